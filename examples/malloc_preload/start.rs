//! When the library is loaded.

use std::ffi::c_void;
use std::mem::MaybeUninit;

/// Run by the loader. Calls that came before were served all the same.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    stay();
}

/// Keeps the library for ever, whoever closes it: threads end through its code, and blocks outlive handles.
fn stay() {
    let mut found = MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: `found` is written before it is read; opening what is open changes its flags alone.
    unsafe {
        if libc::dladdr(stay as fn() as *const c_void, found.as_mut_ptr()) != 0 {
            let name = found.assume_init().dli_fname;
            libc::dlopen(name, libc::RTLD_LAZY | libc::RTLD_NOLOAD | libc::RTLD_NODELETE);
        }
    }
}

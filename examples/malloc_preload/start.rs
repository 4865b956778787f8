//! When the library is loaded, and when the program ends.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use memory_pool::WatchedHeap;

use crate::heap;

/// Run by the loader. Calls that came before were served all the same.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    stay();
    // SAFETY: no preconditions. Who starts a privileged program has no say in it.
    if unsafe { libc::getauxval(libc::AT_SECURE) } == 0 {
        watch();
    }
}

/// Begins to watch, where the environment asks for it.
fn watch() {
    match WatchedHeap::from_env() {
        Ok(Some(layer)) => heap::watch_with(layer),
        Ok(None) => {}
        Err(error) => eprintln!("memory-pool: {error}; nothing is watched"),
    }
}

/// Run by the loader after the program's own exit handlers. A program that ends by `_exit` or a signal is not
/// asked.
#[used]
// SAFETY: the linker's table of functions without arguments to run at the end.
#[unsafe(link_section = ".fini_array")]
static FINISH: extern "C" fn() = finish;

extern "C" fn finish() {
    if let Some(layer) = heap::watch() {
        layer.finish();
    }
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

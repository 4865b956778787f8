//! RMM's callback resource. It names the stream; its own argument is the number of the device, as a pointer's value.

use core::ffi::{c_int, c_void};
use core::ptr::null_mut;

use crate::report::{Fault, guard};
use crate::site::site;

fn device(argument: *mut c_void) -> Result<c_int, Fault> {
    c_int::try_from(argument as usize)
        .map_err(|_| Fault(format!("argument {argument:p} of the resource is no device number")))
}

/// `void* allocate(size_t bytes, cuda_stream_view stream, void* argument)`.
///
/// # Safety
/// As for `memory_pool_torch_alloc`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_rmm_allocate(
    bytes: usize,
    stream: *mut c_void,
    argument: *mut c_void,
) -> *mut c_void {
    guard("allocation for RMM", null_mut(), || site(device(argument)?)?.take(bytes, stream as usize))
}

/// `void deallocate(void* ptr, size_t bytes, cuda_stream_view stream, void* argument)`.
///
/// # Safety
/// As for `memory_pool_torch_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_rmm_deallocate(
    block: *mut c_void,
    _bytes: usize,
    stream: *mut c_void,
    argument: *mut c_void,
) {
    guard("free for RMM", (), || {
        if block.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's contract.
        unsafe { site(device(argument)?)?.give(block, stream as usize) }
    });
}

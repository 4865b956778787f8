//! CuPy's function allocator. It names no stream; the parameter that CuPy passes on says which one is meant.

use core::ffi::{c_int, c_void};
use core::ptr::null_mut;

use crate::report::guard;
use crate::site::site;

/// `void* malloc(void* param, size_t size, int device)`.
///
/// `param` is the handle of the stream that all work on the memory is ordered by (1 for the legacy default stream, which
/// is what CuPy uses unless told otherwise), or null: then the block may be used on any stream, and what is freed
/// comes back only once the device was waited for, which happens when nothing else is left.
///
/// # Safety
/// `param` is null or a stream of `device`, as for `memory_pool_torch_alloc`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_cupy_malloc(
    param: *mut c_void,
    bytes: usize,
    device: c_int,
) -> *mut c_void {
    guard("allocation for CuPy", null_mut(), || {
        let site = site(device)?;
        match param as usize {
            0 => site.take_for_all(bytes),
            raw => site.take(bytes, raw),
        }
    })
}

/// `void free(void* param, void* ptr, int device)`, with the parameter of the allocation.
///
/// # Safety
/// As for the allocation; all work on the block is ordered by the stream of `param`, if it names one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_cupy_free(param: *mut c_void, block: *mut c_void, device: c_int) {
    guard("free for CuPy", (), || {
        if block.is_null() {
            return Ok(());
        }
        let site = site(device)?;
        match param as usize {
            0 => site.give_for_all(block),
            // SAFETY: the caller's contract.
            raw => unsafe { site.give(block, raw) },
        }
    });
}

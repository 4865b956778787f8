//! Where blocks come from.

use std::ffi::c_void;

use crate::POOL;

/// Alignment of every block, as the ABI has it.
pub(crate) const ALIGN: usize = 16;

#[inline(always)]
pub(crate) fn allocate(size: usize) -> *mut c_void {
    POOL.alloc_unsized(size, ALIGN).cast()
}

pub(crate) fn allocate_zeroed(size: usize) -> *mut c_void {
    POOL.alloc_unsized_zeroed(size, ALIGN).cast()
}

/// `align` is a power of two.
pub(crate) fn allocate_aligned(size: usize, align: usize) -> *mut c_void {
    POOL.alloc_unsized(size, align.max(ALIGN)).cast()
}

/// # Safety
/// As for `free` of C.
#[inline(always)]
pub(crate) unsafe fn release(block: *mut c_void) {
    // SAFETY: the caller's contract.
    unsafe { POOL.free_unsized(block.cast()) }
}

/// # Safety
/// As for `realloc` of C, of what is not null, and `size` is not 0.
pub(crate) unsafe fn resize(block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: the caller's contract.
    unsafe { POOL.realloc_unsized(block.cast(), size).cast() }
}

/// # Safety
/// As for `malloc_usable_size`, of what is not null.
pub(crate) unsafe fn usable(block: *mut c_void) -> usize {
    // SAFETY: the caller's contract.
    unsafe { POOL.usable_size_of_live(block.cast()) }
}

//! Where blocks come from: the process heap, or where `MEMORY_POOL_DEBUG` asks for it, the same under a debug layer.
//!
//! The layer begins when the library is initialised. What was allocated before is the heap's, and the layer knows
//! such blocks by that when they are freed.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use memory_pool::WatchedHeap;

use crate::POOL;

/// Alignment of every block, as the ABI has it.
pub(crate) const ALIGN: usize = 16;

/// The layer, if there is one; it lives for ever.
static WATCH: AtomicPtr<WatchedHeap> = AtomicPtr::new(ptr::null_mut());

/// Puts every block under `layer` from now on.
pub(crate) fn watch_with(layer: WatchedHeap) {
    let layer: &'static WatchedHeap = Box::leak(Box::new(layer));
    layer.protect_forks();
    WATCH.store(ptr::from_ref(layer).cast_mut(), Ordering::Release);
}

#[inline(always)]
pub(crate) fn watch() -> Option<&'static WatchedHeap> {
    // SAFETY: null, or a layer that lives for ever.
    unsafe { WATCH.load(Ordering::Acquire).as_ref() }
}

#[inline(always)]
pub(crate) fn allocate(size: usize) -> *mut c_void {
    match watch() {
        None => POOL.alloc_unsized(size, ALIGN).cast(),
        Some(layer) => layer.alloc(size, ALIGN).cast(),
    }
}

pub(crate) fn allocate_zeroed(size: usize) -> *mut c_void {
    let Some(layer) = watch() else { return POOL.alloc_unsized_zeroed(size, ALIGN).cast() };
    let block = layer.alloc(size, ALIGN);
    if !block.is_null() {
        // SAFETY: a fresh block of that size.
        unsafe { block.write_bytes(0, size) };
    }
    block.cast()
}

/// `align` is a power of two.
pub(crate) fn allocate_aligned(size: usize, align: usize) -> *mut c_void {
    match watch() {
        None => POOL.alloc_unsized(size, align.max(ALIGN)).cast(),
        Some(layer) => layer.alloc(size, align).cast(),
    }
}

/// # Safety
/// As for `free` of C.
#[inline(always)]
pub(crate) unsafe fn release(block: *mut c_void) {
    // SAFETY: the caller's contract.
    unsafe {
        match watch() {
            None => POOL.free_unsized(block.cast()),
            Some(layer) => layer.free(block.cast()),
        }
    }
}

/// # Safety
/// As for `realloc` of C, of what is not null, and `size` is not 0.
pub(crate) unsafe fn resize(block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: the caller's contract.
    unsafe {
        match watch() {
            None => POOL.realloc_unsized(block.cast(), size).cast(),
            Some(layer) => layer.realloc(block.cast(), size).cast(),
        }
    }
}

/// # Safety
/// As for `malloc_usable_size`, of what is not null.
#[inline(always)]
pub(crate) unsafe fn usable(block: *mut c_void) -> usize {
    match watch() {
        // SAFETY: the caller's contract.
        None => unsafe { POOL.usable_size_of_live(block.cast()) },
        Some(layer) => layer.usable_size(block.cast()).unwrap_or(0),
    }
}

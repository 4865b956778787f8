//! Where the maps of a slots engine are kept.

use core::fmt;
use core::ptr::{self, NonNull};
use std::alloc::{Layout, alloc, dealloc};

use crate::engine::Span;

/// Bytes of map for `slots` slots: two words for each 64.
pub(crate) const fn map_bytes(slots: usize) -> usize {
    slots.div_ceil(64) * 16
}

/// A place for maps.
///
/// # Safety
/// `claim` returns memory for `map_bytes(slots)` bytes, aligned to 8, that the CPU may use until `release`;
/// where it lies in the span, behind the room that `slots` take.
pub unsafe trait Home: Send + fmt::Debug {
    /// Whether the CPU may touch the blocks themselves.
    const TOUCHES: bool;

    /// Bytes of a span that the map of `slots` slots takes, padding included.
    fn overhead(slots: usize) -> usize;

    /// Memory for the map of a span.
    ///
    /// # Safety
    /// As for [`Engine::add`](crate::engine::Engine::add); `overhead(slots)` bytes of the span are left for it.
    unsafe fn claim(span: &Span, slots: usize) -> Option<NonNull<u64>>;

    /// Gives it back.
    ///
    /// # Safety
    /// `map` came from `claim` for as many slots, and is used no more.
    unsafe fn release(map: NonNull<u64>, slots: usize);
}

/// At the end of the span: for memory that the CPU may touch.
#[derive(Debug)]
pub enum InSpan {}

// SAFETY: the last `map_bytes` of the span, rounded down to 8, are behind the slots: `overhead` includes the
// rounding.
unsafe impl Home for InSpan {
    const TOUCHES: bool = true;

    fn overhead(slots: usize) -> usize {
        map_bytes(slots) + 7
    }

    unsafe fn claim(span: &Span, slots: usize) -> Option<NonNull<u64>> {
        let at = (span.start + span.len).checked_sub(map_bytes(slots))? & !7;
        NonNull::new(ptr::with_exposed_provenance_mut(at))
    }

    unsafe fn release(_: NonNull<u64>, _: usize) {}
}

/// In host memory from the global allocator: for memory that the CPU cannot or should not touch.
#[derive(Debug)]
pub enum Beside {}

// SAFETY: an allocation of its own.
unsafe impl Home for Beside {
    const TOUCHES: bool = false;

    fn overhead(_: usize) -> usize {
        0
    }

    unsafe fn claim(_: &Span, slots: usize) -> Option<NonNull<u64>> {
        let layout = Layout::from_size_align(map_bytes(slots), 8).ok()?;
        // SAFETY: the size is not 0, as a span has at least one slot.
        NonNull::new(unsafe { alloc(layout) }.cast())
    }

    unsafe fn release(map: NonNull<u64>, slots: usize) {
        if let Ok(layout) = Layout::from_size_align(map_bytes(slots), 8) {
            // SAFETY: allocated by `claim` with this layout.
            unsafe { dealloc(map.as_ptr().cast(), layout) }
        }
    }
}

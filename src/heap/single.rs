//! Blocks larger than any class that share a segment: each is a span of its own.

use core::ptr;

use super::class;
use super::foreign::post_one;
use super::segment::{SEGMENT, SLICE, Segment};
use super::span::SINGLE;
use super::thread::{Slot, ThreadHeap};
use crate::source::os;

impl ThreadHeap {
    /// A block of its own slices, larger than any class; null when there is no memory.
    pub(crate) fn alloc_single(&self, size: usize) -> (*mut u8, bool) {
        debug_assert!(size > class::MAX && size <= super::SINGLE_MAX);
        self.housekeeping();
        self.collect_some();
        let size = size.next_multiple_of(os::page_size().min(SLICE));
        let count = (size + self.hub().settings.guard_page()).div_ceil(SLICE);
        let mut found = self.find_idle(count, 1);
        if found.is_none() && self.reuse(count, 1) {
            found = self.find_idle(count, 1);
        }
        let Some((segment, first)) = found.or_else(|| self.find_vacant(count, 1)) else {
            return (ptr::null_mut(), false);
        };
        let span = self.make_span_at(segment, first, count, SINGLE, size);
        if !self.commit(span, 1) {
            self.retire(segment, span);
            self.purge_if_due();
            return (ptr::null_mut(), false);
        }
        span.carved.set(1);
        self.live.set(self.live.get() + size);
        (span.block(0), span.zeroed.get())
    }

    /// Frees a block of its own slices; `segment` may be another thread's.
    pub(crate) fn free_single(&self, segment: &Segment, block: *mut u8) {
        if self.claims(segment) {
            self.give_back(segment, &[Slot::new(block)]);
            self.purge_if_due();
        } else {
            post_one(segment, block);
        }
    }
}

const _: () = assert!(super::SINGLE_MAX < SEGMENT / 2);

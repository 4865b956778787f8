//! How blocks go back from a full cache to their spans, and what becomes of a span that has all of them.

use core::ptr;
use core::sync::atomic::Ordering;

use super::class;
use super::fault;
use super::segment::{SLICE, Segment};
use super::segment_of_small;
use super::span::{Place, Span};
use super::thread::{Slot, ThreadHeap, bump, lower};

impl ThreadHeap {
    /// The cache of `class` is full: gives its older half back to the spans, or all but an eighth where the thread does
    /// nothing but free, then takes `block`.
    #[cold]
    #[inline(never)]
    pub(crate) fn flush(&self, class: usize, block: *mut u8) {
        if let Some(guard) = self.guard() {
            return self.guarded_free(guard, block);
        }
        let capacity = self.capacity(class);
        let keep = capacity / if self.bins[class].flushed.replace(true) { 8 } else { 2 };
        self.flush_oldest(class, (capacity - keep).max(1));
        // SAFETY: this thread's heap, and there is room now.
        let pushed = unsafe { self.front.push(class, block) };
        debug_assert!(pushed);
        bump(&self.tally.flushes, 1);
        self.sweep();
        self.purge_if_due();
    }

    /// Gives the oldest `count` blocks in the cache of `class` back to their spans.
    pub(super) fn flush_oldest(&self, class: usize, count: usize) {
        let blocks = self.cached(class);
        let count = count.min(blocks.len());
        let mut rest = &blocks[..count];
        while let Some(first) = rest.first() {
            // SAFETY: a block in a cache is live (invariant 3), so its segment is there.
            let segment = unsafe { &*segment_of_small(first.load(Ordering::Relaxed)) };
            rest = &rest[self.send_home(segment, rest)..];
        }
        // The others move down.
        for at in count..blocks.len() {
            blocks[at - count].store(blocks[at].load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.set_top(class, self.bottom(class).wrapping_add(blocks.len() - count));
    }

    /// Gives every cached block back to its span.
    pub(super) fn flush_all(&self) {
        if let Some(guard) = self.guard() {
            self.end_quarantine(guard);
        }
        for class in 0..class::COUNT {
            self.flush_oldest(class, usize::MAX);
        }
    }

    /// Marks those blocks at the start of `blocks` free that share a span of this heap with the first, which lies in
    /// `segment`; returns how many.
    pub(super) fn give_back(&self, segment: &Segment, blocks: &[Slot]) -> usize {
        let Some(first) = blocks.first() else { return 0 };
        let first = first.load(Ordering::Relaxed);
        let span = segment.span_at(first);
        let (count, all_live) = span.give(blocks);
        if !all_live || count == 0 {
            fault::double_free(first);
        }
        self.count_back(segment, span, count);
        count
    }

    /// Counts blocks that are back in their span.
    pub(super) fn count_back(&self, segment: &Segment, span: &Span, count: usize) {
        if !span.is_single() {
            lower(&self.tally.out[span.class.get() as usize], count as u64);
        }
        let bytes = count * span.size.get() as usize;
        self.live.set(self.live.get() - bytes);
        self.pending.set(self.pending.get() + bytes);
        if span.free_count.get() >= span.notify_at.get() {
            self.notice(segment, span);
        }
    }

    /// A span reached the count of free blocks it was told to report.
    #[cold]
    #[inline(never)]
    fn notice(&self, segment: &Segment, span: &Span) {
        if span.place.get() == Place::Full {
            if span.is_single() {
                self.retire(segment, span);
                return;
            }
            span.place.set(Place::Partial);
            self.bins[span.class.get() as usize].partial.push_back(span);
        }
        if span.free_count.get() == span.carved.get() && span.place.get() == Place::Partial {
            self.retire(segment, span);
            return;
        }
        if !span.queued.get() && span.free_count.get() - span.settled.get() >= span.purge_step() {
            span.queued.set(true);
            self.queue.push_back(span);
        }
        span.rearm();
    }

    /// Takes a span apart that has no live block; its slices become idle.
    pub(super) fn retire(&self, segment: &Segment, span: &Span) {
        match span.place.get() {
            Place::Partial => self.bins[span.class.get() as usize].partial.remove(span),
            Place::Current => self.bins[span.class.get() as usize].current.set(ptr::null()),
            Place::Full => {}
        }
        if span.queued.replace(false) {
            self.queue.remove(span);
        }
        // What the frees of this span added to `pending`.
        let unsettled = span.unsettled();
        lower(&self.tally.committed, span.held());
        self.hub().refund(span.committed.get() as usize);
        let slices = segment.unmake_span(span).count_ones() as usize;
        self.pending.set(self.pending.get() + slices * SLICE - unsettled);
        self.relist(segment);
    }
}

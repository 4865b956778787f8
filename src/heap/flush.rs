//! How blocks go back from a full cache to their spans, and what becomes of a span that has all of them.

use core::ptr;
use core::sync::atomic::Ordering;

use super::class;
use super::fault;
use super::segment::{SLICE, Segment, segment_of};
use super::span::{Place, Span};
use super::thread::{ThreadHeap, bump, lower};

impl ThreadHeap {
    /// The cache of `class` is full: gives its older half back to the spans, then takes `block`.
    #[cold]
    #[inline(never)]
    pub(crate) fn flush(&self, class: usize, block: *mut u8) {
        if let Some(guard) = self.guard() {
            return self.guarded_free(guard, block);
        }
        let half = (self.capacity(class) / 2).max(1);
        self.flush_oldest(class, half);
        // SAFETY: this thread's heap, and there is room now.
        let pushed = unsafe { self.front.push(class, block) };
        debug_assert!(pushed);
        bump(&self.tally.flushes, 1);
        self.sweep();
        self.purge_if_due();
    }

    pub(super) fn flush_oldest(&self, class: usize, count: usize) {
        let blocks = self.cached(class);
        let count = count.min(blocks.len());
        for slot in &blocks[..count] {
            let block = slot.load(Ordering::Relaxed);
            self.give_back(block);
        }
        let bytes = count * class::size(class);
        lower(&self.tally.out[class], count as u64);
        self.live.set(self.live.get() - bytes);
        self.pending.set(self.pending.get().wrapping_add(bytes));
        // The rest moves down.
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
        self.post_all();
    }

    /// Marks a block of this heap free in its span; the caller adjusts `live` and `pending`, which a span
    /// that goes whole turns into idle slices.
    #[inline(always)]
    fn give_back(&self, block: *mut u8) {
        // SAFETY: the block lies in a segment of this heap.
        let segment = unsafe { &*segment_of(block) };
        let span = segment.span_at(block);
        if !span.give(span.index_of(block)) {
            fault::double_free(block);
        }
        if span.free_count.get() >= span.notify_at.get() {
            self.notice(segment, span);
        }
    }

    pub(super) fn give_back_counted(&self, block: *mut u8) {
        // SAFETY: the block is live, so its segment is there.
        let span = unsafe { (*segment_of(block)).span_at(block) };
        self.count_back(span, 1);
        let bytes = span.size.get() as usize;
        self.live.set(self.live.get() - bytes);
        self.pending.set(self.pending.get() + bytes);
        self.give_back(block);
    }

    /// Counts blocks that are back in their span.
    pub(super) fn count_back(&self, span: &Span, blocks: usize) {
        if !span.is_single() {
            lower(&self.tally.out[span.class.get() as usize], blocks as u64);
        }
    }

    /// A span reached the count of free blocks it was told to report.
    #[cold]
    #[inline(never)]
    pub(super) fn notice(&self, segment: &Segment, span: &Span) {
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
        // What the frees of this span added, or still will add, to `pending`.
        let unsettled = span.unsettled();
        lower(&self.tally.committed, span.held());
        self.hub().refund(span.committed.get() as usize);
        let slices = segment.unmake_span(span).count_ones() as usize;
        self.pending.set(self.pending.get().wrapping_add(slices * SLICE).wrapping_sub(unsettled));
        self.relist(segment);
    }
}

//! Blocks of other threads: gathered, posted to their spans in batches, and collected there by the owner.

use core::sync::atomic::Ordering;

use super::class;
use super::fault;
use super::remote;
use super::segment::{SLICE, SLICES, Segment, segment_of};
use super::span::NO_CLASS;
use super::thread::{Slot, ThreadHeap, bump};

/// Segments whose posted blocks are looked for when a class runs out.
const POLLED: usize = 8;

impl ThreadHeap {
    /// Frees a block that belongs to another thread, or to none.
    #[cold]
    #[inline(never)]
    pub(crate) fn free_remote(&self, class: usize, block: *mut u8) {
        let top = self.out_tops[class].get();
        // SAFETY: below the limit there is a slot.
        unsafe { (*top).store(block, Ordering::Relaxed) };
        let top = top.wrapping_add(1);
        self.out_tops[class].set(top);
        if top == self.out_limit(class) {
            self.post(class);
        }
    }

    /// Posts the outbox of `class` to the owners of its blocks.
    #[cold]
    #[inline(never)]
    pub(super) fn post(&self, class: usize) {
        let blocks = self.outgoing(class);
        let mut at = 0;
        while at < blocks.len() {
            at += self.post_run(&blocks[at..]);
        }
        self.out_tops[class].set(self.out_bottom(class));
        bump(&self.tally.posted, blocks.len() as u64);
        self.purge_if_due();
    }

    /// Posts the first block, and those after it that share its bitmap word; returns how many.
    fn post_run(&self, blocks: &[Slot]) -> usize {
        let block = blocks[0].load(Ordering::Relaxed);
        // SAFETY: the block is live, so its segment is there.
        let segment = unsafe { &*segment_of(block) };
        let owner = segment.head.owner.load(Ordering::Acquire);
        if self.is(owner) || (owner.is_null() && self.adopt(segment)) {
            self.give_back_counted(block);
            return 1;
        }
        let span = segment.span_at(block);
        let index = span.index_of(block);
        let (word, mut bits) = (index / 64, 1u64 << (index % 64));
        let first_of_word = span.block(word as usize * 64) as usize;
        let mut count = 1;
        while let Some(next) = blocks.get(count) {
            // In the same word, and so in the same span, if it lies within 64 blocks of its first.
            let next = next.load(Ordering::Relaxed);
            let offset = (next as usize).wrapping_sub(first_of_word);
            if offset >= 64 * span.size.get() as usize {
                break;
            }
            let index = span.index_of(next);
            if index / 64 != word || index >= span.capacity.get() || bits >> (index % 64) & 1 == 1 {
                break;
            }
            bits |= 1 << (index % 64);
            count += 1;
        }
        if remote::post(
            span.remote_word(word as usize),
            bits,
            &segment.remote_mask.0,
            span.first.get() as u32,
        ) != 0
        {
            fault::double_free(block);
        }
        count
    }

    /// Posts every outbox.
    pub(super) fn post_all(&self) {
        for class in 0..class::COUNT {
            if !self.outgoing(class).is_empty() {
                self.post(class);
            }
        }
    }

    /// Takes in what other threads posted to a few segments, in turn; whether there was anything.
    pub(super) fn collect_some(&self) -> bool {
        let mut any = false;
        for _ in 0..POLLED.min(self.segment_count.get()) {
            // SAFETY: the cursor is null or on the list (`leave` sees to that).
            let next = unsafe { self.cursor.get().as_ref() }.and_then(|at| self.segments.after(at));
            let Some(segment) = next.or_else(|| self.segments.front()) else { break };
            self.cursor.set(segment);
            any |= self.collect(segment);
        }
        any
    }

    pub(super) fn collect_all(&self) {
        self.segments.iter().for_each(|segment| _ = self.collect(segment));
    }

    /// Takes in what other threads posted to `segment`.
    pub(super) fn collect(&self, segment: &Segment) -> bool {
        let mut any = false;
        remote::collect(&segment.remote_mask.0, |slice| {
            any = true;
            let slice = slice as usize % SLICES;
            if segment.class_of[slice].get() == NO_CLASS {
                // Announced after it was collected, and the span is gone by now (invariant 7).
                return;
            }
            let span = segment.span_at(segment.base().wrapping_add(slice * SLICE));
            let mut count = 0;
            for at in 0..span.words() {
                let bits = remote::Word::take(span.remote_word(at));
                if bits != 0 {
                    count += bits.count_ones() as usize;
                    if !span.give_word(at, bits) {
                        fault::double_free(span.block(at * 64));
                    }
                }
            }
            if count > 0 {
                bump(&self.tally.collected, count as u64);
                self.count_back(span, count);
                let bytes = count * span.size.get() as usize;
                self.live.set(self.live.get() - bytes);
                self.pending.set(self.pending.get() + bytes);
                if span.free_count.get() >= span.notify_at.get() {
                    self.notice(segment, span);
                }
            }
        });
        any
    }
}

/// Posts one block, for who has no heap or no outbox for it.
pub(crate) fn post_one(segment: &Segment, block: *mut u8) {
    let span = segment.span_at(block);
    let index = span.index_of(block);
    let word = span.remote_word(index as usize / 64);
    if remote::post(word, 1 << (index % 64), &segment.remote_mask.0, span.first.get() as u32) != 0 {
        fault::double_free(block);
    }
}

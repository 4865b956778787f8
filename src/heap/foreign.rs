//! Blocks that go home to another thread's spans: posted by whoever has them in a full cache, collected by the owner.

use core::sync::atomic::Ordering;

use super::fault;
use super::remote;
use super::segment::{SLICE, SLICES, Segment};
use super::span::NO_CLASS;
use super::thread::{Slot, ThreadHeap, bump, lower};

/// Segments whose posted blocks are looked for when a class runs out.
const POLLED: usize = 8;
/// Of so many frees into segments that nobody owns one adopts.
const STRAYS: u32 = 64;

impl ThreadHeap {
    /// Whether `segment` is this heap's; it is from now on if its thread has ended.
    pub(super) fn claims(&self, segment: &Segment) -> bool {
        let owner = segment.head.owner.load(Ordering::Acquire);
        self.is(owner) || (owner.is_null() && self.adopt(segment))
    }

    /// Gives the first of `blocks`, which lies in `segment`, and some of those after it to whom they belong; returns how
    /// many.
    pub(super) fn send_home(&self, segment: &Segment, blocks: &[Slot]) -> usize {
        let owner = segment.head.owner.load(Ordering::Acquire);
        if self.is(owner) {
            return self.give_back(segment, blocks);
        }
        if owner.is_null() {
            // What lies idle in the segment is for who needs it, not for who happens to free into it; but who does
            // that all the time had better own it.
            let strays = self.strays.get() + 1;
            self.strays.set(strays % STRAYS);
            if strays == STRAYS && self.adopt(segment) {
                return self.give_back(segment, blocks);
            }
            if let Some(count) = self.give_to_abandoned(segment, blocks) {
                return count;
            }
        }
        self.post(segment, blocks)
    }

    fn give_to_abandoned(&self, segment: &Segment, blocks: &[Slot]) -> Option<usize> {
        let first = blocks.first()?.load(Ordering::Relaxed);
        // Frozen while the block is live.
        let class = segment.class_at(first) as usize;
        let (count, all_live) = self.hub().give_to_abandoned(segment, blocks)?;
        if !all_live || count == 0 {
            fault::double_free(first);
        }
        lower(&self.tally.out[class], count as u64);
        Some(count)
    }

    /// Posts the first of `blocks`, which lies in another thread's `segment`, and those after it that share its bitmap
    /// word; returns how many.
    pub(super) fn post(&self, segment: &Segment, blocks: &[Slot]) -> usize {
        let Some(first) = blocks.first() else { return 0 };
        let first = first.load(Ordering::Relaxed);
        let count = post_word(segment, first, blocks);
        bump(&self.tally.posted, count as u64);
        count
    }

    /// Takes in what other threads posted to a few segments, in turn, if there may be any; whether there was.
    pub(super) fn collect_some(&self) -> bool {
        if self.has_mail.0.load(Ordering::Relaxed) {
            self.has_mail.0.store(false, Ordering::Relaxed);
            self.look_everywhere();
        }
        let mut any = false;
        for _ in 0..POLLED.min(self.unseen.get()) {
            self.unseen.set(self.unseen.get() - 1);
            // SAFETY: the cursor is null or on the list (`leave` sees to that).
            let next = unsafe { self.cursor.get().as_ref() }.and_then(|at| self.segments.after(at));
            let Some(segment) = next.or_else(|| self.segments.front()) else { break };
            self.cursor.set(segment);
            any |= self.collect(segment);
        }
        any
    }

    /// Lets the next collections go through all segments. Once in a while that is done unasked: who posts while a
    /// segment changes hands may tell the former owner.
    pub(super) fn look_everywhere(&self) {
        self.unseen.set(self.segment_count.get());
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
                    count += bits.count_ones();
                    if !span.give_word(at, bits) {
                        fault::double_free(span.block(at * 64));
                    }
                }
            }
            if count > 0 {
                bump(&self.tally.collected, count as u64);
                span.free_count.set(span.free_count.get() + count);
                self.count_back(segment, span, count as usize);
            }
        });
        any
    }
}

/// Posts one block, for who has no heap or no cache for it.
pub(crate) fn post_one(segment: &Segment, block: *mut u8) {
    post_word(segment, block, &[Slot::new(block)]);
}

/// Posts `first` and the blocks after it that share its bitmap word; returns how many.
fn post_word(segment: &Segment, first: *mut u8, blocks: &[Slot]) -> usize {
    let span = segment.span_at(first);
    let (word, bits, count) = span.word_of(blocks);
    if remote::post(span.remote_word(word), bits, &segment.remote_mask.0, span.first.get() as u32) != 0 {
        fault::double_free(first);
    }
    // SAFETY: heaps live as long as their hub, of which there is a block.
    if let Some(owner) = unsafe { segment.head.owner.load(Ordering::Relaxed).as_ref() }
        && !owner.has_mail.0.load(Ordering::Relaxed)
    {
        owner.has_mail.0.store(true, Ordering::Relaxed);
    }
    count
}

//! How an empty cache is filled: from free blocks of spans, or from parts of spans that were never used.

use core::ptr;
use core::sync::atomic::Ordering;

use super::guard::GROUP;
use super::segment::{HEADER, SLICE};
use super::span::{Place, Span};
use super::thread::{Slot, ThreadHeap, bump};
use crate::source::os;

/// Refills after which mail is looked for unasked, and a heap that shrank counts as one that does not.
const AGE: u32 = 64;

/// Slots of an empty cache while they are filled, the last one first: what comes first is popped first.
struct Filling<'a> {
    slots: &'a [Slot],
    /// How many are still empty.
    left: usize,
}

impl Filling<'_> {
    #[inline(always)]
    fn put(&mut self, block: *mut u8) {
        if let Some(slot) = self.slots.get(self.left.wrapping_sub(1)) {
            slot.store(block, Ordering::Relaxed);
            self.left -= 1;
        }
    }

    /// Puts `count` neighbours of `size` bytes, of which there is room for.
    fn put_run(&mut self, first: *mut u8, size: usize, count: usize) {
        let (mut block, rest) = (first, self.left - count);
        for slot in self.slots[rest..self.left].iter().rev() {
            slot.store(block, Ordering::Relaxed);
            block = block.wrapping_add(size);
        }
        self.left = rest;
    }
}

impl ThreadHeap {
    /// Fills the empty cache of `class` and returns one block; null when there is no memory.
    #[cold]
    #[inline(never)]
    pub(crate) fn refill(&self, class: usize) -> *mut u8 {
        self.housekeeping();
        self.sweep();
        let bin = &self.bins[class];
        let most = (self.capacity(class) / 2) as u32;
        bin.flushed.set(false);
        let guard = self.guard();
        let least = if guard.is_none() { 4 } else { GROUP };
        let want = (bin.taken.get() / 4).clamp(most.min(least), most);
        bin.taken.set(bin.taken.get().saturating_add(want));
        debug_assert_eq!(self.cached_count(class), 0);
        let slots = self.slots(class, want as usize);
        let mut filling = Filling { slots, left: slots.len() };
        self.gather(class, &mut filling);
        let (left, gathered) = (filling.left, slots.len() - filling.left);
        if gathered == 0 {
            return ptr::null_mut();
        }
        if left > 0 {
            for at in 0..gathered {
                slots[at].store(slots[left + at].load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        if let Some(guard) = guard {
            guard.shuffle(&slots[..gathered]);
        }
        self.set_top(class, self.bottom(class).wrapping_add(gathered - 1));
        self.high_water.set(self.high_water.get().max(self.live.get()));
        bump(&self.tally.refills, 1);
        slots[gathered - 1].load(Ordering::Relaxed)
    }

    /// What is done once in a while, whatever the thread does.
    pub(super) fn housekeeping(&self) {
        let trims = self.hub().trims();
        if self.trims_seen.get() != trims {
            self.trims_seen.set(trims);
            self.purge(0);
        }
        match self.refills_left.get() {
            0 => {
                self.refills_left.set(AGE);
                self.look_everywhere();
                if self.shrinking.get() {
                    self.set_shrinking(false);
                }
            }
            left => self.refills_left.set(left - 1),
        }
    }

    /// Takes blocks of `class` out of spans, at least one unless memory is short.
    fn gather(&self, class: usize, filling: &mut Filling<'_>) {
        if self.take_free(class, filling) || (self.collect_some() && self.take_free(class, filling)) {
            return;
        }
        // SAFETY: the current span is this heap's, or null.
        let current = unsafe { self.bins[class].current.get().as_ref() };
        if current.is_some_and(|span| self.carve(span, filling)) {
            return;
        }
        // Memory that is there before memory that must be had from the system.
        let mut span = self.idle_span(class);
        if span.is_none() && self.reuse_for(class) {
            if self.take_free(class, filling) {
                return;
            }
            span = self.idle_span(class);
        }
        if let Some(span) = span.or_else(|| self.new_span(class)) {
            self.replace_current(class, span);
            if self.carve(span, filling) {
                return;
            }
        }
        // A last effort: what is idle elsewhere may bring us below the limit.
        self.flush_all();
        self.collect_all();
        self.purge(0);
        self.take_free(class, filling);
    }

    /// Takes free blocks of the current span, then of partial ones; whether there were any.
    fn take_free(&self, class: usize, filling: &mut Filling<'_>) -> bool {
        let bin = &self.bins[class];
        let before = filling.left;
        // SAFETY: as in `gather`.
        if let Some(span) = unsafe { bin.current.get().as_ref() }
            && span.free_count.get() > 0
        {
            self.take_from(span, filling);
        }
        while filling.left > 0
            && let Some(span) = bin.partial.front()
        {
            self.take_from(span, filling);
            if span.free_count.get() == 0 {
                bin.partial.remove(span);
                span.place.set(Place::Full);
                span.rearm();
            }
        }
        filling.left < before
    }

    /// Makes a fresh span the one its class is carved from.
    fn replace_current(&self, class: usize, span: &Span) {
        let bin = &self.bins[class];
        // SAFETY: as in `gather`.
        if let Some(old) = unsafe { bin.current.get().as_ref() } {
            old.place.set(Place::Full);
            if old.free_count.get() > 0 {
                old.place.set(Place::Partial);
                bin.partial.push_back(old);
            }
            old.rearm();
        }
        span.place.set(Place::Current);
        bin.current.set(span);
        span.rearm();
    }

    fn take_from(&self, span: &Span, filling: &mut Filling<'_>) {
        let unsettled = span.unsettled();
        let taken = if span.discarded.get() == 0 {
            span.take(filling.left, |block| filling.put(block))
        } else {
            let (page, mut back) = (os::page_size(), 0);
            let segment = self.segment_of_span(span);
            let taken = span.take(filling.left, |block| {
                back += segment.revive(span, block as usize, page);
                filling.put(block);
            });
            bump(&self.tally.committed, back as u64);
            self.hub().took(back);
            taken
        };
        span.settled.set(span.settled.get().min(span.free_count.get()));
        span.rearm();
        self.pending.set(self.pending.get() - (unsettled - span.unsettled()));
        self.count_out(span, taken);
    }

    /// Hands out blocks that were never used; whether there were any.
    fn carve(&self, span: &Span, filling: &mut Filling<'_>) -> bool {
        let carved = span.carved.get() as usize;
        let mut count = filling.left.min(span.capacity.get() as usize - carved);
        if count > 0 && !self.commit(span, carved + count) {
            count = usize::from(self.commit(span, carved + 1));
        }
        if let Some(guard) = self.guard() {
            (carved..carved + count).for_each(|index| {
                guard.on_carve(span.block(index), span.size.get() as usize, span.zeroed.get())
            });
        }
        filling.put_run(span.block(carved), span.size.get() as usize, count);
        if count > 0 {
            span.carved.set((carved + count) as u32);
            span.rearm();
            self.count_out(span, count);
        }
        count > 0
    }

    /// Counts blocks that are out of their span.
    fn count_out(&self, span: &Span, count: usize) {
        self.live.set(self.live.get() + count * span.size.get() as usize);
        bump(&self.tally.out[span.class.get() as usize], count as u64);
    }

    /// Counts the memory that a span holds once `carved` blocks are carved; false past the limit.
    pub(super) fn commit(&self, span: &Span, carved: usize) -> bool {
        let segment = self.segment_of_span(span);
        let first = span.first.get() as usize;
        let start = segment.base() as usize + if first == 0 { HEADER } else { first * SLICE };
        let page = os::page_size();
        // A page is a power of two; a division would take longer than all the rest.
        let end = (span.block(carved) as usize + page - 1) & !(page - 1);
        let most = span.slices.get() as usize * SLICE;
        let committed = (end - start).min(most);
        let more = committed - (span.committed.get() as usize).min(committed);
        if more > 0 {
            if !self.may_hold(more) || !self.hub().charge(more) {
                return false;
            }
            span.committed.set(committed as u32);
            self.hub().took(segment.touch(span, start + committed) * SLICE);
            bump(&self.tally.committed, more as u64);
        }
        true
    }

    /// Whether `more` bytes may be held: always, unless the request must be served from what is there.
    pub(super) fn may_hold(&self, more: usize) -> bool {
        !self.frugal.get() || self.hub().snapshot().committed + more <= self.hub().booked()
    }
}

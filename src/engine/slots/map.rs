//! The spans of a slots engine and their bit maps. Nothing here touches a block.

use core::marker::PhantomData;
use core::ptr::NonNull;

use super::home::Home;
use crate::base::bits::{aligned_steps, round_up};
use crate::engine::{Broken, Span};

/// Spans an engine can hold. Pools at least double with each growth, so this is more than any address space
/// needs, unless growth is kept small by hand.
const MAX_SPANS: usize = 64;

/// Division by a size that is known when the pool is made: a multiplication where that is exact.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Divider {
    by: usize,
    /// `2^64 / by` rounded up; 0 for powers of two, which shift.
    factor: u64,
    shift: u32,
}

impl Divider {
    pub(crate) fn new(by: usize) -> Self {
        let factor = if by.is_power_of_two() { 0 } else { u64::MAX / by as u64 + 1 };
        Self { by, factor, shift: by.trailing_zeros() }
    }

    /// `value / by`.
    #[inline]
    pub(crate) fn divide(&self, value: usize) -> usize {
        if self.factor == 0 {
            return value >> self.shift;
        }
        // The product is off by less than value * by / 2^64, which is harmless below 1 / by.
        if (value as u128 * self.by as u128) >> 64 != 0 {
            return value / self.by;
        }
        ((value as u128 * self.factor as u128) >> 64) as usize
    }
}

/// A span and its map: words `2 i` and `2 i + 1` hold the bits `free` and `tail` of slots `64 i ..`.
#[derive(Clone, Copy, Debug)]
struct MapSpan {
    /// As it was added.
    span: Span,
    /// The first slot.
    base: usize,
    slots: usize,
    /// Slots from here on were never handed out.
    fresh: usize,
    free_count: usize,
    map: NonNull<u64>,
}

// SAFETY: the map belongs to the engine alone, wherever it is used from.
unsafe impl Send for MapSpan {}

const EMPTY: MapSpan = MapSpan {
    span: Span { start: 0, len: 0, zeroed: false },
    base: 0,
    slots: 0,
    fresh: 0,
    free_count: 0,
    map: NonNull::dangling(),
};

/// The bits of word `index` that stand for slots below `slots`.
fn word_mask(index: usize, slots: usize) -> u64 {
    let left = slots - index * 64;
    if left >= 64 { u64::MAX } else { (1 << left) - 1 }
}

impl MapSpan {
    fn words(&self) -> usize {
        self.slots.div_ceil(64)
    }

    fn free(&self, word: usize) -> u64 {
        debug_assert!(word < self.words());
        // SAFETY: within the `map_bytes(slots)` claimed for this span.
        unsafe { self.map.add(2 * word).read() }
    }

    fn tail(&self, word: usize) -> u64 {
        debug_assert!(word < self.words());
        // SAFETY: as above.
        unsafe { self.map.add(2 * word + 1).read() }
    }

    fn set(&mut self, word: usize, free: u64, tail: u64) {
        debug_assert!(word < self.words());
        // SAFETY: as above.
        unsafe {
            self.map.add(2 * word).write(free);
            self.map.add(2 * word + 1).write(tail);
        }
    }

    fn is_free(&self, slot: usize) -> bool {
        self.free(slot / 64) >> (slot % 64) & 1 != 0
    }

    fn is_tail(&self, slot: usize) -> bool {
        self.tail(slot / 64) >> (slot % 64) & 1 != 0
    }

    /// Every slot free.
    fn clear(&mut self) {
        for word in 0..self.words() {
            self.set(word, word_mask(word, self.slots), 0);
        }
        self.free_count = self.slots;
    }

    /// Calls `apply` with each word that `from .. to` touches, and the bits of it that it touches.
    fn for_words(from: usize, to: usize, mut apply: impl FnMut(usize, u64)) {
        let mut slot = from;
        while slot < to {
            let end = (slot / 64 * 64 + 64).min(to);
            let bits = (u64::MAX >> (64 - (end - slot))) << (slot % 64);
            apply(slot / 64, bits);
            slot = end;
        }
    }

    /// Takes `slots` free slots from `first` on as one block; returns whether all of it is zero.
    fn take(&mut self, first: usize, slots: usize) -> bool {
        Self::for_words(first, first + slots, |word, bits| {
            let (free, tail) = (self.free(word), self.tail(word));
            debug_assert_eq!(free & bits, bits);
            self.set(word, free & !bits, tail | bits);
        });
        let head = first / 64;
        let tail = self.tail(head) & !(1 << (first % 64));
        self.set(head, self.free(head), tail);
        self.free_count -= slots;
        let zeroed = self.span.zeroed && first >= self.fresh;
        self.fresh = self.fresh.max(first + slots);
        zeroed
    }

    /// The first run of `slots` free slots whose address is a multiple of `align`.
    fn find_run(&self, slots: usize, align: usize, block: usize) -> Option<usize> {
        let (aligned, step) = aligned_steps(self.base, block, align)?;
        let mut first = aligned;
        'candidate: while let Some(end) = first.checked_add(slots).filter(|&end| end <= self.slots) {
            // Look at the far end first: a taken slot there rules out all candidates before it.
            let mut slot = end;
            while slot > first {
                let word = (slot - 1) / 64;
                let from = (word * 64).max(first);
                let bits = (u64::MAX >> (64 - (slot - from))) << (from % 64);
                let taken = !self.free(word) & bits;
                if taken != 0 {
                    let next = self.next_free(word * 64 + 64 - taken.leading_zeros() as usize)?;
                    first = aligned + (next - aligned).next_multiple_of(step);
                    continue 'candidate;
                }
                slot = from;
            }
            return Some(first);
        }
        None
    }

    /// The first free slot from `slot` on.
    fn next_free(&self, slot: usize) -> Option<usize> {
        let mut word = slot / 64;
        let mut mask = u64::MAX << (slot % 64);
        while word < self.words() {
            let free = self.free(word) & mask;
            if free != 0 {
                return Some(word * 64 + free.trailing_zeros() as usize);
            }
            mask = u64::MAX;
            word += 1;
        }
        None
    }

    /// Slots of the block that begins at `slot`.
    fn run_len(&self, slot: usize) -> usize {
        let mut end = slot + 1;
        while end < self.slots {
            let rest = !(self.tail(end / 64) >> (end % 64));
            let tails = (rest.trailing_zeros() as usize).min(64 - end % 64);
            end += tails;
            if tails == 0 || !end.is_multiple_of(64) {
                break;
            }
        }
        end.min(self.slots) - slot
    }
}

/// The spans of an engine, sorted by address.
#[derive(Debug)]
pub(super) struct SpanTable<H: Home> {
    spans: [MapSpan; MAX_SPANS],
    count: usize,
    /// Span and word where single slots are cut; nothing before them is free.
    cursor: (usize, usize),
    divider: Divider,
    home: PhantomData<fn() -> H>,
}

impl<H: Home> SpanTable<H> {
    pub(super) fn new(block: usize) -> Self {
        let divider = Divider::new(block);
        Self { spans: [EMPTY; MAX_SPANS], count: 0, cursor: (0, 0), divider, home: PhantomData }
    }

    fn all(&self) -> &[MapSpan] {
        &self.spans[..self.count]
    }

    /// Slots that fit in `room` bytes together with their map.
    pub(super) fn slots_in(room: usize, block: usize) -> usize {
        let mut slots = room / block;
        while slots > 0 && slots * block + H::overhead(slots) > room {
            // Each slot less frees a block and at most its share of the map.
            let missing = slots * block + H::overhead(slots) - room;
            slots -= missing.div_ceil(block + 16).min(slots);
        }
        slots
    }

    /// # Safety
    /// As for [`Engine::add`](crate::engine::Engine::add).
    pub(super) unsafe fn add(&mut self, span: Span, align: usize) -> Result<(), Span> {
        let block = self.divider.by;
        let (Some(first), Some(end)) = (round_up(span.start, align), span.start.checked_add(span.len)) else {
            return Err(span);
        };
        let room = end.saturating_sub(first);
        let slots = Self::slots_in(room, block);
        if slots == 0 || self.count == MAX_SPANS {
            return Err(span);
        }
        // SAFETY: the caller's contract; `slots_in` left room for the map.
        let Some(map) = (unsafe { H::claim(&span, slots) }) else { return Err(span) };
        let at = self.all().partition_point(|other| other.base < first);
        self.spans.copy_within(at..self.count, at + 1);
        self.count += 1;
        let mut new = MapSpan { span, base: first, slots, fresh: 0, free_count: slots, map };
        new.clear();
        self.spans[at] = new;
        self.cursor = (0, 0);
        Ok(())
    }

    /// The span in which `address` lies.
    pub(super) fn find(&self, address: usize) -> Option<usize> {
        let at = self.all().partition_point(|span| span.base <= address).checked_sub(1)?;
        let span = &self.spans[at];
        (address - span.base < span.slots * self.divider.by).then_some(at)
    }

    /// The span and slot that start at `address`.
    pub(super) fn locate(&self, address: usize) -> Option<(usize, usize)> {
        let span = self.find(address)?;
        let offset = address - self.spans[span].base;
        let slot = self.divider.divide(offset);
        (slot * self.divider.by == offset).then_some((span, slot))
    }

    /// Whether the slot is the first of a block that was cut.
    pub(super) fn begins_block(&self, span: usize, slot: usize) -> bool {
        let span = &self.spans[span];
        !span.is_free(slot) && !span.is_tail(slot)
    }

    pub(super) fn is_tail(&self, span: usize, slot: usize) -> bool {
        self.spans[span].is_tail(slot)
    }

    pub(super) fn run_len(&self, span: usize, slot: usize) -> usize {
        self.spans[span].run_len(slot)
    }

    pub(super) fn free_slots(&self) -> usize {
        self.all().iter().map(|span| span.free_count).sum()
    }

    /// Takes the lowest free slot from the cursor on: its address, and whether it is zero.
    pub(super) fn take_one(&mut self) -> Option<(usize, bool)> {
        let (mut at, mut word) = self.cursor;
        while at < self.count {
            let span = &mut self.spans[at];
            if span.free_count > 0
                && let Some(slot) = span.next_free(word * 64)
            {
                self.cursor = (at, slot / 64);
                let zeroed = span.take(slot, 1);
                return Some((span.base + slot * self.divider.by, zeroed));
            }
            (at, word) = (at + 1, 0);
        }
        self.cursor = (at, 0);
        None
    }

    /// Takes the first run that fits: its address, and whether it is zero.
    pub(super) fn take_run(&mut self, slots: usize, align: usize) -> Option<(usize, bool)> {
        let slots = slots.max(1);
        let block = self.divider.by;
        for span in &mut self.spans[..self.count] {
            if span.free_count >= slots
                && let Some(first) = span.find_run(slots, align, block)
            {
                let zeroed = span.take(first, slots);
                return Some((span.base + first * block, zeroed));
            }
        }
        None
    }

    /// Adds the slots behind a run to it, up to `new` slots in all, if they are free.
    pub(super) fn extend(&mut self, span: usize, slot: usize, old: usize, new: usize) -> bool {
        let span = &mut self.spans[span];
        if new > span.slots - slot || (slot + old..slot + new).any(|slot| !span.is_free(slot)) {
            return false;
        }
        span.take(slot + old, new - old);
        // `take` made a block of its own; its head becomes a tail too.
        let first = slot + old;
        span.set(first / 64, span.free(first / 64), span.tail(first / 64) | 1 << (first % 64));
        true
    }

    /// Frees slots.
    pub(super) fn give(&mut self, span: usize, first: usize, slots: usize) {
        let at = span;
        let span = &mut self.spans[at];
        MapSpan::for_words(first, first + slots, |word, bits| {
            span.set(word, span.free(word) | bits, span.tail(word) & !bits);
        });
        span.free_count += slots;
        self.cursor = self.cursor.min((at, first / 64));
    }

    /// Removes an idle span of at most `at_most` bytes, the largest such.
    pub(super) fn remove_idle(&mut self, at_most: usize) -> Option<Span> {
        let idle = |span: &&MapSpan| span.free_count == span.slots && span.span.len <= at_most;
        let (at, &MapSpan { span, slots, map, .. }) = self
            .all()
            .iter()
            .enumerate()
            .filter(|(_, span)| idle(span))
            .max_by_key(|(_, span)| span.span.len)?;
        // SAFETY: claimed for this span when it was added, and forgotten with it.
        unsafe { H::release(map, slots) };
        self.spans.copy_within(at + 1..self.count, at);
        self.count -= 1;
        self.cursor = (0, 0);
        Some(Span { zeroed: false, ..span })
    }

    pub(super) fn reset(&mut self) {
        self.spans[..self.count].iter_mut().for_each(MapSpan::clear);
        self.cursor = (0, 0);
    }

    /// Slots of the longest run of free ones.
    pub(super) fn longest_run(&self) -> usize {
        let mut longest = 0;
        for span in self.all() {
            let mut run = 0;
            for word in 0..span.words() {
                let mut free = span.free(word);
                if free == u64::MAX {
                    run += 64;
                    continue;
                }
                let mut bits = 64;
                while bits > 0 {
                    let ones = (free.trailing_ones()).min(bits);
                    run += ones as usize;
                    longest = longest.max(run);
                    if ones == bits {
                        break;
                    }
                    free >>= ones;
                    let zeros = free.trailing_zeros().min(bits - ones);
                    free = free.checked_shr(zeros).unwrap_or(0);
                    bits -= ones + zeros;
                    run = 0;
                }
            }
            longest = longest.max(run);
        }
        longest
    }

    /// Calls `visit` with the address and the slots of every block that was cut.
    pub(super) fn for_each_block(&self, visit: &mut dyn FnMut(usize, usize)) {
        for (at, span) in self.all().iter().enumerate() {
            for word in 0..span.words() {
                let mut heads = !span.free(word) & !span.tail(word) & word_mask(word, span.slots);
                while heads != 0 {
                    let slot = word * 64 + heads.trailing_zeros() as usize;
                    visit(span.base + slot * self.divider.by, self.run_len(at, slot));
                    heads &= heads - 1;
                }
            }
        }
    }

    /// Walks invariants 1, 3, 4 and 6 and counts taken and tail slots.
    pub(super) fn check(&self, taken: &mut usize, tails: &mut usize) -> Result<(), Broken> {
        let broken = |invariant, at| Err(Broken { invariant, at });
        let mut behind = 0;
        for (at, span) in self.all().iter().enumerate() {
            let end = span.base + span.slots * self.divider.by;
            let outside = span.base < span.span.start
                || span.slots == 0
                || end + H::overhead(span.slots) > span.span.start + span.span.len;
            if outside || span.span.start < behind {
                return broken("1: spans are sorted and hold their slots", span.span.start);
            }
            behind = span.span.start + span.span.len;
            let mut free_count = 0;
            // Whether the slot before the word at hand is free; nothing precedes the first.
            let mut free_before = 1;
            for word in 0..span.words() {
                let (free, tail) = (span.free(word), span.tail(word));
                if (free | tail) & !word_mask(word, span.slots) != 0 {
                    return broken("6: no bits behind the last slot", span.base);
                }
                if tail & (free | free << 1 | free_before) != 0 {
                    return broken("3: tails are live and follow live slots", span.base);
                }
                free_before = free >> 63;
                free_count += free.count_ones() as usize;
                *tails += tail.count_ones() as usize;
            }
            if free_count != span.free_count {
                return broken("6: free slots add up", span.base);
            }
            if (span.fresh..span.slots).any(|slot| !span.is_free(slot)) {
                return broken("4: fresh slots are free", span.base);
            }
            let (cursor, word) = self.cursor;
            let skipped = if at < cursor {
                span.slots
            } else if at == cursor {
                word * 64
            } else {
                0
            };
            if span.next_free(0).is_some_and(|slot| slot < skipped) {
                return broken("the cursor skips nothing", span.base);
            }
            *taken += span.slots - free_count;
        }
        Ok(())
    }
}

impl<H: Home> Drop for SpanTable<H> {
    fn drop(&mut self) {
        for span in self.all() {
            // SAFETY: claimed for this span when it was added; the table is going away.
            unsafe { H::release(span.map, span.slots) };
        }
    }
}

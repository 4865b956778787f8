//! The slow side: spans, runs, and the walkers. One caller at a time, beside any number of fast paths.

use core::alloc::Layout;
use core::ptr::{self, NonNull};

use super::{ADDRESSES, AtomicSlots, COUNT_SHIFT, Cell, GROUP, Group, HIGH_SHIFT, MAX_SPANS, Seen};
use super::{PLACE_COUNT_SHIFT, PLACE_ZEROED, free_bits, high};
use crate::base::bits::aligned_steps;
use crate::base::error::PointerFault;
use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use crate::base::sync::atomic::{AtomicU64, Ordering};
use crate::engine::{Block, Broken, Engine, Serves, Space, Span, Totals};

/// What only the slow side knows of a span.
#[derive(Clone, Copy, Debug)]
struct Info {
    span: Span,
    slots: usize,
    groups: *mut Group,
    /// Groups in memory at `groups`; kept when the span goes, for the next one.
    capacity: usize,
}

const NO_SPAN: Span = Span { start: 0, len: 0, zeroed: false };

#[derive(Debug)]
pub(super) struct Slow {
    infos: [Info; MAX_SPANS],
    /// Runs cut, by size, and their tail slots.
    runs: [u64; HISTOGRAM_BUCKETS],
    tails_cut: u64,
    /// Live slots at the last moment that the peak was looked at, or more.
    peak: usize,
    /// `high` of all groups when the peak was reset.
    high_at_reset: usize,
}

// SAFETY: the groups belong to the engine, and are reached through it alone.
unsafe impl Send for Slow {}

impl Default for Slow {
    fn default() -> Self {
        let none = Info { span: NO_SPAN, slots: 0, groups: ptr::null_mut(), capacity: 0 };
        Self {
            infos: [none; MAX_SPANS],
            runs: [0; HISTOGRAM_BUCKETS],
            tails_cut: 0,
            peak: 0,
            high_at_reset: 0,
        }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        for info in self.infos.iter().filter(|info| !info.groups.is_null()) {
            // SAFETY: made by `new_groups`, and nobody is left to look.
            unsafe {
                let summary = (*info.groups).summary.as_ptr();
                drop(Box::from_raw(ptr::slice_from_raw_parts_mut(summary, info.capacity.div_ceil(64))));
                drop(Box::from_raw(ptr::slice_from_raw_parts_mut(info.groups, info.capacity)));
            }
        }
    }
}

/// Groups without a span; `None` where memory is short.
fn new_groups(count: usize) -> Option<*mut Group> {
    let mut groups = Vec::new();
    let mut summary = Vec::new();
    groups.try_reserve_exact(count).ok()?;
    summary.try_reserve_exact(count.div_ceil(64)).ok()?;
    summary.resize_with(count.div_ceil(64), || AtomicU64::new(0));
    let summary = NonNull::new(Box::into_raw(summary.into_boxed_slice()).cast::<AtomicU64>())?;
    // SAFETY: one bit for each group: the word is among those just made.
    groups.extend((0..count).map(|at| Group::new(unsafe { summary.add(at / 64) }, 1 << (at % 64))));
    Some(Box::into_raw(groups.into_boxed_slice()).cast())
}

/// `count` bits from `from` on, within a group.
fn bits(from: usize, count: usize) -> u32 {
    ((u64::from(u32::MAX) >> (GROUP - count)) << from) as u32
}

/// The lowest `count` bits.
fn bits_below(count: u32) -> u32 {
    if count == 0 { 0 } else { bits(0, count as usize) }
}

/// The engine as who has the slow lock sees it.
pub(crate) struct SlowSide<'a> {
    engine: &'a AtomicSlots,
    slow: &'a mut Slow,
}

impl AtomicSlots {
    /// Calls `act` with the slow side, when it is this caller's turn.
    pub(crate) fn with_slow<R>(&self, act: impl FnOnce(&mut dyn Engine) -> R) -> R {
        act(&mut SlowSide { engine: self, slow: &mut self.slow.lock() })
    }

    /// Frees a run. Its owner needs no lock.
    #[cold]
    #[inline(never)]
    pub(super) fn free_run_slow(&self, start: usize) -> usize {
        let (cell, slot) = self.locate(start).expect("a run lies in a span");
        let slots = run_len(&cell, self.slots(&cell), slot);
        release_run(&cell, slot, slots);
        slots * self.block
    }

    fn slots(&self, seen: &Seen) -> usize {
        seen.len / self.block
    }

    /// The span and the slot that begin at `start`.
    fn locate(&self, start: usize) -> Option<(Seen, usize)> {
        let cells = &self.cells[..self.cell_count.load(Ordering::Acquire)];
        let seen =
            cells.iter().filter_map(Cell::see).find(|seen| start.wrapping_sub(seen.start) < seen.len)?;
        let slot = self.slot_of(start - seen.start);
        (slot * self.block == start - seen.start).then_some((seen, slot))
    }
}

impl Seen {
    fn group(&self, slot: usize) -> &Group {
        // SAFETY: groups stay (invariant 2), and the slot is one of this span's.
        unsafe { &*self.groups.add(slot / GROUP) }
    }

    fn is_free(&self, slot: usize) -> bool {
        free_bits(self.group(slot).word.load(Ordering::Acquire)) >> (slot % GROUP) & 1 != 0
    }

    fn is_tail(&self, slot: usize) -> bool {
        self.group(slot).tail.load(Ordering::Relaxed) >> (slot % GROUP) & 1 != 0
    }
}

/// Calls `act` with each group that the slots touch, and the bits of it that they are.
fn for_groups(seen: &Seen, from: usize, to: usize, mut act: impl FnMut(&Group, u32)) {
    let mut slot = from;
    while slot < to {
        let end = (slot / GROUP * GROUP + GROUP).min(to);
        act(seen.group(slot), bits(slot % GROUP, end - slot));
        slot = end;
    }
}

/// Slots of the block that begins at `slot`.
fn run_len(seen: &Seen, slots: usize, slot: usize) -> usize {
    let mut end = slot + 1;
    while end < slots {
        let tails = seen.group(end).tail.load(Ordering::Relaxed) >> (end % GROUP);
        let here = (!tails).trailing_zeros() as usize;
        end += here;
        // A group that is not all tails up to its end ends the run.
        if here == 0 || !end.is_multiple_of(GROUP) {
            break;
        }
    }
    end.min(slots) - slot
}

/// The last slot of `from .. to` that is taken.
fn last_taken(seen: &Seen, from: usize, to: usize) -> Option<usize> {
    let mut end = to;
    while end > from {
        let start = ((end - 1) / GROUP * GROUP).max(from);
        let free = free_bits(seen.group(start).word.load(Ordering::Acquire));
        let taken = !free & bits(start % GROUP, end - start);
        if taken != 0 {
            return Some((end - 1) / GROUP * GROUP + GROUP - 1 - taken.leading_zeros() as usize);
        }
        end = start;
    }
    None
}

/// The first slot of `from .. to` that is free.
fn next_free(seen: &Seen, from: usize, to: usize) -> Option<usize> {
    let mut start = from;
    while start < to {
        let free = free_bits(seen.group(start).word.load(Ordering::Acquire)) >> (start % GROUP);
        if free != 0 {
            return Some(start + free.trailing_zeros() as usize).filter(|&slot| slot < to);
        }
        start = start / GROUP * GROUP + GROUP;
    }
    None
}

/// Gives a live run's slots back; the marks go first.
fn release_run(seen: &Seen, slot: usize, slots: usize) {
    seen.group(slot).head.fetch_and(!bits(slot % GROUP, 1), Ordering::Relaxed);
    give_slots(seen, slot, slot + slots);
}

/// Gives slots back. All marks go before the first slot does, or else a new owner could take the next one's
/// mark for his own.
fn give_slots(seen: &Seen, from: usize, to: usize) {
    for_groups(seen, from, to, |group, bits| _ = group.tail.fetch_and(!bits, Ordering::Relaxed));
    for_groups(seen, from, to, |group, bits| _ = group.give(bits));
}

/// Takes exactly these slots, or none; whether none of them was ever handed out before.
fn take_slots(seen: &Seen, from: usize, to: usize) -> Option<bool> {
    let mut fresh = true;
    let mut missed = None;
    for_groups(seen, from, to, |group, bits| {
        if missed.is_none() {
            match group.take_exactly(bits) {
                Some(unused) => fresh &= unused,
                None => missed = Some(ptr::from_ref(group)),
            }
        }
    });
    let Some(missed) = missed else { return Some(fresh) };
    let mut given_back = false;
    for_groups(seen, from, to, |group, bits| {
        given_back |= ptr::eq(group, missed);
        if !given_back {
            // Not an allocation after all.
            let count = u64::from(bits.count_ones()) << COUNT_SHIFT;
            group.word.fetch_sub(count, Ordering::Relaxed);
            group.give(bits);
        }
    });
    None
}

impl<M: Space> Serves<M> for SlowSide<'_> {}

impl SlowSide<'_> {
    fn seen(&self) -> impl Iterator<Item = Seen> {
        self.engine.cells.iter().filter_map(Cell::see)
    }

    fn groups(&self) -> impl Iterator<Item = &Group> {
        let engine = self.engine;
        self.seen().flat_map(move |seen| {
            let groups = engine.slots(&seen).div_ceil(GROUP);
            // SAFETY: groups stay (invariant 2); the span has as many.
            (0..groups).map(move |at| unsafe { &*seen.groups.add(at) })
        })
    }

    /// Live slots, and how many were ever handed out at most.
    fn live_slots(&self) -> (usize, usize) {
        let slots: usize = self.seen().map(|seen| self.engine.slots(&seen)).sum();
        let words = || self.groups().map(|group| group.word.load(Ordering::Acquire));
        let free: usize = words().map(|word| free_bits(word).count_ones() as usize).sum();
        (slots - free, words().map(|word| high(word) as usize).sum())
    }

    fn tails(&self) -> usize {
        self.groups().map(|group| group.tail.load(Ordering::Relaxed).count_ones() as usize).sum()
    }

    /// Marks slots as one run.
    fn mark(seen: &Seen, slot: usize, slots: usize) {
        for_groups(seen, slot + 1, slot + slots, |group, bits| {
            group.tail.fetch_or(bits, Ordering::Relaxed);
        });
        if slots > 1 {
            seen.group(slot).head.fetch_or(bits(slot % GROUP, 1), Ordering::Relaxed);
        }
    }

    /// Takes the first run of free slots that fits and is aligned.
    fn take_run(&self, seen: &Seen, slots: usize, align: usize) -> Option<(usize, bool)> {
        let (aligned, step) = aligned_steps(seen.start, self.engine.block, align)?;
        let mut first = aligned;
        while let Some(end) = first.checked_add(slots).filter(|&end| end <= self.engine.slots(seen)) {
            // The last slot that is taken rules out every candidate up to it.
            if let Some(taken) = last_taken(seen, first, end) {
                let next = next_free(seen, taken + 1, self.engine.slots(seen))?;
                first = aligned + (next - aligned).next_multiple_of(step);
            } else if let Some(fresh) = take_slots(seen, first, end) {
                return Some((first, fresh));
            }
            // Else another thread was faster: look again at the same place.
        }
        None
    }

    fn note_peak(&mut self, live: usize) {
        self.slow.peak = self.slow.peak.max(live);
    }
}

// SAFETY: a block is made of slots whose bits this engine cleared, and who clears a bit owns the slot
// (invariant 1), so no two live blocks overlap; `take_run` sees to size and alignment.
unsafe impl Engine for SlowSide<'_> {
    unsafe fn add(&mut self, span: Span) -> Result<(), Span> {
        let engine = self.engine;
        let lead = span.start.wrapping_neg() & (engine.align - 1);
        let slots = span.len.saturating_sub(lead) / engine.block;
        let end = span.start.checked_add(span.len).filter(|&end| end < ADDRESSES);
        if slots == 0 || end.is_none() || !engine.divides(span.len) {
            return Err(span);
        }
        let count = slots.div_ceil(GROUP);
        // The smallest set of idle groups that is large enough, else a cell without any.
        let infos = self.slow.infos.iter().enumerate();
        let idle = infos.filter(|(_, info)| info.slots == 0 && info.capacity >= count);
        let at = match idle.min_by_key(|(_, info)| info.capacity) {
            Some((at, _)) => at,
            None => {
                let unused = self.slow.infos.iter().position(|info| info.capacity == 0).ok_or(span)?;
                let groups = new_groups(count).ok_or(span)?;
                self.slow.infos[unused] = Info { span: NO_SPAN, slots: 0, groups, capacity: count };
                unused
            }
        };
        let info = &mut self.slow.infos[at];
        (info.span, info.slots) = (span, slots);
        let cell = &engine.cells[at];
        cell.version.fetch_add(1, Ordering::AcqRel);
        let seen = Seen { start: span.start + lead, len: slots * engine.block, groups: info.groups };
        cell.start.store(seen.start, Ordering::Release);
        cell.len.store(seen.len, Ordering::Release);
        cell.groups.store(seen.groups, Ordering::Release);
        cell.version.fetch_add(1, Ordering::Release);
        engine.cell_count.fetch_max(at + 1, Ordering::AcqRel);
        for first in (0..slots).step_by(GROUP) {
            let here = GROUP.min(slots - first);
            let zeroed = if span.zeroed { PLACE_ZEROED } else { 0 };
            let place = (seen.start + first * engine.block) | zeroed | here << PLACE_COUNT_SHIFT;
            let group = seen.group(first);
            group.place.store(place, Ordering::Release);
            // `high` starts anew; the bits come last (invariant 3).
            group.word.fetch_and(!(63 << HIGH_SHIFT), Ordering::Relaxed);
            group.give(bits(0, here));
        }
        Ok(())
    }

    fn calls_out(&self) -> bool {
        false
    }

    fn span_len(&self, payload: usize) -> Option<usize> {
        payload.div_ceil(self.engine.block).max(1).checked_mul(self.engine.block)
    }

    fn payload(&self, span_len: usize) -> usize {
        span_len / self.engine.block * self.engine.block
    }

    fn need(&self, layout: Layout) -> Option<usize> {
        self.span_len(layout.size())
    }

    fn ready(&self) -> usize {
        self.free_bytes().0
    }

    fn count_sizes(&self, buckets: &mut [u64; HISTOGRAM_BUCKETS]) {
        let runs: u64 = self.slow.runs.iter().sum();
        buckets[MemoryStats::bucket(self.engine.block)] += self.totals().allocs.saturating_sub(runs);
        buckets.iter_mut().zip(&self.slow.runs).for_each(|(bucket, count)| *bucket += count);
    }

    fn alloc(&mut self, layout: Layout) -> Option<Block> {
        let slots = layout.size().div_ceil(self.engine.block).max(1);
        let mut found = None;
        for seen in self.seen() {
            if let Some((slot, fresh)) = self.take_run(&seen, slots, layout.align()) {
                let place = seen.group(slot).place.load(Ordering::Relaxed);
                found = Some((seen, slot, fresh && place & PLACE_ZEROED != 0));
                break;
            }
        }
        let (seen, slot, zeroed) = found?;
        let size = slots * self.engine.block;
        if slots > 1 {
            Self::mark(&seen, slot, slots);
            self.slow.runs[MemoryStats::bucket(size)] += 1;
            self.slow.tails_cut += slots as u64 - 1;
        }
        let start = seen.start + slot * self.engine.block;
        Some(Block { start, size, dirty: if zeroed { 0 } else { size } })
    }

    unsafe fn free(&mut self, start: usize) -> usize {
        // SAFETY: the caller's contract.
        unsafe { self.engine.free_block(start, 0) }
    }

    unsafe fn free_checked(&mut self, start: usize) -> Result<usize, PointerFault> {
        let Some((seen, slot)) = self.engine.locate(start) else { return Err(self.fault(start)) };
        if seen.is_tail(slot) {
            return Err(PointerFault::Interior);
        }
        let slots = run_len(&seen, self.engine.slots(&seen), slot);
        if slots > 1 {
            release_run(&seen, slot, slots);
            return Ok(slots * self.engine.block);
        }
        // The bit itself says whether somebody freed it before, even at this very moment.
        let bit = bits(slot % GROUP, 1);
        let before = free_bits(seen.group(slot).give(bit));
        if before & bit == 0 { Ok(self.engine.block) } else { Err(PointerFault::NotLive) }
    }

    fn fault(&self, start: usize) -> PointerFault {
        match self.engine.locate(start) {
            Some((seen, slot)) if seen.is_tail(slot) => PointerFault::Interior,
            Some(_) => PointerFault::NotLive,
            None if self.owns(start) => PointerFault::Interior,
            None => PointerFault::Foreign,
        }
    }

    fn usable_size(&self, start: usize) -> Option<usize> {
        let (seen, slot) = self.engine.locate(start)?;
        let begins = !seen.is_free(slot) && !seen.is_tail(slot);
        begins.then(|| run_len(&seen, self.engine.slots(&seen), slot) * self.engine.block)
    }

    unsafe fn grow(&mut self, start: usize, size: usize) -> Option<usize> {
        let (seen, slot) = self.engine.locate(start)?;
        let old = run_len(&seen, self.engine.slots(&seen), slot);
        let new = size.div_ceil(self.engine.block);
        if new > old {
            if new > self.engine.slots(&seen) - slot {
                return None;
            }
            take_slots(&seen, slot + old, slot + new)?;
            Self::mark(&seen, slot, new);
            self.slow.tails_cut += (new - old) as u64;
        }
        Some(new.max(old) * self.engine.block)
    }

    unsafe fn shrink(&mut self, start: usize, size: usize) -> usize {
        let Some((seen, slot)) = self.engine.locate(start) else { return size };
        let old = run_len(&seen, self.engine.slots(&seen), slot);
        let new = size.div_ceil(self.engine.block).clamp(1, old);
        if new == 1 {
            seen.group(slot).head.fetch_and(!bits(slot % GROUP, 1), Ordering::Relaxed);
        }
        give_slots(&seen, slot + new, slot + old);
        new * self.engine.block
    }

    fn owns(&self, address: usize) -> bool {
        self.seen().any(|seen| address.wrapping_sub(seen.start) < seen.len)
    }

    fn remove_idle(&mut self, at_most: usize) -> Option<Span> {
        let engine = self.engine;
        let (live, high) = self.live_slots();
        self.note_peak(if self.slow.high_at_reset == 0 { high } else { live });
        for (cell, info) in engine.cells.iter().zip(&mut self.slow.infos) {
            let Some(seen) = cell.see().filter(|_| info.span.len <= at_most) else { continue };
            let mut looks_idle = true;
            for_groups(&seen, 0, info.slots, |group, bits| {
                looks_idle &= free_bits(group.word.load(Ordering::Relaxed)) == bits;
            });
            // Owning every slot is what makes the span idle.
            if !looks_idle || take_slots(&seen, 0, info.slots).is_none() {
                continue;
            }
            cell.version.fetch_add(1, Ordering::AcqRel);
            cell.len.store(0, Ordering::Release);
            cell.version.fetch_add(1, Ordering::Release);
            for_groups(&seen, 0, info.slots, |group, bits| {
                group.place.store(0, Ordering::Release);
                let count = u64::from(bits.count_ones()) << COUNT_SHIFT;
                // The counts move out of the group, which may serve another span.
                let counted = (group.word.fetch_sub(count, Ordering::Relaxed) - count) >> COUNT_SHIFT;
                group.word.fetch_sub(counted << COUNT_SHIFT, Ordering::Relaxed);
                engine.spilled.fetch_add(counted, Ordering::Relaxed);
            });
            info.slots = 0;
            let span = core::mem::replace(&mut info.span, NO_SPAN);
            return Some(Span { zeroed: false, ..span });
        }
        None
    }

    unsafe fn reset(&mut self) {
        for seen in self.seen() {
            let slots = self.engine.slots(&seen);
            for_groups(&seen, 0, slots, |group, _| group.head.store(0, Ordering::Relaxed));
            give_slots(&seen, 0, slots);
        }
    }

    fn reset_if_idle(&mut self) -> usize {
        // All that is free is free already, and other threads may be allocating.
        self.live_blocks()
    }

    fn totals(&self) -> Totals {
        let (live, high) = self.live_slots();
        let counted: u64 = self.groups().map(|group| group.word.load(Ordering::Acquire) >> COUNT_SHIFT).sum();
        let slots = counted + self.engine.spilled.load(Ordering::Relaxed);
        let allocs = slots.saturating_sub(self.slow.tails_cut);
        let peak = if high > self.slow.high_at_reset { high } else { live };
        Totals {
            allocs,
            frees: allocs.saturating_sub(self.live_blocks() as u64),
            alloc_bytes: slots * self.engine.block as u64,
            peak_bytes: peak.max(self.slow.peak).max(live) * self.engine.block,
        }
    }

    fn reset_peak(&mut self) {
        let (live, high) = self.live_slots();
        (self.slow.peak, self.slow.high_at_reset) = (live, high);
    }

    fn live_blocks(&self) -> usize {
        self.live_slots().0 - self.tails()
    }

    fn live_bytes(&self) -> usize {
        self.live_slots().0 * self.engine.block
    }

    fn free_bytes(&self) -> (usize, usize) {
        let mut free = 0;
        let mut longest = 0;
        for seen in self.seen() {
            let mut run = 0;
            for_groups(&seen, 0, self.engine.slots(&seen), |group, bits| {
                let here = free_bits(group.word.load(Ordering::Acquire));
                free += here.count_ones() as usize;
                if here == u32::MAX {
                    run += GROUP;
                } else {
                    for slot in 0..bits.count_ones() {
                        longest = longest.max(run);
                        run = if here >> slot & 1 != 0 { run + 1 } else { 0 };
                    }
                }
                longest = longest.max(run);
            });
        }
        (free * self.engine.block, longest * self.engine.block)
    }

    fn for_each_live(&self, visit: &mut dyn FnMut(Block)) {
        for seen in self.seen() {
            let slots = self.engine.slots(&seen);
            let mut first = 0;
            for_groups(&seen, 0, slots, |group, bits| {
                let free = free_bits(group.word.load(Ordering::Acquire));
                let mut heads = !free & !group.tail.load(Ordering::Relaxed) & bits;
                while heads != 0 {
                    let slot = first + heads.trailing_zeros() as usize;
                    let size = run_len(&seen, slots, slot) * self.engine.block;
                    visit(Block { start: seen.start + slot * self.engine.block, size, dirty: size });
                    heads &= heads - 1;
                }
                first += GROUP;
            });
        }
    }

    /// Exact only while no other thread is at work.
    fn check(&self) -> Result<(), Broken> {
        for (cell, info) in self.engine.cells.iter().zip(&self.slow.infos) {
            let Some(seen) = cell.see() else { continue };
            let broken =
                |invariant, slot: usize| Err(Broken { invariant, at: seen.start + slot * self.engine.block });
            if self.engine.slots(&seen) != info.slots || seen.groups != info.groups {
                return broken("5: a cell says what its span is", 0);
            }
            // Whether the slot before the group is of a run, as bit 0.
            let mut run_before = 0;
            for first in (0..info.slots).step_by(GROUP) {
                let here = bits(0, GROUP.min(info.slots - first));
                let group = seen.group(first);
                let place = group.place.load(Ordering::Relaxed);
                if place & (ADDRESSES - 1) != seen.start + first * self.engine.block {
                    return broken("3: a group knows its place", first);
                }
                let word = group.word.load(Ordering::Relaxed);
                let (head, tail) = (group.head.load(Ordering::Relaxed), group.tail.load(Ordering::Relaxed));
                let free = free_bits(word);
                if (free | head | tail) & !here != 0 {
                    return broken("1: no bits behind the last slot", first);
                }
                if (head | tail) & free != 0 || tail & (head | !((head | tail) << 1 | run_before)) != 0 {
                    return broken("4: marks are on live slots, tails follow their head", first);
                }
                let next = if first + GROUP < info.slots {
                    seen.group(first + GROUP).tail.load(Ordering::Relaxed)
                } else {
                    0
                };
                if head & !(tail >> 1 | next << (GROUP - 1)) != 0 {
                    return broken("4: a run has several slots", first);
                }
                if !free & here & !bits_below(high(word)) != 0 {
                    return broken("high: what is live was handed out", first);
                }
                if free != 0 && group.summary().load(Ordering::Relaxed) & group.bit == 0 {
                    return broken("6: the summary knows of free slots", first);
                }
                run_before = (head | tail) >> (GROUP - 1);
            }
        }
        Ok(())
    }
}

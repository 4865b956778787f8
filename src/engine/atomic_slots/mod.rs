//! Blocks of one size that many threads take and give back at once, without a lock.
//!
//! Slots come in groups of 32. A group is one cache line, and what matters of it is one word:
//!
//! ```text
//!  63            38 37    32 31                               0
//! ┌────────────────┬────────┬──────────────────────────────────┐
//! │ allocations    │ high   │ free: one bit a slot             │
//! └────────────────┴────────┴──────────────────────────────────┘
//! ```
//!
//! Allocating clears the lowest free bit, counts, and raises `high` to the highest slot ever handed out, all in
//! one compare-and-swap; freeing sets the bit. There is no chain of pointers, so there is no ABA: a word that
//! compares equal *is* the state that was seen, and its free bits are free. Nor is a block ever read, so memory
//! that the CPU must not touch can be served as well.
//!
//! Each thread works on the group that its stripe points to, usually one of its own. When that is empty it
//! looks for another in the span's summary, which has a bit for each group that may have something free.
//! Single blocks never wait for anybody. Runs, growth and the walkers take turns at the *slow side*, a lock
//! that no fast path needs.
//!
//! Invariants:
//! 1. Whoever cleared a slot's bit owns the slot until he sets it again.
//! 2. A group's words are in memory until the engine is dropped, whatever happens to its span, so that a stale
//!    pointer to it is harmless: its bits are all clear, or those of the span that uses it now.
//! 3. `place` of a group is set before its bits, and its bits are all clear (their owner being who removes the
//!    span) before it changes. So who owns a slot reads the right `place`.
//! 4. `head` is set on a slot that begins a live run of several slots, `tail` on the others of it; both only by
//!    the owner of the slots.
//! 5. A cell changes only while its `version` is odd.
//! 6. The summary's bit of a group with free slots is set, or about to be by who gives a slot or clears the bit:
//!    both look again at what the other wrote, and all four accesses are sequentially consistent.

#[cfg(all(test, loom))]
mod loom_tests;
mod slow;
#[cfg(all(test, not(loom)))]
mod tests;

use core::alloc::Layout;
use core::fmt;
use core::ptr::{self, NonNull};

use crossbeam_utils::CachePadded;

use super::Block;
use crate::base::bits::round_up;
use crate::base::sync::Lock;
use crate::base::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use slow::Slow;

/// Slots in a group.
const GROUP: usize = 32;

/// Spans the engine can hold.
const MAX_SPANS: usize = if cfg!(loom) { 2 } else { 64 };

/// Most stripes; at least as many as threads that run at once is best.
const MAX_STRIPES: usize = if cfg!(loom) { 2 } else { 32 };

/// Addresses lie below this; what is above it in a `place` is used otherwise.
const ADDRESSES: usize = 1 << 57;
const PLACE_ZEROED: usize = ADDRESSES;
const PLACE_COUNT_SHIFT: u32 = 58;

const HIGH_SHIFT: u32 = 32;
const COUNT_SHIFT: u32 = 38;
const ONE_COUNT: u64 = 1 << COUNT_SHIFT;
/// Set when a group's count should be moved to where it has room.
const COUNT_FULL: u64 = 1 << 63;

/// The slots of a word that are free.
fn free_bits(word: u64) -> u32 {
    word as u32
}

/// How many slots of a group were ever handed out.
fn high(word: u64) -> u32 {
    (word >> HIGH_SHIFT) as u32 & 63
}

/// loom takes sequentially consistent accesses for acquire and release; a fence it knows.
#[inline]
fn loom_barrier() {
    #[cfg(loom)]
    loom::sync::atomic::fence(Ordering::SeqCst);
}

/// A group of slots: a cache line, so that threads on different groups do not disturb each other.
#[repr(align(64))]
#[derive(Debug)]
struct Group {
    word: AtomicU64,
    /// Address of the first slot, whether fresh slots are zero, and the number of slots; 0 in no span.
    place: AtomicUsize,
    head: AtomicU32,
    tail: AtomicU32,
    /// The word of the summary that has this group's bit, and the bit.
    summary: NonNull<AtomicU64>,
    bit: u64,
}

impl Group {
    fn new(summary: NonNull<AtomicU64>, bit: u64) -> Self {
        Self {
            summary,
            bit,
            word: AtomicU64::new(0),
            place: AtomicUsize::new(0),
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
        }
    }

    /// Takes the lowest free slot; its index, and whether it was never handed out before.
    #[inline(always)]
    fn take_lowest(&self) -> Option<(u32, bool, u64)> {
        let mut old = self.word.load(Ordering::Relaxed);
        loop {
            let free = free_bits(old);
            if free == 0 {
                return None;
            }
            let slot = free.trailing_zeros();
            let mut new = (old & !(1 << slot)) + ONE_COUNT;
            let unused = slot >= high(old);
            if unused {
                new += u64::from(slot + 1 - high(old)) << HIGH_SHIFT;
            }
            // Acquire: whatever the previous owner of the slot, or who published the span, did before is done.
            match self.word.compare_exchange_weak(old, new, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some((slot, unused, new)),
                Err(now) => old = now,
            }
        }
    }

    /// Takes exactly `slots`, if all of them are free; whether none was ever handed out before.
    fn take_exactly(&self, slots: u32) -> Option<bool> {
        let mut old = self.word.load(Ordering::Relaxed);
        loop {
            if free_bits(old) & slots != slots {
                return None;
            }
            let lowest = slots.trailing_zeros();
            let top = GROUP as u32 - slots.leading_zeros();
            let raise = top.saturating_sub(high(old));
            let count = u64::from(slots.count_ones()) << COUNT_SHIFT;
            let new = (old & !u64::from(slots)) + count + (u64::from(raise) << HIGH_SHIFT);
            match self.word.compare_exchange_weak(old, new, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(lowest >= high(old)),
                Err(now) => old = now,
            }
        }
    }

    /// Gives slots back; the word before.
    #[inline(always)]
    fn give(&self, slots: u32) -> u64 {
        // What the owner did with the slots is done before anybody else gets them.
        let before = self.word.fetch_or(u64::from(slots), Ordering::SeqCst);
        loom_barrier();
        if self.summary().load(Ordering::SeqCst) & self.bit == 0 {
            self.announce_slow();
        }
        before
    }

    #[inline]
    fn summary(&self) -> &AtomicU64 {
        // SAFETY: the summary was made with the group and stays as long (invariant 2).
        unsafe { self.summary.as_ref() }
    }

    #[cold]
    fn announce_slow(&self) {
        self.summary().fetch_or(self.bit, Ordering::SeqCst);
    }

    /// Takes a group that was found empty out of the summary.
    fn retract(&self) {
        self.summary().fetch_and(!self.bit, Ordering::SeqCst);
        loom_barrier();
        // Whoever gave a slot back before that may have seen the bit still set (invariant 6).
        if free_bits(self.word.load(Ordering::SeqCst)) != 0 {
            self.announce_slow();
        }
    }
}

/// Where a span is, for who frees a block. `len` is 0 where there is none.
#[derive(Debug)]
struct Cell {
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    groups: AtomicPtr<Group>,
}

/// A cell as it was at one moment.
#[derive(Clone, Copy, Debug)]
struct Seen {
    start: usize,
    len: usize,
    groups: *mut Group,
}

impl Cell {
    /// The span; `None` where there is none, or while it changes.
    #[inline]
    fn see(&self) -> Option<Seen> {
        // Acquire throughout, so that the second look at the version comes last.
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Acquire);
        let len = self.len.load(Ordering::Acquire);
        let groups = self.groups.load(Ordering::Acquire);
        let same = version & 1 == 0 && self.version.load(Ordering::Acquire) == version;
        (same && len != 0).then_some(Seen { start, len, groups })
    }
}

/// Where a thread allocated or freed last.
#[derive(Debug)]
struct Stripe {
    group: AtomicPtr<Group>,
}

/// The engine of lock-free fixed-size pools. See the [module](self).
pub struct AtomicSlots {
    block: usize,
    align: usize,
    /// `2^64 / block`, rounded up.
    reciprocal: u64,
    /// One less than the number of stripes, a power of two.
    stripe_mask: usize,
    /// Cells that were ever used.
    cell_count: AtomicUsize,
    /// Allocations moved out of groups whose count was full.
    spilled: AtomicU64,
    cells: [Cell; MAX_SPANS],
    stripes: [CachePadded<Stripe>; MAX_STRIPES],
    slow: Lock<Box<Slow>>,
}

impl fmt::Debug for AtomicSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtomicSlots").field("block", &self.block).finish_non_exhaustive()
    }
}

// SAFETY: groups are shared through atomics alone and owned by the engine (invariant 2).
unsafe impl Send for AtomicSlots {}
// SAFETY: as above.
unsafe impl Sync for AtomicSlots {}

/// A number for each thread, small and in order of first use.
#[inline]
pub(crate) fn thread_number() -> usize {
    use core::{cell::Cell, sync::atomic};
    static NEXT: atomic::AtomicUsize = atomic::AtomicUsize::new(1);
    thread_local!(static NUMBER: Cell<usize> = const { Cell::new(0) });
    NUMBER.with(|number| match number.get() {
        0 => {
            number.set(NEXT.fetch_add(1, atomic::Ordering::Relaxed));
            number.get()
        }
        known => known,
    })
}

impl AtomicSlots {
    /// Blocks of at least `block_size` bytes at multiples of `align`, for about `threads` threads at once; `None`
    /// where that overflows.
    pub fn new(block_size: usize, align: usize, threads: usize) -> Option<Self> {
        let block = round_up(block_size.max(2), align).filter(|&block| block <= isize::MAX as usize)?;
        let stripes = threads.clamp(1, MAX_STRIPES).next_power_of_two();
        let cell = |_| Cell {
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            groups: AtomicPtr::new(ptr::null_mut()),
        };
        let stripe = |_| CachePadded::new(Stripe { group: AtomicPtr::new(ptr::null_mut()) });
        Some(Self {
            block,
            align,
            reciprocal: ((1u128 << 64).div_ceil(block as u128)) as u64,
            stripe_mask: stripes - 1,
            cell_count: AtomicUsize::new(0),
            spilled: AtomicU64::new(0),
            cells: core::array::from_fn(cell),
            stripes: core::array::from_fn(stripe),
            slow: Lock::new(Box::default()),
        })
    }

    /// What one block holds.
    #[inline]
    pub fn block_size(&self) -> usize {
        self.block
    }

    /// Whether one block serves `layout`.
    #[inline(always)]
    pub fn serves(&self, layout: Layout) -> bool {
        layout.size() <= self.block && layout.align() <= self.align
    }

    /// Whether `slot_of` is exact for offsets below `len`.
    fn divides(&self, len: usize) -> bool {
        // The product is off by less than offset * block / 2^64, which is harmless below 1 / block.
        self.block.is_power_of_two() || (len as u128 * self.block as u128) >> 64 == 0
    }

    /// The slot at an offset from a span's or a group's start.
    #[inline]
    fn slot_of(&self, offset: usize) -> usize {
        ((offset as u128 * self.reciprocal as u128) >> 64) as usize
    }

    #[inline]
    fn stripe(&self, thread: usize) -> &Stripe {
        // The second mask changes nothing and spares the check.
        &self.stripes[thread & self.stripe_mask & (MAX_STRIPES - 1)]
    }

    /// A single block for the thread of that number; `None` when none is free.
    pub(crate) fn alloc_one(&self, thread: usize) -> Option<Block> {
        let group = self.stripe(thread).group.load(Ordering::Acquire);
        // SAFETY: a stripe points nowhere or to a group, which stays (invariant 2).
        if let Some(group) = unsafe { group.as_ref() }
            && let Some(block) = self.take_from(group)
        {
            return Some(block);
        }
        self.search_slow(thread)
    }

    /// Start and size of a block from the group that the thread was at last; a start of 0 where it has none. And
    /// whether [`spill_near`](Self::spill_near) should follow.
    #[inline(always)]
    pub(crate) fn take_near(&self, thread: usize) -> ((usize, usize), bool) {
        let group = self.stripe(thread).group.load(Ordering::Acquire);
        // SAFETY: as above.
        let Some(group) = (unsafe { group.as_ref() }) else { return ((0, 0), false) };
        let Some((slot, _, word)) = group.take_lowest() else { return ((0, 0), false) };
        // Ours since the bit was cleared (invariants 1 and 3).
        let base = group.place.load(Ordering::Relaxed) & (ADDRESSES - 1);
        ((base + slot as usize * self.block, self.block), word & COUNT_FULL != 0)
    }

    /// [`spill_slow`](Self::spill_slow) for the group that the thread is at. Should that be another one by now, the
    /// next to allocate from the full one is asked again; there is room for as many allocations as before.
    #[cold]
    pub(crate) fn spill_near(&self, thread: usize) {
        let group = self.stripe(thread).group.load(Ordering::Acquire);
        // SAFETY: null or a group, which stays (invariant 2).
        if let Some(group) = unsafe { group.as_ref() } {
            self.spill_slow(group);
        }
    }

    #[inline(always)]
    fn take_from(&self, group: &Group) -> Option<Block> {
        let (slot, unused, word) = group.take_lowest()?;
        if word & COUNT_FULL != 0 {
            self.spill_slow(group);
        }
        // Ours since the bit was cleared (invariants 1 and 3).
        let place = group.place.load(Ordering::Relaxed);
        let start = (place & (ADDRESSES - 1)) + slot as usize * self.block;
        let zeroed = unused && place & PLACE_ZEROED != 0;
        Some(Block { start, size: self.block, dirty: if zeroed { 0 } else { self.block } })
    }

    /// Moves most of a full count elsewhere.
    #[cold]
    #[inline(never)]
    fn spill_slow(&self, group: &Group) {
        let old = group.word.load(Ordering::Relaxed);
        if old & COUNT_FULL != 0 {
            // Others may count meanwhile, but nobody else gets to subtract: only one sees the bit go.
            let before = group.word.fetch_and(!COUNT_FULL, Ordering::Relaxed);
            if before & COUNT_FULL != 0 {
                self.spilled.fetch_add(COUNT_FULL >> COUNT_SHIFT, Ordering::Relaxed);
            }
        }
    }

    /// Looks for another group, on from where the thread was.
    #[cold]
    #[inline(never)]
    fn search_slow(&self, thread: usize) -> Option<Block> {
        let own = self.stripe(thread);
        let last = own.group.load(Ordering::Acquire);
        let cells = &self.cells[..self.cell_count.load(Ordering::Acquire)];
        let of_last = |seen: &Seen| {
            let groups = seen.groups..seen.groups.wrapping_add(self.groups_of(seen));
            // SAFETY: both point into one array of groups.
            groups.contains(&last).then(|| unsafe { last.offset_from(seen.groups) as usize })
        };
        // The thread's own span from its place on, the newest first of the others, and its own from the start.
        let mut rest = None;
        if let Some((seen, at)) =
            cells.iter().filter_map(Cell::see).find_map(|seen| Some((seen, of_last(&seen)?)))
        {
            if let Some(block) = self.search_span(&seen, at, self.groups_of(&seen), own) {
                return Some(block);
            }
            rest = Some((seen, at));
        }
        for seen in cells.iter().rev().filter_map(Cell::see).filter(|seen| of_last(seen).is_none()) {
            let groups = self.groups_of(&seen);
            // Every thread starts at a place of its own, so that they stay apart.
            let first = groups * (thread & self.stripe_mask) / (self.stripe_mask + 1);
            let block = self.search_span(&seen, first, groups, own);
            if let Some(block) = block.or_else(|| self.search_span(&seen, 0, first, own)) {
                return Some(block);
            }
        }
        rest.and_then(|(seen, at)| self.search_span(&seen, 0, at, own))
    }

    /// Takes a slot from any group of `from .. to`.
    fn search_span(&self, seen: &Seen, from: usize, to: usize, own: &Stripe) -> Option<Block> {
        let mut at = from;
        while at < to {
            // SAFETY: a group of the span (invariant 2).
            let summary = unsafe { &*seen.groups.add(at) }.summary().load(Ordering::Acquire) >> (at % 64);
            if summary == 0 {
                at = at / 64 * 64 + 64;
                continue;
            }
            at += summary.trailing_zeros() as usize;
            if at >= to {
                break;
            }
            let place = seen.groups.wrapping_add(at);
            // SAFETY: as above.
            let group = unsafe { &*place };
            if let Some(block) = self.take_from(group) {
                own.group.store(place, Ordering::Release);
                return Some(block);
            }
            group.retract();
            at += 1;
        }
        None
    }

    fn groups_of(&self, seen: &Seen) -> usize {
        seen.len.div_ceil(self.block).div_ceil(GROUP)
    }

    /// Gives back a block of the group that the thread of that number is at; `false` where it is in another, or is
    /// a run, and nothing has changed then.
    ///
    /// # Safety
    /// `start` is the address of a live block of this engine.
    #[inline(always)]
    pub(crate) unsafe fn give_near(&self, start: usize, thread: usize) -> bool {
        let group = self.stripe(thread).group.load(Ordering::Acquire);
        // SAFETY: null or a group, which stays (invariant 2).
        let Some(group) = (unsafe { group.as_ref() }) else { return false };
        // 0, of this block's span, or of one that existed beside it, which then does not contain `start`.
        let place = group.place.load(Ordering::Acquire);
        let slot = self.slot_of(start.wrapping_sub(place & (ADDRESSES - 1)));
        if slot >= place >> PLACE_COUNT_SHIFT || group.head.load(Ordering::Relaxed) & (1 << slot) != 0 {
            return false;
        }
        group.give(1 << slot);
        true
    }

    /// Gives back a block, for the thread of that number; returns its size.
    ///
    /// # Safety
    /// `start` is the address of a live block of this engine.
    pub(crate) unsafe fn free_block(&self, start: usize, thread: usize) -> usize {
        // SAFETY: the caller's contract.
        if unsafe { self.give_near(start, thread) } {
            return self.block;
        }
        let (at, slot) = self.find_group(start).expect("freed an address that is not of this engine");
        self.stripe(thread).group.store(at, Ordering::Release);
        // SAFETY: a group, which stays (invariant 2).
        let group = unsafe { &*at };
        if group.head.load(Ordering::Relaxed) & (1 << slot) != 0 {
            return self.free_run_slow(start);
        }
        group.give(1 << slot);
        self.block
    }

    /// The group and the slot in it that begin at `start`, if they are of this engine.
    #[inline(never)]
    fn find_group(&self, start: usize) -> Option<(*mut Group, usize)> {
        for cell in &self.cells[..self.cell_count.load(Ordering::Acquire)] {
            let Some(seen) = cell.see() else { continue };
            let offset = start.wrapping_sub(seen.start);
            if offset < seen.len {
                let slot = self.slot_of(offset);
                let exact = slot * self.block == offset;
                return exact.then(|| (seen.groups.wrapping_add(slot / GROUP), slot % GROUP));
            }
        }
        None
    }
}

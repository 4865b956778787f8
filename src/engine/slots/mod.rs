//! Blocks of one size, each free or taken by a bit of a map; a larger request takes a run of adjacent blocks.
//!
//! ```text
//!            ┌──────┬──────┬──────┬──────┬─ … ─┬──────┬──────────┐
//! span       │ slot │ slot │ slot │ slot │     │ slot │ map      │   the map lies at the end of the span,
//!            └──────┴──────┴──────┴──────┴─ … ─┴──────┴──────────┘   or beside it in host memory
//! map.free      1      0      0      0              1      one bit a slot: may be cut
//! map.tail      0      0      1      1              0      one bit a slot: belongs to the run before it
//!                      └─ a run of three, live ─┘
//!                                                fresh ┘   slots from here on were never handed out
//! ```
//!
//! Where the CPU may touch the memory, a single block that is freed goes on the *hot list*, which runs through
//! the free blocks themselves: freeing pushes, allocating pops. Its blocks stay taken in the map until
//! [`settle`](Engine::settle) moves them there; whatever needs the truth (runs, trimming, statistics) settles
//! first. Each free is settled at most once, so all of it is O(1) a call, but for the search for a run.
//!
//! Invariants:
//! 1. Spans are sorted by address and disjoint; slot `i` of a span starts at `start + i * block`, and all of
//!    its slots and its map (where it is inside) lie in the span, apart from each other.
//! 2. A slot is free (bit in `free`), hot (on the list), or live; `taken` counts those that are not free.
//! 3. A bit in `tail` is set only on a live slot, and the slot before it is live. A slot that is not a tail,
//!    not free and not hot begins a live block, which reaches over the tails that follow.
//! 4. Slots from `fresh` on are free and were never handed out; where the span was zeroed they are zero.
//! 5. The hot list is a chain of distinct slots without tails, each holding the address of the next in its
//!    first word, 0 at the end. It is empty where the engine may not touch the memory.
//! 6. Bits behind the last slot are clear; `free_count` of a span counts its bits.

mod home;
mod map;

use core::alloc::Layout;
use core::ptr;

pub use home::{Beside, Home, InSpan};
#[cfg(test)]
use map::Divider;
use map::SpanTable;

use super::{Block, Broken, CpuSpace, Engine, Serves, Space, Span, Totals};
use crate::base::bits::round_up;
use crate::base::error::PointerFault;
use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};

/// The engine of fixed-size pools. `H` says where the maps are kept, and with that whether the blocks
/// themselves may be touched.
#[derive(Debug)]
pub struct Slots<H: Home = InSpan> {
    /// First block of the hot list, or 0.
    hot: usize,
    /// Blocks freed.
    frees: u64,
    /// Slots that are the tail of a live run.
    tails: usize,
    /// Bytes from one block to the next; what a single block can hold.
    block: usize,
    /// Every block starts at a multiple of this.
    align: usize,
    /// Slots that are not free in the map.
    taken: usize,
    /// Most slots ever taken at once since the peak was last reset.
    peak: usize,
    /// Tail slots of the runs that were freed.
    tails_freed: u64,
    /// Runs cut, by size.
    runs: [u64; HISTOGRAM_BUCKETS],
    spans: SpanTable<H>,
}

impl<H: Home> Slots<H> {
    /// Blocks of at least `block_size` bytes, starting at multiples of `align`; `None` where that overflows.
    pub fn new(block_size: usize, align: usize) -> Option<Self> {
        let align = if H::TOUCHES { align.max(align_of::<usize>()) } else { align };
        let block = round_up(block_size.max(1), align).filter(|&block| block <= isize::MAX as usize)?;
        Some(Self {
            hot: 0,
            frees: 0,
            tails: 0,
            block,
            align,
            taken: 0,
            peak: 0,
            tails_freed: 0,
            runs: [0; HISTOGRAM_BUCKETS],
            spans: SpanTable::new(block),
        })
    }

    /// What one block holds.
    #[inline]
    pub fn block_size(&self) -> usize {
        self.block
    }

    /// The alignment of every block.
    #[inline]
    pub fn block_align(&self) -> usize {
        self.align
    }

    #[inline]
    fn note_taken(&mut self, slots: usize) {
        self.taken += slots;
        // The hot list is empty whenever slots are cut, or was settled: all that is taken is live.
        self.peak = self.peak.max(self.taken);
    }

    /// Cuts one slot from the maps.
    #[cold]
    #[inline(never)]
    fn cut_slow(&mut self) -> Option<Block> {
        debug_assert_eq!(self.hot, 0);
        let (start, zeroed) = self.spans.take_one()?;
        self.note_taken(1);
        let dirty = if zeroed { 0 } else { self.block };
        Some(Block { start, size: self.block, dirty })
    }

    /// Cuts a run, or a block with more than the usual alignment.
    #[cold]
    #[inline(never)]
    fn run_slow(&mut self, layout: Layout) -> Option<Block> {
        let slots = layout.size().div_ceil(self.block).max(1);
        self.settle();
        let (start, zeroed) = self.spans.take_run(slots, layout.align())?;
        self.note_taken(slots);
        self.tails += slots - 1;
        if slots > 1 {
            self.runs[MemoryStats::bucket(slots * self.block)] += 1;
        }
        let size = slots * self.block;
        Some(Block { start, size, dirty: if zeroed { 0 } else { size } })
    }

    /// Frees where runs are about, or where the memory may not be touched: the map decides.
    #[cold]
    #[inline(never)]
    fn free_slow(&mut self, start: usize) -> usize {
        let (span, slot) = self.spans.locate(start).expect("freed an address that is not of this engine");
        let slots = self.spans.run_len(span, slot);
        if slots == 1 && H::TOUCHES {
            // SAFETY: the caller of `free` vouches for a live block of ours; it is a single one.
            unsafe { self.push(start) };
            return self.block;
        }
        self.spans.give(span, slot, slots);
        self.taken -= slots;
        self.tails -= slots - 1;
        self.tails_freed += slots as u64 - 1;
        slots * self.block
    }

    /// Puts a block on the hot list.
    ///
    /// # Safety
    /// `start` is a slot without tails that is neither free nor hot, and the memory may be touched.
    #[inline(always)]
    unsafe fn push(&mut self, start: usize) {
        // SAFETY: the slot is ours, at least a word long and aligned to one (see `new`), invariant 5.
        unsafe { ptr::with_exposed_provenance_mut::<usize>(start).write(self.hot) };
        self.hot = start;
    }

    /// Blocks on the hot list.
    fn hot_len(&self) -> usize {
        let mut len = 0;
        let mut at = self.hot;
        while at != 0 {
            len += 1;
            // SAFETY: invariant 5.
            at = unsafe { ptr::with_exposed_provenance::<usize>(at).read() };
        }
        len
    }

    /// Whether the slot at `start` is on the hot list.
    fn is_hot(&self, start: usize) -> bool {
        let mut at = self.hot;
        while at != 0 && at != start {
            // SAFETY: invariant 5.
            at = unsafe { ptr::with_exposed_provenance::<usize>(at).read() };
        }
        at != 0
    }
}

impl<M: CpuSpace> Serves<M> for Slots<InSpan> {}
impl<M: Space> Serves<M> for Slots<Beside> {}

// SAFETY: a block is made of slots that were free or hot and are neither after (invariant 2), so no two live
// blocks overlap; `take_run` and `new` see to size and alignment.
unsafe impl<H: Home> Engine for Slots<H> {
    unsafe fn add(&mut self, span: Span) -> Result<(), Span> {
        // SAFETY: the caller's contract.
        unsafe { self.spans.add(span, self.align) }
    }

    #[inline]
    fn calls_out(&self) -> bool {
        false
    }

    fn span_len(&self, payload: usize) -> Option<usize> {
        let slots = payload.div_ceil(self.block).max(1);
        slots.checked_mul(self.block)?.checked_add(H::overhead(slots))
    }

    fn payload(&self, span_len: usize) -> usize {
        SpanTable::<H>::slots_in(span_len, self.block) * self.block
    }

    fn need(&self, layout: Layout) -> Option<usize> {
        layout.size().div_ceil(self.block).max(1).checked_mul(self.block)
    }

    fn ready(&self) -> usize {
        self.free_bytes().0
    }

    fn count_sizes(&self, buckets: &mut [u64; HISTOGRAM_BUCKETS]) {
        let runs: u64 = self.runs.iter().sum();
        buckets[MemoryStats::bucket(self.block)] += self.totals().allocs - runs;
        buckets.iter_mut().zip(&self.runs).for_each(|(bucket, count)| *bucket += count);
    }

    fn alloc(&mut self, layout: Layout) -> Option<Block> {
        if layout.size() > self.block || layout.align() > self.align {
            return self.run_slow(layout);
        }
        match self.take(layout) {
            (0, _) => self.cut_slow(),
            (start, size) => Some(Block { start, size, dirty: size }),
        }
    }

    #[inline(always)]
    fn take(&mut self, layout: Layout) -> (usize, usize) {
        let start = self.hot;
        if start == 0 || layout.size() > self.block || layout.align() > self.align {
            return (0, 0);
        }
        // SAFETY: invariant 5.
        self.hot = unsafe { ptr::with_exposed_provenance::<usize>(start).read() };
        (start, self.block)
    }

    unsafe fn free(&mut self, start: usize) -> usize {
        // SAFETY: the caller's contract.
        if unsafe { self.give(start) } {
            return self.block;
        }
        self.frees += 1;
        self.free_slow(start)
    }

    #[inline(always)]
    unsafe fn give(&mut self, start: usize) -> bool {
        if self.tails != 0 || !H::TOUCHES {
            return false;
        }
        self.frees += 1;
        // SAFETY: the caller vouches for a live block; without tails every block is a single slot.
        unsafe { self.push(start) };
        true
    }

    fn fault(&self, start: usize) -> PointerFault {
        match self.spans.locate(start) {
            Some((span, slot)) if self.spans.is_tail(span, slot) => PointerFault::Interior,
            Some(_) => PointerFault::NotLive,
            None if self.owns(start) => PointerFault::Interior,
            None => PointerFault::Foreign,
        }
    }

    fn settle(&mut self) {
        while self.hot != 0 {
            let start = self.hot;
            // SAFETY: invariant 5.
            self.hot = unsafe { ptr::with_exposed_provenance::<usize>(start).read() };
            let (span, slot) = self.spans.locate(start).expect("a hot block lies in a span");
            self.spans.give(span, slot, 1);
            self.taken -= 1;
        }
    }

    fn usable_size(&self, start: usize) -> Option<usize> {
        let (span, slot) = self.spans.locate(start)?;
        if !self.spans.begins_block(span, slot) || self.is_hot(start) {
            return None;
        }
        Some(self.spans.run_len(span, slot) * self.block)
    }

    unsafe fn grow(&mut self, start: usize, size: usize) -> Option<usize> {
        let (span, slot) = self.spans.locate(start)?;
        let old = self.spans.run_len(span, slot);
        let new = size.div_ceil(self.block);
        if new <= old {
            return Some(old * self.block);
        }
        self.settle();
        if !self.spans.extend(span, slot, old, new) {
            return None;
        }
        self.note_taken(new - old);
        self.tails += new - old;
        Some(new * self.block)
    }

    unsafe fn shrink(&mut self, start: usize, size: usize) -> usize {
        let Some((span, slot)) = self.spans.locate(start) else { return size };
        let old = self.spans.run_len(span, slot);
        let new = size.div_ceil(self.block).clamp(1, old);
        if new < old {
            self.spans.give(span, slot + new, old - new);
            self.taken -= old - new;
            self.tails -= old - new;
            self.tails_freed += (old - new) as u64;
        }
        new * self.block
    }

    fn owns(&self, address: usize) -> bool {
        self.spans.find(address).is_some()
    }

    fn remove_idle(&mut self, at_most: usize) -> Option<Span> {
        self.settle();
        self.spans.remove_idle(at_most)
    }

    unsafe fn reset(&mut self) {
        self.frees += self.live_blocks() as u64;
        self.hot = 0;
        self.tails_freed += self.tails as u64;
        self.tails = 0;
        self.taken = 0;
        self.spans.reset();
    }

    fn live_blocks(&self) -> usize {
        self.taken - self.tails - self.hot_len()
    }

    fn live_bytes(&self) -> usize {
        (self.taken - self.hot_len()) * self.block
    }

    fn free_bytes(&self) -> (usize, usize) {
        let hot = self.hot_len();
        let free = self.spans.free_slots() + hot;
        let largest = self.spans.longest_run().max(usize::from(hot > 0));
        (free * self.block, largest * self.block)
    }

    fn totals(&self) -> Totals {
        let slots_freed = self.frees + self.tails_freed;
        let live = (self.taken - self.hot_len()) as u64;
        Totals {
            allocs: self.frees + self.live_blocks() as u64,
            frees: self.frees,
            alloc_bytes: (slots_freed + live) * self.block as u64,
            peak_bytes: self.peak * self.block,
        }
    }

    fn reset_peak(&mut self) {
        self.settle();
        self.peak = self.taken;
    }

    fn for_each_live(&self, visit: &mut dyn FnMut(Block)) {
        let hot = self.hot_blocks();
        self.spans.for_each_block(&mut |start, slots| {
            if hot.binary_search(&start).is_err() {
                let size = slots * self.block;
                visit(Block { start, size, dirty: size });
            }
        });
    }

    fn check(&self) -> Result<(), Broken> {
        let broken = |invariant, at| Err(Broken { invariant, at });
        let mut taken = 0;
        let mut tails = 0;
        self.spans.check(&mut taken, &mut tails)?;
        if taken != self.taken {
            return broken("2: taken slots add up", taken);
        }
        if tails != self.tails {
            return broken("3: tail slots add up", tails);
        }
        let mut seen = 0;
        let mut at = self.hot;
        while at != 0 {
            let Some((span, slot)) = self.spans.locate(at) else {
                return broken("5: hot blocks are slots", at);
            };
            if !self.spans.begins_block(span, slot) || self.spans.run_len(span, slot) != 1 {
                return broken("5: hot blocks are single and taken", at);
            }
            seen += 1;
            if seen > taken {
                return broken("5: the hot list ends", at);
            }
            // SAFETY: a slot of ours, just verified.
            at = unsafe { ptr::with_exposed_provenance::<usize>(at).read() };
        }
        if self.peak < taken - seen {
            return broken("2: the peak is a peak", self.peak);
        }
        let mut hot = self.hot_blocks();
        hot.dedup();
        if hot.len() != seen {
            return broken("5: hot blocks are distinct", self.hot);
        }
        Ok(())
    }
}

impl<H: Home> Slots<H> {
    /// The hot list, sorted by address; for the walkers, which may allocate.
    fn hot_blocks(&self) -> Vec<usize> {
        let mut blocks = Vec::new();
        let mut at = self.hot;
        while at != 0 {
            blocks.push(at);
            // SAFETY: invariant 5.
            at = unsafe { ptr::with_exposed_provenance::<usize>(at).read() };
        }
        blocks.sort_unstable();
        blocks
    }
}

#[cfg(test)]
mod tests;

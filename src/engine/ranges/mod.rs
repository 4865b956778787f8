//! Variable ranges: blocks of any size, cut from any number of spans and joined again.
//!
//! ```text
//!   Ranges<S> ── store: S        which blocks there are, and how they lie  (InBlocks | Beside)
//!             ── free: Free<S>   which of them are free, in the strategy's order
//! ```
//!
//! A span is tiled by blocks. A block that is freed is joined at once with whichever neighbours are free, in
//! constant time, through boundary tags. A strategy, chosen at run time, says which free block a request is
//! cut from. It is cut from the low end, so what was allocated last can mostly grow in place; but for best fit
//! with books in the blocks, which cuts blocks of 4 KiB and more from the high end unless a small block lies
//! behind it: large blocks apart from small ones leave larger holes (two points of heap efficiency).
//!
//! 1. The blocks of a span tile it from its first to its end mark.
//! 2. No two neighbours are free.
//! 3. The free blocks, and nothing else, are in `free`.
//! 4. `counts` has the number of live blocks and of their usable bytes, `capacity` the whole sizes
//!    of all blocks.
//! 5. Starts are multiples of the granule, and whole sizes too.
//!
//! The engine takes no lock and calls nothing but, for a [`Strategy::Custom`], the policy.

mod beside;
mod bins;
mod counts;
mod free;
mod in_blocks;
mod store;
#[cfg(test)]
mod tests;
mod treap;

pub use beside::Beside;
pub use in_blocks::InBlocks;
pub use store::Store;

use core::alloc::Layout;

use super::{Block, Broken, CpuSpace, Engine, Serves, Space, Span, Totals};
use crate::base::bits::{is_aligned, round_down, round_up};
use crate::base::error::{Error, PointerFault, Result};
use crate::base::policy::{FreeRange, Request, Strategy};
use crate::base::stats::HISTOGRAM_BUCKETS;
use bins::MAX_SIZE;
use counts::Counts;
use free::{Free, Order, Place, Want};
use store::Extent;

/// How [`Ranges`] are to be divided.
#[derive(Clone, Debug, PartialEq)]
pub struct Division {
    /// Which free range a request is cut from.
    pub strategy: Strategy,
    /// Blocks start at multiples of this power of two, and sizes are rounded to it (with books in the memory,
    /// the 8 bytes of books included); at least 16.
    pub granule: usize,
    /// The smallest range that a split leaves behind; anything smaller stays with the block.
    pub min_rest: usize,
}

impl Default for Division {
    fn default() -> Self {
        Self { strategy: Strategy::Segregated, granule: 16, min_rest: 32 }
    }
}

/// A live block's name, which frees it without a look-up. Of use with books [`Beside`] the memory.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped ticket leaks its block"]
pub struct Ticket<S: Store>(S::Id);

/// The engine of variable ranges. See the [module](self).
///
/// ```
/// use memory_pool::engine::ranges::{Division, InBlocks, Ranges};
/// use memory_pool::engine::{Engine, Span};
/// use std::alloc::Layout;
///
/// let mut memory = vec![0_u8; 4096];
/// let mut ranges = Ranges::<InBlocks>::new(Division::default())?;
/// let start = memory.as_mut_ptr().expose_provenance();
/// // SAFETY: the vector outlives the engine and is used by nothing else.
/// unsafe { ranges.add(Span { start, len: 4096, zeroed: true }) }.unwrap();
///
/// let block = ranges.alloc(Layout::new::<[u64; 10]>()).unwrap();
/// assert!(block.size >= 80 && block.zeroed());
/// // SAFETY: the block is live.
/// unsafe { ranges.free(block.start) };
/// # Ok::<(), memory_pool::Error>(())
/// ```
///
/// A pool over memory of kind `M` asks for an engine that [serves](Serves) it; books in memory that the CPU
/// must not touch do not compile:
///
/// ```compile_fail,E0277
/// use memory_pool::engine::ranges::{Beside, InBlocks, Ranges};
/// use memory_pool::engine::{HostSpace, Serves, Space};
///
/// struct Card;
/// impl Space for Card {}
///
/// fn pool_over<M: Space, E: Serves<M>>() {}
/// pool_over::<HostSpace, Ranges<InBlocks>>();
/// pool_over::<HostSpace, Ranges<Beside>>();
/// pool_over::<Card, Ranges<Beside>>();
/// pool_over::<Card, Ranges<InBlocks>>(); // `Card` is no `CpuSpace`
/// ```
#[derive(Debug)]
pub struct Ranges<S: Store> {
    store: S,
    free: Free<S>,
    granule: usize,
    /// `granule - 1`, and with a block's head.
    mask: usize,
    round: usize,
    min_rest: usize,
    /// Whole size from which on blocks are cut from the high end.
    high_from: usize,
    /// Alignments up to this need no thought: the granule, or 0 if a user's policy is to be asked.
    plain_align: usize,
    counts: Counts,
    capacity: usize,
    strategy: Strategy,
}

impl<M: CpuSpace> Serves<M> for Ranges<InBlocks> {}
impl<M: Space> Serves<M> for Ranges<Beside> {}

impl<S: Store> Ranges<S> {
    /// An engine without memory.
    ///
    /// # Errors
    /// `Config` if the granule is not a power of two of 16 to 2^30.
    pub fn new(division: Division) -> Result<Self> {
        let Division { strategy, granule, min_rest } = division;
        if !granule.is_power_of_two() || !(16..=1 << 30).contains(&granule) {
            return Err(Error::config("granule", granule, "a power of two from 16 to 2^30"));
        }
        let order = match strategy {
            Strategy::Segregated => Order::Lists,
            Strategy::FirstFit => Order::ByAddress,
            Strategy::BestFit | Strategy::Custom(_) => Order::BySize,
        };
        Ok(Self {
            store: S::new(granule),
            free: Free::new(order),
            granule,
            mask: granule - 1,
            round: granule - 1 + S::HEAD,
            min_rest: min_rest.max(S::MIN).checked_next_multiple_of(granule).unwrap_or(usize::MAX),
            high_from: if strategy == Strategy::BestFit { S::LARGE } else { usize::MAX },
            plain_align: if matches!(strategy, Strategy::Custom(_)) { 0 } else { granule },
            counts: Counts::default(),
            capacity: 0,
            strategy,
        })
    }

    /// The strategy in use.
    pub fn strategy(&self) -> &Strategy {
        &self.strategy
    }

    /// Whole size for `size` usable bytes; `None` if no block is that large.
    #[inline(always)]
    fn whole(&self, size: usize) -> Option<usize> {
        // No granule is larger than 2^30, so nothing here overflows, and the sum is not above `MAX_SIZE`.
        if size > MAX_SIZE - (1 << 30) - S::HEAD {
            return None;
        }
        Some(((size + self.round) & !self.mask).max(S::MIN))
    }

    /// Cuts a block and leaves it unnoted.
    #[inline]
    fn cut_new(&mut self, layout: Layout) -> Option<(S::Id, Block)> {
        let size = self.whole(layout.size())?;
        if !self.store.prepare() {
            return None;
        }
        if layout.align() > self.plain_align {
            return self.cut_slow(size, layout.align());
        }
        if !self.free.lists() {
            return self.cut_ordered(size);
        }
        let (id, whole) = self.free.pop(&mut self.store, size)?;
        Some((id, self.take_low::<true>(id, whole, size)))
    }

    /// Cuts a block where best fit or first fit says.
    #[inline(never)]
    fn cut_ordered(&mut self, size: usize) -> Option<(S::Id, Block)> {
        let (mut id, mut whole) = self.free.take(&mut self.store, size)?;
        if size >= self.high_from && whole - size >= self.min_rest && !self.small_behind(id) {
            let low = id;
            id = self.store.part(low, whole, whole - size);
            self.free.insert(&mut self.store, low, whole - size);
            whole = size;
        }
        Some((id, self.take_low::<false>(id, whole, size)))
    }

    /// Cuts `size` bytes from the low end of the free block `id`, which is not filed any more. `LISTS` says that
    /// the free blocks are in lists.
    #[inline(always)]
    fn take_low<const LISTS: bool>(&mut self, id: S::Id, whole: usize, size: usize) -> Block {
        let Self { store, free, .. } = self;
        let rest = whole - size;
        let (size, dirty) = if rest < self.min_rest {
            (whole, store.take(id, whole))
        } else {
            let (low, dirty) = store.take_low(id, whole, size);
            if LISTS {
                free.push(store, low, rest);
            } else {
                free.insert(store, low, rest);
            }
            (size, dirty)
        };
        self.counts.cut(size - S::HEAD);
        Block { start: self.store.start(id), size: size - S::HEAD, dirty }
    }

    /// Whether the block behind a free block is small and thus no good neighbour for a large one.
    #[inline]
    fn small_behind(&self, id: S::Id) -> bool {
        // The end mark has size 0.
        (1..S::LARGE).contains(&self.store.size(self.store.next(id)))
    }

    /// Cuts a block for an aligned request, or where the user's policy says.
    #[cold]
    fn cut_slow(&mut self, size: usize, align: usize) -> Option<(S::Id, Block)> {
        let want = Want { size, align: align.max(self.granule), front: self.min_rest };
        let place = match self.ask_policy(&want) {
            Some(place) => place,
            None => self.free.find_aligned_slow(&self.store, &want)?,
        };
        let (mut id, mut whole) = (place.id, self.store.size(place.id));
        self.free.remove(&mut self.store, id, whole);
        if place.skip != 0 {
            id = self.store.part(place.id, whole, place.skip);
            self.free.insert(&mut self.store, place.id, place.skip);
            whole -= place.skip;
        }
        Some((id, self.take_low::<false>(id, whole, size)))
    }

    /// What the user's policy answers, if it is any good.
    fn ask_policy(&self, want: &Want) -> Option<Place<S::Id>> {
        let Strategy::Custom(policy) = &self.strategy else { return None };
        let request = Request { size: want.size, align: want.align };
        let mut free = self.blocks().filter(|id| self.store.is_free(*id)).map(|id| self.range(id));
        let answer = policy.choose(request, &mut free)?;
        // Only what is found among the free blocks is believed.
        let id = self.blocks().find(|id| self.store.is_free(*id) && self.range(*id) == answer)?;
        want.place(&self.store, id)
    }

    fn range(&self, id: S::Id) -> FreeRange {
        FreeRange { start: self.store.start(id), len: self.store.size(id) }
    }

    fn spans(&self) -> impl Iterator<Item = Extent<S::Id>> {
        let after = |extent: &Extent<S::Id>| self.store.span_from(extent.span.start + 1);
        core::iter::successors(self.store.span_from(0), after)
    }

    /// The blocks of a span, from left to right.
    fn blocks_of(&self, extent: Extent<S::Id>) -> impl Iterator<Item = S::Id> {
        let next = move |id: &S::Id| Some(self.store.next(*id)).filter(|next| *next != extent.end);
        core::iter::successors(Some(extent.first), next)
    }

    /// All blocks of all spans.
    fn blocks(&self) -> impl Iterator<Item = S::Id> {
        self.spans().flat_map(|extent| self.blocks_of(extent))
    }

    fn block(&self, id: S::Id) -> Block {
        let size = self.store.size(id) - S::HEAD;
        Block { start: self.store.start(id), size, dirty: size }
    }

    /// Frees a live block that is not noted; returns its usable size.
    #[inline]
    fn release(&mut self, id: S::Id) -> usize {
        let size = self.store.size(id);
        self.counts.freed(size - S::HEAD);
        self.file(id, size);
        size - S::HEAD
    }

    /// Makes a live block free, and joins it with its neighbours.
    #[inline(always)]
    fn file(&mut self, id: S::Id, size: usize) {
        if self.free.lists() { self.join::<true>(id, size) } else { self.join_ordered(id, size) }
    }

    #[inline(never)]
    fn join_ordered(&mut self, id: S::Id, size: usize) {
        self.join::<false>(id, size);
    }

    #[inline(always)]
    fn join<const LISTS: bool>(&mut self, id: S::Id, size: usize) {
        let Self { free, store, .. } = self;
        let (id, size) = store.give(id, size, |store, neighbour, size| {
            if LISTS {
                free.unlink(store, neighbour, size);
            } else {
                free.remove(store, neighbour, size);
            }
        });
        if LISTS {
            free.push(store, id, size);
        } else {
            free.insert(store, id, size);
        }
    }

    /// Grows a live block in place to `size` usable bytes.
    fn grow_id(&mut self, id: S::Id, size: usize) -> Option<usize> {
        let (old, wanted) = (self.store.size(id), self.whole(size)?);
        if wanted > old {
            let more = wanted - old;
            let (next, room) = self.store.next_free(id, old).filter(|(_, room)| *room >= more)?;
            self.free.remove(&mut self.store, next, room);
            if room - more >= self.min_rest {
                let rest = self.store.push_border(id, next, more);
                self.free.insert(&mut self.store, rest, room - more);
            } else {
                self.store.absorb(id, next);
            }
            self.counts.grown(self.store.size(id) - old);
        }
        Some(self.store.size(id) - S::HEAD)
    }

    /// Cuts the tail off a live block, keeping `size` usable bytes.
    fn shrink_id(&mut self, id: S::Id, size: usize) -> usize {
        let old = self.store.size(id);
        let Some(wanted) = self.whole(size).filter(|wanted| *wanted < old) else { return old - S::HEAD };
        let spare = old - wanted;
        // A tail too small to stand alone may still join a free neighbour.
        let joins = spare >= S::MIN && self.store.next_free(id, old).is_some();
        if (spare >= self.min_rest || joins) && self.store.prepare() {
            let rest = self.store.split(id, wanted);
            self.counts.shrunk(spare);
            self.file(rest, spare);
        }
        self.store.size(id) - S::HEAD
    }

    /// Like [`alloc`](Engine::alloc), with a ticket that frees the block without a look-up. The block's address
    /// is unknown to [`free`](Engine::free) and [`usable_size`](Engine::usable_size) (unless the books lie in the
    /// memory) until it is [published](Self::publish).
    pub fn alloc_ticket(&mut self, layout: Layout) -> Option<(Ticket<S>, Block)> {
        self.cut_new(layout).map(|(id, block)| (Ticket(id), block))
    }

    /// Frees the block of a ticket and returns its usable size.
    ///
    /// # Safety
    /// The ticket is of this engine, given out after its last reset, and the block is used no more.
    pub unsafe fn free_ticket(&mut self, ticket: Ticket<S>) -> usize {
        self.release(ticket.0)
    }

    /// Turns a ticket into an address that [`free`](Engine::free) knows.
    ///
    /// # Safety
    /// The ticket is of this engine, given out after its last reset.
    pub unsafe fn publish(&mut self, ticket: Ticket<S>) -> usize {
        self.store.note(ticket.0);
        self.store.start(ticket.0)
    }

    /// The ticket of the live block at `start`, whose address is unknown from now on; the reverse of `publish`.
    ///
    /// # Safety
    /// As for `free`.
    pub unsafe fn withdraw(&mut self, start: usize) -> Ticket<S> {
        // SAFETY: the caller's contract.
        let id = unsafe { self.store.at(start) };
        self.store.forget(id);
        Ticket(id)
    }

    /// The block of a ticket; nothing is known of its contents.
    ///
    /// # Safety
    /// The ticket is of this engine, given out after its last reset.
    pub unsafe fn block_of(&self, ticket: &Ticket<S>) -> Block {
        self.block(ticket.0)
    }

    /// [`grow`](Engine::grow) by ticket.
    ///
    /// # Safety
    /// The ticket is of this engine, given out after its last reset.
    pub unsafe fn grow_ticket(&mut self, ticket: &Ticket<S>, size: usize) -> Option<usize> {
        self.grow_id(ticket.0, size)
    }

    /// [`shrink`](Engine::shrink) by ticket.
    ///
    /// # Safety
    /// The ticket is of this engine, given out after its last reset.
    pub unsafe fn shrink_ticket(&mut self, ticket: &Ticket<S>, size: usize) -> usize {
        self.shrink_id(ticket.0, size)
    }
}

impl Ranges<Beside> {
    /// Bytes of the host's memory that the books take.
    pub fn footprint(&self) -> usize {
        self.store.footprint()
    }
}

// SAFETY: by invariants 1 and 5 blocks tile their spans at multiples of the granule, so live ones overlap
// neither each other nor the outside; `whole` rounds up, and `find` and `find_aligned_slow` see to alignment.
unsafe impl<S: Store> Engine for Ranges<S> {
    unsafe fn add(&mut self, span: Span) -> core::result::Result<(), Span> {
        // SAFETY: the caller's contract.
        let id = unsafe { self.store.add_span(span) }?;
        let size = self.store.size(id);
        self.capacity += size;
        self.free.insert(&mut self.store, id, size);
        Ok(())
    }

    fn calls_out(&self) -> bool {
        matches!(self.strategy, Strategy::Custom(_))
    }

    fn span_len(&self, payload: usize) -> Option<usize> {
        // Wherever the span starts, less than this is lost to alignment and books.
        round_up(payload.max(S::MIN), self.granule)?
            .checked_add(S::span_books(self.granule) + self.granule + 8)
    }

    fn payload(&self, span_len: usize) -> usize {
        round_down(span_len, self.granule).saturating_sub(S::span_books(self.granule))
    }

    fn need(&self, layout: Layout) -> Option<usize> {
        let size = self.whole(layout.size())?;
        let aligned = layout.align() <= self.granule || S::span_books(self.granule) == 0;
        if aligned { Some(size) } else { size.checked_add(self.min_rest)?.checked_add(layout.align()) }
    }

    #[inline]
    fn alloc(&mut self, layout: Layout) -> Option<Block> {
        let (id, block) = self.cut_new(layout)?;
        self.store.note(id);
        Some(block)
    }

    #[inline]
    unsafe fn free(&mut self, start: usize) -> usize {
        // SAFETY: the caller's contract.
        let id = unsafe { self.store.at(start) };
        self.store.forget(id);
        self.release(id)
    }

    unsafe fn free_checked(&mut self, start: usize) -> core::result::Result<usize, PointerFault> {
        let id = self.store.find(start).ok_or_else(|| self.fault(start))?;
        self.store.forget(id);
        Ok(self.release(id))
    }

    #[cold]
    fn fault(&self, start: usize) -> PointerFault {
        let Some(extent) = self.store.span_of(start) else { return PointerFault::Foreign };
        let holds = |id: &S::Id| start < self.store.start(self.store.next(*id)) - S::HEAD;
        match self.blocks_of(extent).find(holds) {
            Some(id) if !self.store.is_free(id) && self.store.start(id) != start => PointerFault::Interior,
            _ => PointerFault::NotLive,
        }
    }

    fn usable_size(&self, start: usize) -> Option<usize> {
        self.store.find(start).map(|id| self.store.size(id) - S::HEAD)
    }

    unsafe fn grow(&mut self, start: usize, size: usize) -> Option<usize> {
        // SAFETY: the caller's contract.
        let id = unsafe { self.store.at(start) };
        self.grow_id(id, size)
    }

    unsafe fn shrink(&mut self, start: usize, size: usize) -> usize {
        // SAFETY: the caller's contract.
        let id = unsafe { self.store.at(start) };
        self.shrink_id(id, size)
    }

    fn owns(&self, address: usize) -> bool {
        self.store.span_of(address).is_some()
    }

    fn remove_idle(&mut self, at_most: usize) -> Option<Span> {
        let idle = |extent: &Extent<S::Id>| {
            extent.span.len <= at_most
                && self.store.is_free(extent.first)
                && self.store.next(extent.first) == extent.end
        };
        let extent = self.spans().find(idle)?;
        let size = self.store.size(extent.first);
        self.free.remove(&mut self.store, extent.first, size);
        self.capacity -= size;
        self.store.remove_span(&extent);
        Some(Span { zeroed: false, ..extent.span })
    }

    unsafe fn reset(&mut self) {
        self.free.clear();
        let free = &mut self.free;
        self.store.reset(|store, id| {
            let size = store.size(id);
            free.insert(store, id, size);
        });
        self.counts.reset();
    }

    fn count_sizes(&self, buckets: &mut [u64; HISTOGRAM_BUCKETS]) {
        buckets.iter_mut().zip(&self.counts.sizes).for_each(|(bucket, count)| *bucket += count);
    }

    fn totals(&self) -> Totals {
        self.counts.totals()
    }

    fn reset_peak(&mut self) {
        self.counts.reset_peak();
    }

    fn live_blocks(&self) -> usize {
        self.counts.live().0
    }

    fn live_bytes(&self) -> usize {
        self.counts.live().1
    }

    fn free_bytes(&self) -> (usize, usize) {
        let (blocks, bytes) = self.counts.live();
        let free = self.capacity - bytes - blocks * S::HEAD;
        (free, self.free.largest(&self.store).saturating_sub(S::HEAD))
    }

    fn for_each_live(&self, visit: &mut dyn FnMut(Block)) {
        self.blocks().filter(|id| !self.store.is_free(*id)).for_each(|id| visit(self.block(id)));
    }

    fn check(&self) -> core::result::Result<(), Broken> {
        let (mut free, mut live, mut bytes, mut capacity) = (0, 0, 0, 0);
        for extent in self.spans() {
            let mut expected = self.store.start(extent.first);
            let mut left_free = false;
            for id in self.blocks_of(extent) {
                let at = self.store.start(id);
                let broken = |invariant| Err(Broken { invariant, at });
                let size = self.store.size(id);
                if at != expected || size < S::MIN || size > self.store.start(extent.end) - at {
                    return broken("1: blocks tile their span");
                }
                if !is_aligned(at, self.granule) || !is_aligned(size, self.granule) {
                    return broken("5: starts and sizes are multiples of the granule");
                }
                let is_free = self.store.is_free(id);
                if is_free && left_free {
                    return broken("2: no two neighbours are free");
                }
                if self.store.prev_free(id).is_some() != left_free {
                    return broken("1: a block knows whether its left neighbour is free");
                }
                self.store.check(id).or_else(broken)?;
                if is_free {
                    free += 1;
                } else {
                    live += 1;
                    bytes += size - S::HEAD;
                }
                capacity += size;
                expected = at + size;
                left_free = is_free;
            }
            if expected != self.store.start(extent.end) {
                return Err(Broken { invariant: "1: blocks tile their span", at: expected });
            }
        }
        let broken = |invariant| Broken { invariant, at: 0 };
        if ((live, bytes), capacity) != (self.counts.live(), self.capacity) {
            return Err(broken("4: the counters count"));
        }
        let known = |id| {
            let start = self.store.start(id);
            is_aligned(start, self.granule) && self.owns(start)
        };
        let filed = self.free.check(&self.store, &known).map_err(broken)?;
        if filed == free { Ok(()) } else { Err(broken("3: every free block is filed")) }
    }
}

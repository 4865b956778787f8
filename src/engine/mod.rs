//! How a range is divided.
//!
//! An engine owns no memory and takes no lock: it is given spans, cuts blocks from them and takes blocks
//! back, under `&mut self`. It never calls a source and never allocates from what it serves. Addresses are
//! plain numbers, because some of the memory served here no CPU can touch; engines that keep their books
//! inside free blocks say so by their store's type.

pub mod atomic_slots;
pub mod ranges;
pub mod slots;

use core::alloc::Layout;
use core::fmt;

use crate::base::error::PointerFault;
use crate::base::stats::HISTOGRAM_BUCKETS;

/// A stretch of memory given to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First address.
    pub start: usize,
    /// Length in bytes.
    pub len: usize,
    /// Whether all of it is known to read as zero.
    pub zeroed: bool,
}

/// A block that an engine hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// First address.
    pub start: usize,
    /// Usable bytes, at least what was asked for.
    pub size: usize,
    /// Leading bytes that may hold anything; all after them are known to read as zero. `size` where nothing
    /// is known.
    pub dirty: usize,
}

impl Block {
    /// Whether all of the block is known to read as zero.
    #[inline]
    pub fn zeroed(&self) -> bool {
        self.dirty == 0
    }
}

/// A kind of memory, as a type: what decides where an engine may keep its books.
pub trait Space: 'static {}

/// Memory that the CPU may read and write as it likes, at the price of ordinary memory.
///
/// # Safety
/// Engines dereference addresses of such memory.
pub unsafe trait CpuSpace: Space {}

/// Ordinary memory of the process.
#[derive(Clone, Copy, Debug)]
pub struct HostSpace;

impl Space for HostSpace {}
// SAFETY: ordinary memory.
unsafe impl CpuSpace for HostSpace {}

/// An engine that may serve memory of kind `M`. A pool over memory of kind `M` asks for `E: Serves<M>`, so an
/// engine whose books lie in the memory itself cannot be paired with memory that the CPU must not touch.
pub trait Serves<M: Space>: Engine {}

/// An invariant that does not hold: which one, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The invariant.
    pub invariant: &'static str,
    /// The address or index where it fails.
    pub at: usize,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken at {:#x}: {}", self.at, self.invariant)
    }
}

/// What an engine did over its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Totals {
    /// Blocks cut.
    pub allocs: u64,
    /// Blocks taken back.
    pub frees: u64,
    /// Usable bytes of all blocks cut, growth in place included.
    pub alloc_bytes: u64,
    /// Most usable bytes live at once since the peak was last reset.
    pub peak_bytes: usize,
}

/// What every engine does.
///
/// # Safety
/// Blocks that are live never overlap each other nor leave the spans that were added, and have the size and
/// alignment that were asked for.
pub unsafe trait Engine: Send {
    /// Adds a span to serve from; adjacent spans may be joined. `Err` gives back a span that is of no use
    /// (too small, or there is no room to note it).
    ///
    /// # Safety
    /// The span overlaps none added before, and stays valid and unused by others until removed. An engine
    /// whose books lie inside the memory needs it writable.
    unsafe fn add(&mut self, span: Span) -> Result<(), Span>;

    /// Whether the engine calls code of the user's (a policy), which might call the pool again.
    fn calls_out(&self) -> bool {
        true
    }

    /// Length of a span that has room for `payload` bytes of blocks.
    fn span_len(&self, payload: usize) -> Option<usize> {
        Some(payload)
    }

    /// Bytes for blocks in a span of `span_len` bytes; what a pool counts as reserved.
    fn payload(&self, span_len: usize) -> usize {
        span_len
    }

    /// Payload of a span, aligned as `layout`, that surely serves `layout`.
    fn need(&self, layout: Layout) -> Option<usize>;

    /// Bytes that are sure to be served without a further span.
    fn ready(&self) -> usize {
        self.free_bytes().1
    }

    /// Adds to `buckets` how many blocks of each size were cut; buckets as in
    /// [`MemoryStats::size_histogram`](crate::base::stats::MemoryStats::size_histogram).
    fn count_sizes(&self, buckets: &mut [u64; HISTOGRAM_BUCKETS]);

    /// Cuts a block; `None` when nothing fits. The size is not 0.
    fn alloc(&mut self, layout: Layout) -> Option<Block>;

    /// [`alloc`](Engine::alloc) where that is quick, for those who need not know what the block holds: its start
    /// and its size, which travel in registers. A start of 0 says nothing but that `alloc` may know better.
    #[inline]
    fn take(&mut self, layout: Layout) -> (usize, usize) {
        self.alloc(layout).map_or((0, 0), |block| (block.start, block.size))
    }

    /// Takes a block back and returns its usable size.
    ///
    /// # Safety
    /// `start` is the address of a live block of this engine.
    unsafe fn free(&mut self, start: usize) -> usize;

    /// [`free`](Engine::free) where that is quick; whether it was. If not, nothing has changed.
    ///
    /// # Safety
    /// As for `free`.
    #[inline]
    unsafe fn give(&mut self, start: usize) -> bool {
        // SAFETY: the caller's contract.
        unsafe { self.free(start) };
        true
    }

    /// `free` for an address that nobody vouches for: the fault, as far as it is detected, and nothing is
    /// changed then.
    ///
    /// # Safety
    /// Nothing else uses the block, if `start` is one. An address at which no live block of this engine
    /// begins is mostly refused, but an engine without an exact index may be fooled by contents forged to
    /// look like its books.
    unsafe fn free_checked(&mut self, start: usize) -> Result<usize, PointerFault> {
        match self.usable_size(start) {
            // SAFETY: a live block begins there.
            Some(_) => Ok(unsafe { self.free(start) }),
            None => Err(self.fault(start)),
        }
    }

    /// What is wrong with `start`, given that no live block begins there.
    fn fault(&self, start: usize) -> PointerFault {
        if self.owns(start) { PointerFault::NotLive } else { PointerFault::Foreign }
    }

    /// Usable size of the live block at `start`; `None` where none begins, as far as the engine can tell
    /// without reading memory outside its spans.
    fn usable_size(&self, start: usize) -> Option<usize>;

    /// Grows the live block at `start` in place to at least `size` bytes; returns its new usable size.
    ///
    /// # Safety
    /// As for `free`.
    unsafe fn grow(&mut self, start: usize, size: usize) -> Option<usize>;

    /// Cuts the tail off the live block at `start`, keeping at least `size` bytes; returns its usable size.
    ///
    /// # Safety
    /// As for `free`.
    unsafe fn shrink(&mut self, start: usize, size: usize) -> usize;

    /// Whether any address of `address` lies in a span of this engine.
    fn owns(&self, address: usize) -> bool;

    /// Removes a span in which nothing is live, of at most `at_most` bytes, whole as it was added.
    fn remove_idle(&mut self, at_most: usize) -> Option<Span>;

    /// Forgets all blocks: every span is free again.
    ///
    /// # Safety
    /// No block of this engine is used or freed after.
    unsafe fn reset(&mut self);

    /// [`reset`](Engine::reset) if nothing is live; how many blocks are.
    fn reset_if_idle(&mut self) -> usize {
        self.settle();
        let live = self.live_blocks();
        if live == 0 {
            // SAFETY: there is no block.
            unsafe { self.reset() };
        }
        live
    }

    /// Finishes what was put off for speed, so that every answer below is exact and free memory is whole.
    fn settle(&mut self) {}

    /// What the engine did so far, after [`settle`](Engine::settle).
    fn totals(&self) -> Totals;

    /// Starts the peak anew from what is live.
    fn reset_peak(&mut self);

    /// Blocks that are live.
    fn live_blocks(&self) -> usize;

    /// Usable bytes of all live blocks.
    fn live_bytes(&self) -> usize;

    /// Bytes that are free, and the largest range among them.
    fn free_bytes(&self) -> (usize, usize);

    /// Calls `visit` with every live block.
    fn for_each_live(&self, visit: &mut dyn FnMut(Block));

    /// Walks every invariant of the engine.
    fn check(&self) -> Result<(), Broken>;
}

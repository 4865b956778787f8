//! The thread-cached heap, behind [`GlobalPool`](crate::GlobalPool) and [`CpuPool`](crate::CpuPool).
//!
//! | word | meaning |
//! |---|---|
//! | class | one of 81 block sizes (`class`) |
//! | block | what a program gets |
//! | span | 1 to 16 slices cut into blocks of one class, or one larger block (`span`) |
//! | slice | 64 KiB of a segment |
//! | segment | 4 MiB with one owner |
//! | heap | what one thread owns: segments, stacks of free blocks (`thread`, `holdings`, `purge`) |
//! | hub | what the threads of one pool share (`hub`, `budget`), and segments without owner (`unowned`) |
//! | cache | a thread's stack of free blocks of a class |
//! | large | a block with a mapping of its own (`large`) |
//!
//! The way of a block: *carved* from its span, popped from a cache by `alloc` (`refill`), pushed by `free`; in
//! batches back to the bitmap of its span by its owner (`flush`), or to a second one by others (`foreign`, `remote`).
//! The fast paths touch the stacks and nothing else, hold no lock and have no locked instruction.
//!
//! Who may touch what: a thread its own heap and the cells of its segments; any thread the atomics of a
//! segment, and the frozen cells of a span while it holds a block of it; the holder of a hub's lock what is on
//! the hub's lists. A thread that ends leaves segments with live blocks to be adopted by whoever needs a segment;
//! blocks of theirs are freed under the hub's lock meanwhile (`foreign`).

mod bind;
mod budget;
mod check;
mod class;
mod fault;
mod fence;
mod flush;
mod foreign;
mod fork;
mod guard;
mod holdings;
mod hub;
mod large;
mod list;
mod lock;
#[cfg(all(test, loom))]
mod loom_models;
mod purge;
mod refill;
mod registry;
mod regret;
mod remote;
mod seal;
mod segment;
pub(crate) mod settings;
mod single;
mod slot;
#[cfg(all(test, not(loom)))]
mod soak;
mod span;
mod spare;
pub(crate) mod stats;
pub(crate) mod stderr;
mod sweep;
#[cfg(all(test, not(loom)))]
mod tests;
mod thread;
mod unowned;

pub(crate) use bind::{prepare as prepare_process, process};
pub(crate) use class::{MAX as CLASS_MAX, MIN_ALIGN, of_layout, of_small, size as class_size};
pub(crate) use hub::Hub;
use registry::Unit;
pub(crate) use thread::ThreadHeap;

use core::alloc::Layout;
use core::ptr::{self, NonNull};

use crate::base::host::Resized;
use large::Large;
use segment::{SEGMENT, SLICE, Segment, segment_of};
use settings::Part;
use span::SINGLE;

/// Largest block that shares a segment with others.
const SINGLE_MAX: usize = 1 << 20;

/// The segment of a block of a class; these never begin at a segment's first byte.
#[inline(always)]
fn segment_of_small(block: *mut u8) -> *const Segment {
    block.map_addr(|address| address & !(SEGMENT - 1)).cast()
}

impl ThreadHeap {
    /// A block of `class`; null when there is no memory.
    #[inline(always)]
    pub(crate) fn alloc(&self, class: usize) -> *mut u8 {
        // SAFETY: the heap is the calling thread's, and classes are in range.
        let block = unsafe { self.front.pop(class) };
        if block.is_null() { self.refill(class) } else { block }
    }

    /// Frees a block of `class`.
    ///
    /// # Safety
    /// `block` is a live block of that class of this heap's hub.
    #[inline(always)]
    pub(crate) unsafe fn free(&self, class: usize, block: *mut u8) {
        // SAFETY: the heap is the calling thread's, the class in range, and the block the caller's.
        if !unsafe { self.front.push(class, block) } {
            self.flush(class, block);
        }
    }

    /// A block of `class` for a request aligned to `align`.
    pub(crate) fn alloc_aligned(&self, class: usize, align: usize) -> *mut u8 {
        match self.guard() {
            Some(guard) => self.guarded_alloc(guard, class::size(class), align),
            None => self.alloc(class),
        }
    }

    /// A block of `class` for a request of `size` bytes aligned to `align`, which will not be freed by its layout.
    pub(crate) fn alloc_unsized(&self, class: usize, size: usize, align: usize) -> *mut u8 {
        match self.guard() {
            Some(guard) => self.guarded_alloc(guard, size, align),
            None => self.alloc(class),
        }
    }

    /// A block larger than any class, or aligned more than blocks are. The flag says whether it is zero.
    #[cold]
    pub(crate) fn alloc_big(&self, size: usize, align: usize) -> (*mut u8, bool) {
        match self.guard() {
            Some(_) => self.guarded_alloc_big(size, align),
            None => self.alloc_unguarded_big(size, align),
        }
    }

    fn alloc_unguarded_big(&self, size: usize, align: usize) -> (*mut u8, bool) {
        if size <= SINGLE_MAX && size > class::MAX && align <= SLICE {
            return self.alloc_single(size);
        }
        if !self.may_hold(size) {
            return (ptr::null_mut(), false);
        }
        let (block, zeroed) = large::alloc(self.hub(), size, align);
        if block.is_null() {
            // What is idle may bring us below the limit.
            self.purge_all();
            return large::alloc(self.hub(), size, align);
        }
        (block, zeroed)
    }

    /// Runs `request` with growth forbidden.
    pub(crate) fn without_growth<R>(&self, request: impl FnOnce(&Self) -> R) -> R {
        self.frugal.set(true);
        let answer = request(self);
        self.frugal.set(false);
        answer
    }

    /// Calls `visit` with address and size of the live blocks of this heap and of heaps whose threads ended,
    /// which it adopts, and with all larges. Blocks of other threads are not seen, nor those that other threads
    /// freed.
    pub(crate) fn for_each_live(&self, mut visit: impl FnMut(*mut u8, usize)) {
        self.flush_all();
        while let Some(segment) = self.hub().adopt_any(self, |_| true, true) {
            self.welcome(segment);
        }
        for segment in self.segments.iter() {
            for span in segment.spans() {
                let (class, size) = (span.class.get() as usize, span.size.get() as usize);
                span.live_blocks()
                    .filter(|&block| class >= class::COUNT || !self.hub().is_cached(class, block))
                    .for_each(|block| visit(block, size));
            }
        }
        self.hub().larges.lock().each(|block, size| visit(block as *mut u8, size));
    }

    /// Frees a block of which nothing is known; returns its usable bytes, for heaps that are not hardened.
    ///
    /// # Safety
    /// `block` is a live block of this heap's hub.
    #[inline]
    pub(crate) unsafe fn free_unsized(&self, block: *mut u8) -> usize {
        // SAFETY: a live block has books before it.
        let segment = unsafe { &*segment_of(block) };
        if !segment.head.large.get() {
            let class = segment.class_at(block);
            if class < SINGLE {
                // SAFETY: the block is the caller's and of that class.
                unsafe { self.free(class as usize, block) };
                return class::size(class as usize);
            }
        }
        self.free_unsized_slow(segment, block)
    }

    #[cold]
    #[inline(never)]
    fn free_unsized_slow(&self, segment: &Segment, block: *mut u8) -> usize {
        if let Some(guard) = self.guard() {
            self.guarded_free(guard, block);
            return 0;
        }
        if let Some(large) = Large::at(segment) {
            if !large.begins_at(block) {
                fault::invalid_free(block);
            }
            let usable = large.usable();
            large::free(large);
            return usable;
        }
        if segment.class_at(block) != SINGLE {
            fault::invalid_free(block);
        }
        let usable = segment.usable_at(block);
        self.free_single(segment, block);
        usable
    }
}

/// Usable bytes of the live block at `block`.
///
/// # Safety
/// `block` is a live block of some hub.
pub(crate) unsafe fn usable_size(block: *mut u8) -> usize {
    // SAFETY: a live block has books before it.
    let segment = unsafe { &*segment_of(block) };
    match Large::at(segment) {
        Some(large) => large.usable(),
        None => segment.usable_at(block),
    }
}

/// Whether a block of `hub` lies at `address`, as far as can be told without touching foreign memory: the
/// address of a carved block's first byte, free or not.
pub(crate) fn block_size_at(hub: &Hub, address: *mut u8) -> Option<usize> {
    // The byte before: see `segment_of`.
    match registry::lookup(address.addr().wrapping_sub(1)) {
        Unit::Segment(owner) if ptr::eq(owner, hub) => {
            // SAFETY: segments stay mapped as long as their hub, which `hub` is.
            let segment = unsafe { &*segment_of(address) };
            segment.begins_block(address).then(|| segment.usable_at(address))
        }
        Unit::LargeBooks(owner) if ptr::eq(owner, hub) => {
            let mut found = None;
            hub.larges.lock().each(|at, size| {
                if at == address.addr() {
                    found = Some(size);
                }
            });
            found
        }
        _ => None,
    }
}

/// Whether a block of `hub` begins at `address`, free or not.
///
/// # Safety
/// No large block that `address` lies in is freed meanwhile; apart from that any address will do.
pub(crate) unsafe fn begins_block(hub: &Hub, address: *mut u8) -> bool {
    match registry::lookup(address.addr().wrapping_sub(1)) {
        Unit::Segment(owner) if ptr::eq(owner, hub) => {
            // SAFETY: segments stay mapped as long as their hub, which `hub` is.
            unsafe { &*segment_of(address) }.begins_block(address)
        }
        Unit::LargeBooks(owner) if ptr::eq(owner, hub) => {
            // SAFETY: the unit begins with the books of a large block, unless that is being freed this moment.
            let segment = unsafe { &*segment_of(address) };
            Large::at(segment).is_some_and(|large| large.begins_at(address))
        }
        _ => false,
    }
}

/// Whether `address` lies in memory of `hub`; any address will do.
pub(crate) fn owns(hub: &Hub, address: usize) -> bool {
    match registry::lookup(address) {
        Unit::Segment(owner) => ptr::eq(owner, hub),
        Unit::LargeBooks(owner) | Unit::LargeRest(owner) => {
            ptr::eq(owner, hub) && hub.larges.lock().contain(address)
        }
        Unit::Foreign => false,
    }
}

/// Grows or shrinks a block larger than any class; `None` where that takes a new block. Bytes from the second
/// value on are zero.
///
/// # Safety
/// `block` is a live block, the caller's.
#[cold]
pub(crate) unsafe fn resize_big(block: *mut u8, size: usize, may_move: bool) -> Option<(*mut u8, usize)> {
    // SAFETY: a live block has books before it.
    let segment = unsafe { &*segment_of(block) };
    match Large::at(segment) {
        // Pages with guards beside them stay where they are, and take no more.
        Some(large) if segment.hub().settings.has(Part::Checks) => {
            let usable = large.usable();
            (size > class::MAX && size <= usable && size >= usable / 2).then_some((block, usable))
        }
        Some(large) if size > SINGLE_MAX => {
            let known = large.usable();
            large::resize(large, size, may_move).map(|moved| (moved, known))
        }
        Some(_) => None,
        None => {
            let usable = segment.usable_at(block);
            (size > class::MAX && size <= usable && size >= usable / 2).then_some((block, usable))
        }
    }
}

/// Resizes without copying, in terms of layouts: in place, or with `may_move` by moving pages. `None` where
/// that takes a new block.
///
/// # Safety
/// `block` is a live block of a heap that `old` fits.
pub(crate) unsafe fn resize_in_place(
    block: NonNull<u8>,
    old: Layout,
    new: Layout,
    may_move: bool,
) -> Option<Resized> {
    match (of_layout(old.size(), old.align()), of_layout(new.size(), new.align())) {
        (Some(was), Some(is)) if was == is => {
            let block = NonNull::slice_from_raw_parts(block, class::size(is));
            Some(Resized { block, zero_from: usize::MAX })
        }
        // Mappings move to a multiple of a segment, and their blocks to where they were in it.
        (None, None) if old.align() == new.align() => {
            // SAFETY: the caller's contract.
            let (moved, known) = unsafe { resize_big(block.as_ptr(), new.size(), may_move) }?;
            // SAFETY: the block is live.
            let size = unsafe { usable_size(moved) };
            let block = NonNull::slice_from_raw_parts(NonNull::new(moved)?, size);
            Some(Resized { block, zero_from: known })
        }
        _ => None,
    }
}

//! Segments and spans: where blocks lie and which of them are free.
//!
//! ```text
//! segment, 4 MiB at a multiple of 4 MiB
//! ┌─────────────────┬──────────┬──────────┬──────────┬─ ─ ─┬──────────┐
//! │ Segment (16 KiB)│ slice 0  │ slice 1  │ slice 2  │     │ slice 63 │   slices of 64 KiB
//! └─────────────────┴──────────┴──────────┴──────────┴─ ─ ─┴──────────┘
//!                               ╰── span of 1 … 16 slices: blocks of one class, or one larger block
//! ```
//! A block's address leads to its segment by masking and to its span by the slice number. What is free is
//! noted in bitmaps, never inside blocks: nothing that a program writes to freed memory can damage the heap,
//! and free pages can be given back without losing anything. Bitmaps of more than 256 bits lie at the start
//! of their span.
//!
//! Invariants:
//! 1. *Owner*: `owner` is the heap of the one thread that may touch the cells of a segment; null while the
//!    segment is abandoned or unused, and then only the holder of the core's lock may. Atomics are for all.
//! 2. *Frozen*: the cells marked so do not change while a block of the span is live, so whoever holds a block
//!    may read them.
//! 3. *Bits*: a carved block (index below `carved`) is live (in a program's or a cache's hands) if neither
//!    its bit in `free` nor its bit in `remote` is set, and never are both. No bit is set above `carved`.
//! 4. `free_count` is the number of bits in `free`; `settled <= free_count`.
//! 5. The pages marked in `discarded` belong to free blocks, and read as zero.
//! 6. A slice is in `vacant`, or belongs to exactly one span; `pristine` slices hold no memory and read as zero: they
//!    are vacant, or no block of their span that reaches into them was carved yet.
//! 7. Segments stay mapped as long as their core lives, because a freer may still announce in `remote_mask`
//!    what the owner has already collected. One that lost its books with its memory reads as zero, which no
//!    look-up takes for a block.

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use super::hub::Hub;
use super::list::{Chain, Links};
use super::settings::Part;
use super::span::{INLINE_WORDS, NO_CLASS, Place, Span};
use super::thread::ThreadHeap;

pub(crate) const SEGMENT: usize = 4 << 20;
pub(crate) const SLICE: usize = 64 << 10;
pub(crate) const SLICES: usize = SEGMENT / SLICE;
/// Bytes at the start of a segment that hold its books.
pub(crate) const HEADER: usize = 16 << 10;
/// Pages are counted in this unit at the finest, whatever the system's page size.
pub(super) const MIN_PAGE: usize = 4096;

/// What every region begins with, whether a segment or a large mapping.
#[repr(C)]
pub(crate) struct Head {
    /// The owner's heap; never set in a large mapping.
    pub(crate) owner: AtomicPtr<ThreadHeap>,
    /// Frozen.
    pub(crate) hub: Cell<*const Hub>,
    /// Whether this is a mapping of one large block.
    pub(crate) large: Cell<bool>,
}

/// The books of a segment.
#[repr(C)]
pub(crate) struct Segment {
    pub(crate) head: Head,
    /// Whether the segment lies in memory for which huge pages are asked.
    pub(crate) huge: Cell<bool>,
    _line: [u64; 4],
    /// Frozen per slice.
    pub(crate) class_of: [Cell<u8>; SLICES],
    span_of: [Cell<u8>; SLICES],
    pub(crate) remote_mask: Line<AtomicU64>,
    pub(crate) vacant: Cell<u64>,
    pub(crate) pristine: Cell<u64>,
    list: Links<Segment>,
    roomy_list: Links<Segment>,
    queue: Links<Segment>,
    /// Slices whose last page is a guard page.
    pub(crate) guarded: Cell<u64>,
    /// Whether it is on its owner's list of segments with vacant slices.
    pub(crate) roomy: Cell<bool>,
    /// Whether it is on its owner's list of segments with idle slices.
    pub(crate) queued: Cell<bool>,
    discarded: [Cell<u64>; SEGMENT / MIN_PAGE / 64],
    spans: [Span; SLICES],
}

/// All segments of an owner, or those of a hub that nobody owns.
pub(crate) struct Segments;
impl Chain for Segments {
    type Node = Segment;
    fn links(node: &Segment) -> &Links<Segment> {
        &node.list
    }
}

/// Segments with vacant slices.
pub(crate) struct RoomySegments;
impl Chain for RoomySegments {
    type Node = Segment;
    fn links(node: &Segment) -> &Links<Segment> {
        &node.roomy_list
    }
}

/// Segments with idle slices: vacant ones that hold memory.
pub(crate) struct SegmentQueue;
impl Chain for SegmentQueue {
    type Node = Segment;
    fn links(node: &Segment) -> &Links<Segment> {
        &node.queue
    }
}

/// A value on a cache line of its own.
#[repr(align(64))]
pub(crate) struct Line<T>(pub(crate) T);

const _: () = assert!(size_of::<Segment>() <= HEADER);

/// The segment whose books lie before `address`. No block starts at a segment's first byte except blocks
/// aligned to more than a segment, whose books lie one segment below: hence the byte before.
#[inline(always)]
pub(crate) fn segment_of(address: *mut u8) -> *const Segment {
    address.wrapping_sub(1).map_addr(|address| address & !(SEGMENT - 1)).cast()
}

#[inline(always)]
fn slice_of(address: *mut u8) -> usize {
    (address as usize / SLICE) % SLICES
}

/// A run of `count` slices.
pub(crate) const fn run(first: usize, count: usize) -> u64 {
    (if count >= 64 { u64::MAX } else { (1 << count) - 1 }) << first
}

/// The first bits of the runs of `count` bits that start at or after `from`.
fn runs(mut bits: u64, count: usize, from: usize) -> u64 {
    bits &= u64::MAX << from;
    // Shrink every run by count - 1, in doubling steps.
    let mut left = count - 1;
    let mut step = 1;
    while left > 0 && bits != 0 {
        let by = step.min(left);
        bits &= bits >> by;
        left -= by;
        step *= 2;
    }
    bits
}

fn first(bits: u64) -> Option<usize> {
    (bits != 0).then(|| bits.trailing_zeros() as usize)
}

impl Segment {
    /// Prepares a segment in fresh, zeroed memory; everything that is not set here is right as zero.
    ///
    /// # Safety
    /// `base` is a segment's worth of zeroed memory of `hub`, used by nobody.
    pub(crate) unsafe fn create<'a>(base: *mut u8, hub: &Hub, huge: bool) -> &'a Segment {
        debug_assert!((base as usize).is_multiple_of(SEGMENT));
        // SAFETY: zeroed memory is a valid Segment: cells of integers, booleans, null pointers and
        // `Place::Full`, which is 0.
        let segment = unsafe { &*base.cast::<Segment>() };
        segment.head.hub.set(hub);
        segment.huge.set(huge);
        segment.class_of.iter().for_each(|class| class.set(NO_CLASS));
        segment.vacant.set(u64::MAX);
        segment.pristine.set(u64::MAX);
        if hub.settings.has(Part::GuardPages) {
            super::fence::guard_segment(segment);
        }
        segment
    }

    pub(crate) fn base(&self) -> *mut u8 {
        ptr::from_ref(self).cast_mut().cast()
    }

    /// The span that `address` lies in.
    #[inline(always)]
    pub(crate) fn span_at(&self, address: *mut u8) -> &Span {
        let first = self.span_of[slice_of(address)].get() as usize;
        &self.spans[first % SLICES]
    }

    #[inline(always)]
    pub(crate) fn class_at(&self, address: *mut u8) -> u8 {
        self.class_of[slice_of(address)].get()
    }

    /// Whether a block, live or not, begins at `address`, which lies in this segment.
    pub(crate) fn begins_block(&self, address: *mut u8) -> bool {
        address as usize - self.base() as usize >= HEADER
            && self.class_at(address) != NO_CLASS
            && self.span_at(address).begins_block(address)
    }

    pub(super) fn hub(&self) -> &Hub {
        // SAFETY: a hub outlives its segments.
        unsafe { &*self.head.hub.get() }
    }

    /// Usable bytes of the block at `block`.
    pub(crate) fn usable_at(&self, block: *mut u8) -> usize {
        self.span_at(block).size.get() as usize - self.hub().settings.seal()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.vacant.get() == u64::MAX
    }

    /// Vacant slices that hold memory.
    pub(crate) fn idle(&self) -> u64 {
        self.vacant.get() & !self.pristine.get()
    }

    /// Bytes of those.
    pub(crate) fn idle_bytes(&self) -> usize {
        self.idle().count_ones() as usize * SLICE
    }

    /// The spans of this segment.
    pub(crate) fn spans(&self) -> impl Iterator<Item = &Span> {
        let taken = !self.vacant.get();
        self.spans
            .iter()
            .enumerate()
            .filter(move |(at, _)| taken >> at & 1 == 1 && self.span_of[*at].get() as usize == *at)
            .map(|(_, span)| span)
    }

    /// The first slice of a vacant run of `count` slices that starts at or after `from`: of all such runs one that
    /// holds most memory.
    pub(crate) fn find_run(&self, count: usize, from: usize) -> Option<usize> {
        let mut starts = runs(self.vacant.get(), count, from);
        let mut best = first(starts)?;
        if self.idle() & (u64::MAX << from) != 0 {
            let pristine = |at| (self.pristine.get() & run(at, count)).count_ones();
            let mut least = pristine(best);
            while least > 0 && starts != 0 {
                let at = starts.trailing_zeros() as usize;
                starts &= starts - 1;
                if pristine(at) < least {
                    (best, least) = (at, pristine(at));
                }
            }
        }
        Some(best)
    }

    /// The first slice of such a run that holds memory throughout.
    pub(crate) fn find_idle_run(&self, count: usize, from: usize) -> Option<usize> {
        first(runs(self.idle(), count, from))
    }

    /// Makes a span of vacant slices.
    ///
    /// The last `spare` bytes get no block.
    pub(crate) fn make_span(
        &self,
        first: usize,
        count: usize,
        class: u8,
        size: usize,
        spare: usize,
    ) -> &Span {
        let slices = run(first, count);
        debug_assert_eq!(self.vacant.get() & slices, slices);
        let zeroed = self.pristine.get() & slices == slices;
        self.vacant.set(self.vacant.get() & !slices);
        for slice in first..first + count {
            self.class_of[slice].set(class);
            self.span_of[slice].set(first as u8);
        }
        let span = &self.spans[first];
        let start = self.base() as usize + if first == 0 { HEADER } else { first * SLICE };
        let end = self.base() as usize + (first + count) * SLICE - spare;
        let mut base = start;
        let mut capacity = (end - start) / size;
        if capacity > 64 * INLINE_WORDS {
            let words = capacity.div_ceil(64);
            // A block that is written to before its start does not reach the maps.
            let gap = if spare > 0 { 128 } else { 0 };
            let maps = (2 * words * 8).next_multiple_of(128) + gap;
            base = start + maps;
            capacity = (end - base) / size;
            let free = start as *mut Cell<u64>;
            if !zeroed {
                // SAFETY: the span's first bytes, vacant until now.
                unsafe { free.write_bytes(0, 2 * words) };
            }
            span.free.set(free);
            // SAFETY: within the span.
            span.remote.set(unsafe { free.add(words) }.cast());
        } else {
            span.free.set(ptr::null());
            span.free_inline.iter().for_each(|word| word.set(0));
            span.remote.set(ptr::null());
            span.remote_inline.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
        span.base.set(base);
        span.size.set(size as u32);
        span.reciprocal.set((1u64 << 32).div_ceil(size as u64) as u32);
        span.capacity.set(capacity as u32);
        span.class.set(class);
        span.first.set(first as u8);
        span.slices.set(count as u8);
        for cell in [&span.free_count, &span.carved, &span.settled, &span.discarded, &span.committed] {
            cell.set(0);
        }
        span.notify_at.set(1);
        span.hint.set(u16::MAX);
        span.place.set(Place::Full);
        span.zeroed.set(zeroed);
        span
    }

    /// Takes notice that blocks of `span` are carved up to `end`; returns how many slices hold memory now that did
    /// not before.
    pub(crate) fn touch(&self, span: &Span, end: usize) -> usize {
        let first = span.first.get() as usize;
        let last = (end - 1 - self.base() as usize) / SLICE;
        let fresh = self.pristine.get() & run(first, last + 1 - first);
        self.pristine.set(self.pristine.get() & !fresh);
        if fresh == 0 { 0 } else { fresh.count_ones() as usize }
    }

    /// Takes a span apart whose blocks are all free; returns those of its slices that hold memory.
    pub(crate) fn unmake_span(&self, span: &Span) -> u64 {
        const PAGES: usize = SLICE / MIN_PAGE;
        const ALL: u64 = (1 << PAGES) - 1;
        let (first, count) = (span.first.get() as usize, span.slices.get() as usize);
        for slice in first..first + count {
            self.class_of[slice].set(NO_CLASS);
            if span.discarded.get() > 0 {
                let word = &self.discarded[slice * PAGES / 64];
                let shift = slice * PAGES % 64;
                if word.get() >> shift & ALL == ALL {
                    self.pristine.set(self.pristine.get() | 1 << slice);
                }
                word.set(word.get() & !(ALL << shift));
            }
        }
        span.discarded.set(0);
        let slices = run(first, count);
        self.vacant.set(self.vacant.get() | slices);
        slices & !self.pristine.get()
    }

    fn pages(&self, from: usize, to: usize) -> (usize, usize) {
        (from / MIN_PAGE, to.div_ceil(MIN_PAGE))
    }

    fn marked(&self, page: usize) -> bool {
        self.discarded[page / 64].get() >> (page % 64) & 1 == 1
    }

    fn mark(&self, page: usize) {
        let word = &self.discarded[page / 64];
        word.set(word.get() | 1 << (page % 64));
    }

    fn unmark(&self, page: usize) -> bool {
        let word = &self.discarded[page / 64];
        let was = word.get() >> (page % 64) & 1 == 1;
        word.set(word.get() & !(1 << (page % 64)));
        was
    }

    /// Finds page-aligned stretches of free blocks of `span` that still hold memory and passes each as
    /// (offset, length) to `discard`; marks them if that says so. Returns the bytes given back.
    pub(crate) fn discard_free(
        &self,
        span: &Span,
        page: usize,
        mut discard: impl FnMut(*mut u8, usize) -> bool,
    ) -> usize {
        let base = self.base() as usize;
        let mut given = 0;
        span.for_each_free_run(|from, to| {
            let start = span.base.get() + from * span.size.get() as usize;
            let mut end = span.base.get() + to * span.size.get() as usize;
            if to == span.carved.get() as usize {
                // What follows was never touched.
                end = end.next_multiple_of(page).min(self.end_of(span));
            }
            let first = start.next_multiple_of(page);
            let last = end & !(page - 1);
            if first >= last {
                return;
            }
            let (mut at, stop) = self.pages(first - base, last - base);
            while at < stop {
                if self.marked(at) {
                    at += 1;
                    continue;
                }
                let begin = at;
                while at < stop && !self.marked(at) {
                    at += 1;
                }
                let len = (at - begin) * MIN_PAGE;
                if discard(self.base().wrapping_add(begin * MIN_PAGE), len) {
                    (begin..at).for_each(|page| self.mark(page));
                    span.discarded.set(span.discarded.get() + (at - begin) as u32);
                    given += len;
                }
            }
        });
        given
    }

    fn end_of(&self, span: &Span) -> usize {
        self.base() as usize + (span.first.get() as usize + span.slices.get() as usize) * SLICE
    }

    /// Notes that a block of a span with discarded pages will be touched again; returns the bytes that come
    /// back. System pages larger than the unit come back whole.
    pub(crate) fn revive(&self, span: &Span, block: usize, page: usize) -> usize {
        let offset = block - self.base() as usize;
        let from = offset & !(page - 1);
        let to = (offset + span.size.get() as usize).next_multiple_of(page);
        let (from, to) = self.pages(from, to);
        let back = (from..to.min(SEGMENT / MIN_PAGE)).filter(|&page| self.unmark(page)).count();
        span.discarded.set(span.discarded.get() - back as u32);
        back * MIN_PAGE
    }
}

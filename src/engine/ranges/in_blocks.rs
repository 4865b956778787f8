//! Books inside the memory itself: 8 bytes in front of each block, and what free blocks have room for.
//!
//! ```text
//!             start-8     start                                   start+size-16   start+size-8
//!  live      | head     | usable part ...                                        | head of the right
//!  free      | head     | link 0 | link 1 | fresh | ...          | size          | neighbour
//!  span end  | head, size 0                         (a block of size 32: link 0, link 1, size)
//!  span      | start | length | left | right |      padding      | head of the first block
//!
//!  head: bits 63..16 size | 15..3 tag | 2 FRESH | 1 PREV_FREE | 0 LIVE
//! ```
//!
//! 1. Every word named above lies in a span, which its adder left to us, is aligned to 8, and is written
//!    before it is read. Nothing else of a live block is touched.
//! 2. An `Id` is the start of a block whose head is in place; 0 is none.
//! 3. The tag is a hash of the head's address and the seed. A head that ends (its block was merged) is
//!    overwritten, so a head with the right tag is one that we wrote for a block that is still there, but for
//!    one chance in 8192 and contents forged on purpose.
//! 4. `PREV_FREE` says that the left neighbour is free; its size then stands right in front of the head, in
//!    the same 16 bytes. So coalescing to both sides touches two lines besides those of the free lists.
//! 5. `FRESH` says of a free block of at least 48 bytes that everything from the address in its third word on
//!    reads as zero, but for its last word and its first three.

use core::ptr;

use super::bins::MAX_SIZE;
use super::store::{Extent, Nodes, Store};
use super::treap::{self, Tree, View};
use crate::base::bits::{is_aligned, round_down, round_up};
use crate::engine::Span;

const LIVE: u64 = 1;
const PREV_FREE: u64 = 2;
const FRESH: u64 = 4;
const TAG: u64 = 0xfff8;
const SIZE_SHIFT: u32 = 16;

const HEAD: usize = 8;
const MIN: usize = 32;
/// Smallest free block with room for the third word.
const MIN_FRESH: usize = 48;
const SPAN_HEAD: usize = 32;

/// A store whose books lie in the memory that it serves. Only for memory that the CPU may touch; it calls
/// nothing and allocates nothing.
#[derive(Debug)]
pub struct InBlocks {
    granule: usize,
    seed: u64,
    /// Tree of span heads.
    spans: usize,
}

/// # Safety
/// `at` is the address of one of the words of invariant 1.
#[inline(always)]
unsafe fn read(at: usize) -> u64 {
    // SAFETY: invariant 1; whoever added the span exposed its provenance.
    unsafe { *ptr::with_exposed_provenance::<u64>(at) }
}

/// # Safety
/// As for `read`.
#[inline(always)]
unsafe fn write(at: usize, word: u64) {
    // SAFETY: invariant 1; whoever added the span exposed its provenance.
    unsafe { *ptr::with_exposed_provenance_mut::<u64>(at) = word }
}

/// The size in a head.
#[inline(always)]
fn size_in(head: u64) -> usize {
    (head >> SIZE_SHIFT) as usize
}

/// A size as a head holds it.
#[inline(always)]
fn sized(size: usize) -> u64 {
    (size as u64) << SIZE_SHIFT
}

impl Store for InBlocks {}

impl InBlocks {
    #[inline(always)]
    fn head(&self, id: usize) -> u64 {
        // SAFETY: invariants 1 and 2.
        unsafe { read(id - HEAD) }
    }

    #[inline(always)]
    fn set_head(&mut self, id: usize, head: u64) {
        // SAFETY: invariants 1 and 2.
        unsafe { write(id - HEAD, head) }
    }

    #[inline(always)]
    fn tag(&self, id: usize) -> u64 {
        ((id as u64 ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) & TAG
    }

    /// Writes the size of the free block behind its last byte but eight.
    #[inline(always)]
    fn set_foot(&mut self, id: usize, size: usize) {
        // SAFETY: invariant 1; the block is free and this is its last word.
        unsafe { write(id + size - 2 * HEAD, size as u64) }
    }

    /// From where on a free block reads as zero; its end if it has no such part.
    fn fresh_from(&self, id: usize) -> usize {
        let head = self.head(id);
        if head & FRESH != 0 {
            // SAFETY: invariants 1 and 5.
            unsafe { read(id + 16) as usize }
        } else {
            id + size_in(head)
        }
    }

    /// Makes our own words in a fresh block of `size` bytes zero, but for its head, so that it can be divided
    /// or joined; returns from where on all is zero.
    #[cold]
    fn unfresh_slow(&mut self, id: usize, size: usize) -> usize {
        let fresh = self.fresh_from(id);
        for at in [id, id + 8, id + 16, id + size - 2 * HEAD] {
            // SAFETY: invariants 1 and 5.
            unsafe { write(at, 0) };
        }
        fresh
    }

    /// `take` of a fresh block, its right neighbour already told.
    #[cold]
    fn take_fresh_slow(&mut self, id: usize, whole: usize) -> usize {
        let fresh = self.unfresh_slow(id, whole);
        self.set_head(id, (self.head(id) & !FRESH) | LIVE);
        (fresh - id).min(whole - HEAD)
    }

    /// `take_low` of a fresh block.
    #[cold]
    fn take_low_fresh_slow(&mut self, id: usize, whole: usize, size: usize) -> (usize, usize) {
        let fresh = self.unfresh_slow(id, whole);
        self.set_head(id, self.head(id) & !FRESH);
        let (rest, dirty) = self.take_low(id, whole, size);
        self.set_fresh_from(rest, whole - size, fresh);
        (rest, dirty.min(fresh - id))
    }

    /// Notes in a free block of `size` bytes from where on it reads as zero.
    #[inline]
    fn set_fresh_from(&mut self, id: usize, size: usize, from: usize) {
        let from = from.max(id);
        if size >= MIN_FRESH && from < id + size {
            // SAFETY: invariant 1; the block has room for the third word.
            unsafe { write(id + 16, from as u64) };
            self.set_head(id, self.head(id) | FRESH);
        }
    }

    /// First block and end mark of a span; `None` if it has no room for a block.
    fn bounds(&self, span: Span) -> Option<(usize, usize, usize)> {
        let place = round_up(span.start, 8)?;
        let first = round_up(place.checked_add(SPAN_HEAD + HEAD)?, self.granule)?;
        let end = round_down(span.start.checked_add(span.len)?, self.granule);
        let room = end.checked_sub(first)?;
        (MIN..=MAX_SIZE).contains(&room).then_some((place, first, end))
    }

    fn extent(&self, place: usize) -> Extent<usize> {
        // SAFETY: invariant 1: `place` is the head of a span.
        let (start, len) = unsafe { (read(place) as usize, read(place + 8) as usize) };
        let span = Span { start, len, zeroed: false };
        Extent {
            span,
            first: (place + SPAN_HEAD + HEAD).next_multiple_of(self.granule),
            end: round_down(start + len, self.granule),
        }
    }

    /// Writes one free block from `first` to `end`, zero from `fresh` on.
    fn lay(&mut self, first: usize, end: usize, fresh: usize) {
        let size = end - first;
        self.set_head(first, self.tag(first) | sized(size));
        self.set_foot(first, size);
        self.set_head(end, self.tag(end) | LIVE | PREV_FREE);
        self.set_fresh_from(first, size, fresh);
    }
}

impl Nodes for InBlocks {
    type Id = usize;
    const NONE: usize = 0;
    const HEAD: usize = HEAD;
    const MIN: usize = MIN;
    const LARGE: usize = 4096;

    fn new(granule: usize) -> Self {
        Self { granule, seed: 0x5eed_0000_b00c, spans: 0 }
    }

    fn span_books(granule: usize) -> usize {
        (SPAN_HEAD + HEAD).next_multiple_of(granule)
    }

    unsafe fn add_span(&mut self, span: Span) -> Result<usize, Span> {
        let (place, first, end) = self.bounds(span).ok_or(span)?;
        for (word, value) in [span.start, span.len, 0, 0].into_iter().enumerate() {
            // SAFETY: `bounds` saw that the head fits, and the caller left the span to us.
            unsafe { write(place + word * 8, value as u64) };
        }
        let mut root = self.spans;
        treap::insert(&mut Spans, &mut root, place);
        self.spans = root;
        self.lay(first, end, if span.zeroed { first } else { end });
        Ok(first)
    }

    fn remove_span(&mut self, extent: &Extent<usize>) {
        treap::remove(&mut Spans, &mut self.spans, extent.span.start.next_multiple_of(8));
    }

    fn reset(&mut self, mut visit: impl FnMut(&mut Self, usize)) {
        // A new seed makes every old head invalid (invariant 3).
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut next = self.span_from(0);
        while let Some(Extent { span, first, end }) = next {
            let mut fresh = end;
            if let Some((tail, size)) = self.prev_free(end)
                && self.head(tail) & FRESH != 0
            {
                fresh = self.unfresh_slow(tail, size);
            }
            self.lay(first, end, fresh);
            visit(self, first);
            next = self.span_from(span.start + 1);
        }
    }

    fn span_of(&self, address: usize) -> Option<Extent<usize>> {
        let mut at = self.spans;
        while at != 0 {
            let Extent { span, .. } = self.extent(at);
            if address < span.start {
                at = Spans.child(at, 0);
            } else if address - span.start < span.len {
                return Some(self.extent(at));
            } else {
                at = Spans.child(at, 1);
            }
        }
        None
    }

    fn span_from(&self, address: usize) -> Option<Extent<usize>> {
        let at = treap::first(&Spans, self.spans, |_, at| self.extent(at).span.start >= address)?;
        Some(self.extent(at))
    }

    #[inline(always)]
    fn prepare(&mut self) -> bool {
        true
    }

    fn find(&self, start: usize) -> Option<usize> {
        let Extent { first, end, .. } = self.span_of(start)?;
        if start < first || start >= end || !is_aligned(start, self.granule) {
            return None;
        }
        let head = self.head(start);
        let size = size_in(head);
        // FRESH is a free block's, and PREV_FREE may be either way.
        let expected = self.tag(start) | LIVE;
        if head & (TAG | FRESH | LIVE) != expected || size < MIN || size > end - start {
            return None;
        }
        let next = start + size;
        let follows = is_aligned(next, self.granule) && self.head(next) & (TAG | PREV_FREE) == self.tag(next);
        follows.then_some(start)
    }

    #[inline(always)]
    unsafe fn at(&self, start: usize) -> usize {
        debug_assert!(self.head(start) & (LIVE | TAG) == self.tag(start) | LIVE);
        start
    }

    #[inline(always)]
    fn note(&mut self, _: usize) {}

    #[inline(always)]
    fn forget(&mut self, _: usize) {}

    #[inline(always)]
    fn start(&self, id: usize) -> usize {
        id
    }

    #[inline(always)]
    fn size(&self, id: usize) -> usize {
        size_in(self.head(id))
    }

    #[inline(always)]
    fn is_free(&self, id: usize) -> bool {
        self.head(id) & LIVE == 0
    }

    #[inline(always)]
    fn next(&self, id: usize) -> usize {
        id + self.size(id)
    }

    #[inline(always)]
    fn next_free(&self, id: usize, size: usize) -> Option<(usize, usize)> {
        let next = id + size;
        let head = self.head(next);
        if head & LIVE == 0 { Some((next, size_in(head))) } else { None }
    }

    #[inline(always)]
    fn prev_free(&self, id: usize) -> Option<(usize, usize)> {
        if self.head(id) & PREV_FREE == 0 {
            return None;
        }
        // SAFETY: invariants 1 and 4.
        let size = unsafe { read(id - 2 * HEAD) as usize };
        Some((id - size, size))
    }

    #[inline(always)]
    fn take(&mut self, id: usize, whole: usize) -> usize {
        let head = self.head(id);
        let next = id + whole;
        self.set_head(next, self.head(next) & !PREV_FREE);
        if head & FRESH != 0 {
            return self.take_fresh_slow(id, whole);
        }
        self.set_head(id, head | LIVE);
        whole - HEAD
    }

    #[inline(always)]
    fn take_low(&mut self, id: usize, whole: usize, size: usize) -> (usize, usize) {
        let head = self.head(id);
        let rest = id + size;
        if head & FRESH != 0 {
            return self.take_low_fresh_slow(id, whole, size);
        }
        self.set_head(id, (head & (TAG | PREV_FREE)) | sized(size) | LIVE);
        self.set_head(rest, self.tag(rest) | sized(whole - size));
        self.set_foot(rest, whole - size);
        (rest, size - HEAD)
    }

    #[inline]
    fn part(&mut self, id: usize, whole: usize, low: usize) -> usize {
        let head = self.head(id);
        let (high, high_size) = (id + low, whole - low);
        let fresh = if head & FRESH != 0 { self.unfresh_slow(id, whole) } else { id + whole };
        self.set_head(id, (head & TAG) | sized(low));
        self.set_foot(id, low);
        self.set_head(high, self.tag(high) | sized(high_size) | PREV_FREE);
        self.set_foot(high, high_size);
        if head & FRESH != 0 {
            self.set_fresh_from(id, low, fresh);
            self.set_fresh_from(high, high_size, fresh);
        }
        high
    }

    #[inline(always)]
    fn give(
        &mut self,
        id: usize,
        size: usize,
        mut unlink: impl FnMut(&mut Self, usize, usize),
    ) -> (usize, usize) {
        let head = self.head(id);
        let (mut start, mut whole, mut tag) = (id, size, head & TAG);
        let mut fresh = usize::MAX;
        let next = id + size;
        let next_head = self.head(next);
        if next_head & LIVE == 0 {
            let size = size_in(next_head);
            unlink(self, next, size);
            if next_head & FRESH != 0 {
                fresh = self.unfresh_slow(next, size);
            }
            // Invariant 3; and so below.
            self.set_head(next, 0);
            whole += size;
        } else {
            self.set_head(next, next_head | PREV_FREE);
        }
        if head & PREV_FREE != 0 {
            // SAFETY: invariants 1 and 4.
            let size = unsafe { read(id - 2 * HEAD) as usize };
            start = id - size;
            unlink(self, start, size);
            self.set_head(id, 0);
            tag = self.head(start) & TAG;
            whole += size;
        }
        self.set_head(start, tag | sized(whole));
        self.set_foot(start, whole);
        if fresh != usize::MAX {
            self.set_fresh_from(start, whole, fresh);
        }
        (start, whole)
    }

    fn split(&mut self, id: usize, size: usize) -> usize {
        let head = self.head(id);
        let (rest, rest_size) = (id + size, sized(size_in(head) - size));
        self.set_head(id, head - rest_size);
        self.set_head(rest, self.tag(rest) | rest_size | LIVE);
        rest
    }

    fn absorb(&mut self, id: usize, right: usize) {
        let size = self.size(right);
        self.set_head(right, 0);
        self.set_head(id, self.head(id) + sized(size));
        self.set_head(right + size, self.head(right + size) & !PREV_FREE);
    }

    fn push_border(&mut self, id: usize, right: usize, by: usize) -> usize {
        let head = self.head(right);
        let size = size_in(head);
        let fresh = if head & FRESH != 0 { self.unfresh_slow(right, size) } else { right + size };
        let (new, new_size) = (right + by, size - by);
        self.set_head(right, 0);
        self.set_head(id, self.head(id) + sized(by));
        self.set_head(new, self.tag(new) | sized(new_size));
        self.set_foot(new, new_size);
        self.set_fresh_from(new, new_size, fresh);
        new
    }

    #[inline(always)]
    fn link(&self, id: usize, side: usize) -> usize {
        // SAFETY: invariants 1 and 2; the block is free.
        unsafe { read(id + side * 8) as usize }
    }

    #[inline(always)]
    fn set_link(&mut self, id: usize, side: usize, to: usize) {
        // SAFETY: invariants 1 and 2; the block is free.
        unsafe { write(id + side * 8, to as u64) }
    }

    fn check(&self, id: usize) -> Result<(), &'static str> {
        let head = self.head(id);
        let size = size_in(head);
        if head & TAG != self.tag(id) {
            return Err("in blocks 3: a block's head bears its tag");
        }
        if head & LIVE != 0 {
            return if head & FRESH == 0 { Ok(()) } else { Err("in blocks 5: only free blocks are fresh") };
        }
        // SAFETY: invariant 1.
        if self.head(id + size) & PREV_FREE == 0 || unsafe { read(id + size - 16) } != size as u64 {
            return Err("in blocks 4: the right neighbour knows of a free block and its size");
        }
        let from = (id + 24).max(self.fresh_from(id)).next_multiple_of(8);
        let words = (from..id + size - 16).step_by(8);
        // All of a small block, a sample of a large one.
        let step = (words.len() / 256).max(1);
        // SAFETY: the words lie in a free block of our spans; being fresh, they are initialised.
        if words.step_by(step).any(|at| unsafe { read(at) } != 0) {
            return Err("in blocks 5: what is called fresh reads as zero");
        }
        Ok(())
    }
}

/// The spans by address; a node is the address of a span's head.
struct Spans;

impl View for Spans {
    type Id = usize;
    const NONE: usize = 0;

    fn child(&self, node: usize, side: usize) -> usize {
        // SAFETY: `InBlocks` invariant 1: nodes are heads of spans.
        unsafe { read(node + 16 + side * 8) as usize }
    }

    fn before(&self, a: usize, b: usize) -> bool {
        a < b
    }

    fn above(&self, a: usize, b: usize) -> bool {
        treap::scatter(a) > treap::scatter(b)
    }
}

impl Tree for Spans {
    fn set_child(&mut self, node: usize, side: usize, child: usize) {
        // SAFETY: as in `child`.
        unsafe { write(node + 16 + side * 8, child as u64) }
    }
}

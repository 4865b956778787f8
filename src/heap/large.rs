//! Blocks with a mapping of their own: larger than a sixteenth of a segment's slices, or aligned to more
//! than a slice.
//!
//! ```text
//! mapping ─▶ ┌──────────────┬─────────────────────────────┐
//!            │ Large (page) │ block …                     │   the block lies behind its books, at a page,
//!            └──────────────┴─────────────────────────────┘   or at its alignment if that is larger
//! ```
//! 1. The books are found where those of a segment would be, so both begin with a `Head`.
//! 2. All larges of a hub are on its list, under its lock; the fields of one belong to who holds its block.

use core::cell::Cell;
use core::ptr::{self, NonNull};
use core::sync::atomic::Ordering;

use super::hub::Hub;
use super::list::{Chain, Links, List};
use super::registry;
use super::segment::{Head, SEGMENT, Segment, segment_of};
use crate::source::os;
use crate::source::relocate::Relocation;

/// The books of a large block.
#[repr(C)]
pub(crate) struct Large {
    head: Head,
    links: Links<Large>,
    /// The mapping.
    base: Cell<usize>,
    len: Cell<usize>,
    block: Cell<usize>,
}

pub(super) struct Chained;
impl Chain for Chained {
    type Node = Large;
    fn links(node: &Large) -> &Links<Large> {
        &node.links
    }
}

/// The larges of a hub.
pub(super) struct Larges(List<Chained>);
// SAFETY: the nodes belong to the hub, and only the holder of its lock follows the links.
unsafe impl Send for Larges {}

impl Larges {
    pub(super) const fn new() -> Self {
        Self(List::new())
    }

    /// Whether an address lies in a block on the list.
    pub(super) fn contain(&self, address: usize) -> bool {
        self.0.iter().any(|large| (large.block.get()..large.base.get() + large.len.get()).contains(&address))
    }

    /// Calls `visit` with address and size of each block.
    pub(super) fn each(&self, mut visit: impl FnMut(usize, usize)) {
        self.0.iter().for_each(|large| visit(large.block.get(), large.usable()));
    }
}

impl Large {
    /// The large block whose books a segment's turn out to be.
    pub(crate) fn at(segment: &Segment) -> Option<&Large> {
        // SAFETY: both begin with a `Head`, which says which it is (1).
        segment.head.large.get().then(|| unsafe { &*ptr::from_ref(segment).cast::<Large>() })
    }

    pub(crate) fn begins_at(&self, block: *mut u8) -> bool {
        self.block.get() == block as usize
    }

    pub(crate) fn usable(&self) -> usize {
        let settings = &self.hub().settings;
        self.base.get() + self.len.get() - self.block.get() - settings.guard_page() - settings.seal()
    }

    fn hub(&self) -> &Hub {
        // SAFETY: a hub outlives its blocks.
        unsafe { &*self.head.hub.get() }
    }

    fn enlist(&self) {
        let hub = self.hub();
        hub.larges.lock().0.push_back(self);
        hub.counters.large_live.fetch_add(self.len.get(), Ordering::Relaxed);
        hub.counters.large_count.fetch_add(1, Ordering::Relaxed);
    }

    fn delist(&self) {
        let hub = self.hub();
        hub.larges.lock().0.remove(self);
        hub.counters.large_live.fetch_sub(self.len.get(), Ordering::Relaxed);
        hub.counters.large_count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A block, and whether it is zero; null where there is no memory or the limit is reached.
#[cold]
pub(crate) fn alloc(hub: &Hub, size: usize, align: usize) -> (*mut u8, bool) {
    const NONE: (*mut u8, bool) = (ptr::null_mut(), false);
    let page = os::page_size();
    // Behind the books, at a multiple of the alignment; see `segment_of` for alignments past a segment.
    let guard = hub.settings.guard_page();
    let offset = align.max(page + guard);
    let Some(len) = size.checked_add(offset + guard).and_then(|sum| sum.checked_next_multiple_of(page))
    else {
        return NONE;
    };
    if len > isize::MAX as usize {
        return NONE;
    }
    let (least, len) = (len, hub.settings.large_len(len));
    let spare = if align <= page { hub.take_spare(len) } else { None };
    let fresh = |len| mapping(hub, len, align.max(SEGMENT)).map(|base| (base, len));
    let found = spare.or_else(|| fresh(len)).or_else(|| if least < len { fresh(least) } else { None });
    let Some((base, len)) = found else { return NONE };
    // Before the first page is there, which would be a small one.
    advise(hub, base as usize, len);
    let block = base.wrapping_add(offset);
    let books = segment_of(block).cast::<Large>();
    let from = books as usize;
    if !registry::insert(from, base as usize + len - from, hub, true) {
        // SAFETY: nobody has seen the mapping.
        unsafe { hub.unmap(base, len) };
        hub.refund(len);
        return NONE;
    }
    if spare.is_some() {
        // SAFETY: the books of the block that was here before, which nobody knows any more.
        unsafe { books.cast_mut().write_bytes(0, 1) };
    }
    // SAFETY: zeroed memory of the mapping; all zero is a valid value.
    let large = unsafe { &*books };
    large.head.hub.set(hub);
    large.head.large.set(true);
    large.base.set(base as usize);
    large.len.set(len);
    large.block.set(block as usize);
    if guard > 0 {
        for page in [block.wrapping_sub(guard), base.wrapping_add(len - guard)] {
            // SAFETY: pages of the mapping that are neither the books' nor the block's.
            NonNull::new(page).map(|page| unsafe { os::fence(page, guard) || os::protect(page, guard) });
        }
    }
    large.enlist();
    hub.trim_spares();
    (block, spare.is_none())
}

/// Asks for huge pages behind a mapping of `hub`, if it is large enough for them.
fn advise(hub: &Hub, base: usize, len: usize) {
    if let (Some(base), Some(huge)) = (NonNull::new(base as *mut u8), hub.settings.huge_large(len)) {
        // SAFETY: the mapping is ours.
        unsafe { os::advise_huge(base, len, huge) };
    }
}

/// A fresh mapping, charged.
fn mapping(hub: &Hub, len: usize, align: usize) -> Option<*mut u8> {
    if !hub.charge(len) {
        return None;
    }
    // The place of an alignment larger than the block is address space, which there is plenty of.
    let base = if align <= len { hub.map_block(len, align) } else { hub.map(len, align) };
    if base.is_none() {
        hub.refund(len);
    }
    base
}

/// Frees a large block. Its mapping may be kept for the next one.
#[cold]
pub(crate) fn free(large: &Large) {
    large.delist();
    let hub = large.hub();
    let (base, len) = (large.base.get(), large.len.get());
    let plain = hub.settings.guard_page() + hub.settings.seal() == 0;
    if !plain || large.block.get() - base > os::page_size() {
        return release(large);
    }
    let from = ptr::from_ref(large) as usize;
    registry::remove(from, base + len - from);
    // SAFETY: the mapping was the block's own, and nobody knows it any more.
    unsafe { hub.keep_spare(base, len) };
}

/// Frees a large block whose place is not to be used again soon: it stays, inaccessible and empty, until others came
/// after it.
pub(super) fn bury(large: &Large) {
    large.delist();
    let hub = large.hub();
    let (base, len) = (large.base.get(), large.len.get());
    let from = ptr::from_ref(large) as usize;
    registry::remove(from, base + len - from);
    hub.refund(len);
    if let Some(start) = NonNull::new(base as *mut u8) {
        // SAFETY: the mapping is the block's own, and the block is free.
        unsafe { os::decommit(start, len) };
    }
    let (oldest, len) = hub.buried.lock().replace(base, len);
    if len > 0 {
        // SAFETY: a mapping that was buried, and that nobody knows any more.
        unsafe { hub.unmap(oldest as *mut u8, len) };
    }
}

/// The places (base, length) of large blocks freed.
pub(super) struct Buried {
    /// The last ones, of a heap that delays reuse; empty.
    places: [(usize, usize); 8],
    next: usize,
}

impl Buried {
    pub(super) const fn new() -> Self {
        Self { places: [(0, 0); 8], next: 0 }
    }

    /// Puts a place in; returns the one that leaves.
    fn replace(&mut self, base: usize, len: usize) -> (usize, usize) {
        let at = self.next;
        self.next = (at + 1) % self.places.len();
        core::mem::replace(&mut self.places[at], (base, len))
    }

    pub(super) fn places(&self) -> [(usize, usize); 8] {
        self.places
    }
}

fn release(large: &Large) {
    let hub = large.hub();
    let (base, len) = (large.base.get(), large.len.get());
    let from = ptr::from_ref(large) as usize;
    registry::remove(from, base + len - from);
    hub.refund(len);
    // SAFETY: the mapping is the block's own, and the block is free.
    unsafe { hub.unmap(base as *mut u8, len) };
}

/// Frees all of a hub's.
pub(super) fn release_all(hub: &Hub) {
    hub.drop_spares();
    loop {
        let Some(large) = hub.larges.lock().0.pop_front().map(ptr::from_ref) else { return };
        // SAFETY: nobody uses the hub's blocks any more.
        release(unsafe { &*large });
    }
}

/// Changes the size of a large block, in place or (with `may_move`) by moving its pages; `None` leaves it as
/// it was. What is added reads as zero.
#[cold]
pub(crate) fn resize(large: &Large, size: usize, may_move: bool) -> Option<*mut u8> {
    let page = os::page_size();
    let hub = large.hub();
    let (base, old, offset) = (large.base.get(), large.len.get(), large.block.get() - large.base.get());
    let len = size.checked_add(offset)?.checked_next_multiple_of(page)?;
    if len == old {
        return Some(large.block.get() as *mut u8);
    }
    if len > isize::MAX as usize || (len > old && !hub.charge(len - old)) {
        return None;
    }
    let moved = remap(hub, large, len, may_move && offset < SEGMENT);
    let Some(new_base) = moved else {
        if len > old {
            hub.refund(len - old);
        }
        return None;
    };
    if len < old {
        hub.refund(old - len);
    }
    debug_assert!(offset < SEGMENT || new_base == base);
    Some((new_base + offset) as *mut u8)
}

/// Remaps to `len` bytes with all books in order; returns the new base.
fn remap(hub: &Hub, large: &Large, len: usize, may_move: bool) -> Option<usize> {
    let (base, old) = (large.base.get(), large.len.get());
    let from = ptr::from_ref(large) as usize;
    let start = NonNull::new(base as *mut u8)?;
    large.delist();
    hub.count_call();
    // SAFETY: the mapping is the block's own.
    if hub.let_through() && unsafe { os::remap(start, old, len, false) }.is_some() {
        // A shorter one gives up units behind it; a longer one may need some.
        if len < old {
            let end = (base + len).next_multiple_of(SEGMENT);
            let old_end = (base + old).next_multiple_of(SEGMENT);
            registry::remove(end, old_end - end);
        }
        let noted = registry::insert(from, base + len - from, hub, true);
        debug_assert!(noted || len > old);
        hub.counters.reserved.fetch_add(len.wrapping_sub(old), Ordering::Relaxed);
        large.len.set(len);
        advise(hub, base, len);
        large.enlist();
        return Some(base);
    }
    let moved = may_move.then(|| move_pages(hub, start, old, len)).flatten();
    // SAFETY: moved, the books are at the new place; else at the old.
    let large = unsafe { &*moved.map_or(ptr::from_ref(large), |to| to.as_ptr().cast()) };
    if let Some(to) = moved {
        large.base.set(to.as_ptr() as usize);
        large.block.set(to.as_ptr() as usize + (large.block.get() - base));
        large.len.set(len);
        advise(hub, to.as_ptr() as usize, len);
    }
    large.enlist();
    moved.map(|to| to.as_ptr() as usize)
}

/// Moves the pages to a new, aligned place, where there are more of them.
fn move_pages(hub: &Hub, base: NonNull<u8>, old: usize, len: usize) -> Option<NonNull<u8>> {
    if len < old || !hub.let_through() {
        return None;
    }
    hub.count_call();
    // SAFETY: the mapping is the block's own, which is in the hands of who resizes it.
    let moved = unsafe { Relocation::begin(base, old, len, SEGMENT) }?;
    let to = moved.place();
    hub.count_call();
    // SAFETY: a mapping of ours that nobody knows.
    let grown = hub.let_through() && unsafe { os::remap(to, old, len, false) }.is_some();
    if !grown || !registry::insert(to.as_ptr() as usize, len, hub, true) {
        // SAFETY: as above. The block stays where it was.
        unsafe {
            if grown {
                os::unmap(to.add(old), len - old);
            }
            moved.undo();
        }
        return None;
    }
    registry::remove(base.as_ptr() as usize, old);
    // SAFETY: the block is at its new place.
    unsafe { moved.finish() };
    hub.counters.reserved.fetch_add(len - old, Ordering::Relaxed);
    Some(to)
}

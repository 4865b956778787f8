//! The hardened heap: every allocation and free of its threads comes through here.
//!
//! The caches of a hardened heap have no room as far as the fast paths can see, so each call ends on a slow path, and
//! the paths of other heaps hold nothing that serves this one. Below, blocks take the same ways: caches, spans,
//! outboxes. What is different:
//!
//! 1. A block is larger than its request by a word at least, and ends in that word: the *live* word of the block while
//!    a program holds it, its *free* word from the free to the next allocation (`seal`).
//! 2. A free block in a cache or in quarantine begins with its free word too, or is filled. In a span, words and
//!    filling may have become zero, when pages were given back.
//! 3. A free is believed if the registry knows the address as a block's of this hub, a block can begin there, and the
//!    live word is in place.
//! 4. A freed block of the thread's own waits in a queue of its class until as many more were freed; the place of a
//!    large block stays inaccessible until as many more were.
//! 5. The last page of a span cannot be accessed, nor the pages before and behind a large block, nor what follows
//!    the books of a segment, which no span gets. Past `MOST_GUARDS` spans have none: the kernel's table of mappings
//!    is finite, and the program needs it too.

use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::class::{self, COUNT};
use super::fault;
use super::hub::Hub;
use super::large::{self, Large};
use super::registry::{self, Unit};
use super::seal::{self, SEAL};
use super::segment::{HEADER, SEGMENT, SINGLE, SLICE, Segment, Span, segment_of};
use super::settings::Part;
use super::thread::{CACHES, Slot, ThreadHeap};
use super::{SINGLE_MAX, begins_block};
use crate::source::os;

/// Spans of a process that have a guard page.
const MOST_GUARDS: usize = 16 << 10;

/// What a freed block holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fill {
    /// What the program left, but for the words.
    Nothing,
    /// This byte all over.
    With(u8),
}

/// What the blocks of a debugged heap are filled with.
const FRESH: u8 = 0xA5;
const FREED: u8 = 0xDD;

/// What a hardened heap has beside the books of any heap.
pub(super) struct Guard {
    /// The tops of the caches, hidden from the fast paths.
    pub(super) tops: [AtomicPtr<Slot>; COUNT],
    /// Next place and number of the blocks in quarantine, by class.
    next: [Cell<u32>; COUNT],
    pub(super) held: [AtomicU32; COUNT],
    waiting: [Slot; CACHES[COUNT]],
    /// Blocks in quarantine that are larger than any class.
    singles: [Cell<*mut u8>; 4],
    next_single: Cell<usize>,
    fill: Cell<Fill>,
    /// Fresh blocks are filled, freed ones looked at all over.
    debug: Cell<bool>,
    shuffle: Cell<bool>,
    quarantine: Cell<bool>,
    random: Cell<u64>,
}

impl Guard {
    /// Makes the guard of a heap whose caches begin at `bottom`; `None` without memory.
    pub(super) fn create<'a>(hub: &Hub, bottom: impl Fn(usize) -> *const Slot) -> Option<&'a Guard> {
        let settings = &hub.settings;
        let base = hub.map(Self::bytes(), os::page_size())?;
        // SAFETY: zeroed memory of that size for nobody else, which stays: a valid value, but for the filling, which
        // is written before the value is looked at.
        let guard = unsafe {
            (&raw mut (*base.cast::<Self>()).fill).write(Cell::new(Fill::Nothing));
            &*base.cast::<Self>()
        };
        for class in 0..COUNT {
            guard.tops[class].store(bottom(class).cast_mut(), Ordering::Relaxed);
        }
        if settings.has(Part::ZeroOnFree) {
            guard.fill.set(Fill::With(0));
        } else if settings.has(Part::Debug) {
            guard.fill.set(Fill::With(FREED));
        }
        guard.debug.set(settings.has(Part::Debug));
        guard.shuffle.set(settings.has(Part::RandomOrder));
        guard.quarantine.set(settings.has(Part::Quarantine));
        guard.random.set(seal::random_seed());
        Some(guard)
    }

    pub(super) fn bytes() -> usize {
        size_of::<Self>().next_multiple_of(os::page_size())
    }

    /// A number below `bound`.
    fn random_below(&self, bound: usize) -> usize {
        let mut state = self.random.get();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.random.set(state);
        ((state >> 32) as usize * bound) >> 32
    }

    /// Puts slots into any order.
    pub(super) fn shuffle(&self, slots: &[Slot]) {
        if self.shuffle.get() {
            for at in (1..slots.len()).rev() {
                let with = self.random_below(at + 1);
                let (a, b) = (slots[at].load(Ordering::Relaxed), slots[with].load(Ordering::Relaxed));
                slots[at].store(b, Ordering::Relaxed);
                slots[with].store(a, Ordering::Relaxed);
            }
        }
    }

    /// Marks a block of `size` bytes free (1, 2).
    #[inline]
    fn seal_free(&self, block: *mut u8, size: usize) {
        let word = seal::free(block);
        // SAFETY: all of the block, which is in the heap's hands.
        unsafe {
            match self.fill.get() {
                Fill::Nothing => seal::write(block.cast(), word),
                Fill::With(byte) => block.write_bytes(byte, size - SEAL),
            }
            seal::write(seal::end(block, size), word);
        }
    }

    /// Whether a free block is as it was left (2); `home` if it comes from a span.
    #[inline]
    fn is_intact(&self, block: *mut u8, size: usize, home: bool) -> bool {
        let word = seal::free(block);
        let is = |found: u64, left: u64| found == left || (home && found == 0);
        // SAFETY: all of the block, which is in the heap's hands.
        unsafe {
            is(seal::read(seal::end(block, size)), word)
                && match self.fill.get() {
                    Fill::Nothing => is(seal::read(block.cast()), word),
                    Fill::With(byte) if self.debug.get() => {
                        let left = u64::from_ne_bytes([byte; 8]);
                        let words = core::slice::from_raw_parts(block.cast::<u64>(), size / 8 - 1);
                        words.iter().all(|&found| found == left || found == 0)
                    }
                    Fill::With(_) => true,
                }
        }
    }

    /// A block that was never used, or that is made of memory that was.
    pub(super) fn on_carve(&self, block: *mut u8, size: usize) {
        self.seal_free(block, size);
    }

    /// A block that comes from its span.
    pub(super) fn on_take(&self, block: *mut u8, size: usize) {
        if !self.is_intact(block, size, true) {
            fault::written_after_free(block);
        }
        self.seal_free(block, size);
    }
}

impl ThreadHeap {
    /// What the heap has if it is hardened.
    #[inline(always)]
    pub(super) fn guard(&self) -> Option<&Guard> {
        // SAFETY: null or a guard, which lives as long as the heap.
        unsafe { self.guard.get().as_ref() }
    }

    /// A block for requests of `class` at a multiple of `align`, on a hardened heap.
    pub(super) fn guarded_alloc(&self, guard: &Guard, class: usize, align: usize) -> *mut u8 {
        let asked = class::size(class);
        let Some(class) = class::of_layout(asked + SEAL, align) else {
            return self.guarded_alloc_big(asked, align).0;
        };
        // SAFETY: the slot below the top exists.
        let below = unsafe { guard.tops[class].load(Ordering::Relaxed).sub(1) };
        // SAFETY: as above.
        let mut block = unsafe { (*below).load(Ordering::Relaxed) };
        if block.is_null() {
            block = self.refill(class);
            if block.is_null() {
                return block;
            }
        } else {
            guard.tops[class].store(below, Ordering::Relaxed);
        }
        let size = class::size(class);
        if !guard.is_intact(block, size, false) {
            fault::written_after_free(block);
        }
        // SAFETY: a block of that size that nobody else has.
        unsafe {
            if guard.debug.get() {
                block.write_bytes(FRESH, size - SEAL);
            }
            seal::write(seal::end(block, size), seal::live(block));
        }
        block
    }

    /// A block larger than any class, or aligned more than blocks are, on a hardened heap.
    pub(super) fn guarded_alloc_big(&self, size: usize, align: usize) -> (*mut u8, bool) {
        let Some(with_word) = size.checked_add(SEAL) else { return (core::ptr::null_mut(), false) };
        let (block, zeroed) = self.alloc_unguarded_big(with_word.max(class::MAX + 1), align);
        if !block.is_null() {
            let size = size_with_word(block);
            // SAFETY: a block of that size that nobody else has.
            unsafe { seal::write(seal::end(block, size), seal::live(block)) };
        }
        (block, zeroed)
    }

    /// Frees what a program says is a block, on a hardened heap (3).
    pub(crate) fn guarded_free(&self, block: *mut u8) {
        let Some(guard) = self.guard() else { return };
        let hub = self.hub();
        match registry::lookup(block.addr().wrapping_sub(1)) {
            Unit::Segment(owner) if core::ptr::eq(owner, hub) => {
                // SAFETY: segments stay mapped as long as their hub.
                let segment = unsafe { &*segment_of(block) };
                let span = segment.span_at(block);
                if !segment.begins_block(block) {
                    fault::invalid_free(block);
                }
                let size = span.size.get() as usize;
                self.expect_live(block, size);
                match span.class.get() {
                    SINGLE => self.guarded_free_single(guard, segment, block, size),
                    class => {
                        guard.seal_free(block, size);
                        let owner = segment.head.owner.load(Ordering::Relaxed);
                        if !self.is(owner) {
                            self.free_remote(class as usize, block);
                        } else if let Some(block) = guard.delay(class as usize, block) {
                            self.guarded_keep(guard, class as usize, block);
                        }
                    }
                }
            }
            // SAFETY: the caller says that the block is live, so nobody else frees it.
            Unit::LargeBooks(owner) if core::ptr::eq(owner, hub) && unsafe { begins_block(hub, block) } => {
                // SAFETY: the unit begins with the books of the block.
                let Some(large) = Large::at(unsafe { &*segment_of(block) }) else {
                    fault::invalid_free(block)
                };
                self.expect_live(block, large.usable() + SEAL);
                if guard.quarantine.get() { large::bury(large) } else { large::free(large) }
            }
            _ => fault::invalid_free(block),
        }
    }

    /// Ends the program unless a live block of this hub begins at `block`; on a hardened heap.
    pub(super) fn guarded_expect(&self, block: *mut u8) {
        self.expect_live(block, size_with_word(block));
    }

    /// Ends the program unless the block of `size` bytes ends in its live word.
    #[inline]
    fn expect_live(&self, block: *mut u8, size: usize) {
        // SAFETY: the place of a block is mapped.
        let found = unsafe { seal::read(seal::end(block, size)) };
        if found != seal::live(block) {
            if found == seal::free(block) {
                fault::double_free(block);
            }
            // Zero is also found where no block was cut yet, or where its page went back since the free.
            if found == 0 { fault::not_live(block) } else { fault::overflow(block) }
        }
    }

    fn guarded_free_single(&self, guard: &Guard, segment: &Segment, block: *mut u8, size: usize) {
        let owned = self.is(segment.head.owner.load(Ordering::Relaxed));
        // SAFETY: all of the block, which is in the heap's hands.
        unsafe {
            if let Fill::With(byte) = guard.fill.get() {
                block.write_bytes(byte, size - SEAL);
            }
            seal::write(seal::end(block, size), seal::free(block));
        }
        let leaving = if owned { guard.delay_single(block) } else { Some(block) };
        if let Some(block) = leaving {
            // SAFETY: a block that is live for its span, so its segment is there.
            self.free_single(unsafe { &*segment_of(block) }, block);
        }
    }

    /// Puts a block of this heap into its cache.
    fn guarded_keep(&self, guard: &Guard, class: usize, block: *mut u8) {
        let most = class::cache_capacity(class);
        if self.cached_count(class) == most {
            self.flush_oldest(class, (most / 2).max(1));
            self.purge_if_due();
        }
        let top = guard.tops[class].load(Ordering::Relaxed);
        // SAFETY: there is room now.
        unsafe {
            (*top).store(block, Ordering::Relaxed);
            guard.tops[class].store(top.add(1), Ordering::Relaxed);
        }
    }

    /// Puts all blocks in quarantine into the caches, and from there back where they are from.
    pub(super) fn end_quarantine(&self, guard: &Guard) {
        for slot in &guard.singles {
            let block = slot.replace(core::ptr::null_mut());
            if !block.is_null() {
                // SAFETY: as in `guarded_free_single`.
                self.free_single(unsafe { &*segment_of(block) }, block);
            }
        }
        for class in 0..COUNT {
            for slot in guard.queue(class) {
                let block = slot.swap(core::ptr::null_mut(), Ordering::Relaxed);
                if !block.is_null() {
                    guard.held[class].store(guard.held[class].load(Ordering::Relaxed) - 1, Ordering::Relaxed);
                    if self.cached_count(class) == class::cache_capacity(class) {
                        self.flush_oldest(class, usize::MAX);
                    }
                    self.guarded_keep(guard, class, block);
                }
            }
        }
    }

    /// Makes the last page of a fresh span inaccessible and the others accessible (5).
    pub(super) fn guard_span(&self, segment: &Segment, span: &Span) {
        let page = os::page_size();
        let (first, count) = (span.first.get() as usize, span.slices.get() as usize);
        for slice in first..first + count {
            let bit = 1 << slice;
            let has = segment.guarded.get() & bit != 0;
            let wanted = slice == first + count - 1;
            let last = segment.base().wrapping_add((slice + 1) * SLICE - page);
            let Some(last) = NonNull::new(last).filter(|_| has != wanted) else { continue };
            // SAFETY: a page of a span that holds no block yet, or the guard page of one that is gone.
            unsafe {
                if !wanted {
                    if os::commit(last, page).is_ok() {
                        segment.guarded.set(segment.guarded.get() & !bit);
                        self.hub().guards.fetch_sub(1, Ordering::Relaxed);
                    } else {
                        fault::die("no mapping left to open a guard page", last.as_ptr());
                    }
                } else if self.hub().guards.fetch_add(1, Ordering::Relaxed) < MOST_GUARDS
                    && os::protect(last, page)
                {
                    segment.guarded.set(segment.guarded.get() | bit);
                } else {
                    self.hub().guards.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
    }
}

impl Guard {
    /// The places of a class in quarantine.
    fn queue(&self, class: usize) -> &[Slot] {
        &self.waiting[CACHES[class]..][..class::cache_capacity(class) / 2]
    }

    /// Puts a freed block into quarantine; what leaves it (4).
    #[inline]
    fn delay(&self, class: usize, block: *mut u8) -> Option<*mut u8> {
        if !self.quarantine.get() {
            return Some(block);
        }
        let queue = self.queue(class);
        let next = self.next[class].get() as usize;
        self.next[class].set(if next + 1 < queue.len() { next as u32 + 1 } else { 0 });
        let oldest = queue[next].load(Ordering::Relaxed);
        queue[next].store(block, Ordering::Relaxed);
        if oldest.is_null() {
            self.held[class].store(self.held[class].load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            return None;
        }
        Some(oldest)
    }

    fn delay_single(&self, block: *mut u8) -> Option<*mut u8> {
        if !self.quarantine.get() {
            return Some(block);
        }
        let next = self.next_single.get();
        self.next_single.set((next + 1) % self.singles.len());
        Some(self.singles[next].replace(block)).filter(|oldest| !oldest.is_null())
    }
}

/// Bytes of a hardened block larger than any class, its last word included.
fn size_with_word(block: *mut u8) -> usize {
    // SAFETY: a block just handed out.
    (unsafe { super::usable_size(block) }) + SEAL
}

/// Fences a fresh segment's books off from its spans (5).
pub(super) fn guard_segment(segment: &Segment) {
    let fence = HEADER.next_multiple_of(os::page_size());
    if let Some(behind) = NonNull::new(segment.base().wrapping_add(fence)).filter(|_| fence < SLICE) {
        // SAFETY: pages of a segment that holds no span, which no span will get.
        unsafe { os::protect(behind, SLICE - fence) };
    }
}

/// Makes all of a segment accessible that holds no span and is about to lose its books; false where the system
/// refuses.
pub(super) fn open_segment(segment: &Segment) -> bool {
    let hub = segment.hub();
    if !hub.settings.has(Part::GuardPages) {
        return true;
    }
    // SAFETY: nobody has a block of it.
    let opened =
        NonNull::new(segment.base()).is_some_and(|base| unsafe { os::commit(base, SEGMENT).is_ok() });
    if opened {
        hub.guards.fetch_sub(segment.guarded.take().count_ones() as usize, Ordering::Relaxed);
    }
    opened
}

const _: () = assert!(SINGLE_MAX > class::MAX + SEAL);

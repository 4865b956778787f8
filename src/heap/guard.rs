//! The hardened heap: every allocation and free of its threads comes through here.
//!
//! The caches of a hardened heap have no room as far as the fast paths can see, so each call ends on a slow path, and
//! the paths of other heaps hold nothing that serves this one. Below, blocks take the same ways: caches and spans.
//! What is different:
//!
//! 1. A block is larger than its request by a word at least, and ends in that word: the *live* word of the block while
//!    a program holds it, its *free* word from the free to the next allocation (`seal`).
//! 2. A free block in a cache or in quarantine begins with its free word too, or is filled. In a span, words and
//!    filling may have become zero, when pages were given back.
//! 3. A free is believed if the registry knows the address as a block's of this hub, a block can begin there, and the
//!    live word is in place.
//! 4. A freed block waits in a ring of its class until as many more were freed; the place of a
//!    large block stays inaccessible until as many more were.
//!
//! `fence` has the pages between spans that cannot be accessed.

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::class::{self, COUNT, MIN_ALIGN};
use super::fault;
use super::hub::Hub;
use super::large::{self, Large};
use super::registry::{self, Unit};
use super::seal::{self, SEAL};
use super::segment::{Segment, segment_of};
use super::settings::Part;
use super::span::SINGLE;
use super::thread::{CACHES, Slot, ThreadHeap};
use super::{SINGLE_MAX, begins_block};
use crate::source::os;

/// What the blocks of a debugged heap are filled with.
const FRESH: u8 = 0xA5;
const FREED: u8 = 0xDD;

/// What the paths of a class read and write, on one cache line.
#[repr(align(64))]
struct Lane {
    /// The top of the cache and its end, hidden from the fast paths.
    top: AtomicPtr<Slot>,
    limit: Cell<*const Slot>,
    /// Where in the ring the next freed block goes, in the place of the one that waited longest.
    next: Cell<*const Slot>,
    ring: Cell<*const Slot>,
    ring_end: Cell<*const Slot>,
    held: AtomicU32,
    size: Cell<u32>,
}

/// What a hardened heap has beside the books of any heap.
pub(super) struct Guard {
    /// Whether blocks hold nothing but their words: no filling.
    plain: Cell<bool>,
    quarantine: Cell<bool>,
    shuffle: Cell<bool>,
    zero_on_free: Cell<bool>,
    debug: Cell<bool>,
    random: Cell<u64>,
    lanes: [Lane; COUNT],
    waiting: [Slot; CACHES[COUNT]],
    /// Blocks in quarantine that are larger than any class.
    singles: [Cell<*mut u8>; 4],
    next_single: Cell<usize>,
}

impl Guard {
    /// Makes the guard of a heap; `None` without memory.
    pub(super) fn create<'a>(hub: &Hub) -> Option<&'a Guard> {
        let settings = &hub.settings;
        let base = hub.map(Self::bytes(), os::page_size())?;
        // SAFETY: zeroed memory of that size for nobody else, which stays: a valid value.
        let guard = unsafe { &*base.cast::<Self>() };
        guard.zero_on_free.set(settings.has(Part::ZeroOnFree));
        guard.debug.set(settings.has(Part::Debug));
        guard.plain.set(!guard.zero_on_free.get() && !guard.debug.get());
        guard.shuffle.set(settings.has(Part::RandomOrder));
        guard.quarantine.set(settings.has(Part::Quarantine));
        guard.random.set(seal::random_seed());
        Some(guard)
    }

    pub(super) fn bytes() -> usize {
        size_of::<Self>().next_multiple_of(os::page_size())
    }

    /// Prepares for the cache of `class` between `bottom` and `limit`.
    pub(super) fn set_up(&self, class: usize, bottom: *const Slot, limit: *const Slot) {
        let lane = &self.lanes[class];
        lane.top.store(bottom.cast_mut(), Ordering::Relaxed);
        lane.limit.set(limit);
        lane.size.set(class::size(class) as u32);
        if self.quarantine.get() {
            let ring = &self.waiting[CACHES[class]..][..(class::cache_capacity(class) / 2).max(1)];
            lane.ring.set(ring.as_ptr());
            lane.ring_end.set(ring.as_ptr_range().end);
            lane.next.set(ring.as_ptr());
        }
    }

    pub(super) fn top_and_limit(&self, class: usize) -> (&AtomicPtr<Slot>, &Cell<*const Slot>) {
        (&self.lanes[class].top, &self.lanes[class].limit)
    }

    /// Blocks of a class in quarantine; any thread may ask.
    pub(super) fn held(&self, class: usize) -> usize {
        self.lanes[class].held.load(Ordering::Relaxed) as usize
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

    /// What a freed block is filled with; `None` where it keeps what the program left, but for its words.
    fn filling(&self) -> Option<u8> {
        if self.zero_on_free.get() { Some(0) } else { self.debug.get().then_some(FREED) }
    }

    /// Marks a block of `size` bytes free whose live word is `live` (1, 2). Here and below `plain` is what the guard says,
    /// or a constant that makes a shorter path.
    #[inline(always)]
    fn seal_free(&self, block: *mut u8, size: usize, live: u64, plain: bool) {
        let word = seal::free(live);
        // SAFETY: all of the block, which is in the heap's hands.
        unsafe {
            if plain {
                seal::write(block.cast(), word);
            } else {
                self.fill(block, size);
            }
            seal::write(seal::end(block, size), word);
        }
    }

    /// Fills a freed block but for its last word.
    ///
    /// # Safety
    /// All of the block is in the heap's hands.
    #[cold]
    #[inline(never)]
    unsafe fn fill(&self, block: *mut u8, size: usize) {
        if let Some(byte) = self.filling() {
            // SAFETY: the caller's contract.
            unsafe { block.write_bytes(byte, size - SEAL) };
        }
    }

    /// Whether the first bytes of a free block are as they were left (2), which is known of a heap that fills them;
    /// zeroes are as good, since pages may have been given back.
    #[cold]
    #[inline(never)]
    fn is_filled(&self, block: *mut u8, size: usize) -> bool {
        let left = u64::from_ne_bytes([self.filling().unwrap_or(0); 8]);
        // SAFETY: all of the block, which is in the heap's hands.
        let words = unsafe { core::slice::from_raw_parts(block.cast::<u64>(), size / 8 - 1) };
        !self.debug.get() || words.iter().all(|&found| found == left || found == 0)
    }

    /// A block that was never used, or that is made of memory that was.
    pub(super) fn on_carve(&self, block: *mut u8, size: usize) {
        self.seal_free(block, size, seal::live(block), self.plain.get());
    }

    /// A block from a span of which pages were given back (2): what has become zero gets its words again.
    pub(super) fn on_take(&self, block: *mut u8, size: usize) {
        let live = seal::live(block);
        let is_left = |found: u64| found == seal::free(live) || found == 0;
        // SAFETY: all of the block, which is in the heap's hands.
        let (first, last) = unsafe { (seal::read(block.cast()), seal::read(seal::end(block, size))) };
        let first_is_left = if self.plain.get() { is_left(first) } else { self.is_filled(block, size) };
        if !first_is_left || !is_left(last) {
            fault::written_after_free(block);
        }
        self.seal_free(block, size, live, self.plain.get());
    }

    /// Takes a block from the cache and makes it a program's; null when the cache is empty.
    #[inline(always)]
    fn pop(&self, lane: &Lane, plain: bool) -> *mut u8 {
        // SAFETY: the slot below the top exists.
        let below = unsafe { lane.top.load(Ordering::Relaxed).sub(1) };
        // SAFETY: as above.
        let block = unsafe { (*below).load(Ordering::Relaxed) };
        if !block.is_null() {
            lane.top.store(below, Ordering::Relaxed);
            self.hand_out(block, lane.size.get() as usize, plain);
        }
        block
    }

    /// Makes a block of the cache a program's.
    #[inline(always)]
    fn hand_out(&self, block: *mut u8, size: usize, plain: bool) {
        let (live, end) = (seal::live(block), seal::end(block, size));
        // SAFETY: a block of that size that nobody else has.
        unsafe {
            let word = seal::free(live);
            let begins_well =
                if plain { seal::read(block.cast()) == word } else { self.is_filled(block, size) };
            if !begins_well || seal::read(end) != word {
                fault::written_after_free(block);
            }
            if !plain && self.debug.get() {
                block.write_bytes(FRESH, size - SEAL);
            }
            seal::write(end, live);
        }
    }

    /// Puts a freed block into quarantine; what leaves it, or null (4).
    #[inline(always)]
    fn delay(&self, lane: &Lane, block: *mut u8) -> *mut u8 {
        let next = lane.next.get();
        if next.is_null() {
            return block;
        }
        // SAFETY: a place of the ring, whose end is one past its last.
        let (slot, after) = unsafe { (&*next, next.add(1)) };
        lane.next.set(if ptr::eq(after, lane.ring_end.get()) { lane.ring.get() } else { after });
        let oldest = slot.load(Ordering::Relaxed);
        slot.store(block, Ordering::Relaxed);
        if oldest.is_null() {
            lane.held.store(lane.held.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        oldest
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

/// The class that serves requests of `class` with their word, if they are aligned as all blocks are: the next, since
/// classes are further apart than a word.
const fn with_word(class: usize) -> usize {
    class + 1
}

/// A block for requests of `class` at a multiple of `align`, if the cache has one and nothing is filled.
#[inline(always)]
pub(super) fn alloc_cached(guard: &Guard, class: usize, align: usize) -> *mut u8 {
    match guard.lanes.get(with_word(class)) {
        Some(lane) if align <= MIN_ALIGN && guard.plain.get() => guard.pop(lane, true),
        _ => ptr::null_mut(),
    }
}

impl ThreadHeap {
    /// A block for requests of `class` at a multiple of `align`, on a hardened heap.
    pub(super) fn guarded_alloc(&self, guard: &Guard, class: usize, align: usize) -> *mut u8 {
        let asked = class::size(class);
        let Some(class) = class::of_layout(asked + SEAL, align) else {
            return self.guarded_alloc_big(asked, align).0;
        };
        let plain = guard.plain.get();
        let mut block = guard.pop(&guard.lanes[class], plain);
        if block.is_null() {
            block = self.refill(class);
            if !block.is_null() {
                guard.hand_out(block, class::size(class), plain);
            }
        }
        block
    }

    /// A block larger than any class, or aligned more than blocks are, on a hardened heap.
    pub(super) fn guarded_alloc_big(&self, size: usize, align: usize) -> (*mut u8, bool) {
        let Some(with_word) = size.checked_add(SEAL) else { return (ptr::null_mut(), false) };
        let (block, zeroed) = self.alloc_unguarded_big(with_word.max(class::MAX + 1), align);
        if !block.is_null() {
            let size = size_with_word(block);
            // SAFETY: a block of that size that nobody else has.
            unsafe { seal::write(seal::end(block, size), seal::live(block)) };
        }
        (block, zeroed)
    }

    /// Frees what a program says is a block, on a hardened heap (3).
    #[inline(never)]
    pub(super) fn guarded_free(&self, guard: &Guard, block: *mut u8) {
        if guard.plain.get() {
            self.guarded_free_as(guard, block, true);
        } else {
            self.guarded_free_filling(guard, block);
        }
    }

    #[cold]
    #[inline(never)]
    fn guarded_free_filling(&self, guard: &Guard, block: *mut u8) {
        self.guarded_free_as(guard, block, false);
    }

    #[inline(always)]
    fn guarded_free_as(&self, guard: &Guard, block: *mut u8, plain: bool) {
        let hub = self.hub();
        if !registry::in_segment(block.addr().wrapping_sub(1), hub) {
            return self.guarded_free_large(guard, block);
        }
        // SAFETY: segments stay mapped as long as their hub.
        let segment = unsafe { &*segment_of(block) };
        let class = segment.class_at(block);
        if class >= SINGLE {
            return self.guarded_free_single(guard, segment, block);
        }
        let span = segment.span_at(block);
        if !span.begins_block(block) {
            fault::invalid_free(block);
        }
        let size = span.size.get() as usize;
        guard.seal_free(block, size, expect_live(block, size), plain);
        let Some(lane) = guard.lanes.get(class as usize) else { return };
        let block = guard.delay(lane, block);
        if !block.is_null() {
            let top = lane.top.load(Ordering::Relaxed);
            if ptr::eq(top, lane.limit.get()) {
                return self.guarded_flush(guard, class as usize, block);
            }
            // SAFETY: below the limit there is a slot.
            unsafe {
                (*top).store(block, Ordering::Relaxed);
                lane.top.store(top.add(1), Ordering::Relaxed);
            }
        }
    }

    /// The cache of `class` is full: gives its older half back to the spans, then takes `block`.
    #[cold]
    #[inline(never)]
    fn guarded_flush(&self, guard: &Guard, class: usize, block: *mut u8) {
        self.flush_oldest(class, (self.capacity(class) / 2).max(1));
        self.purge_if_due();
        let top = guard.lanes[class].top.load(Ordering::Relaxed);
        // SAFETY: there is room now.
        unsafe {
            (*top).store(block, Ordering::Relaxed);
            guard.lanes[class].top.store(top.add(1), Ordering::Relaxed);
        }
    }

    #[cold]
    #[inline(never)]
    fn guarded_free_large(&self, guard: &Guard, block: *mut u8) {
        let hub = self.hub();
        match registry::lookup(block.addr().wrapping_sub(1)) {
            // SAFETY: the caller says that the block is live, so nobody else frees it.
            Unit::LargeBooks(owner) if ptr::eq(owner, hub) && unsafe { begins_block(hub, block) } => {
                // SAFETY: the unit begins with the books of the block.
                let Some(large) = Large::at(unsafe { &*segment_of(block) }) else {
                    fault::invalid_free(block)
                };
                expect_live(block, large.usable() + SEAL);
                if guard.quarantine.get() { large::bury(large) } else { large::free(large) }
            }
            _ => fault::invalid_free(block),
        }
    }

    #[cold]
    #[inline(never)]
    fn guarded_free_single(&self, guard: &Guard, segment: &Segment, block: *mut u8) {
        if !segment.begins_block(block) {
            fault::invalid_free(block);
        }
        let size = segment.span_at(block).size.get() as usize;
        let live = expect_live(block, size);
        // SAFETY: all of the block, which is in the heap's hands.
        unsafe {
            guard.fill(block, size);
            seal::write(seal::end(block, size), seal::free(live));
        }
        let owned = self.is(segment.head.owner.load(Ordering::Relaxed));
        let leaving = if owned { guard.delay_single(block) } else { Some(block) };
        if let Some(block) = leaving {
            // SAFETY: a block that is live for its span, so its segment is there.
            self.free_single(unsafe { &*segment_of(block) }, block);
        }
    }

    /// Puts all blocks in quarantine into the caches, and from there back where they are from.
    pub(super) fn end_quarantine(&self, guard: &Guard) {
        for slot in &guard.singles {
            let block = slot.replace(ptr::null_mut());
            if !block.is_null() {
                // SAFETY: as in `guarded_free_single`.
                self.free_single(unsafe { &*segment_of(block) }, block);
            }
        }
        for (class, lane) in guard.lanes.iter().enumerate() {
            self.flush_oldest(class, usize::MAX);
            for slot in &guard.waiting[CACHES[class]..CACHES[class + 1]] {
                let block = slot.swap(ptr::null_mut(), Ordering::Relaxed);
                if !block.is_null() {
                    let top = lane.top.load(Ordering::Relaxed);
                    // SAFETY: the ring is half as long as the cache, which is empty.
                    unsafe {
                        (*top).store(block, Ordering::Relaxed);
                        lane.top.store(top.add(1), Ordering::Relaxed);
                    }
                }
            }
            lane.held.store(0, Ordering::Relaxed);
            lane.next.set(lane.ring.get());
        }
    }
}

/// Ends the program unless a live block of the hardened heap begins at `block`, which begins a block.
pub(super) fn expect_block(block: *mut u8) {
    expect_live(block, size_with_word(block));
}

/// The live word of the block of `size` bytes; ends the program unless the block ends in it.
#[inline(always)]
fn expect_live(block: *mut u8, size: usize) -> u64 {
    let live = seal::live(block);
    // SAFETY: the place of a block is mapped.
    let found = unsafe { seal::read(seal::end(block, size)) };
    if found != live {
        not_live(block, found, live);
    }
    live
}

#[cold]
#[inline(never)]
fn not_live(block: *mut u8, found: u64, live: u64) -> ! {
    if found == seal::free(live) {
        fault::double_free(block);
    }
    // Zero is also found where no block was cut yet, or where its page went back since the free.
    if found == 0 { fault::not_live(block) } else { fault::overflow(block) }
}

/// Bytes of a hardened block larger than any class, its last word included.
fn size_with_word(block: *mut u8) -> usize {
    // SAFETY: a block just handed out.
    (unsafe { super::usable_size(block) }) + SEAL
}

const _: () = {
    assert!(SINGLE_MAX > class::MAX + SEAL);
    let mut class = 0;
    while class + 1 < COUNT {
        assert!(class::size(class) + SEAL <= class::size(with_word(class)));
        class += 1;
    }
};

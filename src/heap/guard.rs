//! The hardened heap: every allocation and free of its threads comes through here.
//!
//! The caches of a hardened heap have no room as far as the fast paths can see, so each call ends on a slow path, and
//! the paths of other heaps hold nothing that serves this one. Below, blocks take the same ways: caches and spans.
//! What is different:
//!
//! 1. A block is larger than its request by a word at least, and ends in that word: its *live* word from the moment a
//!    program gets it to its free, and at no other time (`seal`). Nobody can guess it, and no other block has the same.
//!    A block that was carved and is free ends in its *free* word, or in zero where nobody wrote since the memory came
//!    from the system.
//! 2. What else a free block holds means nothing to the heap, so nothing is looked at when it is handed out; but a heap
//!    that is debugged fills what is free, and looks. In a span, the filling may have become zero, when pages were
//!    given back.
//! 3. A free is believed if the registry knows the address as a place in a segment of this hub, and the live word of a
//!    block that begins there is where it would be (1). Then the word before it is looked at, which ends another block
//!    of its span: a block that was written to before its start is found when it is freed.
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
use super::seal::{self, Key, SEAL};
use super::segment::{SEGMENT, Segment, segment_of};
use super::settings::Part;
use super::span::SINGLE;
use super::thread::{CACHES, Slot, ThreadHeap, bump};
use super::{SINGLE_MAX, begins_block};
use crate::source::os;

/// Blocks that come in any order.
pub(super) const GROUP: u32 = 8;
/// What the blocks of a debugged heap are filled with.
const FRESH: u8 = 0xA5;
const FREED: u8 = 0xDD;

/// Blocks of a class that wait in quarantine: some bytes of them, since each is cold when it comes back, but one at least
/// and less than a cache holds.
const fn ring_length(class: usize) -> usize {
    const BYTES: usize = 8 << 10;
    let (count, most) = (BYTES / class::size(class), class::cache_capacity(class) / 2);
    match count {
        0 => 1,
        _ if count < most => count,
        _ => most,
    }
}

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
    class: Cell<u32>,
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
    /// The number of the segment that a block was last freed in. Segments are in the registry as long as their hub.
    known: Cell<usize>,
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
        guard.known.set(usize::MAX);
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
        lane.class.set(class as u32);
        if self.quarantine.get() {
            let ring = &self.waiting[CACHES[class]..][..ring_length(class)];
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

    /// Where blocks of a class wait, with nulls where none does.
    pub(super) fn waiting(&self, class: usize) -> &[Slot] {
        &self.waiting[CACHES[class]..CACHES[class + 1]]
    }

    fn random(&self) -> u64 {
        let mut state = self.random.get();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.random.set(state);
        state
    }

    /// Puts slots into any order within groups of neighbours, which a cache and a page table still like.
    pub(super) fn shuffle(&self, slots: &[Slot]) {
        if !self.shuffle.get() {
            return;
        }
        for group in slots.chunks(GROUP as usize) {
            let mut random = self.random();
            for at in (1..group.len()).rev() {
                let with = ((random & 0xFF) as usize * (at + 1)) >> 8;
                random >>= 8;
                let (a, b) = (group[at].load(Ordering::Relaxed), group[with].load(Ordering::Relaxed));
                group[at].store(b, Ordering::Relaxed);
                group[with].store(a, Ordering::Relaxed);
            }
        }
    }

    /// What a freed block is filled with; `None` where it keeps what the program left, but for its last word.
    fn filling(&self) -> Option<u8> {
        if self.zero_on_free.get() { Some(0) } else { self.debug.get().then_some(FREED) }
    }

    /// Marks a block free. Here and below `plain` is what the guard says, or a constant that makes a shorter path.
    #[inline(always)]
    fn seal_free(&self, block: *mut u8, size: usize, plain: bool) {
        // SAFETY: all of the block, which is in the heap's hands.
        unsafe {
            if !plain {
                self.fill(block, size);
            }
            let at = seal::end(block, size);
            seal::write(at, Key::get().free(at));
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

    /// Ends the program unless a free block is as it was left, zeroes aside (2).
    fn expect_filled(&self, block: *mut u8, size: usize) {
        let left = u64::from_ne_bytes([self.filling().unwrap_or(0); 8]);
        // SAFETY: all of the block, which is in the heap's hands.
        let words = unsafe { core::slice::from_raw_parts(block.cast::<u64>(), size / 8) };
        let (last, others) = (words[words.len() - 1], &words[..words.len() - 1]);
        let is_free = last == Key::get().free(seal::end(block, size)) || last == 0;
        if !(others.iter().all(|&found| found == left || found == 0) && is_free) {
            fault::written_after_free(block);
        }
    }

    /// A block that was never used; `zeroed` says that its memory was not, either (1).
    pub(super) fn on_carve(&self, block: *mut u8, size: usize, zeroed: bool) {
        if self.debug.get() || !zeroed {
            self.seal_free(block, size, !self.debug.get());
        }
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

    /// Makes a free block a program's.
    #[inline(always)]
    fn hand_out(&self, block: *mut u8, size: usize, plain: bool) {
        if !plain && self.debug.get() {
            self.refresh(block, size);
        }
        // SAFETY: a block of that size that nobody else has.
        unsafe { seal_live(block, size) };
    }

    #[cold]
    #[inline(never)]
    fn refresh(&self, block: *mut u8, size: usize) {
        self.expect_filled(block, size);
        // SAFETY: a block of that size that nobody else has.
        unsafe { block.write_bytes(FRESH, size - SEAL) };
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
/// classes are further apart than a word. The last of all serves no other requests.
const fn with_word(class: usize) -> usize {
    class + 1
}

/// The class that serves requests of `size` bytes at a multiple of `align` with their word; `None` if they take a larger
/// block than any class has.
fn of_sealed(size: usize, align: usize) -> Option<usize> {
    let of_others = class::of_layout(size.checked_add(SEAL)?, align);
    of_others.or_else(|| (size <= class::MAX && align <= class::LARGEST_ALIGN).then_some(class::LARGEST))
}

/// A block for requests of `class` at a multiple of `align`, if the cache has one and nothing is filled.
#[inline(always)]
pub(super) fn alloc_cached(guard: &Guard, class: usize, align: usize) -> *mut u8 {
    match guard.lanes.get(with_word(class)) {
        Some(lane) if align <= MIN_ALIGN && guard.plain.get() => guard.pop(lane, true),
        _ => ptr::null_mut(),
    }
}

/// The same for a request of `size` bytes, which are of `class`, whose block will never be freed by a layout: it may be
/// of that class, too, if that has room for the word.
#[inline(always)]
pub(super) fn alloc_cached_exact(guard: &Guard, class: usize, size: usize, align: usize) -> *mut u8 {
    match guard.lanes.get(class..=with_word(class)) {
        Some([lane, next]) if align <= MIN_ALIGN && guard.plain.get() => {
            let has_room = size + SEAL <= lane.size.get() as usize;
            guard.pop(if has_room { lane } else { next }, true)
        }
        _ => ptr::null_mut(),
    }
}

impl ThreadHeap {
    /// A block for a request of `size` bytes, no more than the largest class has, on a hardened heap.
    pub(super) fn guarded_alloc(&self, guard: &Guard, size: usize, align: usize) -> *mut u8 {
        let Some(class) = of_sealed(size, align) else {
            return self.guarded_alloc_big(size, align).0;
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
            unsafe { seal_live(block, size) };
        }
        (block, zeroed)
    }

    /// Frees what a program says is a block, on a hardened heap (3).
    #[inline(never)]
    pub(super) fn guarded_free(&self, guard: &Guard, block: *mut u8) {
        let unit = block.addr().wrapping_sub(1) / SEGMENT;
        if unit != guard.known.get() {
            if !registry::in_segment(block.addr().wrapping_sub(1), self.hub()) {
                return self.guarded_free_large(guard, block);
            }
            guard.known.set(unit);
        }
        // SAFETY: segments stay mapped as long as their hub.
        let segment = unsafe { &*segment_of(block) };
        let class = segment.class_at(block);
        if class >= SINGLE {
            return self.guarded_free_single(guard, segment, block);
        }
        self.guarded_free_small(guard, class as usize, block);
    }

    /// Frees what a program says is a block of a span of `class`. The way of a small block of a heap that
    /// fills nothing calls nothing that comes back, and so saves no registers.
    #[inline(always)]
    pub(super) fn guarded_free_small(&self, guard: &Guard, class: usize, block: *mut u8) {
        let Some(lane) = guard.lanes.get(class) else { return };
        let (size, key) = (lane.size.get() as usize, Key::get());
        if !(guard.plain.get() && lies_in_one_page(block, size)) {
            return self.guarded_free_far(guard, lane, block);
        }
        let (before, before_at) = word_before(block);
        if !key.made(before, before_at) {
            return self.guarded_free_far(guard, lane, block);
        }
        let at = seal::end(block, size);
        let live = expect_live(block, at, key);
        // SAFETY: the last word of a block that is the heap's from here on.
        unsafe { seal::write(at, !live) };
        self.take_back(guard, lane, block);
    }

    /// A block whose words are looked at only once it is known to be one of a span's.
    #[cold]
    #[inline(never)]
    fn guarded_free_far(&self, guard: &Guard, lane: &Lane, block: *mut u8) {
        // SAFETY: segments stay mapped as long as their hub.
        let span = unsafe { &*segment_of(block) }.span_at(block);
        if !span.begins_block(block) {
            fault::invalid_free(block);
        }
        let (size, key) = (lane.size.get() as usize, Key::get());
        expect_live(block, seal::end(block, size), key);
        // Before the first block of a span lies what is not the program's.
        if span.base.get() < block.addr() {
            // Read once: the owner of the block that ends there may write meanwhile.
            let (before, at) = word_before(block);
            if before != 0 && !key.made(before, at) {
                fault::underflow(block);
            }
        }
        guard.seal_free(block, size, guard.plain.get());
        self.take_back(guard, lane, block);
    }

    /// Delays the reuse of a freed block, and puts what has waited for long enough into the cache.
    #[inline(always)]
    fn take_back(&self, guard: &Guard, lane: &Lane, block: *mut u8) {
        let block = guard.delay(lane, block);
        if !block.is_null() {
            let top = lane.top.load(Ordering::Relaxed);
            if ptr::eq(top, lane.limit.get()) {
                return self.guarded_flush(lane, block);
            }
            // SAFETY: below the limit there is a slot.
            unsafe {
                (*top).store(block, Ordering::Relaxed);
                lane.top.store(top.add(1), Ordering::Relaxed);
            }
        }
    }

    /// The cache of a class is full: gives its older half back to the spans, then takes `block`.
    #[cold]
    #[inline(never)]
    fn guarded_flush(&self, lane: &Lane, block: *mut u8) {
        let class = lane.class.get() as usize;
        self.flush_oldest(class, (self.capacity(class) / 2).max(1));
        bump(&self.tally.flushes, 1);
        self.sweep();
        self.purge_if_due();
        let top = lane.top.load(Ordering::Relaxed);
        // SAFETY: there is room now.
        unsafe {
            (*top).store(block, Ordering::Relaxed);
            lane.top.store(top.add(1), Ordering::Relaxed);
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
                expect_live(block, seal::end(block, large.usable() + SEAL), Key::get());
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
        expect_live(block, seal::end(block, size), Key::get());
        guard.seal_free(block, size, false);
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
            for slot in guard.waiting(class) {
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
    expect_live(block, seal::end(block, size_with_word(block)), Key::get());
}

/// Whether a byte before `block` and `size` bytes from there on lie in one page, which can be read if `block` can. The
/// word at their end then says whether they are a block (1), without a look into the books.
#[inline(always)]
fn lies_in_one_page(block: *mut u8, size: usize) -> bool {
    const PAGE: usize = 4096;
    block.wrapping_sub(1).addr() / PAGE == block.wrapping_add(size - 1).addr() / PAGE
}

/// Makes a block end in its live word.
///
/// # Safety
/// The block is of that size and in the caller's hands.
#[inline(always)]
unsafe fn seal_live(block: *mut u8, size: usize) {
    let at = seal::end(block, size);
    // SAFETY: the caller's contract.
    unsafe { seal::write(at, Key::get().live(at)) };
}

/// Ends the program unless the word at `at`, the end of a block, says that it is live; that word.
#[inline(always)]
fn expect_live(block: *mut u8, at: *mut u64, key: Key) -> u64 {
    // SAFETY: the place of a block is mapped, and so is the page of any address in it.
    let found = unsafe { seal::read(at) };
    if found != key.live(at) {
        not_live(block, at, found);
    }
    found
}

/// The word before what is said to be a block, which can be read, and its place.
#[inline(always)]
fn word_before(block: *mut u8) -> (u64, *mut u64) {
    let at = seal::end(block, 0);
    // SAFETY: the caller knows that it is mapped.
    (unsafe { seal::read(at) }, at)
}

#[cold]
#[inline(never)]
fn not_live(block: *mut u8, at: *mut u64, found: u64) -> ! {
    // SAFETY: there are books before the place of a block.
    let segment = unsafe { &*segment_of(block) };
    if Large::at(segment).is_none() && !segment.begins_block(block) {
        fault::invalid_free(block);
    }
    match found {
        _ if found == Key::get().free(at) => fault::double_free(block),
        // Also found where no block was cut yet, or where its page went back since the free.
        0 => fault::not_live(block),
        _ => fault::overflow(block),
    }
}

/// Bytes of a hardened block larger than any class, its last word included.
fn size_with_word(block: *mut u8) -> usize {
    // SAFETY: a block just handed out.
    (unsafe { super::usable_size(block) }) + SEAL
}

const _: () = {
    assert!(SINGLE_MAX > class::MAX + SEAL);
    let mut class = 0;
    while class < class::LARGEST {
        assert!(class::size(class) + SEAL <= class::size(with_word(class)));
        class += 1;
    }
};

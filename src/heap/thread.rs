//! The heap of one thread: what is on the fast paths.
//!
//! For each class a thread keeps a stack of free blocks (its *cache*). Allocation pops, a free pushes, whosesoever
//! the block; only when a stack is empty or full are spans touched, many blocks at a time, in `refill` and `flush`.
//!
//! Invariants, beside those of `segment`:
//! 1. Only the thread that a heap is bound to (or the holder of the lock `late`) uses it.
//! 2. Each stack is `[bottom, limit)` with `bottom <= top <= limit`; the slot below `bottom` is null for
//!    ever, so that an empty stack shows by what is popped.
//! 3. Blocks in caches are live for their span, which may be another thread's: what threads hand to each other
//!    goes home only from a full cache.
//! 4. `pending` is the memory that a purge might give back: unsettled free bytes of spans, and idle slices.
//! 5. Every segment of this heap is on `segments`; those with vacant slices on `roomy`, those with idle ones
//!    on `idle_segments`.

use core::cell::Cell;
use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use super::class::{self, COUNT};
use super::guard::Guard;
use super::hub::Hub;
use super::list::List;
use super::segment::{Line, RoomySegments, Segment, SegmentQueue, Segments};
use super::span::{PartialSpans, Span, SpanQueue};

/// One place of a stack. Atomic, since statistics read the stacks of other threads.
pub(crate) type Slot = AtomicPtr<u8>;

/// The tops and ends of the caches: all that the fast paths read and write.
#[repr(C)]
pub(crate) struct Front {
    tops: [AtomicPtr<Slot>; COUNT],
    limits: [Cell<*const Slot>; COUNT],
    /// What a hardened heap has beside, where its real tops and ends are; null for others.
    guard: Cell<*const Guard>,
}

// SAFETY: the tops are atomic, and only a front's own thread reads or writes its limits, and writes its guard before
// anybody knows the front; those of the two static ones are never written.
unsafe impl Sync for Front {}

/// The same pointer, held in a register of its own.
///
/// Recent Intel cores (Golden Cove) hand what was just stored to the next load at no cost if both name the address by one
/// register, and take seven cycles if they add an index to it. A pair of allocation and free does so twice, one
/// after the other, and little else takes time.
#[inline(always)]
fn in_one_register<T>(pointer: *const T) -> *const T {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let mut pointer = pointer;
        // SAFETY: no instruction at all; but how the pointer came about is forgotten, and so is the index.
        unsafe {
            core::arch::asm!("/* {0} */", inout(reg) pointer, options(pure, readonly, nostack, preserves_flags));
        }
        pointer
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    pointer
}

/// Two empty slots: the stack of a thread that has no heap is empty and full at once.
static NO_SLOTS: [Slot; 2] = [const { AtomicPtr::new(ptr::null_mut()) }; 2];

/// The front of a thread that has no heap yet: every operation goes to its slow path.
pub(crate) static UNBOUND: Front = Front::closed();
/// The front of a thread whose heap is gone: it has run its destructors.
pub(crate) static ENDED: Front = Front::closed();

impl Front {
    const fn closed() -> Self {
        Self {
            tops: [const { AtomicPtr::new((&raw const NO_SLOTS[1]).cast_mut()) }; COUNT],
            limits: [const { Cell::new(&raw const NO_SLOTS[1]) }; COUNT],
            guard: Cell::new(ptr::null()),
        }
    }

    /// What a hardened heap has beside.
    #[inline(always)]
    pub(super) fn guard(&self) -> Option<&Guard> {
        // SAFETY: null or a guard, which lives as long as the heap.
        unsafe { self.guard.get().as_ref() }
    }

    /// Where the top of the cache of `class` is noted.
    ///
    /// # Safety
    /// `class < COUNT`.
    #[inline(always)]
    unsafe fn top_cell(&self, class: usize) -> &AtomicPtr<Slot> {
        // SAFETY: `class` is in range.
        unsafe { &*in_one_register(self.tops.as_ptr().add(class)) }
    }

    /// Takes a block of `class` from the cache; null when it is empty.
    ///
    /// # Safety
    /// The front is the calling thread's, and `class < COUNT`.
    #[inline(always)]
    pub(crate) unsafe fn pop(&self, class: usize) -> *mut u8 {
        // SAFETY: `class` is in range; by invariant 2 the slot below the top exists.
        unsafe {
            let cell = self.top_cell(class);
            let below = cell.load(Ordering::Relaxed).sub(1);
            let block = (*below).load(Ordering::Relaxed);
            if !block.is_null() {
                cell.store(below, Ordering::Relaxed);
            }
            block
        }
    }

    /// Puts a block of `class` into the cache; false when it is full.
    ///
    /// # Safety
    /// The front is the calling thread's, `class < COUNT`, and the block is the caller's to free.
    #[inline(always)]
    pub(crate) unsafe fn push(&self, class: usize, block: *mut u8) -> bool {
        // SAFETY: `class` is in range; below the limit there is a slot.
        unsafe {
            let cell = self.top_cell(class);
            let top = cell.load(Ordering::Relaxed);
            if ptr::eq(top, self.limits.get_unchecked(class).get()) {
                return false;
            }
            (*top).store(block, Ordering::Relaxed);
            cell.store(top.add(1), Ordering::Relaxed);
        }
        true
    }
}

/// What a thread holds of one class beside its stacks.
pub(crate) struct Bin {
    pub(super) current: Cell<*const Span>,
    pub(super) partial: List<PartialSpans>,
    /// Blocks that refills took in all: each asks for a quarter of that, so that what is seldom used stays small.
    pub(super) taken: Cell<u32>,
    /// Blocks in the cache when the class was last looked at: see `sweep`.
    pub(super) seen: Cell<u16>,
    /// Whether the cache was last found full, and not empty since.
    pub(super) flushed: Cell<bool>,
}

/// What a heap counts on its slow paths. Written by its thread only.
pub(crate) struct Tally {
    pub(crate) refills: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) posted: AtomicU64,
    pub(crate) collected: AtomicU64,
    pub(crate) discarded: AtomicU64,
    pub(crate) adopted: AtomicU64,
    /// Bytes of spans that hold memory.
    pub(crate) committed: AtomicU64,
    /// Blocks that this thread took out of spans, less those it put back, by class. Only the sum over all
    /// threads means something.
    pub(crate) out: [AtomicU64; COUNT],
}

/// Adds to a count that only this thread writes: no locked instruction.
#[inline]
pub(super) fn bump(count: &AtomicU64, by: u64) {
    count.store(count.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

#[inline]
pub(super) fn lower(count: &AtomicU64, by: u64) {
    count.store(count.load(Ordering::Relaxed).wrapping_sub(by), Ordering::Relaxed);
}

/// Where the slots of a class begin.
pub(super) const CACHES: [usize; COUNT + 1] = {
    let mut at = [0; COUNT + 1];
    let mut class = 0;
    while class < COUNT {
        // One more than the capacity: the null below a cache's bottom.
        at[class + 1] = at[class] + class::cache_capacity(class) + 1;
        class += 1;
    }
    at
};

/// The heap of one thread.
#[repr(C)]
pub(crate) struct ThreadHeap {
    pub(crate) front: Front,
    pub(super) hub: Cell<*const Hub>,
    pub(super) bins: [Bin; COUNT],
    pub(super) segments: List<Segments>,
    pub(super) segment_count: Cell<usize>,
    pub(super) roomy: List<RoomySegments>,
    pub(super) queue: List<SpanQueue>,
    pub(super) idle_segments: List<SegmentQueue>,
    /// The segment whose posted blocks are collected next.
    pub(super) cursor: Cell<*const Segment>,
    /// How many are to be looked at before all are seen.
    pub(super) unseen: Cell<usize>,
    /// Bytes of blocks that are out of their spans.
    pub(super) live: Cell<usize>,
    pub(super) pending: Cell<usize>,
    /// What of that the others know of: see `regret`.
    pub(super) told: Cell<usize>,
    /// Most live bytes since the caches were last emptied for having become large beside what is live.
    pub(super) high_water: Cell<usize>,
    /// Whether the heap was large and only shrank since: see `set_shrinking`.
    pub(super) shrinking: Cell<bool>,
    pub(super) refills_left: Cell<u32>,
    /// The class that is looked at next: see `sweep`.
    pub(super) swept: Cell<usize>,
    pub(super) trims_seen: Cell<u32>,
    /// Frees into segments that nobody owns: see `send_home`.
    pub(super) strays: Cell<u32>,
    /// Set while a request must be served from what is there.
    pub(super) frugal: Cell<bool>,
    pub(crate) tally: Tally,
    /// Whether others posted blocks since this thread last looked; a hint.
    pub(super) has_mail: Line<AtomicBool>,
    pub(super) next_idle: Cell<*const ThreadHeap>,
    pub(super) next_heap: Cell<*const ThreadHeap>,
    /// What a pool with statistics counts for this thread.
    pub(crate) requests: super::stats::Requests,
    caches: [Slot; CACHES[COUNT]],
}

const _: () = assert!(offset_of!(ThreadHeap, front) == 0);

impl ThreadHeap {
    /// Makes a heap in zeroed memory; what is not set here is right as zero.
    ///
    /// # Safety
    /// `base` is zeroed memory of this type's size and alignment, for nobody else, and lives as long as the
    /// hub.
    pub(super) unsafe fn create<'a>(base: *mut u8, hub: &Hub) -> &'a ThreadHeap {
        // SAFETY: all zero is a valid value: null pointers, zero counts, empty lists.
        let heap = unsafe { &*base.cast::<ThreadHeap>() };
        heap.hub.set(hub);
        for class in 0..COUNT {
            heap.front.tops[class].store(heap.bottom(class).cast_mut(), Ordering::Relaxed);
            heap.set_capacity(class, class::cache_capacity(class));
        }
        heap
    }

    /// Shuts the fast paths and gives the heap a guard; false without memory.
    pub(super) fn harden(&self) -> bool {
        let Some(guard) = Guard::create(self.hub()) else { return false };
        for class in 0..COUNT {
            guard.set_up(class, self.bottom(class), self.front.limits[class].replace(self.bottom(class)));
        }
        self.front.guard.set(guard);
        true
    }

    /// What the heap has if it is hardened.
    #[inline(always)]
    pub(super) fn guard(&self) -> Option<&Guard> {
        self.front.guard()
    }

    pub(super) fn hub(&self) -> &Hub {
        // SAFETY: a heap lives within its hub's life.
        unsafe { &*self.hub.get() }
    }

    pub(super) fn bottom(&self, class: usize) -> *const Slot {
        &raw const self.caches[CACHES[class] + 1]
    }

    /// The first `count` slots of the cache of `class`, or as many as it has.
    pub(super) fn slots(&self, class: usize, count: usize) -> &[Slot] {
        let all = &self.caches[CACHES[class] + 1..CACHES[class + 1]];
        &all[..count.min(all.len())]
    }

    pub(super) fn top(&self, class: usize) -> *const Slot {
        self.top_and_limit(class).0.load(Ordering::Relaxed)
    }

    /// The top and the end of a cache: those of the fast paths, or the hidden ones.
    fn top_and_limit(&self, class: usize) -> (&AtomicPtr<Slot>, &Cell<*const Slot>) {
        match self.guard() {
            Some(guard) => guard.top_and_limit(class),
            None => (&self.front.tops[class], &self.front.limits[class]),
        }
    }

    pub(super) fn set_top(&self, class: usize, top: *const Slot) {
        self.top_and_limit(class).0.store(top.cast_mut(), Ordering::Relaxed);
    }

    /// Blocks that the cache of a class holds at most.
    pub(super) fn capacity(&self, class: usize) -> usize {
        (self.top_and_limit(class).1.get() as usize - self.bottom(class) as usize) / size_of::<Slot>()
    }

    /// Sets that; the cache holds no more by now, and its array has room.
    pub(super) fn set_capacity(&self, class: usize, capacity: usize) {
        debug_assert!(self.cached_count(class) <= capacity && capacity <= class::cache_capacity(class));
        self.top_and_limit(class).1.set(self.bottom(class).wrapping_add(capacity));
    }

    /// The blocks in the cache of a class, oldest first; a snapshot if another thread looks.
    pub(crate) fn cached(&self, class: usize) -> &[Slot] {
        let len = (self.top(class) as usize - self.bottom(class) as usize) / size_of::<Slot>();
        &self.caches[CACHES[class] + 1..][..len]
    }

    /// How many those are; any thread may ask.
    pub(crate) fn cached_count(&self, class: usize) -> usize {
        (self.top(class) as usize).wrapping_sub(self.bottom(class) as usize) / size_of::<Slot>()
    }

    /// Whether a free block is among those at hand or in quarantine; any thread may ask.
    pub(super) fn keeps(&self, class: usize, block: *mut u8) -> bool {
        let is_it = |slot: &Slot| ptr::eq(slot.load(Ordering::Relaxed), block);
        self.cached(class).iter().any(is_it)
            || self.guard().is_some_and(|guard| guard.waiting(class).iter().any(is_it))
    }

    /// Free blocks that this heap keeps at hand or in quarantine; any thread may ask.
    pub(crate) fn kept_count(&self, class: usize) -> usize {
        let held = self.guard().map_or(0, |guard| guard.held(class));
        self.cached_count(class) + held
    }

    /// Whether `owner`, read from a segment, is this heap.
    #[inline(always)]
    pub(crate) fn is(&self, owner: *mut ThreadHeap) -> bool {
        ptr::eq(owner, self)
    }
}

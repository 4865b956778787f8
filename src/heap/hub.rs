//! What the threads of one heap share: segments that nobody owns, heaps of threads that ended, the limit.
//!
//! Everything in `Shared` is under one lock, which is held for list operations only; the operating system is
//! called without it, except to give memory back. Lock order: `late`, then `shared`, then `larges`, then `buried`, then
//! `spares`.

use core::cell::Cell;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::guard::Guard;
use super::large::{Buried, Larges};
use super::list::List;
use super::lock::SpinLock;
use super::registry;
use super::regret::Regret;
use super::segment::{SEGMENT, Segments};
use super::settings::{Part, Settings};
use super::spare::Spares;
use super::thread::ThreadHeap;
use crate::base::error::Result;
use crate::base::heap_config::HeapConfig;
use crate::source::os;

/// See [`Hub::count_peak`].
pub(super) const UNCOUNTED: usize = usize::MAX;

/// The shared part of a heap.
pub(crate) struct Hub {
    /// Most bytes that spans and large blocks may hold.
    pub(super) limit: AtomicUsize,
    /// What spans and large blocks hold, where that is counted: there is a limit, or a peak to be known.
    pub(super) held: AtomicUsize,
    /// Most bytes ever held; `UNCOUNTED` where nobody asks.
    pub(super) peak: AtomicUsize,
    /// What was asked for ahead of need: memory in use up to here is no growth.
    pub(super) booked: AtomicUsize,
    pub(super) peak_booked: AtomicUsize,
    pub(super) shared: SpinLock<Shared>,
    /// The heap of threads that have none any more: they allocate under this lock.
    pub(super) late: SpinLock<LateHeap>,
    pub(super) larges: SpinLock<Larges>,
    pub(super) buried: SpinLock<Buried>,
    pub(super) spares: SpinLock<Spares>,
    pub(crate) counters: Counters,
    /// Rises when somebody asks all threads to give idle memory back.
    pub(super) trims: AtomicU32,
    pub(super) settings: Settings,
    /// Spans with a guard page.
    pub(super) guards: AtomicUsize,
    pub(super) regret: Regret,
    /// Heaps that were made: threads that ran at once.
    heaps: AtomicUsize,
    pub(super) next_hub: AtomicPtr<Hub>,
    /// Calls to the operating system that are let through before one fails; `u64::MAX` for all.
    #[cfg(test)]
    pub(super) fail_after: AtomicU64,
    /// Whether all go through again after the one that fails.
    #[cfg(test)]
    pub(super) fail_once: core::sync::atomic::AtomicBool,
}

/// What only slow paths count.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) reserved: AtomicUsize,
    pub(crate) os_calls: AtomicU64,
    pub(crate) large_live: AtomicUsize,
    pub(crate) large_count: AtomicU64,
    /// Memory held by spans of abandoned segments.
    pub(crate) orphaned: AtomicUsize,
}

/// Lists of segments and heaps that nobody owns.
pub(super) struct Shared {
    /// Small pages, huge pages.
    pub(super) vacant: [List<Segments>; 2],
    /// Reserved and not yet made into segments: (next, end).
    pub(super) fresh: [(usize, usize); 2],
    pub(super) abandoned: List<Segments>,
    idle_heaps: *const ThreadHeap,
    pub(super) all_heaps: *const ThreadHeap,
    /// The first of all segments, and the first of those (small pages, huge pages) that hold nothing; the
    /// registry has the rest.
    pub(super) all_segments: usize,
    pub(super) bare: [usize; 2],
    /// Idle memory in segments that nobody owns, vacant and abandoned.
    pub(super) warm: usize,
}

// SAFETY: the pointers are to memory of the hub, and only the holder of the lock follows them.
unsafe impl Send for Shared {}

pub(super) struct LateHeap(Cell<*const ThreadHeap>);
// SAFETY: as above.
unsafe impl Send for LateHeap {}

// SAFETY: atomics and locks; segments and heaps are handed over under the lock.
unsafe impl Sync for Hub {}
// SAFETY: nothing is bound to the thread that made it.
unsafe impl Send for Hub {}

impl Hub {
    pub(crate) const fn new(limit: usize) -> Self {
        Self {
            limit: AtomicUsize::new(limit),
            held: AtomicUsize::new(0),
            peak: AtomicUsize::new(UNCOUNTED),
            booked: AtomicUsize::new(0),
            peak_booked: AtomicUsize::new(0),
            shared: SpinLock::new(Shared {
                vacant: [List::new(), List::new()],
                fresh: [(0, 0); 2],
                abandoned: List::new(),
                idle_heaps: ptr::null(),
                all_heaps: ptr::null(),
                all_segments: 0,
                bare: [0; 2],
                warm: 0,
            }),
            late: SpinLock::new(LateHeap(Cell::new(ptr::null()))),
            larges: SpinLock::new(Larges::new()),
            buried: SpinLock::new(Buried::new()),
            spares: SpinLock::new(Spares::new()),
            counters: Counters {
                reserved: AtomicUsize::new(0),
                os_calls: AtomicU64::new(0),
                large_live: AtomicUsize::new(0),
                large_count: AtomicU64::new(0),
                orphaned: AtomicUsize::new(0),
            },
            trims: AtomicU32::new(0),
            settings: Settings::new(),
            guards: AtomicUsize::new(0),
            regret: Regret::new(),
            heaps: AtomicUsize::new(0),
            next_hub: AtomicPtr::new(ptr::null_mut()),
            #[cfg(test)]
            fail_after: AtomicU64::new(u64::MAX),
            #[cfg(test)]
            fail_once: core::sync::atomic::AtomicBool::new(false),
        }
    }

    /// Whether the next call to the system may be made: tests make some fail.
    #[cfg(test)]
    pub(super) fn let_through(&self) -> bool {
        let let_through =
            self.fail_after.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| match left {
                u64::MAX => Some(u64::MAX),
                left => left.checked_sub(1),
            });
        if let_through.is_err() && self.fail_once.load(Ordering::Relaxed) {
            self.fail_after.store(u64::MAX, Ordering::Relaxed);
        }
        let_through.is_ok()
    }

    #[cfg(not(test))]
    pub(super) const fn let_through(&self) -> bool {
        true
    }

    /// Maps memory, and counts it.
    pub(super) fn map(&self, len: usize, align: usize) -> Option<*mut u8> {
        self.count_mapping(len, || os::map(len, align, os::Access::ReadWrite))
    }

    /// The same for one block, which the system refuses if it has nowhere near as much memory.
    pub(super) fn map_block(&self, len: usize, align: usize) -> Option<*mut u8> {
        self.count_mapping(len, || os::map_for_use(len, align))
    }

    fn count_mapping(&self, len: usize, map: impl FnOnce() -> Result<NonNull<u8>>) -> Option<*mut u8> {
        if !self.let_through() {
            return None;
        }
        self.count_call();
        let base = map().ok()?;
        self.counters.reserved.fetch_add(len, Ordering::Relaxed);
        Some(base.as_ptr())
    }

    /// # Safety
    /// As for `os::unmap`, and the memory came from `map`.
    pub(super) unsafe fn unmap(&self, base: *mut u8, len: usize) {
        self.count_call();
        self.counters.reserved.fetch_sub(len, Ordering::Relaxed);
        if let Some(base) = NonNull::new(base) {
            // SAFETY: the caller's contract.
            unsafe { os::unmap(base, len) }
        }
    }

    /// # Safety
    /// As for `os::discard`.
    pub(super) unsafe fn discard(&self, base: *mut u8, len: usize) -> bool {
        self.count_call();
        // SAFETY: the caller's contract.
        let done =
            self.let_through() && NonNull::new(base).is_some_and(|base| unsafe { os::discard(base, len) });
        if done {
            self.regret.gave(len, self.threads(), self.settings.regret());
        }
        done
    }

    /// Takes notice that `bytes` will be used that hold no memory yet.
    pub(super) fn took(&self, bytes: usize) {
        if bytes > 0 {
            self.regret.took(bytes, self.settings.regret());
        }
    }

    /// Threads that ran at once.
    pub(super) fn threads(&self) -> usize {
        self.heaps.load(Ordering::Relaxed).max(1)
    }

    pub(super) fn count_call(&self) {
        self.counters.os_calls.fetch_add(1, Ordering::Relaxed);
    }

    /// Sets the hub to a configuration, before it is used.
    pub(super) fn configure(&self, config: &HeapConfig) {
        self.limit.store(config.limit, Ordering::Relaxed);
        self.settings.apply(config);
    }

    /// A heap for a thread: one that a thread left, or a new one.
    pub(crate) fn take_heap(&self) -> Option<&ThreadHeap> {
        {
            let mut shared = self.shared.lock();
            // SAFETY: heaps live as long as the hub.
            if let Some(heap) = unsafe { shared.idle_heaps.as_ref() } {
                shared.idle_heaps = heap.next_idle.get();
                return Some(heap);
            }
        }
        let base = self.map(Self::heap_bytes(), os::page_size())?;
        // SAFETY: fresh zeroed memory of that size, for nobody else.
        let heap = unsafe { ThreadHeap::create(base, self) };
        if self.settings.has(Part::Checks) && !heap.harden() {
            // SAFETY: nobody has seen the heap.
            unsafe { self.unmap(base, Self::heap_bytes()) };
            return None;
        }
        let mut shared = self.shared.lock();
        self.heaps.fetch_add(1, Ordering::Relaxed);
        heap.next_heap.set(shared.all_heaps);
        shared.all_heaps = heap;
        Some(heap)
    }

    fn heap_bytes() -> usize {
        size_of::<ThreadHeap>().next_multiple_of(os::page_size())
    }

    /// Whether a block of `class` is free in some thread's cache or quarantine, as far as can be seen from here.
    pub(super) fn is_cached(&self, class: usize, block: *mut u8) -> bool {
        let shared = self.shared.lock();
        // SAFETY: heaps live as long as the hub.
        let mut at = unsafe { shared.all_heaps.as_ref() };
        while let Some(heap) = at {
            if heap.keeps(class, block) {
                return true;
            }
            // SAFETY: as above.
            at = unsafe { heap.next_heap.get().as_ref() };
        }
        false
    }

    pub(crate) fn put_heap(&self, heap: &ThreadHeap) {
        let mut shared = self.shared.lock();
        heap.next_idle.set(shared.idle_heaps);
        shared.idle_heaps = heap;
    }

    /// Runs `work` on the heap of threads that have none, under its lock.
    pub(crate) fn with_late<R>(&self, work: impl FnOnce(&ThreadHeap) -> R) -> Option<R> {
        let late = self.late.lock();
        if late.0.get().is_null() {
            late.0.set(self.take_heap()?);
        }
        // SAFETY: heaps live as long as the hub, and the lock makes us its only user.
        Some(work(unsafe { &*late.0.get() }))
    }

    /// Unmaps everything.
    ///
    /// # Safety
    /// No thread uses this hub, a heap or a block of it any more.
    pub(crate) unsafe fn demolish(&mut self) {
        self.delist();
        super::large::release_all(self);
        let places = self.buried.lock().places();
        for (base, len) in places.into_iter().filter(|(_, len)| *len > 0) {
            // SAFETY: a mapping of this hub, which nobody uses any more.
            unsafe { self.unmap(base as *mut u8, len) };
        }
        let shared = self.shared.lock();
        let (mut segment, mut heap, fresh) = (shared.all_segments, shared.all_heaps, shared.fresh);
        drop(shared);
        // SAFETY: all of it is memory of this hub, which nobody uses any more; what follows a node is read
        // before the node goes.
        unsafe {
            while segment != 0 {
                let next = registry::entry(segment).map_or(0, |entry| entry.sibling.load(Ordering::Relaxed));
                registry::remove(segment, SEGMENT);
                self.unmap(segment as *mut u8, SEGMENT);
                segment = next;
            }
            while let Some(at) = heap.as_ref() {
                heap = at.next_heap.get();
                if let Some(guard) = at.guard() {
                    self.unmap(ptr::from_ref(guard).cast_mut().cast(), Guard::bytes());
                }
                self.unmap(ptr::from_ref(at).cast_mut().cast(), Self::heap_bytes());
            }
            for (next, end) in fresh {
                if next < end {
                    self.unmap(next as *mut u8, end - next);
                }
            }
        }
    }
}

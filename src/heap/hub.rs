//! What the threads of one heap share: segments that nobody owns, heaps of threads that ended, the limit.
//!
//! Everything in `Shared` is under one lock, which is held for list operations only; the operating system is
//! called without it, except to give memory back. Lock order: `late`, then `shared`, then `larges`, then `buried`.

use core::cell::Cell;
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::guard::Guard;
use super::large::{Buried, Larges, drop_spare};
use super::list::List;
use super::lock::SpinLock;
use super::registry;
use super::regret::Regret;
use super::segment::{HEADER, SEGMENT, SLICE, Segment, Segments, run};
use super::settings::{Part, Settings};
use super::thread::ThreadHeap;
use crate::base::heap_config::HeapConfig;
use crate::source::os;

/// Segments reserved at once, so that most segments cost no call. Address space only.
const SMALL_REGION: usize = 4;
const HUGE_REGION: usize = 16;

/// See [`Hub::count_peak`].
const UNCOUNTED: usize = usize::MAX;

/// The shared part of a heap.
pub(crate) struct Hub {
    /// Most bytes that spans and large blocks may hold.
    limit: AtomicUsize,
    /// What spans and large blocks hold, where that is counted: there is a limit, or a peak to be known.
    held: AtomicUsize,
    /// Most bytes ever held; `UNCOUNTED` where nobody asks.
    peak: AtomicUsize,
    /// What was asked for ahead of need: memory in use up to here is no growth.
    booked: AtomicUsize,
    peak_booked: AtomicUsize,
    pub(super) shared: SpinLock<Shared>,
    /// The heap of threads that have none any more: they allocate under this lock.
    pub(super) late: SpinLock<LateHeap>,
    pub(super) larges: SpinLock<Larges>,
    pub(super) buried: SpinLock<Buried>,
    pub(crate) counters: Counters,
    /// Rises when somebody asks all threads to give idle memory back.
    trims: AtomicU32,
    pub(super) settings: Settings,
    /// Spans with a guard page.
    pub(super) guards: AtomicUsize,
    pub(super) regret: Regret,
    /// Heaps that were made: threads that ran at once.
    heaps: AtomicUsize,
    next_hub: AtomicPtr<Hub>,
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

/// A segment that was taken from the lists.
enum Claim {
    /// With its books in order.
    Furnished(*const Segment),
    /// The place of one, which reads as zero.
    Bare(usize),
}

/// Lists of segments and heaps that nobody owns.
pub(super) struct Shared {
    /// Small pages, huge pages.
    vacant: [List<Segments>; 2],
    /// Reserved and not yet made into segments: (next, end).
    fresh: [(usize, usize); 2],
    pub(super) abandoned: List<Segments>,
    idle_heaps: *const ThreadHeap,
    pub(super) all_heaps: *const ThreadHeap,
    /// The first of all segments, and the first of those (small pages, huge pages) that hold nothing; the
    /// registry has the rest.
    all_segments: usize,
    bare: [usize; 2],
    /// Idle memory in segments that nobody owns, vacant and abandoned.
    warm: usize,
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
        if !self.let_through() {
            return None;
        }
        self.count_call();
        let base = os::map(len, align, os::Access::ReadWrite).ok()?;
        self.counters.reserved.fetch_add(len, Ordering::Relaxed);
        Some(base.as_ptr())
    }

    /// # Safety
    /// As for `os::unmap`, and the memory came from `map`.
    pub(super) unsafe fn unmap(&self, base: *mut u8, len: usize) {
        self.count_call();
        self.counters.reserved.fetch_sub(len, Ordering::Relaxed);
        if let Some(base) = ptr::NonNull::new(base) {
            // SAFETY: the caller's contract.
            unsafe { os::unmap(base, len) }
        }
    }

    /// # Safety
    /// As for `os::discard`.
    pub(super) unsafe fn discard(&self, base: *mut u8, len: usize) -> bool {
        self.count_call();
        // SAFETY: the caller's contract.
        let done = self.let_through()
            && ptr::NonNull::new(base).is_some_and(|base| unsafe { os::discard(base, len) });
        if done {
            self.regret.gave(len, self.threads(), self.settings.regret());
        }
        done
    }

    /// Takes notice that `bytes` will be used that hold no memory yet.
    pub(super) fn took(&self, bytes: usize) {
        if bytes > 0 {
            self.regret.took(bytes, self.threads(), self.settings.regret());
        }
    }

    /// Threads that ran at once.
    fn threads(&self) -> usize {
        self.heaps.load(Ordering::Relaxed).max(1)
    }

    pub(super) fn count_call(&self) {
        self.counters.os_calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// Sets the hub to a configuration, before it is used.
    pub(super) fn configure(&self, config: &HeapConfig) {
        self.limit.store(config.limit, Ordering::Relaxed);
        self.settings.apply(config);
    }

    pub(crate) fn booked(&self) -> usize {
        self.booked.load(Ordering::Relaxed)
    }

    /// Makes room for `bytes` more than are in use; false where there is none.
    pub(crate) fn book(&self, bytes: usize) -> bool {
        let Some(total) = self.snapshot().committed.checked_add(bytes).filter(|&sum| sum <= self.limit())
        else {
            return false;
        };
        let Some(len) = bytes.checked_add(bytes / 16 + SEGMENT).map(|len| len & !(SEGMENT - 1)) else {
            return false;
        };
        let (next, end) = self.shared.lock().fresh[0];
        if end - next < len {
            let Some(base) = self.map(len, SEGMENT) else { return false };
            let (next, end) =
                mem::replace(&mut self.shared.lock().fresh[0], (base as usize, base as usize + len));
            if next < end {
                // SAFETY: reserved and never handed out.
                unsafe { self.unmap(next as *mut u8, end - next) };
            }
        }
        self.booked.fetch_max(total, Ordering::Relaxed);
        self.peak_booked.fetch_max(total, Ordering::Relaxed);
        true
    }

    /// Keeps at most `keep` bytes booked beyond what is in use.
    pub(crate) fn unbook(&self, keep: usize) {
        let most = self.snapshot().committed.saturating_add(keep);
        self.booked.fetch_min(most, Ordering::Relaxed);
    }

    /// Lets the hub count what it holds even without a limit; before it is used.
    pub(crate) fn count_peak(&self) {
        self.peak.store(0, Ordering::Relaxed);
    }

    /// Bytes held, now and at most since the peak was last reset; for hubs that count their peak.
    pub(super) fn holdings(&self) -> (usize, usize) {
        (self.held.load(Ordering::Relaxed), self.peak.load(Ordering::Relaxed))
    }

    /// Most bytes ever booked since the peak was last reset.
    pub(super) fn peak_booked(&self) -> usize {
        self.peak_booked.load(Ordering::Relaxed)
    }

    /// Starts the peaks anew.
    pub(super) fn reset_holdings(&self) {
        self.peak.store(self.holdings().0, Ordering::Relaxed);
        self.peak_booked.store(self.booked(), Ordering::Relaxed);
    }

    fn counts(&self) -> bool {
        self.limit() != usize::MAX || self.peak.load(Ordering::Relaxed) != UNCOUNTED
    }

    /// Counts `bytes` towards the limit, or refuses.
    pub(super) fn charge(&self, bytes: usize) -> bool {
        if !self.counts() {
            return true;
        }
        let limit = self.limit();
        let before = self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            held.checked_add(bytes).filter(|&sum| sum <= limit)
        });
        if let Ok(held) = before
            && held + bytes > self.peak.load(Ordering::Relaxed)
        {
            self.peak.fetch_max(held + bytes, Ordering::Relaxed);
        }
        before.is_ok()
    }

    pub(super) fn refund(&self, bytes: usize) {
        if self.counts() {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// A segment for the calling thread, all vacant; the caller becomes its owner.
    pub(super) fn take_segment(&self, huge: bool) -> Option<&Segment> {
        let kind = usize::from(huge);
        let claim = self.claim(&mut self.shared.lock(), kind);
        if let Some(claim) = claim {
            return Some(self.furnish(claim, kind));
        }
        // No lock is held while the system is asked.
        let mut len = if kind == 1 { HUGE_REGION } else { SMALL_REGION } * SEGMENT;
        let base = self.map(len, SEGMENT).or_else(|| {
            len = SEGMENT;
            self.map(len, SEGMENT)
        });
        let Some(base) = base else {
            let claim = self.claim(&mut self.shared.lock(), 1 - kind)?;
            return Some(self.furnish(claim, 1 - kind));
        };
        // SAFETY: the region is ours. Small programs stay small even where the system prefers huge pages.
        unsafe { os::advise_huge(ptr::NonNull::new_unchecked(base), len, kind == 1) };
        let mut shared = self.shared.lock();
        let (next, end) = shared.fresh[kind];
        let another_was_faster = next < end;
        if !another_was_faster {
            shared.fresh[kind] = (base as usize, base as usize + len);
        }
        // Under the lock that publishes the region, so that who asked the system does not go without however
        // many threads ask at once.
        let claim = self.claim(&mut shared, kind);
        drop(shared);
        if another_was_faster {
            // SAFETY: nobody has seen the region.
            unsafe { self.unmap(base, len) };
        }
        claim.map(|claim| self.furnish(claim, kind))
    }

    /// A segment with idle memory that no block lies in; the caller becomes its owner.
    pub(super) fn take_warm(&self, huge: bool) -> Option<&Segment> {
        let mut shared = self.shared.lock();
        let kind = usize::from(huge);
        if shared.warm == 0 || shared.vacant[kind].front()?.idle() == 0 {
            return None;
        }
        let segment = ptr::from_ref(shared.vacant[kind].pop_front()?);
        // SAFETY: segments live as long as the hub (invariant 7).
        let segment = unsafe { &*segment };
        shared.warm -= segment.idle_bytes();
        Some(segment)
    }

    /// Takes a segment, or the place of one, that is there already: what holds memory first.
    fn claim(&self, shared: &mut Shared, kind: usize) -> Option<Claim> {
        if let Some(segment) = shared.vacant[kind].pop_front() {
            shared.warm -= segment.idle_bytes();
            return Some(Claim::Furnished(segment));
        }
        if let Some(entry) = registry::entry(shared.bare[kind]).filter(|_| shared.bare[kind] != 0) {
            let next = entry.bare.load(Ordering::Relaxed);
            return Some(Claim::Bare(mem::replace(&mut shared.bare[kind], next)));
        }
        let (next, end) = shared.fresh[kind];
        if next >= end || !registry::insert(next, SEGMENT, self, false) {
            return None;
        }
        shared.fresh[kind].0 = next + SEGMENT;
        let entry = registry::entry(next)?;
        entry.sibling.store(mem::replace(&mut shared.all_segments, next), Ordering::Relaxed);
        Some(Claim::Bare(next))
    }

    /// The segment of a claim. No lock is held, since the books of a bare one are faulted in here.
    fn furnish(&self, claim: Claim, kind: usize) -> &Segment {
        match claim {
            // SAFETY: segments live as long as the hub (invariant 7).
            Claim::Furnished(segment) => unsafe { &*segment },
            // SAFETY: memory of a region of ours that reads as zero, claimed once.
            Claim::Bare(base) => unsafe { Segment::create(base as *mut u8, self, kind == 1) },
        }
    }

    /// Takes back a segment with no live block, whose owner has let go of it. What it holds is kept up to a
    /// bound and given back beyond.
    pub(super) fn put_segment(&self, segment: &Segment) {
        debug_assert!(segment.is_empty());
        segment.head.owner.store(ptr::null_mut(), Ordering::Release);
        let mut shared = self.shared.lock();
        if !self.has_room(&shared, segment.idle_bytes()) {
            drop(shared);
            if self.strip(segment) {
                return;
            }
            // What the system did not take back is still there.
            shared = self.shared.lock();
        }
        shared.warm += segment.idle_bytes();
        shared.vacant[usize::from(segment.huge.get())].push_front(segment);
    }

    fn has_room(&self, shared: &Shared, idle: usize) -> bool {
        shared.warm.saturating_add(idle) <= self.settings.warm(self.threads(), self.regret.extra())
    }

    /// Whether unowned segments may hold `idle` bytes more.
    pub(super) fn keeps(&self, idle: usize) -> bool {
        idle == 0 || self.has_room(&self.shared.lock(), idle)
    }

    /// Gives back the idle slices of a segment that is the caller's; returns the bytes.
    pub(super) fn discard_idle(&self, segment: &Segment) -> usize {
        let mut idle = segment.idle();
        let mut given = 0;
        while idle != 0 {
            let first = idle.trailing_zeros() as usize;
            let count = (idle >> first).trailing_ones() as usize;
            let slices = run(first, count);
            idle &= !slices;
            // SAFETY: vacant slices, the caller's.
            if unsafe { self.discard_slices(segment, first, count) } {
                segment.pristine.set(segment.pristine.get() | slices);
                given += count * SLICE;
            }
        }
        given
    }

    /// Gives back all memory of a segment with no live block, its books too: the system backs the whole of it
    /// with huge pages anew, which it does not where a page is left over. False where it refused.
    fn strip(&self, segment: &Segment) -> bool {
        let (base, kind) = (segment.base(), usize::from(segment.huge.get()));
        // SAFETY: nobody has a block of the segment. A freer that is late with its announcement (invariant 7)
        // writes into zeroes, and the next owner finds a mark that leads to nothing.
        if !super::fence::open_segment(segment) || !unsafe { self.discard(base, SEGMENT) } {
            return false;
        }
        let mut shared = self.shared.lock();
        if let Some(entry) = registry::entry(base as usize) {
            entry.bare.store(mem::replace(&mut shared.bare[kind], base as usize), Ordering::Relaxed);
        }
        true
    }

    /// Makes a run of slices read as zero, and gives their memory back except where it shares a page with the
    /// books: on pages larger than those.
    ///
    /// # Safety
    /// The slices are vacant and the caller's.
    unsafe fn discard_slices(&self, segment: &Segment, first: usize, count: usize) -> bool {
        let end = (first + count) * SLICE;
        let mut start = first * SLICE;
        if first == 0 {
            start = HEADER.next_multiple_of(os::page_size());
            // SAFETY: between the books and the end of a page, which is no further than the end of a slice.
            unsafe { segment.base().add(HEADER).write_bytes(0, start - HEADER) };
        }
        // SAFETY: whole pages of vacant slices.
        start == end || unsafe { self.discard(segment.base().wrapping_add(start), end - start) }
    }

    /// Gives back what unowned segments hold; returns the bytes.
    pub(crate) fn trim(&self) -> usize {
        self.trims.fetch_add(1, Ordering::Relaxed);
        let mut given = drop_spare(self, 0);
        {
            let shared = &mut *self.shared.lock();
            // The lock makes them this thread's.
            let idle: usize = shared.abandoned.iter().map(|segment| self.discard_idle(segment)).sum();
            shared.warm -= idle;
            given += idle;
        }
        for kind in 0..2 {
            // Those that the system refuses go to the end of the list, where the count stops.
            let mut left = self.shared.lock().vacant[kind].iter().count();
            while left > 0 {
                left -= 1;
                let mut shared = self.shared.lock();
                let Some(segment) = shared.vacant[kind].pop_front().map(ptr::from_ref) else { break };
                // SAFETY: segments live as long as the hub (invariant 7), and this one is nobody's.
                let segment = unsafe { &*segment };
                let idle = segment.idle_bytes();
                shared.warm -= idle;
                drop(shared);
                if self.strip(segment) {
                    given += idle;
                } else {
                    let mut shared = self.shared.lock();
                    shared.warm += idle;
                    shared.vacant[kind].push_back(segment);
                }
            }
        }
        given
    }

    pub(super) fn trims(&self) -> u32 {
        self.trims.load(Ordering::Relaxed)
    }

    /// Lists a segment whose owner ends while blocks of it are live.
    pub(super) fn abandon(&self, segment: &Segment) {
        let mut shared = self.shared.lock();
        shared.warm += segment.idle_bytes();
        shared.abandoned.push_back(segment);
        segment.head.owner.store(ptr::null_mut(), Ordering::Release);
    }

    /// Makes `heap` the owner of an abandoned segment: of `segment`, if it is still abandoned, or of any.
    pub(super) fn adopt(&self, heap: &ThreadHeap, segment: Option<&Segment>) -> Option<&Segment> {
        let mut shared = self.shared.lock();
        let segment: *const Segment = match segment {
            Some(segment) if segment.head.owner.load(Ordering::Acquire).is_null() => segment,
            Some(_) => return None,
            None => shared.abandoned.front()?,
        };
        // SAFETY: segments live as long as the hub.
        let segment = unsafe { &*segment };
        shared.abandoned.remove(segment);
        shared.warm -= segment.idle_bytes();
        segment.head.owner.store(ptr::from_ref(heap).cast_mut(), Ordering::Release);
        Some(segment)
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

    /// Adds the hub to those that are locked around `fork`.
    pub(crate) fn enlist(&self) {
        let mut hubs = HUBS.lock();
        self.next_hub.store(hubs.0.cast_mut(), Ordering::Relaxed);
        hubs.0 = self;
    }

    fn delist(&self) {
        let mut hubs = HUBS.lock();
        let next = self.next_hub.load(Ordering::Relaxed);
        if ptr::eq(hubs.0, self) {
            hubs.0 = next;
            return;
        }
        // SAFETY: hubs delist before they go, so all on the list are alive.
        let mut at = unsafe { hubs.0.as_ref() };
        while let Some(hub) = at {
            let after = hub.next_hub.load(Ordering::Relaxed);
            if ptr::eq(after, self) {
                hub.next_hub.store(next, Ordering::Relaxed);
                return;
            }
            // SAFETY: as above.
            at = unsafe { after.as_ref() };
        }
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

/// All hubs, for `fork`.
struct Hubs(*const Hub);
// SAFETY: followed under the lock only; hubs delist before they go.
unsafe impl Send for Hubs {}
static HUBS: SpinLock<Hubs> = SpinLock::new(Hubs(ptr::null()));

fn each_hub(hubs: *const Hub, visit: impl Fn(&Hub)) {
    // SAFETY: called between the taking and the release of the lock of `HUBS`.
    let mut at = unsafe { hubs.as_ref() };
    while let Some(hub) = at {
        visit(hub);
        // SAFETY: as above.
        at = unsafe { hub.next_hub.load(Ordering::Relaxed).as_ref() };
    }
}

/// Takes every lock, so that the child finds them free and what they guard whole.
pub(super) extern "C" fn before_fork() {
    HUBS.lock_raw();
    each_hub(hubs_held(), |hub| {
        hub.late.lock_raw();
        hub.shared.lock_raw();
        hub.larges.lock_raw();
        hub.buried.lock_raw();
    });
    registry::GROWTH.lock_raw();
}

/// Lets go of them, in the parent and in the child.
pub(super) extern "C" fn after_fork() {
    // SAFETY: `before_fork` took them all.
    unsafe {
        registry::GROWTH.unlock_raw();
        each_hub(hubs_held(), |hub| {
            hub.buried.unlock_raw();
            hub.larges.unlock_raw();
            hub.shared.unlock_raw();
            hub.late.unlock_raw();
        });
        HUBS.unlock_raw();
    }
}

fn hubs_held() -> *const Hub {
    // SAFETY: the lock is held by this thread, without a guard.
    unsafe { HUBS.value_held().0 }
}

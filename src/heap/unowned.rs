//! Segments that nobody owns: new ones, those that a thread is done with, and those whose thread ended while
//! blocks in them are live.

use core::mem;
use core::ptr;
use core::sync::atomic::Ordering;

use super::hub::{Hub, Shared};
use super::registry;
use super::segment::{HEADER, SEGMENT, SLICE, Segment, run};
use super::thread::{Slot, ThreadHeap};
use crate::source::os;

/// Segments reserved at once, so that most segments cost no call. Address space only.
const SMALL_REGION: usize = 4;
const HUGE_REGION: usize = 16;
/// Abandoned segments in which room is looked for.
const TRIED: usize = 16;

/// A segment that was taken from the lists.
enum Claim {
    /// With its books in order.
    Furnished(*const Segment),
    /// The place of one, which reads as zero.
    Bare(usize),
}

impl Hub {
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

    /// A segment with idle memory that no block lies in, with huge pages or without if there is none other; the
    /// caller becomes its owner.
    pub(super) fn take_warm(&self, huge: bool) -> Option<&Segment> {
        let mut shared = self.shared.lock();
        if shared.warm == 0 {
            return None;
        }
        let holds_memory =
            |kind: &usize| shared.vacant[*kind].front().is_some_and(|segment| segment.idle() != 0);
        let kind = [usize::from(huge), usize::from(!huge)].into_iter().find(holds_memory)?;
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
        let mut given = self.drop_spares();
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

    /// Makes `heap` the owner of `segment`, if that is abandoned.
    pub(super) fn adopt(&self, heap: &ThreadHeap, segment: &Segment) -> Option<&Segment> {
        let shared = &mut *self.shared.lock();
        let abandoned = segment.head.owner.load(Ordering::Acquire).is_null();
        abandoned.then(|| self.give_to(shared, heap, segment))
    }

    /// Marks those blocks at the start of `blocks` free that share a span with the first, which lies in `segment`, if that
    /// is abandoned, as it stays: how many, and whether all were live. `None` where it has an owner.
    pub(super) fn give_to_abandoned(&self, segment: &Segment, blocks: &[Slot]) -> Option<(usize, bool)> {
        let first = blocks.first()?.load(Ordering::Relaxed);
        let mut shared = self.shared.lock();
        if !segment.head.owner.load(Ordering::Acquire).is_null() {
            return None;
        }
        // Nobody owns it and the block was live, so it is abandoned, and its cells are the lock holder's (invariant 1).
        let span = segment.span_at(first);
        let given = span.give(blocks);
        if span.free_count.get() < span.carved.get() {
            return Some(given);
        }
        self.counters.orphaned.fetch_sub(span.held() as usize, Ordering::Relaxed);
        self.refund(span.committed.get() as usize);
        // A mark of the queue of its last owner.
        span.queued.set(false);
        let before = segment.idle_bytes();
        segment.unmake_span(span);
        if segment.is_empty() {
            shared.abandoned.remove(segment);
            shared.warm -= before;
            drop(shared);
            self.put_segment(segment);
            return Some(given);
        }
        shared.warm += segment.idle_bytes() - before;
        if !self.has_room(&shared, 0) {
            shared.warm -= self.discard_idle(segment);
        }
        Some(given)
    }

    /// Makes `heap` the owner of an abandoned segment that `fits`; if there is none among the first, of the first one
    /// where `or_any` says so.
    pub(super) fn adopt_any(
        &self,
        heap: &ThreadHeap,
        fits: impl Fn(&Segment) -> bool,
        or_any: bool,
    ) -> Option<&Segment> {
        let shared = &mut *self.shared.lock();
        // The lock makes them this thread's.
        let fitting = shared.abandoned.iter().take(TRIED).find(|segment| fits(segment));
        let segment = ptr::from_ref(fitting.or_else(|| shared.abandoned.front().filter(|_| or_any))?);
        Some(self.give_to(shared, heap, segment))
    }

    fn give_to(&self, shared: &mut Shared, heap: &ThreadHeap, segment: *const Segment) -> &Segment {
        // SAFETY: segments live as long as the hub.
        let segment = unsafe { &*segment };
        shared.abandoned.remove(segment);
        shared.warm -= segment.idle_bytes();
        segment.head.owner.store(ptr::from_ref(heap).cast_mut(), Ordering::Release);
        segment
    }
}

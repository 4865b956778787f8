//! Statistics, derived: engines count what they do in any case, so counting costs a request nothing, and
//! switching it off only hides what was done meanwhile.

use core::sync::atomic::Ordering;

use super::core::Core;
use super::front::Front;
use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use crate::base::sync::Lock;
use crate::engine::{Engine, Totals};
use crate::observe::Observer;
use crate::source::Source;

/// What requests added up to at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    allocs: u64,
    frees: u64,
    bytes: u64,
    sizes: [u64; HISTOGRAM_BUCKETS],
}

impl Counts {
    fn combine(mut self, other: &Self, with: impl Fn(u64, u64) -> u64) -> Self {
        self.allocs = with(self.allocs, other.allocs);
        self.frees = with(self.frees, other.frees);
        self.bytes = with(self.bytes, other.bytes);
        self.sizes.iter_mut().zip(&other.sizes).for_each(|(mine, theirs)| *mine = with(*mine, *theirs));
        self
    }

    fn minus(self, other: &Self) -> Self {
        self.combine(other, u64::saturating_sub)
    }

    fn plus(self, other: &Self) -> Self {
        self.combine(other, u64::wrapping_add)
    }
}

#[derive(Debug, Default)]
struct State {
    /// What was done while switched off.
    hidden: Counts,
    /// Where the counts stood when it was last switched off; `None` while it is on.
    off_since: Option<Counts>,
}

/// Whether requests are counted, and what is not to be shown.
#[derive(Debug)]
pub(super) struct Tracking(Lock<State>);

impl Tracking {
    pub(super) fn new(on: bool) -> Self {
        let off_since = if on { None } else { Some(Counts::default()) };
        Self(Lock::new(State { hidden: Counts::default(), off_since }))
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.lock().off_since.is_none()
    }

    fn switch(&self, on: bool, now: Counts) {
        let mut state = self.0.lock();
        match (on, state.off_since) {
            (true, Some(since)) => {
                state.hidden = state.hidden.plus(&now.minus(&since));
                state.off_since = None;
            }
            (false, None) => state.off_since = Some(now),
            _ => {}
        }
    }

    /// Of what was done up to `now`, what was done while switched on.
    fn shown(&self, now: Counts) -> Counts {
        let state = self.0.lock();
        state.off_since.unwrap_or(now).minus(&state.hidden)
    }
}

fn engine_counts(engine: &dyn Engine) -> (Counts, Totals) {
    let totals = engine.totals();
    let mut sizes = [0; HISTOGRAM_BUCKETS];
    engine.count_sizes(&mut sizes);
    (Counts { allocs: totals.allocs, frees: totals.frees, bytes: totals.alloc_bytes, sizes }, totals)
}

impl<F: Front, S: Source, O: Observer> Core<F, S, O> {
    fn counts(&self) -> (Counts, Totals) {
        let (mut counts, totals) = self.front.with(|engine| {
            engine.settle();
            engine_counts(engine)
        });
        let large = self.large.totals();
        counts.allocs += large.allocs;
        counts.frees += large.allocs - large.live as u64;
        counts.bytes += large.alloc_bytes;
        large.sizes.iter().zip(&mut counts.sizes).for_each(|(large, all)| *all += large);
        (counts, totals)
    }

    pub(super) fn stats(&self) -> MemoryStats {
        let (counts, totals) = self.counts();
        let shown = self.tracking.shown(counts);
        let large = self.large.totals();
        let (live, (free, largest_free)) = self.front.with(|engine| {
            engine.settle();
            (engine.live_bytes(), engine.free_bytes())
        });
        let (held, _) = self.observer.held();
        let current = if O::ACTIVE {
            // What the observer adds to a block, or holds back, is not the user's.
            self.active().iter().map(|block| block.size).sum()
        } else {
            live + large.live_bytes
        };
        let reserved = self.reserved.load(Ordering::Relaxed);
        let peak_reserved = self.peak_reserved.load(Ordering::Relaxed).max(reserved);
        MemoryStats {
            total_allocated: shown.bytes,
            current_allocated: current,
            peak_allocated: (totals.peak_bytes + large.peak_bytes).max(current),
            allocation_count: shown.allocs,
            deallocation_count: shown.frees + held as u64,
            failed_count: self.failed.load(Ordering::Relaxed),
            reserved,
            peak_reserved,
            committed: reserved,
            peak_committed: peak_reserved,
            free,
            largest_free,
            source_calls: self.source_calls.load(Ordering::Relaxed),
            size_histogram: shown.sizes,
            latency: self.observer.latency(),
            ..MemoryStats::default()
        }
    }

    pub(super) fn set_tracking(&self, on: bool) {
        let (now, _) = self.counts();
        self.tracking.switch(on, now);
    }

    pub(super) fn reset_peak(&self) {
        // What the observer holds back is no use of the user's.
        self.evict(true);
        self.front.with(|engine| engine.reset_peak());
        self.large.reset_peak();
        self.peak_reserved.store(self.reserved.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

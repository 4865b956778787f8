//! Whether requests are counted. Pools count what they do in any case, so switching it off only hides what was
//! done meanwhile.

use super::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use super::sync::Lock;

/// What requests added up to at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) allocs: u64,
    pub(crate) frees: u64,
    pub(crate) bytes: u64,
    pub(crate) sizes: [u64; HISTOGRAM_BUCKETS],
}

impl Counts {
    pub(crate) fn of(stats: &MemoryStats) -> Self {
        Self {
            allocs: stats.allocation_count,
            frees: stats.deallocation_count,
            bytes: stats.total_allocated,
            sizes: stats.size_histogram,
        }
    }

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
pub(crate) struct Tracking(Lock<State>);

impl Tracking {
    pub(crate) fn new(on: bool) -> Self {
        let off_since = if on { None } else { Some(Counts::default()) };
        Self(Lock::new(State { hidden: Counts::default(), off_since }))
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.lock().off_since.is_none()
    }

    pub(crate) fn switch(&self, on: bool, now: Counts) {
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

    /// Leaves of the counts in `stats` what was done while switched on.
    pub(crate) fn show(&self, stats: &mut MemoryStats) {
        let Counts { allocs, frees, bytes, sizes } = self.shown(Counts::of(stats));
        (stats.allocation_count, stats.deallocation_count) = (allocs, frees);
        (stats.total_allocated, stats.size_histogram) = (bytes, sizes);
    }

    /// Of what was done up to `now`, what was done while switched on.
    pub(crate) fn shown(&self, now: Counts) -> Counts {
        let state = self.0.lock();
        state.off_since.unwrap_or(now).minus(&state.hidden)
    }
}

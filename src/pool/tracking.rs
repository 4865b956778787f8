//! Statistics, derived: engines count what they do in any case, so counting costs a request nothing.

use core::sync::atomic::Ordering;

use super::core::Core;
use super::front::Front;
use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use crate::base::tracking::Counts;
use crate::engine::{Engine, Totals};
use crate::observe::Observer;
use crate::source::Source;

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

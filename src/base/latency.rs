//! Quantiles of durations, recorded without a lock.
//!
//! A duration falls into one of 16 buckets per power of two, so a quantile is at most 1/16 too high and
//! never too low. Durations past 2^40 ns (18 minutes) count as that.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use super::stats::Latency;

const SUB_BITS: u32 = 4;
const SUBS: usize = 1 << SUB_BITS;
const TOP_BITS: u32 = 40;
const BUCKETS: usize = (TOP_BITS - SUB_BITS + 1) as usize * SUBS;

/// A histogram of durations.
pub(crate) struct LatencyRecorder {
    buckets: [AtomicU64; BUCKETS],
    max: AtomicU64,
}

/// The bucket of a duration: exact below 16 ns, then 16 a power of two.
fn bucket(nanos: u64) -> usize {
    let nanos = nanos.min((1 << TOP_BITS) - 1);
    let shift = (u64::BITS - nanos.leading_zeros()).saturating_sub(SUB_BITS + 1);
    shift as usize * SUBS + (nanos >> shift) as usize
}

/// The longest duration that falls into `bucket`.
fn upper_end(bucket: usize) -> u64 {
    let shift = (bucket / SUBS).saturating_sub(1);
    (((bucket - shift * SUBS) as u64 + 1) << shift) - 1
}

impl LatencyRecorder {
    pub(crate) const fn new() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], max: AtomicU64::new(0) }
    }

    pub(crate) fn record(&self, nanos: u64) {
        self.buckets[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.max.fetch_max(nanos, Ordering::Relaxed);
    }

    /// The quantiles of what was recorded; `None` where nothing was.
    pub(crate) fn quantiles(&self) -> Option<Latency> {
        let counts: Vec<u64> = self.buckets.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        if total == 0 {
            return None;
        }
        let max = self.max.load(Ordering::Relaxed);
        let quantile = |percent: u64| {
            let wanted = (total * percent).div_ceil(100).max(1);
            let mut seen = 0;
            let at = counts.iter().position(|count| {
                seen += count;
                seen >= wanted
            });
            at.map_or(max, |bucket| upper_end(bucket).min(max))
        };
        Some(Latency { p50: quantile(50), p90: quantile(90), p99: quantile(99), max })
    }
}

impl fmt::Debug for LatencyRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LatencyRecorder").field(&self.quantiles()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_their_ends_belong_to_them() {
        let mut last = 0;
        for nanos in (0..100_000).chain([1 << 20, 1 << 30, (1 << 40) - 1, u64::MAX]) {
            let at = bucket(nanos);
            assert!(at >= last, "{nanos}");
            last = at;
            assert!(at < BUCKETS && bucket(upper_end(at)) == at, "{nanos}");
            let known = nanos.min((1 << TOP_BITS) - 1);
            assert!(upper_end(at) >= known && upper_end(at) - known <= known / 16, "{nanos}");
        }
    }

    #[test]
    fn quantiles_are_right_to_a_sixteenth() {
        let recorder = LatencyRecorder::new();
        assert_eq!(recorder.quantiles(), None);
        for nanos in 1..=1000 {
            recorder.record(nanos);
        }
        let Latency { p50, p90, p99, max } = recorder.quantiles().unwrap();
        assert!((500..=532).contains(&p50) && (900..=957).contains(&p90), "{p50} {p90}");
        assert!((990..=1000).contains(&p99) && max == 1000, "{p99} {max}");
    }
}

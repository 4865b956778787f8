//! What a pool did and holds: a plain value, gathered when asked for.

use core::fmt::{self, Write};

/// Buckets of the size histogram; bucket `i` counts requests of up to `16 << i` bytes, the last all larger.
pub const HISTOGRAM_BUCKETS: usize = 24;

/// What a pool did and holds, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Bytes handed out over the pool's life.
    pub total_allocated: u64,
    /// Bytes live now, as handed out.
    pub current_allocated: usize,
    /// Most bytes ever live at once since the peak was last reset.
    pub peak_allocated: usize,
    /// Allocations served.
    pub allocation_count: u64,
    /// Blocks freed.
    pub deallocation_count: u64,
    /// Requests that failed.
    pub failed_count: u64,
    /// Address space or memory taken from the source.
    pub reserved: usize,
    /// Most bytes ever reserved at once since the peak was last reset.
    pub peak_reserved: usize,
    /// Reserved bytes that are backed by memory, as far as the pool knows.
    pub committed: usize,
    /// Most bytes ever committed at once since the peak was last reset.
    pub peak_committed: usize,
    /// Free bytes inside the pool.
    pub free: usize,
    /// The largest free range.
    pub largest_free: usize,
    /// Requests served from a cache.
    pub cache_hits: u64,
    /// Requests that missed it.
    pub cache_misses: u64,
    /// Calls to the source.
    pub source_calls: u64,
    /// Requests by size.
    pub size_histogram: [u64; HISTOGRAM_BUCKETS],
    /// Latency quantiles, where they were asked for.
    pub latency: Option<Latency>,
}

/// Quantiles of the time an allocation took, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Latency {
    /// Half of the calls took no longer.
    pub p50: u64,
    /// Nine in ten.
    pub p90: u64,
    /// Ninety-nine in a hundred.
    pub p99: u64,
    /// The slowest.
    pub max: u64,
}

impl Latency {
    fn worse(self, other: Self) -> Self {
        Self {
            p50: self.p50.max(other.p50),
            p90: self.p90.max(other.p90),
            p99: self.p99.max(other.p99),
            max: self.max.max(other.max),
        }
    }
}

impl MemoryStats {
    /// Adds what another pool did and holds. Of the largest free ranges and of the latencies the larger one
    /// stays, as they cannot be added.
    pub fn add(&mut self, other: &Self) {
        self.total_allocated += other.total_allocated;
        self.current_allocated += other.current_allocated;
        self.peak_allocated += other.peak_allocated;
        self.allocation_count += other.allocation_count;
        self.deallocation_count += other.deallocation_count;
        self.failed_count += other.failed_count;
        self.reserved += other.reserved;
        self.peak_reserved += other.peak_reserved;
        self.committed += other.committed;
        self.peak_committed += other.peak_committed;
        self.free += other.free;
        self.largest_free = self.largest_free.max(other.largest_free);
        self.cache_hits += other.cache_hits;
        self.cache_misses += other.cache_misses;
        self.source_calls += other.source_calls;
        self.size_histogram.iter_mut().zip(&other.size_histogram).for_each(|(mine, more)| *mine += more);
        self.latency = match (self.latency, other.latency) {
            (Some(mine), Some(theirs)) => Some(mine.worse(theirs)),
            (mine, theirs) => mine.or(theirs),
        };
    }

    /// Takes out of a sum, in which it is already, what a pool got from another pool of the sum.
    pub(crate) fn enclose(&mut self, inner: &Self) {
        for (sum, part) in [
            (&mut self.reserved, inner.reserved),
            (&mut self.peak_reserved, inner.peak_reserved),
            (&mut self.committed, inner.committed),
            (&mut self.peak_committed, inner.peak_committed),
            (&mut self.current_allocated, inner.reserved),
            (&mut self.peak_allocated, inner.peak_reserved),
        ] {
            *sum = sum.saturating_sub(part);
        }
    }

    /// Blocks live now.
    pub fn active_count(&self) -> u64 {
        self.allocation_count.saturating_sub(self.deallocation_count)
    }

    /// The part of the free memory that one request could not get: `1 − largest free range / free bytes`; 0
    /// where nothing is free.
    pub fn fragmentation_ratio(&self) -> f64 {
        if self.free == 0 { 0.0 } else { 1.0 - self.largest_free as f64 / self.free as f64 }
    }

    /// The bucket of [`size_histogram`](Self::size_histogram) that counts requests of `size` bytes.
    pub const fn bucket(size: usize) -> usize {
        // 16 bytes and less are bucket 0; the `| 15` leaves no special case.
        let bits = (size.saturating_sub(1) | 15).ilog2() - 3;
        if (bits as usize) < HISTOGRAM_BUCKETS { bits as usize } else { HISTOGRAM_BUCKETS - 1 }
    }
}

/// All fields, and what is computed from them.
#[cfg(feature = "serde")]
impl serde::Serialize for MemoryStats {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut out = serializer.serialize_struct("MemoryStats", 19)?;
        macro_rules! fields {
            ($($field:ident)*) => {$(out.serialize_field(stringify!($field), &self.$field)?;)*};
        }
        fields! {
            total_allocated current_allocated peak_allocated allocation_count deallocation_count failed_count
            reserved peak_reserved committed peak_committed free largest_free cache_hits cache_misses
            source_calls size_histogram latency
        }
        out.serialize_field("active_count", &self.active_count())?;
        out.serialize_field("fragmentation_ratio", &self.fragmentation_ratio())?;
        out.end()
    }
}

/// Bytes in the unit a person reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let unit = (self.0.max(1).ilog2() / 10).min(5) as usize;
        let scaled = self.0 as f64 / (1u64 << (10 * unit)) as f64;
        let mut text = Short { text: [0; 24], len: 0 };
        if unit == 0 {
            write!(text, "{} B", self.0)?;
        } else {
            write!(text, "{scaled:.1} {}", UNITS[unit])?;
        }
        f.pad(core::str::from_utf8(&text.text[..text.len]).unwrap_or_default())
    }
}

/// A few letters, for what is written where nothing may be allocated.
struct Short {
    text: [u8; 24],
    len: usize,
}

impl fmt::Write for Short {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        let room = self.text.get_mut(self.len..self.len + more.len()).ok_or(fmt::Error)?;
        room.copy_from_slice(more.as_bytes());
        self.len += more.len();
        Ok(())
    }
}

impl fmt::Display for MemoryStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |n: usize| Bytes(n as u64);
        writeln!(f, "{:<12} {:>14} {:>14}", "", "now", "peak")?;
        for (label, now, peak) in [
            ("allocated", self.current_allocated, self.peak_allocated),
            ("committed", self.committed, self.peak_committed),
            ("reserved", self.reserved, self.peak_reserved),
        ] {
            writeln!(f, "{label:<12} {:>14} {:>14}", bytes(now), bytes(peak))?;
        }
        writeln!(
            f,
            "{:<12} {:>14} largest {:>10}, fragmentation {:.1} %",
            "free",
            bytes(self.free),
            bytes(self.largest_free),
            100.0 * self.fragmentation_ratio()
        )?;
        writeln!(
            f,
            "{:<12} {:>14} freed {}, live {}, failed {}, {} in all",
            "allocations",
            self.allocation_count,
            self.deallocation_count,
            self.active_count(),
            self.failed_count,
            Bytes(self.total_allocated)
        )?;
        write!(
            f,
            "{:<12} {:>14} misses {}, source calls {}",
            "cache hits", self.cache_hits, self.cache_misses, self.source_calls
        )?;
        if let Some(latency) = self.latency {
            let Latency { p50, p90, p99, max } = latency;
            write!(f, "\n{:<12} {:>11} ns p90 {p90}, p99 {p99}, max {max}", "latency", p50)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_powers_of_two() {
        assert_eq!([0, 1, 16, 17, 32, 33].map(MemoryStats::bucket), [0, 0, 0, 1, 1, 2]);
        assert_eq!(MemoryStats::bucket(usize::MAX), HISTOGRAM_BUCKETS - 1);
    }

    #[test]
    fn bytes_are_shown_in_units() {
        let shown = [0, 1023, 1024, 1536, 1 << 30].map(|n| Bytes(n).to_string());
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 GiB"]);
    }
}

//! Statistics, and the invariants of the books.

#![forbid(unsafe_code)]

use super::{Core, LARGE, Ticket};
use crate::base::error::Result;
use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use crate::engine::Broken;
use crate::gpu::arena::Pieces;
use crate::gpu::ranges::{CLEAN, HOLE, RECORDED, Range, Ranges};

/// Counters since the pool was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) total: u64,
    pub(super) allocations: u64,
    pub(super) frees: u64,
    pub(super) failed: u64,
    pub(super) misses: u64,
    pub(super) source_calls: u64,
    pub(super) peak: usize,
    pub(super) peak_reserved: usize,
    pub(super) histogram: [u64; HISTOGRAM_BUCKETS],
}

impl Core {
    /// Notes that as many bytes are live as the books say, less `cached` at least.
    #[inline]
    pub(in crate::gpu) fn note_peak(&mut self, cached: impl FnOnce() -> usize) {
        if self.live > self.counters.peak {
            self.counters.peak = self.counters.peak.max(self.live.saturating_sub(cached()));
        }
    }

    /// A request is not served by what its lane finds at once.
    pub(in crate::gpu) fn note_miss(&mut self) {
        self.counters.misses += 1;
    }

    pub(in crate::gpu) fn note_source_call(&mut self) {
        self.counters.source_calls += 1;
    }

    pub(in crate::gpu) fn set_reserved(&mut self, bytes: usize) {
        self.reserved = bytes;
        self.counters.peak_reserved = self.counters.peak_reserved.max(bytes);
    }

    /// Requests that the books served.
    pub(in crate::gpu) fn served(&self) -> u64 {
        self.counters.allocations
    }

    pub(in crate::gpu) fn peak_reserved(&self) -> usize {
        self.counters.peak_reserved
    }

    /// Calls `visit` with place, size and lane of every live block.
    pub(in crate::gpu) fn for_each_live(&self, visit: &mut dyn FnMut(usize, usize, u16)) {
        self.for_each_held(&mut |ticket, range| {
            if !self.is_cached(ticket) {
                visit(range.start, range.len, range.tag.lane);
            }
        });
    }

    /// The same, with those that caches hold.
    fn for_each_held(&self, visit: &mut dyn FnMut(Ticket, Range)) {
        for (zone, ranges) in self.zones.iter().enumerate() {
            ranges.for_each(&mut |range| {
                if range.live
                    && range.tag.lane != HOLE
                    && !(zone == LARGE && self.parents.contains_key(&range.start))
                {
                    visit(Ticket::new(zone, range.node), range);
                }
            });
        }
    }

    /// Bytes that are free for everybody.
    pub(in crate::gpu) fn clean_bytes(&self) -> usize {
        self.zones.iter().map(|zone| zone.free_in(CLEAN)).sum()
    }

    /// Free bytes in all zones.
    pub(in crate::gpu) fn free_bytes(&self) -> usize {
        self.zones.iter().map(Ranges::free_bytes).sum()
    }

    /// Bytes that nobody holds, in ranges and in pieces that lie nowhere.
    pub(in crate::gpu) fn idle_bytes(&self) -> usize {
        self.free_bytes() + self.pieces.as_ref().map_or(0, Pieces::spare_bytes)
    }

    /// Live blocks.
    pub(in crate::gpu) fn live_blocks(&self) -> usize {
        self.zones.iter().map(|zone| zone.live_blocks).sum::<usize>() - self.parents.len()
    }

    /// Bytes of host memory that the books take.
    pub(in crate::gpu) fn metadata_bytes(&self) -> usize {
        self.zones.iter().map(Ranges::metadata_bytes).sum::<usize>()
            + self.pieces.as_ref().map_or(0, Pieces::metadata_bytes)
    }

    pub(in crate::gpu) fn failed(&mut self) {
        self.counters.failed += 1;
    }

    pub(in crate::gpu) fn reset_peak(&mut self, cached: usize) {
        (self.counters.peak, self.counters.peak_reserved) = (self.live - cached, self.reserved);
    }

    pub(in crate::gpu) fn stats(&self) -> MemoryStats {
        let Counters { total, allocations, frees, failed, misses, source_calls, .. } = self.counters;
        MemoryStats {
            total_allocated: total,
            current_allocated: self.live,
            peak_allocated: self.counters.peak,
            allocation_count: allocations,
            deallocation_count: frees,
            failed_count: failed,
            reserved: self.reserved,
            peak_reserved: self.counters.peak_reserved,
            committed: self.reserved,
            peak_committed: self.counters.peak_reserved,
            free: self.free_bytes(),
            largest_free: self.zones.iter().map(Ranges::largest_free).max().unwrap_or(0),
            cache_hits: allocations.saturating_sub(misses),
            cache_misses: misses,
            source_calls,
            size_histogram: self.counters.histogram,
            latency: None,
        }
    }

    /// Walks every invariant.
    pub(in crate::gpu) fn check(&self) -> Result<(), Broken> {
        self.zones.iter().try_for_each(Ranges::check)?;
        self.check_pieces()?;
        let (mut live, mut recorded) = (0, 0);
        self.for_each_held(&mut |_, range| {
            live += range.len;
            recorded += usize::from(range.tag.batch & RECORDED != 0);
        });
        let spare = self.pieces.as_ref().map_or(0, Pieces::spare_bytes);
        if live != self.live || live + self.free_bytes() + spare != self.reserved {
            return Err(Broken { invariant: "live and free bytes add up to what is reserved", at: live });
        }
        self.records.for_each(&mut |_| recorded = recorded.wrapping_sub(1));
        if recorded != 0 {
            return Err(Broken { invariant: "a block has a record where its flag says so", at: recorded });
        }
        let nested: usize = self.parents.values().map(|&parent| self.zones[LARGE].len(parent)).sum();
        if nested != self.nested {
            return Err(Broken {
                invariant: "nested segments are live ranges of the large zone",
                at: nested,
            });
        }
        Ok(())
    }
}

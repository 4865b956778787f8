//! What the engine did, counted as it does it.

use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use crate::engine::Totals;

#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Blocks cut, by size.
    pub(super) sizes: [u64; HISTOGRAM_BUCKETS],
    /// Usable bytes of all blocks cut.
    bytes: u64,
    live_blocks: usize,
    live_bytes: usize,
    peak: usize,
}

impl Counts {
    #[inline(always)]
    pub(super) fn cut(&mut self, size: usize) {
        self.sizes[MemoryStats::bucket(size)] += 1;
        self.live_blocks += 1;
        self.grown(size);
    }

    #[inline(always)]
    pub(super) fn grown(&mut self, by: usize) {
        self.bytes += by as u64;
        self.live_bytes += by;
        self.peak = self.peak.max(self.live_bytes);
    }

    #[inline(always)]
    pub(super) fn freed(&mut self, size: usize) {
        self.live_blocks -= 1;
        self.live_bytes -= size;
    }

    /// A block became two, `head` bytes of it books of the second.
    pub(super) fn split(&mut self, head: usize) {
        self.live_blocks += 1;
        self.live_bytes -= head;
    }

    pub(super) fn reset(&mut self) {
        (self.live_blocks, self.live_bytes) = (0, 0);
    }

    pub(super) fn reset_peak(&mut self) {
        self.peak = self.live_bytes;
    }

    pub(super) fn live(&self) -> (usize, usize) {
        (self.live_blocks, self.live_bytes)
    }

    pub(super) fn totals(&self) -> Totals {
        let allocs = self.sizes.iter().sum();
        let frees = allocs - self.live_blocks as u64;
        Totals { allocs, frees, alloc_bytes: self.bytes, peak_bytes: self.peak }
    }
}

//! What the engine did, counted as it does it: two words an allocation, two a free.

use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use crate::engine::Totals;

/// What is live is a difference: were it counted, frees would write what allocations write. The order of the
/// fields keeps apart what one call writes, as the compiler would make one wide store of two neighbours, which
/// other loads then wait for.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Counts {
    /// Blocks taken back.
    frees: u64,
    /// Usable bytes of all blocks cut.
    bytes: u64,
    /// Usable bytes of all blocks taken back.
    freed: u64,
    /// Blocks cut, by size.
    pub(super) sizes: [u64; HISTOGRAM_BUCKETS],
    /// Most usable bytes live at once.
    peak: u64,
}

impl Counts {
    #[inline(always)]
    pub(super) fn cut(&mut self, size: usize) {
        self.sizes[MemoryStats::bucket(size)] += 1;
        self.grown(size);
    }

    #[inline(always)]
    pub(super) fn grown(&mut self, by: usize) {
        self.bytes += by as u64;
        self.peak = self.peak.max(self.bytes - self.freed);
    }

    #[inline(always)]
    pub(super) fn freed(&mut self, size: usize) {
        self.frees += 1;
        self.freed += size as u64;
    }

    /// `size` bytes were cut off the end of a block that lives on.
    pub(super) fn shrunk(&mut self, size: usize) {
        self.freed += size as u64;
    }

    /// Everything was freed at once.
    pub(super) fn reset(&mut self) {
        self.frees = self.sizes.iter().sum();
        self.freed = self.bytes;
    }

    pub(super) fn reset_peak(&mut self) {
        self.peak = self.bytes - self.freed;
    }

    /// Live blocks and their usable bytes.
    pub(super) fn live(&self) -> (usize, usize) {
        let blocks = self.sizes.iter().sum::<u64>() - self.frees;
        (blocks as usize, (self.bytes - self.freed) as usize)
    }

    pub(super) fn totals(&self) -> Totals {
        let allocs = self.sizes.iter().sum();
        Totals { allocs, frees: self.frees, alloc_bytes: self.bytes, peak_bytes: self.peak as usize }
    }
}

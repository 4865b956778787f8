//! Blocks that are regions of the source of their own: too large for what the pool holds.
//!
//! Each starts at its region's first byte, so it is aligned to a page at least; the source can grow it in
//! place, or move it without copying.

use super::front::{Front, LARGE_ALIGN};
use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use crate::base::sync::Lock;
use crate::source::Region;
use core::sync::atomic::{AtomicUsize, Ordering};

/// No page is smaller, and so no large block is aligned to less.
pub(super) const PAGE: usize = 4096;

#[derive(Debug, Default)]
struct Table {
    /// Sorted by address.
    regions: Vec<Region>,
    /// Places in `regions` that are set aside for blocks under way.
    pending: usize,
    allocs: u64,
    alloc_bytes: u64,
    live_bytes: usize,
    peak_bytes: usize,
    sizes: [u64; HISTOGRAM_BUCKETS],
}

/// The large blocks of a pool, behind a lock of their own that is never held while the source is called.
#[derive(Debug, Default)]
pub(super) struct LargeBlocks {
    table: Lock<Table>,
    /// Blocks in the table, so that a pool without any takes no lock.
    count: AtomicUsize,
}

impl LargeBlocks {
    /// Whether `address` may be a large block of a pool with front `F`: cheap, and never wrong about one.
    #[inline]
    pub(super) fn may_be<F: Front>(&self, address: usize) -> bool {
        large_aligned::<F>(address) && self.count.load(Ordering::Relaxed) != 0
    }
}

/// Whether `address` is aligned as all large blocks of a pool with front `F` are.
#[inline]
pub(super) fn large_aligned<F: Front>(address: usize) -> bool {
    let align = if F::DIRECT == usize::MAX { LARGE_ALIGN } else { PAGE };
    address & (align - 1) == 0
}

/// Counts of large blocks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LargeTotals {
    pub(super) allocs: u64,
    pub(super) alloc_bytes: u64,
    pub(super) live: usize,
    pub(super) live_bytes: usize,
    pub(super) peak_bytes: usize,
    pub(super) sizes: [u64; HISTOGRAM_BUCKETS],
}

impl Table {
    fn find(&self, address: usize) -> Result<usize, usize> {
        self.regions.binary_search_by_key(&address, Region::start)
    }
}

impl LargeBlocks {
    /// Makes sure that an `insert` will find room; `false` where memory is short. `insert` or `cancel` follows.
    pub(super) fn prepare(&self) -> bool {
        let mut table = self.table.lock();
        let more = table.pending + 1;
        let ready = table.regions.try_reserve(more).is_ok();
        table.pending += usize::from(ready);
        ready
    }

    /// Gives up what `prepare` set aside.
    pub(super) fn cancel(&self) {
        self.table.lock().pending -= 1;
    }

    /// Notes a block, after `prepare` (a new one) or `remove_for_now`.
    pub(super) fn insert(&self, region: Region, new: bool) {
        let mut table = self.table.lock();
        table.pending -= 1;
        let at = table.find(region.start()).unwrap_or_else(|at| at);
        table.regions.insert(at, region);
        self.count.store(table.regions.len(), Ordering::Relaxed);
        table.live_bytes += region.len;
        table.peak_bytes = table.peak_bytes.max(table.live_bytes);
        if new {
            table.sizes[MemoryStats::bucket(region.len)] += 1;
            table.allocs += 1;
            table.alloc_bytes += region.len as u64;
        }
    }

    /// Takes the block at `address` out until the next `insert`.
    pub(super) fn remove_for_now(&self, address: usize) -> Option<Region> {
        let mut table = self.table.lock();
        let at = table.find(address).ok()?;
        let region = table.regions.remove(at);
        self.count.store(table.regions.len(), Ordering::Relaxed);
        table.live_bytes -= region.len;
        table.pending += 1;
        Some(region)
    }

    /// Forgets the block at `address`.
    pub(super) fn remove(&self, address: usize) -> Option<Region> {
        let mut table = self.table.lock();
        let at = table.find(address).ok()?;
        let region = table.regions.remove(at);
        self.count.store(table.regions.len(), Ordering::Relaxed);
        table.live_bytes -= region.len;
        Some(region)
    }

    /// Forgets any block.
    pub(super) fn remove_any(&self) -> Option<Region> {
        let mut table = self.table.lock();
        let region = table.regions.pop()?;
        self.count.store(table.regions.len(), Ordering::Relaxed);
        table.live_bytes -= region.len;
        Some(region)
    }

    /// The block that begins at `address`.
    pub(super) fn get(&self, address: usize) -> Option<Region> {
        let table = self.table.lock();
        table.find(address).ok().map(|at| table.regions[at])
    }

    /// The block in which `address` lies.
    pub(super) fn containing(&self, address: usize) -> Option<Region> {
        let table = self.table.lock();
        let at = table.regions.partition_point(|region| region.start() <= address).checked_sub(1)?;
        Some(table.regions[at]).filter(|region| address < region.end())
    }

    pub(super) fn all(&self) -> Vec<Region> {
        self.table.lock().regions.clone()
    }

    pub(super) fn totals(&self) -> LargeTotals {
        let table = self.table.lock();
        LargeTotals {
            allocs: table.allocs,
            alloc_bytes: table.alloc_bytes,
            live: table.regions.len(),
            live_bytes: table.live_bytes,
            peak_bytes: table.peak_bytes,
            sizes: table.sizes,
        }
    }

    pub(super) fn reset_peak(&self) {
        let mut table = self.table.lock();
        table.peak_bytes = table.live_bytes;
    }
}

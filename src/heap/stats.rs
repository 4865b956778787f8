//! What a heap did and holds, gathered when asked for.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use super::class::{self, COUNT};
use super::hub::Hub;
use super::thread::{ThreadHeap, bump};
use crate::base::stats::{Bytes, HISTOGRAM_BUCKETS, MemoryStats};

/// Requests of one thread, for pools that count them. Written by that thread only, except for the peak.
pub(crate) struct Requests {
    /// Blocks handed out, by class.
    classes: [AtomicU64; COUNT],
    /// Blocks handed out that have no class, by size.
    sizes: [AtomicU64; HISTOGRAM_BUCKETS],
    frees: AtomicU64,
    alloc_bytes: AtomicU64,
    free_bytes: AtomicU64,
    failed: AtomicU64,
    /// Most bytes that this thread allocated more than it freed.
    peak: AtomicU64,
}

impl Requests {
    #[inline]
    pub(crate) fn on_alloc(&self, class: Option<usize>, size: usize) {
        let count = match class {
            Some(class) => self.classes.get(class),
            None => self.sizes.get(MemoryStats::bucket(size)),
        };
        if let Some(count) = count {
            bump(count, 1);
        }
        bump(&self.alloc_bytes, size as u64);
        let live = self.live_bytes();
        if live > self.peak.load(Ordering::Relaxed) as i64 {
            self.peak.store(live as u64, Ordering::Relaxed);
        }
    }

    /// Blocks handed out, by size.
    fn histogram(&self) -> [u64; HISTOGRAM_BUCKETS] {
        let mut buckets: [u64; HISTOGRAM_BUCKETS] =
            core::array::from_fn(|bucket| self.sizes[bucket].load(Ordering::Relaxed));
        for (class, count) in self.classes.iter().enumerate() {
            buckets[MemoryStats::bucket(class::size(class))] += count.load(Ordering::Relaxed);
        }
        buckets
    }

    #[inline]
    pub(crate) fn on_free(&self, size: usize) {
        bump(&self.frees, 1);
        bump(&self.free_bytes, size as u64);
    }

    /// A block changed its size where it was.
    pub(crate) fn on_resize(&self, old: usize, new: usize) {
        bump(&self.alloc_bytes, new as u64);
        bump(&self.free_bytes, old as u64);
    }

    pub(crate) fn on_failure(&self) {
        bump(&self.failed, 1);
    }

    fn live_bytes(&self) -> i64 {
        let (out, back) = (&self.alloc_bytes, &self.free_bytes);
        out.load(Ordering::Relaxed).wrapping_sub(back.load(Ordering::Relaxed)) as i64
    }
}

/// What the process heap did and holds, summed over its threads: each count is exact, their sum is of nearly
/// one moment.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct HeapStats {
    /// Address space taken from the system.
    pub reserved: usize,
    /// Bytes that hold memory, as far as the heap knows: what it keeps resident.
    pub committed: usize,
    /// Of those, bytes of blocks with a mapping of their own.
    pub large: usize,
    /// Bytes of free blocks that threads keep at hand.
    pub cached: usize,
    /// Threads that have a heap, or left one to the next thread.
    pub threads: usize,
    /// Times a thread fetched blocks from its spans.
    pub refills: u64,
    /// Times a thread put blocks back.
    pub flushes: u64,
    /// Blocks freed to other threads.
    pub remote_frees: u64,
    /// Of those, blocks that came back to their owners.
    pub collected: u64,
    /// Segments taken over from threads that ended.
    pub adopted: u64,
    /// Bytes given back to the system.
    pub given_back: u64,
    /// Calls to the system for memory.
    pub os_calls: u64,
    /// By size class, the smallest first.
    pub classes: [ClassStats; COUNT],
}

/// Blocks of one size.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct ClassStats {
    /// Size of a block.
    pub size: usize,
    /// Blocks that the program holds, or that wait to go back to another thread.
    pub live: usize,
    /// Free blocks that threads keep at hand.
    pub cached: usize,
}

impl fmt::Display for HeapStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |n: usize| Bytes(n as u64);
        writeln!(f, "reserved     {:>12}   committed {:>12}", bytes(self.reserved), bytes(self.committed))?;
        writeln!(f, "large        {:>12}   cached    {:>12}", bytes(self.large), bytes(self.cached))?;
        writeln!(f, "given back   {:>12}   OS calls  {:>12}", Bytes(self.given_back), self.os_calls)?;
        writeln!(f, "refills      {:>12}   flushes   {:>12}", self.refills, self.flushes)?;
        writeln!(f, "remote frees {:>12}   collected {:>12}", self.remote_frees, self.collected)?;
        writeln!(f, "threads      {:>12}   adopted   {:>12}", self.threads, self.adopted)?;
        write!(f, "{:>12} {:>12} {:>12}", "block size", "live", "cached")?;
        for class in self.classes.iter().filter(|class| class.live + class.cached > 0) {
            write!(f, "\n{:>12} {:>12} {:>12}", class.size, class.live, class.cached)?;
        }
        Ok(())
    }
}

impl Hub {
    fn each_heap(&self, mut visit: impl FnMut(&ThreadHeap)) {
        // Heaps are only ever added, in front, so the list may be walked without the lock.
        let mut at = self.shared.lock().all_heaps;
        // SAFETY: heaps live as long as their hub.
        while let Some(heap) = unsafe { at.as_ref() } {
            visit(heap);
            at = heap.next_heap.get();
        }
    }

    pub(crate) fn snapshot(&self) -> HeapStats {
        let large = self.counters.large_live.load(Ordering::Relaxed);
        let mut sum = HeapStats {
            reserved: self.counters.reserved.load(Ordering::Relaxed),
            committed: self.counters.orphaned.load(Ordering::Relaxed) + large + self.spare_bytes(),
            large,
            cached: 0,
            threads: 0,
            refills: 0,
            flushes: 0,
            remote_frees: 0,
            collected: 0,
            adopted: 0,
            given_back: 0,
            os_calls: self.counters.os_calls.load(Ordering::Relaxed),
            classes: core::array::from_fn(|class| ClassStats {
                size: class::size(class),
                live: 0,
                cached: 0,
            }),
        };
        self.each_heap(|heap| {
            let tally = &heap.tally;
            let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
            sum.threads += 1;
            sum.committed += read(&tally.committed) as usize;
            sum.refills += read(&tally.refills);
            sum.flushes += read(&tally.flushes);
            sum.remote_frees += read(&tally.posted);
            sum.collected += read(&tally.collected);
            sum.adopted += read(&tally.adopted);
            sum.given_back += read(&tally.discarded);
            for (class, stats) in sum.classes.iter_mut().enumerate() {
                let cached = heap.kept_count(class);
                stats.cached += cached;
                stats.live = stats.live.wrapping_add(read(&tally.out[class]) as usize).wrapping_sub(cached);
                sum.cached += cached * stats.size;
            }
        });
        for stats in &mut sum.classes {
            // Counts of different moments may miss each other.
            stats.live = (stats.live as isize).max(0) as usize;
        }
        sum
    }

    /// Blocks that are live.
    pub(crate) fn live_count(&self) -> usize {
        let (mut allocs, mut frees) = (0u64, 0u64);
        self.each_heap(|heap| {
            allocs += heap.requests.histogram().iter().sum::<u64>();
            frees += heap.requests.frees.load(Ordering::Relaxed);
        });
        allocs.saturating_sub(frees) as usize
    }

    /// Starts the peak anew.
    pub(crate) fn reset_peak(&self) {
        self.reset_holdings();
        self.each_heap(|heap| {
            let requests = &heap.requests;
            requests.peak.store(requests.live_bytes().max(0) as u64, Ordering::Relaxed);
        });
    }

    /// Requests summed over threads, into the statistics that every pool has. The peak is the sum of the
    /// threads' peaks: exact for one thread, an upper bound for several.
    pub(crate) fn memory_stats(&self) -> MemoryStats {
        let held = self.snapshot();
        let (now, peak) = self.holdings();
        let mut stats = MemoryStats {
            reserved: now.max(self.booked()),
            peak_reserved: peak.max(self.peak_booked()),
            committed: held.committed,
            // Exact, but that pages given back within a span still count.
            peak_committed: peak.max(held.committed),
            source_calls: held.os_calls,
            ..MemoryStats::default()
        };
        let (mut alloc_bytes, mut free_bytes, mut peak) = (0u64, 0u64, 0usize);
        self.each_heap(|heap| {
            let requests = &heap.requests;
            let histogram = requests.histogram();
            stats.allocation_count += histogram.iter().sum::<u64>();
            stats.deallocation_count += requests.frees.load(Ordering::Relaxed);
            stats.failed_count += requests.failed.load(Ordering::Relaxed);
            alloc_bytes = alloc_bytes.wrapping_add(requests.alloc_bytes.load(Ordering::Relaxed));
            free_bytes = free_bytes.wrapping_add(requests.free_bytes.load(Ordering::Relaxed));
            peak += requests.peak.load(Ordering::Relaxed) as usize;
            for (sum, count) in stats.size_histogram.iter_mut().zip(histogram) {
                *sum += count;
            }
        });
        stats.peak_allocated = peak;
        stats.total_allocated = alloc_bytes;
        stats.current_allocated = alloc_bytes.saturating_sub(free_bytes) as usize;
        stats.free = held.committed.saturating_sub(stats.current_allocated);
        stats.cache_misses = held.refills;
        stats.cache_hits = stats.allocation_count.saturating_sub(held.refills);
        stats
    }
}

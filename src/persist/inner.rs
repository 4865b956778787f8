//! What the handles of one open pool share.
//!
//! Locks, in the order in which a thread may take them: object locks ([`Locks`]), the journal's group, the
//! [`Gate`] with the index behind it, the names. Readers are inside the gate, and who applies a record is alone.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, RwLock};

use core::sync::atomic::{AtomicBool, Ordering};

use super::format::{CHUNK, Counter, Header, internal};
use super::gate::Gate;
use super::heap::Heap;
use super::journal::{Journal, Overflow};
use super::locks::Locks;
use super::media::{Durability, Media};
use super::table::{Mark, Object, Table};
use crate::base::config::PoolConfig;
use crate::base::error::{Error, PointerFault, Refusal, Result};
use crate::base::stats::MemoryStats;

/// What one transaction adds to the counters.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) transactions: u64,
    pub(crate) allocations: u64,
    pub(crate) frees: u64,
    pub(crate) bytes: u64,
    pub(crate) freed_bytes: u64,
}

/// The index and what is counted under the same lock.
#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) heap: Heap,
    /// Since the pool was opened.
    pub(crate) tally: Tally,
    pub(crate) failures: u64,
    /// Bytes live when it was opened; counted when first asked for.
    pub(crate) live_at_open: Option<u64>,
    pub(crate) peak: i64,
    /// Raw blocks freed while their thread was in a read; freed in the file when it is over.
    pub(crate) deferred: Vec<u64>,
}

impl core::ops::Deref for Books {
    type Target = Heap;
    fn deref(&self) -> &Heap {
        &self.heap
    }
}

impl core::ops::DerefMut for Books {
    fn deref_mut(&mut self) -> &mut Heap {
        &mut self.heap
    }
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) media: Media,
    pub(crate) table: Table,
    pub(crate) heap: Gate<Books>,
    pub(crate) journal: Journal,
    pub(crate) locks: Locks,
    pub(crate) header: Mutex<Header>,
    pub(crate) identity: u64,
    pub(crate) durability: Durability,
    pub(crate) names: RwLock<HashMap<String, u64>>,
    pub(crate) path: PathBuf,
    pub(crate) config: PoolConfig,
    pub(crate) name: String,
    pub(crate) replayed: usize,
    pub(crate) tracking: AtomicBool,
    /// Whether the pool was destroyed through the common interface; what is under way ends as it would have.
    destroyed: AtomicBool,
}

/// What opening found out.
pub(crate) struct Parts {
    pub(crate) media: Media,
    pub(crate) table: Table,
    pub(crate) heap: Heap,
    pub(crate) header: Header,
    pub(crate) durability: Durability,
    pub(crate) names: HashMap<String, u64>,
    pub(crate) path: PathBuf,
    pub(crate) replayed: usize,
}

impl Inner {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { media, table, heap, header, durability, names, path, replayed } = parts;
        let books = Books {
            heap,
            tally: Tally::default(),
            failures: 0,
            live_at_open: None,
            peak: 0,
            deferred: Vec::new(),
        };
        Self {
            journal: Journal::new(&header),
            config: PoolConfig::default_cpu().path(&path).initial_size(header.file_len() as usize),
            identity: header.identity,
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            header: Mutex::new(header),
            heap: Gate::new(books),
            locks: Locks::default(),
            names: RwLock::new(names),
            tracking: AtomicBool::new(true),
            destroyed: AtomicBool::new(false),
            media,
            table,
            durability,
            path,
            replayed,
        }
    }

    /// Says no where the pool was destroyed, or cannot be used.
    #[inline]
    pub(crate) fn open(&self) -> Result<()> {
        self.present()?;
        self.media.check_usable()
    }

    /// Says no where the pool was destroyed.
    #[inline]
    pub(crate) fn present(&self) -> Result<()> {
        if self.destroyed.load(Ordering::Relaxed) {
            return Err(Error::InvalidOperation(Refusal::Destroyed));
        }
        Ok(())
    }

    /// Refuses everything from now on; an error while scratch memory is live.
    pub(crate) fn destroy(&self) -> Result<()> {
        let books = self.heap.lock();
        let mut live = 0;
        books.for_each_held(internal::SCRATCH, |_, _| live += 1);
        if live > 0 {
            return Err(Error::InvalidOperation(Refusal::StillLive(live)));
        }
        self.destroyed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether a pointer is one of this pool at all.
    #[inline]
    pub(crate) fn check_pointer(&self, identity: u64, offset: u64) -> Result<()> {
        if offset == 0 {
            return Err(Error::pointer(0, PointerFault::NotLive));
        }
        if identity != self.identity {
            return Err(Error::pointer(offset as usize, PointerFault::WrongOwner));
        }
        Ok(())
    }

    /// The live object of that type at `offset`.
    #[inline]
    pub(crate) fn live(&self, offset: u64, fingerprint: u64) -> Result<(Object, Mark)> {
        match self.table.live(&self.media, offset) {
            Some(found) if found.0.fingerprint == fingerprint => Ok(found),
            Some(_) => Err(Error::pointer(offset as usize, PointerFault::WrongType)),
            None => Err(Error::pointer(offset as usize, PointerFault::NotLive)),
        }
    }

    /// Adds to the counters.
    #[inline]
    pub(crate) fn count(&self, books: &mut Books, tally: Tally) {
        let sum = &mut books.tally;
        sum.transactions += tally.transactions;
        sum.allocations += tally.allocations;
        sum.frees += tally.frees;
        sum.bytes += tally.bytes;
        sum.freed_bytes += tally.freed_bytes;
        books.peak = books.peak.max(sum.bytes as i64 - sum.freed_bytes as i64);
    }

    pub(crate) fn add_roots(&self, roots: &[(String, u64)]) {
        let mut names = self.names.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        names.extend(roots.iter().cloned());
    }

    /// The record of a root.
    pub(crate) fn root_record(&self, name: &str) -> Option<u64> {
        self.names.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(name).copied()
    }

    /// A counter of the file, as it was when the pool was opened.
    pub(crate) fn stored(&self, counter: Counter) -> u64 {
        self.media.load(counter.at())
    }

    /// Writes the counters to the super page; called when the pool is closed.
    pub(crate) fn store_counters(&self) {
        let tally = self.heap.lock().tally;
        for (counter, more) in [
            (Counter::Transactions, tally.transactions),
            (Counter::Allocations, tally.allocations),
            (Counter::Frees, tally.frees),
            (Counter::Bytes, tally.bytes),
        ] {
            let sum = self.stored(counter).wrapping_add(more);
            // SAFETY: nobody holds references into the super page, and the last handle is being dropped.
            unsafe { self.media.store(counter.at(), sum) };
        }
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        let mut books = self.heap.lock();
        let Tally { bytes, freed_bytes, allocations, frees, .. } = books.tally;
        let at_open = match books.live_at_open {
            Some(live) => live,
            None => {
                let mut live = 0;
                self.table.for_each(&self.media, |object| {
                    live += object.size;
                    true
                });
                // Transactions that are being applied right now are in the file and not yet in the tally.
                let live = (live + freed_bytes).saturating_sub(bytes);
                books.live_at_open = Some(live);
                live
            }
        };
        let held = self.media.len() as usize;
        let (free, largest_free) = books.free_space();
        MemoryStats {
            total_allocated: self.stored(Counter::Bytes).wrapping_add(bytes),
            current_allocated: (at_open + bytes).saturating_sub(freed_bytes) as usize,
            peak_allocated: (at_open as i64).saturating_add(books.peak).max(0) as usize,
            allocation_count: self.stored(Counter::Allocations).wrapping_add(allocations),
            deallocation_count: self.stored(Counter::Frees).wrapping_add(frees),
            failed_count: books.failures,
            reserved: held,
            peak_reserved: held,
            committed: held - free as usize,
            peak_committed: held - free as usize,
            free: free as usize,
            largest_free: largest_free as usize,
            source_calls: self.media.syncs(),
            ..MemoryStats::default()
        }
    }
}

impl Overflow for Inner {
    fn reserve(&self, len: usize) -> Result<u64> {
        let len = len.next_multiple_of(CHUNK as usize);
        let mut books = self.heap.lock();
        books.heap.reserve(&self.media, &self.table, internal::SCRATCH, len, 8, false).map(|slot| slot.offset)
    }

    fn release(&self, offset: u64) {
        self.heap.lock().release(&self.table, offset);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A child of a fork leaves the file to its parent.
        if self.media.is_writable() && self.media.is_ours() {
            // What fails here is recovered at the next opening.
            let _ = super::pool::shut(self);
        }
    }
}

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
use super::heap::{Heap, Slot};
use super::journal::{Journal, Overflow};
use super::locks::{Locks, TxId};
use super::media::{Durability, Media};
use super::stash::Stash;
use super::table::{Mark, Object, Table};
use crate::base::config::PoolConfig;
use crate::base::error::{Error, PointerFault, Refusal, Result};
use crate::base::stats::MemoryStats;
use crate::base::tracking::{Counts, Tracking};

/// What one transaction adds to the counters.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) transactions: u64,
    pub(crate) allocations: u64,
    pub(crate) frees: u64,
    pub(crate) bytes: u64,
    pub(crate) freed_bytes: u64,
}

impl Tally {
    #[inline]
    pub(crate) fn add(&mut self, more: &Self) {
        let Self { transactions, allocations, frees, bytes, freed_bytes } = self;
        let more = [more.transactions, more.allocations, more.frees, more.bytes, more.freed_bytes];
        let sums = [transactions, allocations, frees, bytes, freed_bytes];
        // A file may claim anything.
        sums.into_iter().zip(more).for_each(|(sum, more)| *sum = sum.wrapping_add(more));
    }

    /// What the file has of it, in its order.
    #[inline]
    pub(crate) fn counters(&self) -> [u64; 4] {
        [self.transactions, self.allocations, self.frees, self.bytes]
    }
}

/// The index and what is counted under the same lock.
#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) heap: Heap,
    /// Since the pool was made; `freed_bytes` since it was opened.
    pub(crate) tally: Tally,
    /// Bytes allocated less bytes freed since the pool was opened, and the most that was.
    pub(crate) held: i64,
    pub(crate) peak: i64,
    pub(crate) failures: u64,
    /// Bytes live when it was opened; counted when first asked for.
    pub(crate) live_at_open: Option<u64>,
    /// Raw blocks freed while their thread was in a read; freed in the file when it is over. `Inner::defers` says
    /// whether there are any.
    pub(crate) deferred: Vec<u64>,
}

impl Books {
    /// Of a pool that was just opened.
    pub(crate) fn new(heap: Heap, media: &Media) -> Self {
        let counted = |counter: Counter| media.load(counter.at());
        let tally = Tally {
            transactions: counted(Counter::Transactions),
            allocations: counted(Counter::Allocations),
            frees: counted(Counter::Frees),
            bytes: counted(Counter::Bytes),
            freed_bytes: 0,
        };
        let (held, peak, failures, live_at_open, deferred) = (0, 0, 0, None, Vec::new());
        Self { heap, tally, held, peak, failures, live_at_open, deferred }
    }

    /// Adds to the counters.
    #[inline]
    pub(crate) fn count(&mut self, more: &Tally) {
        self.tally.add(more);
        self.held = self.held.wrapping_add_unsigned(more.bytes).wrapping_sub_unsigned(more.freed_bytes);
        self.peak = self.peak.max(self.held);
    }

    /// Adds to the counters, in the file as well: that takes no record, and what was written survives a killed
    /// process.
    #[inline]
    pub(crate) fn count_in_file(&mut self, media: &Media, more: &Tally) {
        self.count(more);
        self.store_counters(media);
    }

    /// What the counters in the file will be.
    pub(crate) fn foretell<'a>(&self, more: impl Iterator<Item = &'a Tally>) -> [u64; 4] {
        let mut sum = self.tally;
        more.for_each(|more| sum.add(more));
        sum.counters()
    }

    /// Writes the counters to the super page.
    #[inline]
    pub(crate) fn store_counters(&self, media: &Media) {
        let words = self.tally.counters();
        let at = Counter::Transactions.at();
        // SAFETY: nobody holds references into the super page, and who counts has the index locked.
        unsafe { media.store_words(at, &words) };
        media.flush(at, size_of_val(&words));
    }
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
    pub(crate) tracking: Tracking,
    pub(crate) stash: Stash,
    pub(crate) defers: AtomicBool,
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
        let books = Books::new(heap, &media);
        Self {
            journal: Journal::new(&header),
            config: PoolConfig::default_cpu().path(&path).initial_size(header.file_len() as usize),
            identity: header.identity,
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            header: Mutex::new(header),
            heap: Gate::new(books),
            locks: Locks::default(),
            names: RwLock::new(names),
            tracking: Tracking::new(true),
            stash: Stash::default(),
            defers: AtomicBool::new(false),
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
        if offset == 0 || identity != self.identity {
            let fault = if offset == 0 { PointerFault::NotLive } else { PointerFault::WrongOwner };
            return Err(bad_pointer(offset, fault));
        }
        Ok(())
    }

    /// The live object of that type at `offset`.
    #[inline]
    pub(crate) fn live(&self, offset: u64, fingerprint: u64) -> Result<(Object, Mark)> {
        match self.table.live(&self.media, offset) {
            Some(found) if found.0.fingerprint == fingerprint => Ok(found),
            Some(_) => Err(bad_pointer(offset, PointerFault::WrongType)),
            None => Err(bad_pointer(offset, PointerFault::NotLive)),
        }
    }

    /// A slot for an object of that type, or of that size if it is not `exact`, for the transaction of that number.
    #[inline(always)]
    pub(crate) fn reserve_slot(
        &self,
        owner: TxId,
        fingerprint: u64,
        size: usize,
        align: usize,
        exact: bool,
    ) -> Result<Slot> {
        if exact && let Some(slot) = self.stash.take(owner, fingerprint) {
            return Ok(slot);
        }
        self.reserve_and_keep(owner, fingerprint, size, align, exact)
    }

    /// A slot out of the index, and some to keep for the next objects of the type.
    #[inline(never)]
    fn reserve_and_keep(
        &self,
        owner: TxId,
        fingerprint: u64,
        size: usize,
        align: usize,
        exact: bool,
    ) -> Result<Slot> {
        let mut books = self.heap.lock();
        let slot = self.reserve(&mut books, fingerprint, size, align, exact)?;
        if exact && let Some((shelf, most)) = self.stash.shelf_for(owner, fingerprint, &slot) {
            shelf.empty(|offset| _ = books.heap.release(&self.table, offset));
            shelf.fill(fingerprint, &slot, books.heap.reserve_beside(&slot, most));
        }
        Ok(slot)
    }

    /// A slot out of the locked index.
    #[inline]
    pub(crate) fn reserve(
        &self,
        books: &mut Books,
        fingerprint: u64,
        size: usize,
        align: usize,
        exact: bool,
    ) -> Result<Slot> {
        let slot = books.heap.reserve(&self.media, &self.table, fingerprint, size, align, exact);
        if slot.is_ok() { slot } else { self.reserve_again(books, fingerprint, size, align, exact, slot) }
    }

    /// Where the pool is full, what transactions keep for their next objects is taken back first.
    #[cold]
    fn reserve_again(
        &self,
        books: &mut Books,
        fingerprint: u64,
        size: usize,
        align: usize,
        exact: bool,
        mut slot: Result<Slot>,
    ) -> Result<Slot> {
        let full = matches!(slot, Err(Error::OutOfMemory { .. }));
        if full && self.take_back(books) {
            slot = books.heap.reserve(&self.media, &self.table, fingerprint, size, align, exact);
        }
        books.failures += u64::from(slot.is_err());
        slot
    }

    /// Gives all slots that transactions keep back to the index. Whether there were any.
    pub(crate) fn take_back(&self, books: &mut Books) -> bool {
        self.stash.empty(|offset| _ = books.heap.release(&self.table, offset))
    }

    /// Gives a slot back: one that was reserved and not published, or that of an object which is free in the file.
    #[inline]
    pub(crate) fn release(&self, owner: TxId, books: &mut Books, fingerprint: u64, offset: u64, mark: Mark) {
        if !self.stash.keep(owner, fingerprint, mark) {
            books.heap.release(&self.table, offset);
        }
    }

    pub(crate) fn add_roots(&self, roots: &[(String, u64)]) {
        let mut names = self.names.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        names.extend(roots.iter().cloned());
    }

    /// The record of a root.
    pub(crate) fn root_record(&self, name: &str) -> Option<u64> {
        self.names.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(name).copied()
    }

    /// A counter in the file.
    pub(crate) fn stored(&self, counter: Counter) -> u64 {
        self.media.load(counter.at())
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        let mut books = self.heap.lock();
        let (Tally { bytes, allocations, frees, .. }, held_since) = (books.tally, books.held);
        let at_open = match books.live_at_open {
            Some(live) => live,
            None => {
                let mut live = 0;
                self.table.for_each(&self.media, |object| {
                    live += object.size;
                    true
                });
                let live = live.saturating_sub_signed(held_since);
                books.live_at_open = Some(live);
                live
            }
        };
        let held = self.media.len() as usize;
        let (free, largest_free) = books.free_space();
        let mut stats = MemoryStats {
            total_allocated: bytes,
            current_allocated: at_open.saturating_add_signed(held_since) as usize,
            peak_allocated: at_open.saturating_add_signed(books.peak) as usize,
            allocation_count: allocations,
            deallocation_count: frees,
            failed_count: books.failures,
            reserved: held,
            peak_reserved: held,
            committed: held - free as usize,
            peak_committed: held - free as usize,
            free: free as usize,
            largest_free: largest_free as usize,
            source_calls: self.media.syncs(),
            ..MemoryStats::default()
        };
        drop(books);
        self.tracking.show(&mut stats);
        stats
    }

    /// Whether the statistics say what happens from now on.
    pub(crate) fn set_tracking(&self, on: bool) {
        let Tally { bytes, allocations: allocs, frees, .. } = self.heap.lock().tally;
        self.tracking.switch(on, Counts { allocs, frees, bytes, ..Counts::default() });
    }
}

#[cold]
#[inline(never)]
fn bad_pointer(offset: u64, fault: PointerFault) -> Error {
    Error::pointer(offset as usize, fault)
}

impl Overflow for Inner {
    fn reserve(&self, len: usize) -> Result<u64> {
        let len = len.next_multiple_of(CHUNK as usize);
        self.reserve(&mut self.heap.lock(), internal::SCRATCH, len, 8, false).map(|slot| slot.offset)
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

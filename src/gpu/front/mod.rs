//! Caches in front of a pool's books: the common pair of allocation and free takes one uncontended lock and looks
//! at one record.
//!
//! ```text
//!   take ─► cache of the stream ─► block of that very size              no books, no driver
//!              │ nothing there
//!              ▼
//!           the large blocks of this cache go back, for a large request ─► books, under the pool's lock ─► its small
//!           ones go back, the larger ones first, for a small request ─► books ─► what all caches hold goes back
//!           ─► books ─► driver
//!
//!   give ─► record of the address ─► cache of the stream                no books, no driver
//!              │ none yet, or no room
//!              ▼
//!           books: makes a record; what must give way goes back
//! ```
//! A cache belongs to a stream (by its slot), or to the CPU, of which there are several so that threads seldom meet.
//! A stream is usually one thread's, and then so is its cache; where two threads share a stream, what one frees the
//! other finds. Who finds a cache locked goes to the books instead and waits for nobody. Since no thread owns a cache,
//! nothing happens when a thread ends.
//!
//! To the books a cached block is live; it is free to everybody else, who see [`Records`]. Blocks are cached after their
//! first free, of which the record is made, if blocks of such sizes were asked for again lately. Of one size there may be
//! any number: programs free hundreds of small blocks one after the other before they ask for them again.
//!
//! Invariants
//! 1. A cache holds blocks that were freed on its stream and on no other (or, the CPU's, of which all work is complete),
//!    and hands them out for that stream alone. So no reuse needs an event.
//! 2. What goes back to the books is freed there on the stream's lane, then: its open batch covers all earlier work.
//! 3. A stream's cache is emptied and shut before its slot is given on. Blocks of graph captures, and blocks that other
//!    streams use, never come here.
//! 4. Everything cached goes back before memory is asked of the driver, or given to it.
//! 5. Caches are locked after the books and hold no other lock, so whoever waits for one waits for a few instructions.

#![forbid(unsafe_code)]

mod cache;
mod records;
mod sizes;

use core::cell::Cell;
use std::sync::{Arc, OnceLock};

use super::capture::Session;
use super::core::{Core, Placed, Ticket, ZONE_LIMITS};
use super::driver::Driver;
use super::seat::Seat;
use super::stream::Stream;
use crate::base::policy::Strategy;
use crate::base::stats::MemoryStats;
use crate::base::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use crate::engine::Broken;

pub(super) use cache::{Cache, Guarded};
pub(super) use records::{CACHED, PUBLISHED, Record, Records, SHARED};
pub(super) use sizes::Place;

/// Blocks up to this size are cached.
const MOST_BYTES: usize = 256 << 20;
/// A cache holds this many bytes at most, ...
const LEAST_CAP: usize = MOST_BYTES;
/// ... or this part of the pool if that is more.
const PART: usize = 16;
/// A cache holds this many blocks at most: they go back one by one when memory is short.
pub(super) const MOST_BLOCKS: usize = 4096;
/// Small requests that find no room have cached blocks back from these sizes on, one after the other.
const STEPS: [usize; 4] = [256 << 10, 64 << 10, 16 << 10, 0];
/// Slots come in rows, each made when one of its streams caches something.
const ROW: usize = 64;
/// Caches of the CPU.
const WAYS: usize = 16;

/// Whose cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// A stream's, by its slot.
    Stream(u32),
    /// The CPU's; which one depends on the thread.
    Cpu,
}

impl Whose {
    /// `None` where the stream is captured.
    #[inline]
    pub(super) fn of(stream: Option<&Stream>, session: Option<&Arc<Session>>) -> Option<Self> {
        match (stream, session) {
            (None, _) => Some(Self::Cpu),
            (Some(stream), None) => Some(Self::Stream(stream.slot())),
            (Some(_), Some(_)) => None,
        }
    }
}

/// Caches, and which of them there are.
#[derive(Debug)]
struct Row {
    cells: Box<[OnceLock<Box<Cache>>; ROW]>,
    made: AtomicU64,
}

impl Row {
    fn new() -> Self {
        Self { cells: Box::new([const { OnceLock::new() }; ROW]), made: AtomicU64::new(0) }
    }

    #[inline]
    fn get(&self, at: usize) -> Option<&Cache> {
        self.cells.get(at)?.get().map(|cache| &**cache)
    }

    fn get_or_make(&self, at: usize, large_from: u32) -> Option<&Cache> {
        let cell = self.cells.get(at)?;
        if let Some(cache) = cell.get() {
            return Some(cache);
        }
        let cache = cell.get_or_init(|| Box::new(Cache::new(large_from)));
        self.made.fetch_or(1 << at, Relaxed);
        Some(cache)
    }

    fn caches(&self) -> impl Iterator<Item = &Cache> {
        bits(self.made.load(Relaxed)).filter_map(|at| self.get(at))
    }
}

/// The numbers of the bits that are set.
fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let at = (set != 0).then(|| set.trailing_zeros() as usize);
        set &= set.wrapping_sub(1);
        at
    })
}

/// The number of the calling thread, for a share of the CPU's caches.
#[inline]
fn way() -> usize {
    static NEXT: core::sync::atomic::AtomicUsize = core::sync::atomic::AtomicUsize::new(0);
    thread_local! {
        static WAY: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    let known = WAY.get();
    if known != usize::MAX {
        return known;
    }
    let fresh = NEXT.fetch_add(1, Relaxed) % WAYS;
    WAY.set(fresh);
    fresh
}

/// Bytes from which on a block is large: those of a cache go back before the books look for another such, the small ones
/// when nothing fits. A strategy that weighs all free ranges sees them all.
fn large_from(strategy: &Strategy) -> usize {
    if matches!(strategy, Strategy::Segregated) { ZONE_LIMITS[0] } else { 0 }
}

/// The caches of a pool.
#[derive(Debug)]
pub(super) struct Front {
    shift: u32,
    /// Largest block to be cached; 0 where nothing is.
    most: usize,
    /// Bytes from which on a block is large.
    large_from: usize,
    /// Most bytes in a cache.
    cap: AtomicUsize,
    rows: [OnceLock<Row>; ROW],
    /// Which rows there are.
    made: AtomicU64,
    cpu: Row,
    records: Arc<Records>,
    /// A test lets all streams have one cache, to see that the detector notices.
    #[cfg(test)]
    pub(super) one_for_all: core::sync::atomic::AtomicBool,
}

impl Front {
    /// For memory in granules of `1 << shift` bytes. A strategy that chooses by place is asked about every block, so
    /// nothing is cached then.
    pub(super) fn new(shift: u32, strategy: &Strategy, records: Arc<Records>) -> Self {
        let by_size = matches!(strategy, Strategy::Segregated | Strategy::BestFit);
        Self {
            shift,
            large_from: large_from(strategy),
            most: if by_size { MOST_BYTES } else { 0 },
            cap: AtomicUsize::new(LEAST_CAP),
            rows: [const { OnceLock::new() }; ROW],
            made: AtomicU64::new(0),
            cpu: Row::new(),
            records,
            #[cfg(test)]
            one_for_all: false.into(),
        }
    }

    #[cfg(test)]
    fn slot(&self, slot: u32) -> usize {
        if self.one_for_all.load(Relaxed) { 0 } else { slot as usize }
    }

    #[cfg(not(test))]
    #[inline]
    fn slot(&self, slot: u32) -> usize {
        slot as usize
    }

    /// The cache, if it was made.
    #[inline]
    pub(super) fn cache(&self, whose: Whose) -> Option<&Cache> {
        match whose {
            Whose::Cpu => self.cpu.get(way()),
            Whose::Stream(slot) => {
                let slot = self.slot(slot);
                self.rows.get(slot / ROW)?.get()?.get(slot % ROW)
            }
        }
    }

    /// The cache, made if there is none yet.
    #[cold]
    pub(super) fn new_cache(&self, whose: Whose) -> Option<&Cache> {
        let large_from = (self.large_from >> self.shift) as u32;
        match whose {
            Whose::Cpu => self.cpu.get_or_make(way(), large_from),
            Whose::Stream(slot) => {
                let slot = self.slot(slot);
                let cell = self.rows.get(slot / ROW)?;
                if let Some(row) = cell.get() {
                    return row.get_or_make(slot % ROW, large_from);
                }
                let row = cell.get_or_init(Row::new);
                self.made.fetch_or(1 << (slot / ROW), Relaxed);
                row.get_or_make(slot % ROW, large_from)
            }
        }
    }

    fn caches(&self) -> impl Iterator<Item = &Cache> {
        let rows = bits(self.made.load(Relaxed)).filter_map(|at| self.rows[at].get());
        rows.chain([&self.cpu]).flat_map(Row::caches)
    }

    /// A cached block for a request of `bytes`, rounded as the pool rounds them.
    #[inline]
    pub(super) fn take(&self, cache: &Cache, bytes: usize, align: usize) -> Option<Placed> {
        let place = self.look(cache, bytes)?;
        Some(self.pick(cache, &mut *cache.turn.try_lock()?, place, bytes, align)?.placed())
    }

    /// Where the block for a request lies, if there is one.
    #[inline(always)]
    pub(super) fn look(&self, cache: &Cache, bytes: usize) -> Option<Place> {
        let granules = bytes.checked_add((1 << self.shift) - 1)? >> self.shift;
        cache.look(u32::try_from(granules).ok()?)
    }

    /// [`take`](Self::take) from a cache that is locked, of a block that was looked for. What is known of the block is
    /// returned as a reference, in a register: values that are written here and read by the caller in other widths would
    /// wait for each other.
    #[inline(always)]
    pub(super) fn pick(
        &self,
        cache: &Cache,
        inside: &mut Guarded,
        place: Place,
        bytes: usize,
        align: usize,
    ) -> Option<&Record> {
        // Alignments are powers of two; a division would be a sixth of the pair.
        let record = cache.pop(inside, place, &self.records, align - 1)?;
        let served = &mut inside.served;
        served.bytes += record.len() as u64;
        served.histogram[MemoryStats::bucket(bytes)] += 1;
        Some(record)
    }

    /// Caches a block that is freed, if that takes no more than this; `by_address` where its address is all that is
    /// known of it.
    #[inline]
    pub(super) fn give(&self, cache: &Cache, start: usize, by_address: bool) -> bool {
        // Most blocks that come here by way of the books have no record, and need no lock to see that.
        let Some(found) = self.find(start) else { return false };
        cache.turn.try_lock().is_some_and(|mut inside| self.put(cache, &mut inside, found, by_address))
    }

    /// The record of a block, and its number.
    #[inline(always)]
    pub(super) fn find(&self, start: usize) -> Option<(u32, &Record)> {
        self.records.find(start)
    }

    /// [`give`](Self::give) to a cache that is locked, of a block that has a record.
    #[inline(always)]
    pub(super) fn put(
        &self,
        cache: &Cache,
        inside: &mut Guarded,
        (number, record): (u32, &Record),
        by_address: bool,
    ) -> bool {
        let known = record.flags();
        if known & (CACHED | SHARED) != 0 || by_address && known & PUBLISHED == 0 {
            return false;
        }
        let len = record.len();
        if !inside.open || !self.has_room(cache, len) {
            return false;
        }
        cache.push(inside, (len >> self.shift) as u32, number, record)
    }

    /// Caches a block that is freed on `lane`, and lets others give way; false where it must go to the books.
    #[inline(always)]
    pub(super) fn keep(
        &self,
        core: &mut Core,
        driver: &dyn Driver,
        cache: &Cache,
        lane: u16,
        (ticket, len): (Ticket, usize),
    ) -> bool {
        cache.is_worth((len >> self.shift) as u32)
            && len <= self.most
            && self.keep_in(core, driver, cache, lane, ticket)
    }

    /// [`keep`](Self::keep) of a block of a size that is worth it.
    fn keep_in(
        &self,
        core: &mut Core,
        driver: &dyn Driver,
        cache: &Cache,
        lane: u16,
        ticket: Ticket,
    ) -> bool {
        let len = core.len(ticket);
        let granules = (len >> self.shift) as u32;
        if core.is_shared(ticket) || core.is_private(ticket, lane) {
            return false;
        }
        let Some(number) = core.make_record(ticket) else { return false };
        let Some(record) = self.records.get(number) else { return false };
        self.cap.store(LEAST_CAP.max(core.reserved / PART), Relaxed);
        let mut inside = cache.turn.lock();
        (inside.open, inside.lane) = (true, lane);
        while !self.has_room(cache, len) {
            let Some(record) = cache.pop_any(&mut inside, &self.records) else { break };
            cache.given_up((record.len() >> self.shift) as u32);
            self.put_back(core, driver, lane, record);
        }
        let mut out = |record: &Record| self.put_back(core, driver, lane, record);
        let kept = cache.make_place(&mut inside, granules, &self.records, &mut out)
            && cache.push(&mut inside, granules, number, record);
        if kept {
            // The caller noted the peak.
            cache.settle_low();
        }
        kept
    }

    /// Whether a cache may hold one more block of this size.
    #[inline(always)]
    fn has_room(&self, cache: &Cache, len: usize) -> bool {
        cache.bytes() + len <= self.cap.load(Relaxed) && cache.blocks() < MOST_BLOCKS
    }

    /// Frees a block that was taken out of a cache (invariant 2).
    fn put_back(&self, core: &mut Core, driver: &dyn Driver, lane: u16, record: &Record) {
        #[cfg(test)]
        let lane = match core.order.mutant {
            Some(super::order::Mutant::CleanCaches) => super::ranges::CLEAN,
            _ => lane,
        };
        core.release(driver, record.ticket(), lane, None);
    }

    /// What a cache holds of blocks of at least so many bytes goes back to the books; whether there was anything.
    pub(super) fn empty(&self, core: &mut Core, driver: &dyn Driver, cache: &Cache, least: usize) -> bool {
        if cache.blocks() == 0 {
            return false;
        }
        let mut inside = cache.turn.lock();
        let (lane, before) = (inside.lane, cache.blocks());
        let least = (least >> self.shift) as u32;
        let mut last = 0;
        cache.drain(&mut inside, &self.records, least, &mut |record| {
            // A size that was kept in vain, however many there were of it.
            if record.len() != last && record.len() < self.large_from {
                cache.given_up((record.len() >> self.shift) as u32);
            }
            last = record.len();
            self.put_back(core, driver, lane, record);
        });
        before != cache.blocks()
    }

    /// For a large request, the large blocks that one cache holds go back to the books.
    pub(super) fn take_large_back(&self, core: &mut Core, driver: &dyn Driver, cache: &Cache, bytes: usize) {
        if bytes < self.large_from || cache.blocks() == 0 {
            return;
        }
        let mut inside = cache.turn.lock();
        let (lane, least) = (inside.lane, (self.large_from >> self.shift) as u32);
        cache.drain(&mut inside, &self.records, least, &mut |record| {
            cache.given_up((record.len() >> self.shift) as u32);
            self.put_back(core, driver, lane, record);
        });
    }

    /// From which sizes on the blocks of its stream go back for a request that finds no room, step by step: the larger
    /// ones are most of the bytes and the least of the blocks. Small blocks are of no use to a large request.
    pub(super) fn steps(&self, bytes: usize) -> &'static [usize] {
        if bytes < self.large_from { &STEPS } else { &[] }
    }

    /// What all caches hold goes back to the books; whether there was anything.
    pub(super) fn take_all_back(&self, core: &mut Core, driver: &dyn Driver) -> bool {
        self.caches().fold(false, |any, cache| self.empty(core, driver, cache, 0) | any)
    }

    /// Empties the cache of a stream and shuts it (invariant 3). The seats are dropped with no lock held.
    #[must_use]
    pub(super) fn shut_of(&self, core: &mut Core, driver: &dyn Driver, slot: u32) -> Vec<Arc<Seat>> {
        let Some(cache) = self.cache(Whose::Stream(slot)) else { return Vec::new() };
        self.empty(core, driver, cache, 0);
        let seats = cache.turn.lock().shut();
        // Whoever was quicker than that.
        self.empty(core, driver, cache, 0);
        seats
    }

    /// Empties all caches and shuts them; [`keep`](Self::keep) opens them again. The seats are dropped with no lock
    /// held.
    #[must_use]
    pub(super) fn shut(&self, core: &mut Core, driver: &dyn Driver) -> Vec<Arc<Seat>> {
        let mut seats = Vec::new();
        for cache in self.caches() {
            self.empty(core, driver, cache, 0);
            seats.append(&mut cache.turn.lock().shut());
        }
        // Whoever was quicker than that.
        self.take_all_back(core, driver);
        seats
    }

    /// Forgets what is cached; the books forget it as well.
    pub(super) fn forget(&self) {
        for cache in self.caches() {
            cache.forget(&mut cache.turn.lock(), &self.records);
        }
    }

    /// Bytes cached.
    pub(super) fn bytes(&self) -> usize {
        self.caches().map(Cache::bytes).sum()
    }

    /// Blocks cached.
    pub(super) fn blocks(&self) -> usize {
        self.caches().map(Cache::blocks).sum()
    }

    /// No more bytes were live than are live to the books, less these, since each stream last went to the books.
    pub(super) fn low(&self) -> usize {
        self.caches().map(Cache::low).sum()
    }

    /// The peak was noted: the least is looked for from now on.
    #[inline]
    pub(super) fn settle_low(&self, cache: &Cache) {
        // Mostly there is nothing to do, and no need of the lock to see that.
        if cache.low() != cache.bytes() {
            let _held = cache.turn.lock();
            cache.settle_low();
        }
    }

    /// The same for all caches.
    pub(super) fn settle_lows(&self) {
        for cache in self.caches() {
            let _held = cache.turn.lock();
            cache.settle_low();
        }
    }

    /// Adds what the caches served to the counts of the books.
    pub(super) fn add_to(&self, stats: &mut MemoryStats) {
        for cache in self.caches() {
            let (served, blocks) = {
                let inside = cache.turn.lock();
                (inside.served, cache.blocks() as u64)
            };
            let allocations = served.allocations();
            stats.allocation_count += allocations;
            // Every block that came in was freed; it was handed out again, went back or lies there.
            stats.deallocation_count += allocations + served.returned + blocks;
            stats.total_allocated += served.bytes;
            stats.cache_hits += allocations;
            for (all, cached) in stats.size_histogram.iter_mut().zip(served.histogram) {
                *all += cached;
            }
        }
        let cached = self.bytes();
        stats.current_allocated -= cached.min(stats.current_allocated);
        stats.free += cached;
        self.records.for_each(&mut |record| {
            if record.flags() & CACHED != 0 {
                stats.largest_free = stats.largest_free.max(record.len());
            }
        });
    }

    pub(super) fn metadata_bytes(&self) -> usize {
        self.caches().count() * size_of::<Cache>() + self.records.metadata_bytes()
    }

    /// Walks the invariants of the caches; the books are locked, and all caches at once meanwhile, since blocks come
    /// and go there without the books.
    pub(super) fn check(&self, core: &Core) -> Result<(), Broken> {
        let (mut cached, mut bytes) = (0, 0);
        let locked: Vec<_> = self.caches().map(|cache| (cache, cache.turn.lock())).collect();
        for (cache, inside) in &locked {
            let (mut blocks, mut sum) = (0, 0);
            for (granules, mut number) in cache.chains() {
                while let Some(record) = self.records.get(number) {
                    let at = record.start();
                    if record.flags() & (CACHED | SHARED) != CACHED
                        || record.len() >> self.shift != granules as usize
                    {
                        return Err(Broken { invariant: "what lies in a cache is cached", at });
                    }
                    (blocks, sum, number) = (blocks + 1, sum + record.len(), record.next());
                    if blocks > cache.blocks() {
                        return Err(Broken { invariant: "a chain of cached blocks ends", at });
                    }
                }
            }
            if (blocks, sum) != (cache.blocks(), cache.bytes()) || blocks != 0 && !inside.open {
                return Err(Broken { invariant: "a cache counts what it holds", at: sum });
            }
            cached += blocks;
            bytes += sum;
        }
        let mut broken = None;
        self.records.for_each(&mut |record| {
            let (ticket, at) = (record.ticket(), record.start());
            if !core.is_live(ticket) || (core.start(ticket), core.len(ticket)) != (at, record.len()) {
                broken = Some(Broken { invariant: "a record is of a live block", at });
            }
            if record.flags() & CACHED != 0 {
                cached -= 1;
                bytes -= record.len();
            }
        });
        match broken {
            Some(broken) => Err(broken),
            None if (cached, bytes) != (0, 0) => {
                Err(Broken { invariant: "what is cached lies in one cache", at: bytes })
            }
            None => Ok(()),
        }
    }
}

//! What is known of blocks that caches hold, or handed out and may get back: found by address, without a lock.
//!
//! Records stand in sets of four; a block whose set is full has none, and is cached by nobody. They are made and
//! removed under the pool's lock, and never move. The blocks of a cache are linked through them.
//!
//! Invariants
//! 1. A record's `start` is not 0 exactly while it stands for a live block of the books, whose ticket and length
//!    it has.
//! 2. `CACHED` is set exactly while the block lies in a cache; it changes while that cache is locked.
//! 3. While a block lies in a cache its link is the number of the next record of its chain, or `NONE`.
//! 4. Only the owner of a block (who got it, or a locked cache, or the locked pool) changes its record, so what an
//!    owner reads is what the last one wrote.

use std::sync::OnceLock;

use super::super::core::{Placed, Ticket};
use crate::base::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

/// The block lies in a cache.
pub(in crate::gpu) const CACHED: u32 = 1;
/// The books find the block by its address.
pub(in crate::gpu) const PUBLISHED: u32 = 2;
/// Streams beside its own use the block.
pub(in crate::gpu) const SHARED: u32 = 4;

/// The bits below the link.
const FLAG_BITS: u32 = 3;
const FLAGS: u32 = (1 << FLAG_BITS) - 1;

/// No record has this number, and the link has room for it.
pub(super) const NONE: u32 = u32::MAX >> FLAG_BITS;

const WAYS: usize = 4;

#[derive(Debug, Default)]
pub(in crate::gpu) struct Record {
    start: AtomicUsize,
    len: AtomicUsize,
    ticket: AtomicU32,
    /// Flags, and the link above them.
    state: AtomicU32,
}

impl Record {
    #[inline]
    pub(in crate::gpu) fn start(&self) -> usize {
        self.start.load(Relaxed)
    }

    #[inline]
    pub(in crate::gpu) fn len(&self) -> usize {
        self.len.load(Relaxed)
    }

    /// The block as the books placed it.
    #[inline]
    pub(in crate::gpu) fn placed(&self) -> Placed {
        let published = self.flags() & PUBLISHED != 0;
        Placed { ticket: self.ticket(), start: self.start(), len: self.len(), published }
    }

    pub(in crate::gpu) fn set_len(&self, len: usize) {
        self.len.store(len, Relaxed);
    }

    #[inline]
    pub(in crate::gpu) fn ticket(&self) -> Ticket {
        Ticket::from_raw(self.ticket.load(Relaxed))
    }

    #[inline]
    pub(in crate::gpu) fn flags(&self) -> u32 {
        self.state.load(Relaxed) & FLAGS
    }

    #[inline]
    pub(in crate::gpu) fn set(&self, flag: u32, on: bool) {
        let state = self.state.load(Relaxed);
        self.state.store(if on { state | flag } else { state & !flag }, Relaxed);
    }

    /// The block enters a chain, before the block of this number.
    #[inline(always)]
    pub(super) fn enter(&self, next: u32) {
        self.state.store(next << FLAG_BITS | self.flags() | CACHED, Relaxed);
    }

    /// The block leaves its chain; returns what came after it.
    #[inline(always)]
    pub(super) fn leave(&self) -> u32 {
        let state = self.state.load(Relaxed);
        self.state.store(state & FLAGS & !CACHED, Relaxed);
        state >> FLAG_BITS
    }

    pub(super) fn next(&self) -> u32 {
        self.state.load(Relaxed) >> FLAG_BITS
    }

    pub(super) fn set_next(&self, next: u32) {
        self.state.store(next << FLAG_BITS | self.flags(), Relaxed);
    }
}

/// The records of a pool.
#[derive(Debug)]
pub(in crate::gpu) struct Records {
    sets: OnceLock<Box<[[Record; WAYS]]>>,
    log2: u32,
}

impl Records {
    /// A record for each MiB of a pool of this size, within bounds.
    pub(in crate::gpu) fn for_pool(bytes: usize) -> Self {
        let records = (bytes >> 20).clamp(1 << 10, 1 << 14).next_power_of_two();
        Self { sets: OnceLock::new(), log2: (records / WAYS).ilog2() }
    }

    #[inline]
    fn set_of(&self, start: usize) -> usize {
        // The low bits of an address say little.
        let hash = (start as u64 >> 6).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (hash >> (64 - self.log2)) as usize
    }

    /// The record of the block that begins here, and its number.
    #[inline]
    pub(in crate::gpu) fn find(&self, start: usize) -> Option<(u32, &Record)> {
        let set = self.set_of(start);
        let ways = &self.sets.get()?[set];
        let way = ways.iter().position(|record| record.start() == start)?;
        Some(((set * WAYS + way) as u32, &ways[way]))
    }

    /// The record of this number.
    #[inline]
    pub(in crate::gpu) fn get(&self, number: u32) -> Option<&Record> {
        self.sets.get()?.as_flattened().get(number as usize)
    }

    /// A record for a block that has none; `None` where there is no room.
    pub(in crate::gpu) fn add(&self, start: usize, len: usize, ticket: Ticket, flags: u32) -> Option<u32> {
        let sets = self.sets.get_or_init(|| {
            let empty = || std::array::from_fn(|_| Record::default());
            std::iter::repeat_with(empty).take(1 << self.log2).collect()
        });
        let set = self.set_of(start);
        let way = sets[set].iter().position(|record| record.start() == 0)?;
        let record = &sets[set][way];
        record.len.store(len, Relaxed);
        record.ticket.store(ticket.raw(), Relaxed);
        record.state.store(flags, Relaxed);
        record.start.store(start, Relaxed);
        Some((set * WAYS + way) as u32)
    }

    /// Removes the record of a block, if it has one.
    pub(in crate::gpu) fn remove(&self, start: usize) {
        if let Some((_, record)) = self.find(start) {
            record.start.store(0, Relaxed);
        }
    }

    pub(in crate::gpu) fn clear(&self) {
        self.for_each(&mut |record| record.start.store(0, Relaxed));
    }

    /// Calls `visit` with every record.
    pub(in crate::gpu) fn for_each(&self, visit: &mut dyn FnMut(&Record)) {
        let all = self.sets.get().into_iter().flat_map(|sets| sets.iter().flatten());
        all.filter(|record| record.start() != 0).for_each(visit);
    }

    pub(in crate::gpu) fn metadata_bytes(&self) -> usize {
        self.sets.get().map_or(0, |sets| size_of_val(&**sets))
    }
}

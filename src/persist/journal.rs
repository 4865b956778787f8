//! Records: how a change of many words becomes one.
//!
//! A transaction keeps what it will change to itself. To commit, its changes are written as one record with
//! a checksum into a *lane* of the log; once the record is safe they are applied in place. Recovery applies
//! the records it finds again; applying twice is the same as once.
//!
//! | durability | a record is safe | a lane is used again |
//! |---|---|---|
//! | process crash | when written: stores survive the process in program order | when its record was applied and cleared |
//! | DAX | when flushed and fenced | when the changes and the clearing were flushed |
//! | power | after one `fdatasync`, shared by all who wait for one | after the *next* `fdatasync`, which made the changes durable, too |
//!
//! Invariants
//! 1. Records that can be replayed together and touch the same word are replayed in the order in which they
//!    were applied: under process crash and DAX no two such records exist (the objects stay locked until the
//!    record is cleared); under power sequence numbers order them, and the next record names the number
//!    below which all is in place for good.
//! 2. What a transaction writes outside the log before it commits is reachable from nothing, and no record
//!    that can still be replayed writes to it. Under power that data and the record become durable in one
//!    sync, in any order, so the record carries checksums of the data; it counts only if they hold. Once a
//!    record of a later group exists that sync was complete, and they are not looked at any more.
//! 3. Nothing of a record is applied before the record is safe, and then all of it alone at the gate.
//! 4. Whether a record is still to be applied is said by those of the last group. So whoever clears the log clears
//!    them last, when all others are durably gone: an old record left alone would be applied over newer ones.

mod group;
mod ops;

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::format::{Checksum, Counter, Header, LANE_FIELDS, LANE_HEADER, LANE_SIZE, ShortHead};
use super::locks::TxId;
use super::media::Media;
use super::recover::Log;
use crate::base::error::{Error, Refusal, Result};
use crate::base::sync::{Condvar, Mutex};
use group::Group;
pub(crate) use ops::{Op, Ops, apply, bits_op, parse, sum_of, write_op};

/// A block outside the log that holds a body too large for a lane.
pub(crate) trait Overflow {
    /// Reserves a block of `len` bytes.
    fn reserve(&self, len: usize) -> Result<u64>;
    /// Gives it back.
    fn release(&self, offset: u64);
}

/// The checksum of a short record.
#[inline]
pub(crate) fn short_sum(identity: u64, lane: u32, head: u64, body: &[u64]) -> u64 {
    body.iter().fold(Checksum::new(identity ^ u64::from(lane)).add(head), |sum, &word| sum.add(word)).finish()
}

/// The checksum of a lane's header.
pub(crate) fn header_sum(identity: u64, lane: u32, words: &[u64; LANE_FIELDS]) -> u64 {
    Checksum::of(identity ^ u64::from(lane), words)
}

#[derive(Debug)]
struct Lane {
    at: u64,
    /// Of a shared lane: somebody has claimed it.
    busy: AtomicBool,
    sequence: AtomicU64,
}

/// Where a record is that is safe and not cleared yet.
#[derive(Debug)]
pub(crate) enum Safe {
    /// One word needs no record.
    None,
    /// In a lane, its body perhaps in a block of its own.
    Lane { number: u32, block: u64 },
}

/// The log of an open pool.
pub(crate) struct Journal {
    identity: u64,
    lanes: Box<[Lane]>,
    /// Of these, under process crash and DAX, each belongs to the transactions of one number, counted from 1.
    owned: u32,
    group: Mutex<Group>,
    wake: Condvar,
}

impl core::fmt::Debug for Journal {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Journal").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl Journal {
    /// The log of a recovered pool: every lane is empty.
    pub(crate) fn new(header: &Header) -> Self {
        let lane = |i| Lane { at: header.lane(i), busy: AtomicBool::new(false), sequence: AtomicU64::new(1) };
        Self {
            identity: header.identity,
            lanes: (0..header.lanes).map(lane).collect(),
            owned: header.lanes - header.lanes.div_ceil(8),
            group: Mutex::new(Group::new(header.lanes)),
            wake: Condvar::new(),
        }
    }

    /// Records committed since opening.
    pub(crate) fn records(&self) -> u64 {
        let alone: u64 = self.lanes.iter().map(|lane| lane.sequence.load(Ordering::Relaxed) - 1).sum();
        alone + self.lock().records()
    }

    /// Writes a record under process crash or DAX, after a fence behind what was written in place; when it returns,
    /// the record is safe.
    #[inline]
    pub(crate) fn write(
        &self,
        media: &Media,
        overflow: &dyn Overflow,
        id: TxId,
        body: &[u64],
    ) -> Result<Safe> {
        let number = self.claim(id);
        let lane = &self.lanes[number as usize];
        let sequence = lane.sequence.load(Ordering::Relaxed);
        let mut block = 0;
        let head = ShortHead { words: body.len() as u64, sequence };
        if let Some(head) = head.encode() {
            let sum = short_sum(self.identity, number, head, body);
            // SAFETY: the lane is ours until unclaimed.
            unsafe {
                media.store_words(lane.at + ShortHead::BODY, body);
                media.store_words(lane.at, &[sum, head]);
            }
            media.flush(lane.at, ShortHead::BODY as usize + body.len() * 8);
        } else {
            block = self.write_long(media, number, overflow, body)?;
        }
        lane.sequence.store(sequence + 1, Ordering::Relaxed);
        media.fence();
        Ok(Safe::Lane { number, block })
    }

    /// Writes a record that does not fit into its lane; returns the block of its body.
    #[cold]
    #[inline(never)]
    fn write_long(&self, media: &Media, number: u32, overflow: &dyn Overflow, body: &[u64]) -> Result<u64> {
        let lane = &self.lanes[number as usize];
        let sequence = lane.sequence.load(Ordering::Relaxed);
        match self.write_body(media, lane, overflow, body) {
            Ok((body_sum, block)) => {
                let bytes = body.len() as u64 * 8;
                self.write_header(media, number, [sequence, 0, body_sum, bytes, block, 0, 0, 0, 0, 0]);
                Ok(block)
            }
            Err(error) => {
                self.unclaim(number);
                Err(error)
            }
        }
    }

    /// Forgets a record that was applied. Returns the block that held its body, if any, to be released.
    #[inline]
    pub(crate) fn clear(&self, media: &Media, record: &Safe) -> Option<u64> {
        media.fence();
        let Safe::Lane { number, block } = *record else { return None };
        let lane = &self.lanes[number as usize];
        // SAFETY: the lane is ours until unclaimed.
        unsafe { media.store(lane.at + 8, 0) };
        media.flush(lane.at, 16);
        media.fence();
        self.unclaim(number);
        (block != 0).then_some(block)
    }

    /// A lane for this transaction alone: numbers are small and no two that are open have the same, so the first
    /// ones have lanes of their own.
    #[inline]
    fn claim(&self, id: TxId) -> u32 {
        if id <= self.owned { id - 1 } else { self.claim_shared() }
    }

    /// One of the lanes behind those.
    #[cold]
    fn claim_shared(&self) -> u32 {
        loop {
            for number in self.owned..self.lanes.len() as u32 {
                let busy = &self.lanes[number as usize].busy;
                if !busy.load(Ordering::Relaxed) && !busy.swap(true, Ordering::Acquire) {
                    return number;
                }
            }
            std::thread::yield_now();
        }
    }

    #[inline]
    fn unclaim(&self, number: u32) {
        if number >= self.owned {
            self.lanes[number as usize].busy.store(false, Ordering::Release);
        }
    }

    /// Writes a body into the lane or a block; returns its checksum and the block.
    #[inline]
    fn write_body(
        &self,
        media: &Media,
        lane: &Lane,
        overflow: &dyn Overflow,
        body: &[u64],
    ) -> Result<(u64, u64)> {
        let bytes = body.len() * 8;
        let block = if bytes as u64 <= LANE_SIZE - LANE_HEADER { 0 } else { overflow.reserve(bytes)? };
        let at = if block == 0 { lane.at + LANE_HEADER } else { block };
        // SAFETY: the lane or block is ours alone.
        unsafe { media.store_words(at, body) };
        media.flush(at, bytes);
        Ok((Checksum::of(self.identity, body), block))
    }

    /// Completes the record.
    #[inline]
    fn write_header(&self, media: &Media, number: u32, fields: [u64; LANE_FIELDS]) {
        let at = self.lanes[number as usize].at;
        let mut words = [0; 1 + LANE_FIELDS];
        words[0] = header_sum(self.identity, number, &fields);
        words[1..].copy_from_slice(&fields);
        // SAFETY: the lane is ours alone.
        unsafe { media.store_words(at, &words) };
        media.flush(at, LANE_HEADER as usize);
    }
}

/// Puts what the log holds in place: the records, and the counters as they were with the last.
///
/// # Safety
/// Nobody else uses the file, or the mapping is private.
pub(crate) unsafe fn replay(media: &Media, log: &Log) {
    for record in &log.records {
        // SAFETY: `read_log` checked that the operations lie in the file; the caller's contract.
        unsafe { apply(media, &record.body) };
    }
    let at = Counter::Transactions.at();
    if let Some(counters) = log.counters
        && counters[0] >= media.load(at)
    {
        // SAFETY: the caller's contract.
        unsafe { media.store_words(at, &counters) };
        media.flush(at, size_of_val(&counters));
    }
}

/// Clears the lanes at those offsets, durably: the `last` ones when the others are gone for good.
///
/// # Safety
/// Nobody else writes to them, and nobody needs their records.
pub(crate) unsafe fn clear_lanes(
    media: &Media,
    earlier: impl Iterator<Item = u64>,
    last: impl Iterator<Item = u64>,
) -> Result<()> {
    let clear = |lane: u64| {
        // SAFETY: the caller's contract.
        unsafe { media.store(lane + 8, 0) };
        media.flush(lane, 16);
    };
    earlier.for_each(clear);
    media.fence();
    media.sync()?;
    last.for_each(clear);
    media.fence();
    media.sync()
}

/// The error of a transaction that would wait for itself.
#[cold]
pub(crate) fn conflict() -> Error {
    Error::InvalidOperation(Refusal::Conflict)
}

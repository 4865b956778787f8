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

use std::sync::{Condvar, Mutex, MutexGuard};

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::format::{BITMAP_WORDS, Checksum, Header, LANE_HEADER, LANE_SIZE};
use super::gate::Gate;
use super::inner::Books;
use super::locks::TxId;
use super::media::Media;
use super::recover::Words;
use crate::base::error::{Error, Refusal, Result};

/// Operations of a record, encoded.
#[derive(Debug, Default)]
pub(crate) struct Ops {
    words: Vec<u64>,
    count: usize,
    /// Where the last operation begins.
    last: usize,
}

/// One operation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Op<'a> {
    Set { at: u64, value: u64 },
    SetBits { at: u64, mask: u64 },
    ClearBits { at: u64, mask: u64 },
    Write { at: u64, words: &'a [u64] },
    Entry { at: u64, bitmap: u64, word: u64, fingerprint: u64 },
    Check { at: u64, len: u64, sum: u64 },
}

/// Bytes that one check covers at most.
const CHECKED: u64 = 1 << 30;

impl Ops {
    /// `words` are kind, place and operands.
    #[inline]
    fn push<const N: usize>(&mut self, words: [u64; N]) {
        self.count += 1;
        self.last = self.words.len();
        self.words.extend_from_slice(&words);
    }

    #[inline]
    pub(crate) fn set(&mut self, at: u64, value: u64) {
        self.push([1, at, value]);
    }

    #[inline]
    pub(crate) fn set_bits(&mut self, at: u64, mask: u64) {
        self.bits(2, at, mask);
    }

    #[inline]
    pub(crate) fn clear_bits(&mut self, at: u64, mask: u64) {
        self.bits(3, at, mask);
    }

    /// Neighbours are often set or cleared together.
    #[inline]
    fn bits(&mut self, kind: u64, at: u64, mask: u64) {
        match self.words.get_mut(self.last..) {
            Some([last, place, bits]) if (*last, *place) == (kind, at) => *bits |= mask,
            _ => self.push([kind, at, mask]),
        }
    }

    #[inline]
    pub(crate) fn write(&mut self, at: u64, words: &[u64]) {
        let kind = 4 | (words.len() as u64 * 8) << 32;
        match *words {
            [value] => self.set(at, value),
            [first, second] => self.push([kind, at, first, second]),
            _ => {
                self.push([kind, at]);
                self.words.extend_from_slice(words);
            }
        }
    }

    /// Sets a table entry, and clears the bitmap with it, unless it is set already.
    pub(crate) fn entry(&mut self, at: u64, bitmap: u64, word: u64, fingerprint: u64) {
        self.push([5, at, bitmap, word, fingerprint]);
    }

    /// Makes the record depend on words that were written in place.
    pub(crate) fn check(&mut self, media: &Media, mut at: u64, mut len: u64) {
        while len > 0 {
            let piece = len.min(CHECKED);
            self.push([6 | piece << 32, at, sum_of(media, at, piece)]);
            (at, len) = (at + piece, len - piece);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.words.clear();
        (self.count, self.last) = (0, 0);
    }

    /// The encoded operations.
    pub(crate) fn body(&self) -> &[u64] {
        &self.words
    }

    /// Whether it is one word, which changes whole or not at all.
    fn is_one_word(&self) -> bool {
        self.count == 1 && self.words.first().is_some_and(|kind| *kind <= 3)
    }
}

/// The operations in a body; `None` behind a malformed one.
pub(crate) fn parse(mut body: &[u64]) -> impl Iterator<Item = Option<Op<'_>>> {
    core::iter::from_fn(move || {
        let (&head, rest) = body.split_first()?;
        let step = || {
            let (&at, rest) = rest.split_first()?;
            let bytes = head >> 32;
            let operands = match head & 0xFFFF_FFFF {
                1..=3 if bytes == 0 => 1,
                4 if bytes > 0 && bytes % 8 == 0 => (bytes / 8) as usize,
                5 if bytes == 0 => 3,
                6 if bytes > 0 && bytes % 8 == 0 => 1,
                _ => return None,
            };
            let (words, rest) = rest.split_at_checked(operands)?;
            let op = match (head & 0xFFFF_FFFF, words) {
                (1, &[value]) => Op::Set { at, value },
                (2, &[mask]) => Op::SetBits { at, mask },
                (3, &[mask]) => Op::ClearBits { at, mask },
                (6, &[sum]) => Op::Check { at, len: bytes, sum },
                (5, &[bitmap, word, fingerprint]) => Op::Entry { at, bitmap, word, fingerprint },
                (_, words) => Op::Write { at, words },
            };
            Some((op, rest))
        };
        match step() {
            Some((op, rest)) => {
                body = rest;
                Some(Some(op))
            }
            None => {
                body = &[];
                Some(None)
            }
        }
    })
}

/// Applies the operations of a body that was made here or checked.
///
/// # Safety
/// Nobody else reads through references, or writes, what they change.
#[inline]
pub(crate) unsafe fn apply(media: &Media, body: &[u64]) {
    let mut rest = body;
    while let [kind, at, operands @ ..] = rest {
        // SAFETY: the caller's contract.
        let taken = unsafe { apply_one(media, *kind, *at, operands) };
        rest = &operands[taken..];
    }
}

/// Applies one operation; returns the number of its operands.
///
/// # Safety
/// As for [`apply`].
#[inline(always)]
unsafe fn apply_one(media: &Media, kind: u64, at: u64, operands: &[u64]) -> usize {
    if let (1..=3, [operand, ..]) = (kind, operands) {
        let value = match kind {
            1 => *operand,
            2 => media.load(at) | operand,
            _ => media.load(at) & !operand,
        };
        // SAFETY: the caller's contract.
        unsafe { media.store(at, value) };
        media.flush(at, 8);
        return 1;
    }
    let words = (kind >> 35) as usize;
    if kind as u32 == 4 {
        // SAFETY: the caller's contract.
        unsafe { media.store_words(at, &operands[..words]) };
        media.flush(at, words * 8);
        return words;
    }
    if let (5, &[bitmap, word, fingerprint, ..]) = (kind, operands) {
        // SAFETY: the caller's contract.
        unsafe { apply_entry(media, at, bitmap, [word, fingerprint]) };
        return 3;
    }
    // A check changes nothing.
    1
}

/// # Safety
/// As for [`apply`].
#[cold]
unsafe fn apply_entry(media: &Media, at: u64, bitmap: u64, entry: [u64; 2]) {
    if media.load_pair(at) == entry {
        return;
    }
    // SAFETY: the caller's contract.
    unsafe {
        media.store_words(bitmap, &[0; BITMAP_WORDS]);
        media.store(at + 8, entry[1]);
        media.store(at, entry[0]);
    }
    media.flush(bitmap, BITMAP_WORDS * 8);
    media.flush(at, 16);
}

/// The checksum of `len` bytes at `at`, both multiples of 8.
pub(crate) fn sum_of(words: &impl Words, mut at: u64, mut len: u64) -> u64 {
    let mut piece = [0; 64];
    let mut sum = Checksum::new(at);
    while len > 0 {
        let count = (len / 8).min(64) as usize;
        words.read(at, &mut piece[..count]);
        sum = piece[..count].iter().fold(sum, |sum, &word| sum.add(word));
        (at, len) = (at + count as u64 * 8, len - count as u64 * 8);
    }
    sum.finish()
}

/// A block outside the log that holds a body too large for a lane.
pub(crate) trait Overflow {
    /// Reserves a block of `len` bytes.
    fn reserve(&self, len: usize) -> Result<u64>;
    /// Gives it back.
    fn release(&self, offset: u64);
}

/// The checksum of a lane's header.
pub(crate) fn header_sum(identity: u64, lane: u32, words: &[u64; 6]) -> u64 {
    Checksum::of(identity ^ u64::from(lane), words)
}

#[derive(Debug)]
struct Lane {
    at: u64,
    /// Of a shared lane: somebody has claimed it.
    busy: AtomicBool,
    sequence: AtomicU64,
}

/// A record that waits for its sync.
struct Waiting {
    ticket: u64,
    lane: u32,
    body: Vec<u64>,
    body_sum: u64,
    overflow: u64,
}

#[derive(Default)]
struct Group {
    sequence: u64,
    /// Up to here every record is in place for good.
    settled: u64,
    free: Vec<u32>,
    waiting: Vec<Waiting>,
    /// Lanes and overflow blocks of records applied since the last sync began.
    applied: Vec<(u32, u64)>,
    leading: bool,
    next_ticket: u64,
    /// Tickets below this one were served.
    served: u64,
    spare: Vec<Vec<u64>>,
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
            group: Mutex::new(Group {
                sequence: 1,
                free: (0..header.lanes).rev().collect(),
                ..Group::default()
            }),
            wake: Condvar::new(),
        }
    }

    /// Records committed since opening.
    pub(crate) fn records(&self) -> u64 {
        let alone: u64 = self.lanes.iter().map(|lane| lane.sequence.load(Ordering::Relaxed) - 1).sum();
        alone + self.lock().sequence - 1
    }

    /// Writes a record under process crash or DAX; when it returns, the record is safe. [`Safe::None`] where
    /// the operations need none.
    #[inline]
    pub(crate) fn write(&self, media: &Media, overflow: &dyn Overflow, id: TxId, ops: &Ops) -> Result<Safe> {
        media.check_usable()?;
        // What was written in place comes before what makes it reachable.
        media.fence();
        if ops.is_one_word() {
            return Ok(Safe::None);
        }
        let number = self.claim(id);
        let lane = &self.lanes[number as usize];
        match self.write_body(media, lane, overflow, &ops.words) {
            Ok((body_sum, block)) => {
                let sequence = lane.sequence.load(Ordering::Relaxed);
                lane.sequence.store(sequence + 1, Ordering::Relaxed);
                let bytes = ops.words.len() as u64 * 8;
                self.write_header(media, number, [sequence, 0, body_sum, bytes, block, 0]);
                media.fence();
                Ok(Safe::Lane { number, block })
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
    fn write_header(&self, media: &Media, number: u32, words: [u64; 6]) {
        let [sequence, settled, body_sum, bytes, block, group] = words;
        let sum = header_sum(self.identity, number, &words);
        let at = self.lanes[number as usize].at;
        // SAFETY: the lane is ours alone.
        unsafe { media.store_words(at, &[sum, sequence, settled, body_sum, bytes, block, group]) };
        media.flush(at, LANE_HEADER as usize);
    }

    fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'a>(&self, group: MutexGuard<'a, Group>) -> MutexGuard<'a, Group> {
        self.wake.wait(group).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Makes the operations happen under power, all or none; on return they have and are durable. `ops` is
    /// empty afterwards.
    ///
    /// # Safety
    /// The operations lie in the file, and what they change is locked by the caller, so that only readers
    /// inside the gate look at it.
    pub(crate) unsafe fn commit(
        &self,
        media: &Media,
        gate: &Gate<Books>,
        overflow: &dyn Overflow,
        ops: &mut Ops,
    ) -> Result<()> {
        media.check_usable()?;
        let mut group = self.lock();
        let lane = loop {
            if let Some(lane) = group.free.pop() {
                break lane;
            }
            // All lanes wait for the sync that makes their changes durable.
            group = if group.leading { self.wait(group) } else { self.lead(group, media, gate, overflow) };
            media.check_usable()?;
        };
        drop(group);
        let written = self.write_body(media, &self.lanes[lane as usize], overflow, &ops.words);
        let mut group = self.lock();
        let (body_sum, block) = match written {
            Ok(written) => written,
            Err(error) => {
                group.free.push(lane);
                return Err(error);
            }
        };
        let ticket = group.next_ticket;
        group.next_ticket += 1;
        let spare = group.spare.pop().unwrap_or_default();
        let body = core::mem::replace(&mut ops.words, spare);
        ops.clear();
        group.waiting.push(Waiting { ticket, lane, body, body_sum, overflow: block });
        while group.served <= ticket {
            group = if group.leading { self.wait(group) } else { self.lead(group, media, gate, overflow) };
            if group.served <= ticket {
                media.check_usable()?;
            }
        }
        Ok(())
    }

    /// Syncs for all that wait, and applies their records.
    fn lead<'a>(
        &'a self,
        mut group: MutexGuard<'a, Group>,
        media: &Media,
        gate: &Gate<Books>,
        overflow: &dyn Overflow,
    ) -> MutexGuard<'a, Group> {
        group.leading = true;
        let batch = core::mem::take(&mut group.waiting);
        let before = core::mem::take(&mut group.applied);
        let (first, settled) = (group.sequence, group.settled);
        group.sequence += batch.len() as u64;
        drop(group);
        for (i, record) in batch.iter().enumerate() {
            let bytes = record.body.len() as u64 * 8;
            let words = [first + i as u64, settled, record.body_sum, bytes, record.overflow, first];
            self.write_header(media, record.lane, words);
        }
        let synced = media.sync();
        if synced.is_ok() {
            let alone = gate.alone();
            for record in &batch {
                // SAFETY: every committer of the batch locked what its record changes and waits for us; the
                // gate keeps readers out.
                unsafe { apply(media, &record.body) };
            }
            drop(alone);
        }
        let mut group = self.lock();
        group.leading = false;
        if synced.is_ok() {
            group.settled = first - 1;
            for (lane, block) in before {
                group.free.push(lane);
                if block != 0 {
                    overflow.release(block);
                }
            }
            for mut record in batch {
                group.served = record.ticket + 1;
                group.applied.push((record.lane, record.overflow));
                record.body.clear();
                group.spare.push(record.body);
            }
        }
        // After a failure the pool is poisoned; those who wait find that out themselves.
        self.wake.notify_all();
        group
    }

    /// Makes every record that was applied durable in place, and clears the log: by invariant 4 the records of the
    /// last group after all others.
    pub(crate) fn settle(&self, media: &Media, overflow: &dyn Overflow) -> Result<()> {
        let mut group = self.lock();
        while group.leading {
            group = self.wait(group);
        }
        media.sync()?;
        if group.applied.is_empty() {
            return Ok(());
        }
        group.settled = group.sequence - 1;
        let last = core::mem::take(&mut group.applied);
        let earlier = group.free.iter().map(|&lane| self.lanes[lane as usize].at);
        // SAFETY: applied and durable, so nobody needs the records; nobody leads.
        unsafe { clear_lanes(media, earlier, last.iter().map(|&(lane, _)| self.lanes[lane as usize].at))? };
        for (lane, block) in last {
            group.free.push(lane);
            if block != 0 {
                overflow.release(block);
            }
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_parse_back_and_cut_ones_end_in_none() {
        let mut ops = Ops::default();
        ops.set(8, 1);
        ops.set_bits(16, 2);
        ops.clear_bits(24, 3);
        ops.write(32, &[4, 5, 6]);
        ops.entry(64, 72, 7, 8);
        ops.push([6 | 16 << 32, 80, 9]);
        let all: Vec<_> = parse(&ops.words).collect();
        assert_eq!(all.len(), ops.count);
        assert_eq!(all[3], Some(Op::Write { at: 32, words: &[4, 5, 6] }));
        assert!(all.iter().all(Option::is_some));
        for cut in 1..ops.words.len() {
            let parsed: Vec<_> = parse(&ops.words[..cut]).collect();
            assert!(parsed.iter().rev().skip(1).all(Option::is_some), "{cut}");
        }
        assert_eq!(parse(&[9, 9, 9]).collect::<Vec<_>>(), [None]);
    }
}

//! The blocks that one stream freed and may have again at once.

use std::sync::Arc;

use super::super::ranges::CLEAN;
use super::super::seat::Seat;
use super::bits;
use crate::base::stats::HISTOGRAM_BUCKETS;
use crate::base::sync::atomic::{AtomicI32, AtomicUsize, Ordering::Relaxed};
use crate::base::turn::Turn;

/// Bins by a hash of the size.
const BINS: usize = 64;
/// What a block that is asked for again is worth, against those that are given up.
const HIT: i32 = 2;
/// A bin gains no more credit than this, and loses no more.
const MOST_CREDIT: i32 = 32;
const LEAST_CREDIT: i32 = -16;
/// Most blocks in a bin.
pub(super) const DEPTH: usize = 8;
/// Most spare seats.
const SEATS: usize = 32;

/// A cached block: the number of its record, and its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) record: u32,
    pub(super) granules: u32,
}

/// Blocks of a few sizes, the oldest first.
#[derive(Clone, Copy, Debug, Default)]
struct Bin {
    count: usize,
    entries: [Entry; DEPTH],
}

impl Bin {
    #[inline]
    fn remove(&mut self, at: usize) -> Entry {
        let entry = self.entries[at];
        self.count -= 1;
        if at != self.count {
            self.entries.copy_within(at + 1..=self.count, at);
        }
        entry
    }
}

/// What requests that a cache served add up to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Served {
    pub(super) allocations: u64,
    pub(super) frees: u64,
    pub(super) bytes: u64,
    pub(super) histogram: [u64; HISTOGRAM_BUCKETS],
}

/// What a cache holds.
#[derive(Debug)]
pub(in crate::gpu) struct Bins {
    /// Whether blocks may be put in and taken out without the pool's lock.
    pub(super) open: bool,
    /// The lane of the stream, while the cache is open.
    pub(super) lane: u16,
    pub(super) served: Served,
    /// Spare ones for buffers, all alike; none in a cache that is shut. They lie here, so that no two caches write to
    /// one line of the processor's.
    seats: [Option<Arc<Seat>>; SEATS],
    /// How many of them there are, from the first.
    spare: usize,
    /// Where to look next for something to give up.
    hand: usize,
    /// Which bins hold blocks, and which may hold large ones.
    filled: u64,
    large: u64,
    /// Granules from which on a block is large.
    large_from: u32,
    bins: [Bin; BINS],
}

const _: () = assert!(BINS == u64::BITS as usize);

fn bin_of(granules: u32) -> usize {
    (granules.wrapping_mul(0x9E37_79B1) >> (u32::BITS - BINS.ilog2())) as usize
}

impl Bins {
    /// A seat, of which one stays here for those who come when there are no spare ones.
    #[inline]
    pub(in crate::gpu) fn seat(&mut self) -> Option<Arc<Seat>> {
        if self.spare > 1 {
            self.spare -= 1;
            return self.seats[self.spare].take();
        }
        self.seats[0].clone()
    }

    /// Keeps a seat, or gives it back where there is no room or the cache is shut.
    #[inline]
    pub(in crate::gpu) fn keep_seat(&mut self, seat: Arc<Seat>) -> Option<Arc<Seat>> {
        match self.seats.get_mut(self.spare) {
            Some(place) if self.open => {
                self.spare += 1;
                // The place is empty.
                place.replace(seat)
            }
            _ => Some(seat),
        }
    }

    /// Shuts the cache, which is empty; the seats are to be dropped with no lock held.
    pub(super) fn shut(&mut self) -> Vec<Arc<Seat>> {
        self.open = false;
        self.spare = 0;
        self.seats.iter_mut().filter_map(Option::take).collect()
    }

    /// The youngest block of this size that `fits`; it is taken out.
    #[inline(always)]
    pub(super) fn pop(&mut self, granules: u32, fits: impl Fn(u32) -> bool) -> Option<Entry> {
        let at = bin_of(granules);
        let bin = &self.bins[at];
        let fitting = |entry: &Entry| entry.granules == granules && fits(entry.record);
        let place = bin.entries[..bin.count].iter().rposition(fitting)?;
        Some(self.remove(at, place))
    }

    #[inline]
    fn remove(&mut self, at: usize, place: usize) -> Entry {
        let entry = self.bins[at].remove(place);
        if self.bins[at].count == 0 {
            self.filled &= !(1 << at);
            self.large &= !(1 << at);
        }
        entry
    }

    /// Puts a block in; false where its bin is full.
    #[inline]
    pub(super) fn push(&mut self, entry: Entry) -> bool {
        let at = bin_of(entry.granules);
        let bin = &mut self.bins[at];
        let room = bin.count < DEPTH;
        if room {
            bin.entries[bin.count] = entry;
            bin.count += 1;
            self.filled |= 1 << at;
            self.large |= u64::from(entry.granules >= self.large_from) << at;
        }
        room
    }

    /// Takes out the oldest block of the bin that a size falls in.
    pub(super) fn pop_oldest(&mut self, granules: u32) -> Option<Entry> {
        let at = bin_of(granules);
        (self.bins[at].count != 0).then(|| self.remove(at, 0))
    }

    /// Takes out some block, bin by bin.
    pub(super) fn pop_any(&mut self) -> Option<Entry> {
        let behind = self.filled & (!0 << self.hand);
        let from = if behind != 0 { behind } else { self.filled };
        (from != 0).then(|| {
            self.hand = from.trailing_zeros() as usize;
            self.remove(self.hand, 0)
        })
    }

    /// Takes out the large blocks.
    pub(super) fn extract_large(&mut self, out: &mut dyn FnMut(Entry)) {
        for at in bits(std::mem::take(&mut self.large)) {
            let mut place = 0;
            while place < self.bins[at].count {
                if self.bins[at].entries[place].granules >= self.large_from {
                    out(self.remove(at, place));
                } else {
                    place += 1;
                }
            }
        }
    }

    /// All blocks, by bin.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.bins.iter().flat_map(|bin| bin.entries[..bin.count].iter().copied())
    }
}

/// The cache of one stream, or of the CPU.
#[derive(Debug)]
#[repr(align(128))]
pub(in crate::gpu) struct Cache {
    pub(in crate::gpu) bins: Turn<Bins>,
    /// How much more often the blocks of a bin were asked for than given up, within bounds. Changed without care for
    /// others: a count that is lost changes what is cached, and nothing else.
    credit: [AtomicI32; BINS],
    /// Bytes cached; changes while `bins` is locked.
    bytes: AtomicUsize,
    blocks: AtomicUsize,
    /// The least that `bytes` was since [`settle_low`](Self::settle_low).
    low: AtomicUsize,
}

impl Cache {
    /// A cache for blocks of which those from `large_from` granules on are large.
    pub(super) fn new(large_from: u32) -> Self {
        let bins = Bins {
            open: false,
            lane: CLEAN,
            served: Served::default(),
            seats: [const { None }; SEATS],
            spare: 0,
            hand: 0,
            filled: 0,
            large: 0,
            large_from,
            bins: [Bin::default(); BINS],
        };
        Self {
            bins: Turn::new(bins),
            credit: std::array::from_fn(|_| AtomicI32::new(0)),
            bytes: AtomicUsize::new(0),
            blocks: AtomicUsize::new(0),
            low: AtomicUsize::new(0),
        }
    }

    /// A block of this size was asked for again.
    #[inline]
    pub(super) fn asked_again(&self, granules: u32) {
        let credit = &self.credit[bin_of(granules)];
        credit.store((credit.load(Relaxed) + HIT).min(MOST_CREDIT), Relaxed);
    }

    /// A block of this size was given up for others to use.
    pub(super) fn given_up(&self, granules: u32) {
        let credit = &self.credit[bin_of(granules)];
        let before = credit.load(Relaxed);
        credit.store(if before > 0 { before - 1 } else { LEAST_CREDIT }, Relaxed);
    }

    /// Whether blocks of this size are asked for again before they are given up; from time to time one is let in to
    /// find out.
    #[inline]
    pub(super) fn is_worth(&self, granules: u32) -> bool {
        let credit = &self.credit[bin_of(granules)];
        let before = credit.load(Relaxed);
        if before < 0 {
            credit.store(before + 1, Relaxed);
        }
        before >= -1
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    pub(in crate::gpu) fn blocks(&self) -> usize {
        self.blocks.load(Relaxed)
    }

    pub(super) fn low(&self) -> usize {
        self.low.load(Relaxed)
    }

    /// A block was put in.
    #[inline]
    pub(super) fn more(&self, len: usize) {
        self.bytes.store(self.bytes() + len, Relaxed);
        self.blocks.store(self.blocks() + 1, Relaxed);
    }

    /// A block was taken out.
    #[inline]
    pub(super) fn less(&self, len: usize) {
        let bytes = self.bytes() - len;
        self.bytes.store(bytes, Relaxed);
        self.blocks.store(self.blocks() - 1, Relaxed);
        if bytes < self.low() {
            self.low.store(bytes, Relaxed);
        }
    }

    /// Begins anew to look for the least.
    pub(super) fn settle_low(&self) {
        self.low.store(self.bytes(), Relaxed);
    }
}

//! The blocks that one stream freed and may have again at once.

use std::sync::Arc;

use super::super::ranges::CLEAN;
use super::super::seat::Seat;
use super::records::{Record, Records};
use super::sizes::{Filled, Place, SETS, Sizes};
use crate::base::stats::HISTOGRAM_BUCKETS;
use crate::base::sync::atomic::{AtomicI32, AtomicUsize, Ordering::Relaxed};
use crate::base::turn::Turn;

/// What a block that is asked for again is worth, against those that are given up.
const HIT: i32 = 2;
/// A set gains no more credit than this, and loses no more.
const MOST_CREDIT: i32 = 32;
const LEAST_CREDIT: i32 = -16;
/// So many blocks of other sizes give way to one that has no place.
const GIVE_WAY: usize = 4;
/// Most spare seats.
const SEATS: usize = 32;

/// What requests that a cache served add up to.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::gpu) struct Served {
    /// Blocks that came in and went back to the books.
    pub(super) returned: u64,
    pub(super) bytes: u64,
    pub(super) histogram: [u64; HISTOGRAM_BUCKETS],
}

impl Served {
    pub(in crate::gpu) fn allocations(&self) -> u64 {
        self.histogram.iter().sum()
    }
}

/// What the turn of a cache guards.
#[derive(Debug)]
pub(in crate::gpu) struct Guarded {
    /// Whether blocks may be put in and taken out without the pool's lock.
    pub(super) open: bool,
    /// The lane of the stream, while the cache is open.
    pub(super) lane: u16,
    pub(in crate::gpu) served: Served,
    /// Spare ones for buffers, all alike; none in a cache that is shut. They lie here, so that no two caches write to
    /// one line of the processor's.
    seats: [Option<Arc<Seat>>; SEATS],
    /// How many of them there are, from the first.
    spare: usize,
    /// Where to look next for something to give up.
    hand: usize,
    filled: Filled,
}

impl Guarded {
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
}

/// The cache of one stream, or of the CPU.
#[derive(Debug)]
#[repr(align(128))]
pub(in crate::gpu) struct Cache {
    pub(in crate::gpu) turn: Turn<Guarded>,
    /// Changes while `turn` is held.
    sizes: Sizes,
    /// How much more often the blocks of a set were asked for than given up, within bounds. Changed without care for
    /// others: a count that is lost changes what is cached, and nothing else.
    credit: [AtomicI32; SETS],
    /// Bytes cached; changes while `turn` is held.
    bytes: AtomicUsize,
    blocks: AtomicUsize,
    /// The least that `bytes` was since [`settle_low`](Self::settle_low).
    low: AtomicUsize,
}

impl Cache {
    /// A cache for blocks of which those from `large_from` granules on are large.
    pub(super) fn new(large_from: u32) -> Self {
        let inside = Guarded {
            open: false,
            lane: CLEAN,
            served: Served::default(),
            seats: [const { None }; SEATS],
            spare: 0,
            hand: 0,
            filled: Filled::default(),
        };
        Self {
            turn: Turn::new(inside),
            sizes: Sizes::new(large_from),
            credit: std::array::from_fn(|_| AtomicI32::new(0)),
            bytes: AtomicUsize::new(0),
            blocks: AtomicUsize::new(0),
            low: AtomicUsize::new(0),
        }
    }

    /// Where a block of this size lies, if there is one. Asked without the turn, before it is taken: most requests that
    /// no cache serves need not take it.
    #[inline(always)]
    pub(super) fn look(&self, granules: u32) -> Option<Place> {
        self.sizes.find(granules).filter(|&place| self.sizes.any(place))
    }

    /// Takes out the youngest block at a place of which the address has none of the bits of `mask`.
    #[inline(always)]
    pub(super) fn pop<'a>(
        &self,
        _inside: &mut Guarded,
        place: Place,
        records: &'a Records,
        mask: usize,
    ) -> Option<&'a Record> {
        let record = self.sizes.pop(place, records, mask)?;
        self.less(record.len());
        // It was asked for again.
        let credit = &self.credit[place.set];
        credit.store((credit.load(Relaxed) + HIT).min(MOST_CREDIT), Relaxed);
        Some(record)
    }

    /// Puts a block in; false where there is no place for its size.
    #[inline(always)]
    pub(super) fn push(&self, inside: &mut Guarded, granules: u32, number: u32, record: &Record) -> bool {
        let Some(place) = self.sizes.find(granules) else { return false };
        self.sizes.push(&mut inside.filled, place, number, record);
        self.more(record.len());
        true
    }

    /// Makes a place for blocks of this size; what has to give way goes to `out`. False where that is not enough.
    pub(super) fn make_place(
        &self,
        inside: &mut Guarded,
        granules: u32,
        records: &Records,
        out: &mut dyn FnMut(&Record),
    ) -> bool {
        if self.sizes.claim(granules).is_some() {
            return true;
        }
        let set = self.sizes.set_of(granules);
        inside.hand += 1;
        for _ in 0..GIVE_WAY {
            if let Some(record) = self.sizes.pop_of(set, inside.hand, records) {
                self.less(record.len());
                inside.served.returned += 1;
                self.given_up_of(set);
                out(record);
            }
            if self.sizes.claim(granules).is_some() {
                return true;
            }
        }
        false
    }

    /// Takes out some block, for others to use.
    pub(super) fn pop_any<'a>(&self, inside: &mut Guarded, records: &'a Records) -> Option<&'a Record> {
        let record = self.sizes.pop_any(&mut inside.filled, &mut inside.hand, records)?;
        self.less(record.len());
        inside.served.returned += 1;
        Some(record)
    }

    /// Takes out all blocks of at least so many granules.
    pub(super) fn drain(
        &self,
        inside: &mut Guarded,
        records: &Records,
        least: u32,
        out: &mut dyn FnMut(&Record),
    ) {
        let Guarded { filled, served, .. } = inside;
        self.sizes.drain(filled, records, least, &mut |record| {
            self.less(record.len());
            served.returned += 1;
            out(record);
        });
    }

    /// Forgets all blocks, and that any were freed but those that were allocated.
    pub(super) fn forget(&self, inside: &mut Guarded, records: &Records) {
        self.drain(inside, records, 0, &mut |_| ());
        inside.served.returned = 0;
    }

    /// A block of this size was given up for others to use.
    pub(super) fn given_up(&self, granules: u32) {
        self.given_up_of(self.sizes.set_of(granules));
    }

    fn given_up_of(&self, set: usize) {
        let credit = &self.credit[set];
        let before = credit.load(Relaxed);
        credit.store(if before > 0 { before - 1 } else { LEAST_CREDIT }, Relaxed);
    }

    /// Whether blocks of this size are asked for again before they are given up; from time to time one is let in to
    /// find out.
    #[inline]
    pub(super) fn is_worth(&self, granules: u32) -> bool {
        let credit = &self.credit[self.sizes.set_of(granules)];
        let before = credit.load(Relaxed);
        if before < 0 {
            credit.store(before + 1, Relaxed);
        }
        before >= -1
    }

    /// The size of every chain, with the number of its youngest block; the cache is locked.
    pub(super) fn chains(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.sizes.chains()
    }

    #[inline]
    pub(in crate::gpu) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    #[inline]
    pub(in crate::gpu) fn blocks(&self) -> usize {
        self.blocks.load(Relaxed)
    }

    #[inline]
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

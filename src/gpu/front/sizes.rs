//! Which blocks a cache holds of which size: a chain of them for each size, through their records.
//!
//! ```text
//!   size ─► set, by a hash of the size ─► way of that very size ─► youngest block ─► … ─► oldest
//! ```
//! Large sizes have sets of their own, so that they can be given back without a look at the small ones. A chain takes no
//! memory but its way, and has no end of its own.
//!
//! Invariants
//! 1. Changed only while the turn of the cache is held (`Filled` is what it guards). Who looks without it finds what may
//!    be true no more, and looks again with it.
//! 2. The chain of a way holds blocks of its size, which are `CACHED`; a way changes its size only while its chain is
//!    empty.
//! 3. The bit of a set is set in `Filled` if one of its chains is not empty.

use super::bits;
use super::records::{NONE, Record, Records};
use crate::base::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Sets for small sizes, then those for large ones, each a power of two.
const SMALL_SETS: usize = 128;
const LARGE_SETS: usize = 64;
/// Sizes in a set.
const WAYS: usize = 4;
pub(super) const SETS: usize = SMALL_SETS + LARGE_SETS;
const WORD: usize = u64::BITS as usize;
/// The bits of the small sets fill words of their own.
const SMALL_WORDS: usize = SMALL_SETS / WORD;

/// Which sets hold blocks.
pub(super) type Filled = [u64; SETS.div_ceil(WORD)];

/// Where the blocks of a size lie.
#[derive(Clone, Copy, Debug)]
pub(in crate::gpu) struct Place {
    pub(super) set: usize,
    way: usize,
    granules: u32,
}

/// Some sizes, 0 where there is none, and the numbers of their youngest blocks' records.
#[derive(Debug)]
#[repr(align(32))]
struct Set {
    sizes: [AtomicU32; WAYS],
    chains: [AtomicU32; WAYS],
}

#[derive(Debug)]
pub(super) struct Sizes {
    sets: [Set; SETS],
    /// Granules from which on a size is large.
    large_from: u32,
}

impl Sizes {
    pub(super) fn new(large_from: u32) -> Self {
        let set = |_| Set {
            sizes: std::array::from_fn(|_| AtomicU32::new(0)),
            chains: std::array::from_fn(|_| AtomicU32::new(NONE)),
        };
        Self { sets: std::array::from_fn(set), large_from }
    }

    #[inline(always)]
    pub(super) fn set_of(&self, granules: u32) -> usize {
        let hash = granules.wrapping_mul(0x9E37_79B1);
        if granules < self.large_from {
            (hash >> (u32::BITS - SMALL_SETS.ilog2())) as usize
        } else {
            SMALL_SETS + (hash >> (u32::BITS - LARGE_SETS.ilog2())) as usize
        }
    }

    /// Where blocks of this size lie, or may be put.
    #[inline(always)]
    pub(super) fn find(&self, granules: u32) -> Option<Place> {
        let set = self.set_of(granules);
        let way = self.sets[set].sizes.iter().position(|size| size.load(Relaxed) == granules)?;
        Some(Place { set, way, granules })
    }

    /// Whether there are blocks at a place.
    #[inline(always)]
    pub(super) fn any(&self, place: Place) -> bool {
        self.sets[place.set].chains[place.way].load(Relaxed) != NONE
    }

    /// Takes out the youngest block at a place of which the address has none of the bits of `mask`.
    #[inline(always)]
    pub(super) fn pop<'a>(&self, place: Place, records: &'a Records, mask: usize) -> Option<&'a Record> {
        let set = &self.sets[place.set];
        // Since the place was found it may have become another size's.
        if set.sizes[place.way].load(Relaxed) != place.granules {
            return None;
        }
        let chain = &set.chains[place.way];
        let record = records.get(chain.load(Relaxed))?;
        if record.start() & mask != 0 {
            return Self::pop_further(record, records, mask);
        }
        chain.store(record.leave(), Relaxed);
        Some(record)
    }

    /// Takes out one of the next few blocks behind one that does not fit.
    #[cold]
    fn pop_further<'a>(mut before: &'a Record, records: &'a Records, mask: usize) -> Option<&'a Record> {
        const LOOKS: usize = 7;
        for _ in 0..LOOKS {
            let record = records.get(before.next())?;
            if record.start() & mask == 0 {
                before.set_next(record.leave());
                return Some(record);
            }
            before = record;
        }
        None
    }

    /// Puts a block in as the youngest of a place.
    #[inline(always)]
    pub(super) fn push(&self, filled: &mut Filled, place: Place, number: u32, record: &Record) {
        let chain = &self.sets[place.set].chains[place.way];
        record.enter(chain.load(Relaxed));
        chain.store(number, Relaxed);
        filled[place.set / WORD] |= 1 << (place.set % WORD);
    }

    /// A place for blocks of a size that has none yet, if its set has a way to spare.
    pub(super) fn claim(&self, granules: u32) -> Option<Place> {
        if let Some(place) = self.find(granules) {
            return Some(place);
        }
        let set = self.set_of(granules);
        let way = self.sets[set].chains.iter().position(|chain| chain.load(Relaxed) == NONE)?;
        self.sets[set].sizes[way].store(granules, Relaxed);
        Some(Place { set, way, granules })
    }

    /// Takes out the youngest block of some way of a set, by turns.
    pub(super) fn pop_of<'a>(&self, set: usize, turn: usize, records: &'a Records) -> Option<&'a Record> {
        let mut chains = self.sets[set].chains.iter().cycle().skip(turn % WAYS).take(WAYS);
        let chain = chains.find(|chain| chain.load(Relaxed) != NONE)?;
        let record = records.get(chain.load(Relaxed))?;
        chain.store(record.leave(), Relaxed);
        Some(record)
    }

    /// Takes out some block, set by set from that of `hand` on.
    pub(super) fn pop_any<'a>(
        &self,
        filled: &mut Filled,
        hand: &mut usize,
        records: &'a Records,
    ) -> Option<&'a Record> {
        for _ in 0..=SETS {
            let set = *hand % SETS;
            *hand += 1;
            let bit = 1 << (set % WORD);
            if filled[set / WORD] & bit == 0 {
                continue;
            }
            match self.pop_of(set, *hand / SETS, records) {
                Some(record) => return Some(record),
                None => filled[set / WORD] &= !bit,
            }
        }
        None
    }

    /// Takes out all blocks of at least so many granules.
    pub(super) fn drain(
        &self,
        filled: &mut Filled,
        records: &Records,
        least: u32,
        out: &mut dyn FnMut(&Record),
    ) {
        let first = if least >= self.large_from { SMALL_WORDS } else { 0 };
        for (word, bits_of) in filled.iter_mut().enumerate().skip(first) {
            for bit in bits(std::mem::take(bits_of)) {
                let set = &self.sets[word * WORD + bit];
                for (size, chain) in set.sizes.iter().zip(&set.chains) {
                    let mut number = chain.load(Relaxed);
                    if size.load(Relaxed) < least {
                        *bits_of |= u64::from(number != NONE) << bit;
                        continue;
                    }
                    chain.store(NONE, Relaxed);
                    while let Some(record) = records.get(number) {
                        number = record.leave();
                        out(record);
                    }
                }
            }
        }
    }

    /// The size of every chain, with the number of its youngest block.
    pub(super) fn chains(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let ways = self.sets.iter().flat_map(|set| set.sizes.iter().zip(&set.chains));
        ways.map(|(size, chain)| (size.load(Relaxed), chain.load(Relaxed)))
    }
}

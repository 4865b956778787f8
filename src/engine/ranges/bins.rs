//! Which bin holds which sizes, and which bins hold anything.
//!
//! Sizes are counted in granules. Up to `2 * SUB` granules every size has a bin of its own; above, each power
//! of two is divided into `SUB` bins, so the sizes of one bin differ by less than a part in `SUB`. The last
//! bin holds all that is larger still.

use crate::base::bits::floor_log2;

/// Logarithm of `SUB`.
const SUB_LOG: u32 = 5;
/// Bins in each power of two.
const SUB: usize = 1 << SUB_LOG;
/// Powers of two above the exact bins: sizes up to 2^38 granules, 4 TiB in granules of 16 bytes.
const OCTAVES: usize = 32;

/// Number of bins.
pub(super) const BINS: usize = (OCTAVES + 2) * SUB;
/// The last bin, whose sizes have no upper limit.
pub(super) const LAST: usize = BINS - 1;
const WORDS: usize = BINS.div_ceil(64);

/// How far the bins' width is from a single size, as a power of two; 0 where every size has its own.
#[inline(always)]
fn octave(granules: usize) -> u32 {
    floor_log2(granules | SUB) - SUB_LOG
}

/// The bin of ranges of `granules`.
#[inline(always)]
pub(super) fn bin_of(granules: usize) -> usize {
    let octave = octave(granules);
    (((octave as usize) << SUB_LOG) + (granules >> octave)).min(LAST)
}

/// The first bin of which every range has at least `granules`; `LAST` promises nothing.
#[inline(always)]
pub(super) fn sure_bin(granules: usize) -> usize {
    bin_of(granules + ((1 << octave(granules)) - 1))
}

/// The bins that are not empty.
#[derive(Debug)]
pub(super) struct Filled {
    /// Bit `w`: `words[w] != 0`.
    summary: u64,
    words: [u64; WORDS],
}

impl Filled {
    pub(super) const fn new() -> Self {
        Self { summary: 0, words: [0; WORDS] }
    }

    #[inline]
    pub(super) fn set(&mut self, bin: usize) {
        self.words[bin / 64] |= 1 << (bin % 64);
        self.summary |= 1 << (bin / 64);
    }

    #[inline]
    pub(super) fn clear(&mut self, bin: usize) {
        let word = &mut self.words[bin / 64];
        *word &= !(1 << (bin % 64));
        if *word == 0 {
            self.summary &= !(1 << (bin / 64));
        }
    }

    #[inline]
    pub(super) fn contains(&self, bin: usize) -> bool {
        self.words[bin / 64] & (1 << (bin % 64)) != 0
    }

    /// The first bin from `bin` on that holds something.
    #[inline]
    pub(super) fn first_from(&self, bin: usize) -> Option<usize> {
        let word = bin / 64;
        if word >= WORDS {
            return None;
        }
        let here = self.words[word] & (!0 << (bin % 64));
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        // WORDS < 64, so the shift is in range.
        let above = self.summary & (!0 << (word + 1));
        if above == 0 {
            return None;
        }
        let word = above.trailing_zeros() as usize;
        Some(word * 64 + self.words.get(word)?.trailing_zeros() as usize)
    }

    /// The last bin that holds something.
    pub(super) fn last(&self) -> Option<usize> {
        let word = self.summary.checked_ilog2()? as usize;
        Some(word * 64 + self.words[word].checked_ilog2()? as usize)
    }

    /// Whether the summary agrees with the words.
    pub(super) fn consistent(&self) -> bool {
        (0..WORDS).all(|word| (self.words[word] != 0) == (self.summary >> word & 1 != 0))
    }
}

const _: () = assert!(WORDS < 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_ascend_and_sure_bins_are_sure() {
        let sizes = (1..5000).chain((6..40).flat_map(|log| {
            let base = 1_usize << log;
            [base - 1, base, base + 1, base + base / 3, base + base / 32 * 31]
        }));
        for size in sizes {
            let bin = bin_of(size);
            assert!(bin_of(size + 1) >= bin && bin_of(size + 1) <= bin + 1);
            let sure = sure_bin(size);
            assert!(sure == bin || sure == bin + 1);
            // Nothing smaller lies in the sure bin.
            assert!(sure == LAST || bin_of(size - 1) < sure, "{size}");
        }
        assert_eq!(bin_of(usize::MAX >> 4), LAST);
    }

    #[test]
    fn finds_the_first_filled_bin() {
        let mut filled = Filled::new();
        assert_eq!((filled.first_from(0), filled.last()), (None, None));
        for bin in [3, 64, 700, LAST] {
            filled.set(bin);
        }
        assert!(filled.consistent() && filled.contains(64) && !filled.contains(65));
        assert_eq!(filled.first_from(0), Some(3));
        assert_eq!(filled.first_from(4), Some(64));
        assert_eq!(filled.first_from(65), Some(700));
        assert_eq!(filled.first_from(701), Some(LAST));
        assert_eq!(filled.last(), Some(LAST));
        filled.clear(LAST);
        assert_eq!((filled.first_from(701), filled.last()), (None, Some(700)));
        assert_eq!(filled.first_from(BINS + 64), None);
        assert!(filled.consistent());
    }
}

//! Which bin holds which sizes, and which bins hold anything.
//!
//! Sizes are counted in units of 16 bytes, the smallest granule. Up to `SUB` units every size has a bin of its
//! own; above, each power of two is divided into `SUB` bins, so the sizes of one bin differ by less than two
//! parts in `SUB`, and soon by less than one.

/// Logarithm of `SUB`.
const SUB_LOG: u32 = 5;
/// Bins in each power of two.
const SUB: usize = 1 << SUB_LOG;
/// Logarithm of the unit.
const UNIT_LOG: u32 = 4;

/// No block is larger than this.
pub(super) const MAX_SIZE: usize = 1 << if usize::BITS == 64 { 47 } else { usize::BITS - 1 };

const WORDS: usize = (bin_of(MAX_SIZE) + 1) / 64 + 1;
/// Number of bins.
pub(super) const BINS: usize = WORDS * 64;

/// The bin of a block of `size` bytes.
///
/// With `SUB` units added, exponent and first bits of the mantissa of the size as a floating-point number count
/// the bins from one place on. Sizes are below 2^53 units, so the conversion is exact; it costs less than
/// counting leading zeros and shifting twice.
#[inline(always)]
pub(super) const fn bin_of(size: usize) -> usize {
    let units = (size >> UNIT_LOG) + SUB;
    let place = (units as i64 as f64).to_bits() >> (52 - SUB_LOG);
    const FIRST: usize = ((SUB as f64).to_bits() >> (52 - SUB_LOG)) as usize;
    place as usize - FIRST
}

/// The first bin of which every block has at least `size` bytes, `size` being a multiple of 16.
#[inline(always)]
pub(super) const fn sure_bin(size: usize) -> usize {
    // The bin behind that of the next smaller size, whether or not that is where this size lies.
    bin_of(size - (1 << UNIT_LOG)) + 1
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
        *self.word_mut(bin / 64) |= 1 << (bin % 64);
        self.summary |= 1 << (bin / 64);
    }

    #[inline]
    pub(super) fn clear(&mut self, bin: usize) {
        let word = self.word_mut(bin / 64);
        *word &= !(1 << (bin % 64));
        if *word == 0 {
            self.summary &= !(1 << (bin / 64));
        }
    }

    #[inline(always)]
    fn word(&self, word: usize) -> u64 {
        debug_assert!(word < WORDS);
        // SAFETY: bins are below `BINS`, which is `WORDS * 64`, and bits of the summary below `WORDS`.
        unsafe { *self.words.get_unchecked(word) }
    }

    #[inline(always)]
    fn word_mut(&mut self, word: usize) -> &mut u64 {
        debug_assert!(word < WORDS);
        // SAFETY: as in `word`.
        unsafe { self.words.get_unchecked_mut(word) }
    }

    #[inline]
    pub(super) fn contains(&self, bin: usize) -> bool {
        self.word(bin / 64) & (1 << (bin % 64)) != 0
    }

    /// The first bin from `bin`, which is below `BINS`, on that holds something.
    #[inline]
    pub(super) fn first_from(&self, bin: usize) -> Option<usize> {
        let word = bin / 64;
        let here = self.word(word) & (!0 << (bin % 64));
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        // WORDS < 64, so the shift is in range.
        let above = self.summary & (!0 << (word + 1));
        if above == 0 {
            return None;
        }
        let word = above.trailing_zeros() as usize;
        Some(word * 64 + self.word(word).trailing_zeros() as usize)
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
        let units = (1..5000).chain((6..43).flat_map(|log| {
            let base = 1_usize << log;
            [base - 1, base, base + 1, base + base / 3, base + base / 32 * 31]
        }));
        for size in units.map(|units| units * 16 + 16) {
            let bin = bin_of(size);
            assert!(bin_of(size + 16) >= bin && bin_of(size + 16) <= bin + 1);
            let sure = sure_bin(size);
            assert!(sure == bin || sure == bin + 1);
            assert!(bin_of(size - 16) < sure, "{size}: nothing smaller lies in its sure bin");
        }
        assert!(bin_of(MAX_SIZE) < BINS && sure_bin(MAX_SIZE) < BINS);
    }

    #[test]
    fn finds_the_first_filled_bin() {
        let mut filled = Filled::new();
        assert_eq!((filled.first_from(0), filled.last()), (None, None));
        for bin in [3, 64, 700, BINS - 1] {
            filled.set(bin);
        }
        assert!(filled.consistent() && filled.contains(64) && !filled.contains(65));
        assert_eq!(filled.first_from(0), Some(3));
        assert_eq!(filled.first_from(4), Some(64));
        assert_eq!(filled.first_from(65), Some(700));
        assert_eq!(filled.first_from(701), Some(BINS - 1));
        assert_eq!(filled.last(), Some(BINS - 1));
        filled.clear(BINS - 1);
        assert_eq!((filled.first_from(701), filled.last()), (None, Some(700)));
        assert!(filled.consistent());
    }
}

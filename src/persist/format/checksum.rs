//! The checksum of headers, records and of what records depend on; the algorithm is written down in the format.

/// Checksum of words: each is mixed by itself, with its place, and the sum of them is turned by 7 bits a word.
/// So each word's part in it is a bijection of the word, and damage within one never goes unseen; and no word
/// waits for the multiplications of the one before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checksum {
    sum: u64,
    place: u64,
}

impl Checksum {
    #[inline]
    pub(crate) const fn new(seed: u64) -> Self {
        Self { sum: 0, place: seed ^ 0x6D70_6F6F_6C73_756D }
    }

    #[inline]
    pub(crate) const fn add(self, word: u64) -> Self {
        let mixed = (word ^ self.place).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mixed = mixed ^ mixed >> 32;
        Self {
            sum: self.sum.rotate_left(7).wrapping_add(mixed),
            place: self.place.wrapping_add(0xD1B5_4A32_D192_ED03),
        }
    }

    /// Never 0, so that a zeroed place has no valid checksum.
    #[inline]
    pub(crate) const fn finish(self) -> u64 {
        let mixed = (self.sum ^ self.place >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        let mixed = mixed ^ mixed >> 29;
        if mixed == 0 { 1 } else { mixed }
    }

    #[inline]
    pub(crate) fn of(seed: u64, words: &[u64]) -> u64 {
        words.iter().fold(Self::new(seed), |sum, &word| sum.add(word)).finish()
    }
}

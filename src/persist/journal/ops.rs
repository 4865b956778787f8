//! The operations of a record: encoded, read back, applied.

use super::super::format::{BITMAP_WORDS, Checksum};
use super::super::media::Media;
use super::super::recover::Words;

/// Operations of a record, encoded.
#[derive(Debug, Default)]
pub(crate) struct Ops {
    pub(super) words: Vec<u64>,
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

/// The operation that sets bits of the word at `at`, or clears them.
#[inline]
pub(crate) fn bits_op(set: bool, at: u64, mask: u64) -> [u64; 3] {
    [if set { 2 } else { 3 }, at, mask]
}

/// How the operation begins that writes so many words at `at`; the words follow.
#[inline]
pub(crate) fn write_op(at: u64, words: usize) -> [u64; 2] {
    [if words == 1 { 1 } else { 4 | (words as u64 * 8) << 32 }, at]
}

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
        self.bits(bits_op(true, at, mask));
    }

    #[inline]
    pub(crate) fn clear_bits(&mut self, at: u64, mask: u64) {
        self.bits(bits_op(false, at, mask));
    }

    /// Neighbours are often set or cleared together.
    #[inline]
    fn bits(&mut self, op: [u64; 3]) {
        match self.words.get_mut(self.last..) {
            Some([kind, at, mask]) if (*kind, *at) == (op[0], op[1]) => *mask |= op[2],
            _ => self.push(op),
        }
    }

    #[inline]
    pub(crate) fn write(&mut self, at: u64, words: &[u64]) {
        self.push(write_op(at, words.len()));
        self.words.extend_from_slice(words);
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
    pub(crate) fn is_one_word(&self) -> bool {
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

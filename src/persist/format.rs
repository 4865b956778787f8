//! The file, byte by byte. Everything is little-endian; offsets count from the start of the file; words have 8 bytes and
//! lie at multiples of 8. What is called zero is written as zero; whoever reads need not check it unless that is said.
//!
//! ```text
//! 0x0000  header               4 KiB   written at create and at grow, never else
//! 0x1000  copy of the header   4 KiB   written before the header, so one of the two is always whole
//! 0x2000  super page           4 KiB   heads of the lists, counters
//! 0x3000  unused               4 KiB   zero
//! 0x4000  log                  lane count × lane size
//!         zone 0, zone 1, …    back to back; the first begins where the log ends
//! ```
//!
//! The file has at least the length at which the last zone ends; what is behind is ignored.
//!
//! **Checksum** of words with a seed; arithmetic is modulo 2⁶⁴:
//!
//! ```text
//! sum = 0;  place = seed XOR 0x6D706F6F6C73756D
//! for each word:
//!     mixed = (word XOR place) × 0x9E3779B97F4A7C15
//!     mixed = mixed XOR (mixed >> 32)
//!     sum   = (sum rotated left by 7) + mixed
//!     place = place + 0xD1B54A32D192ED03
//! mixed = (sum XOR (place >> 32)) × 0xD6E8FEB86659FD93
//! mixed = mixed XOR (mixed >> 29)
//! the checksum is mixed, or 1 where that is 0
//! ```
//!
//! **Header**
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic, `MEMPOOL` and 0x1A |
//! | 8 | 4 | endianness mark, 0x01020304 |
//! | 12 | 4 | size of the header, 4096 |
//! | 16 | 4 + 4 | version, major (1) and minor (0): another major is another format, another minor is not |
//! | 24 | 8 | features that any program may ignore; none exist |
//! | 32 | 8 | features without which a program must not open the file; none exist |
//! | 40 | 8 | features without which a program must not write to the file; none exist |
//! | 48 | 8 | identity, random, not 0 |
//! | 56 | 8 | time of creation, seconds since 1970 |
//! | 64 | 4 | size of a chunk, 65536 |
//! | 68 | 4 + 4 | size of a lane, 4096; count of lanes, 1 to 64 |
//! | 76 | 4 | count of zones, 1 to 128 |
//! | 80 | 8 | generation: counts the writings of the header; of two whole copies the higher one is right |
//! | 88 | 8 | zero |
//! | 96 | 2 | length of the layout name, 0 to 128 |
//! | 98 | 1 | durability it was made with: 0 power, 1 process crash, 2 DAX; any other is taken for 0 |
//! | 99 | 5 | zero |
//! | 104 | 128 | layout name, UTF-8, then zero |
//! | 232 | 24 | zero |
//! | 256 | 128 × 16 | zones: start (8), chunks (4), zero (4); then zero |
//! | 4088 | 8 | checksum of bytes 0 to 4088, seed 0 |
//!
//! **Super page**: words; each changes alone and is checked when it is used.
//!
//! | offset | word |
//! |---|---|
//! | 0 | offset of the first root record, or 0 |
//! | 8 | offset of the first type record, or 0 |
//! | 16 | 1 if closed in order, 0 while open for writing |
//! | 24 | openings for writing |
//! | 32 | openings that applied records of the log |
//! | 40 | transactions |
//! | 48 | objects allocated |
//! | 56 | objects freed |
//! | 64 | bytes allocated, slots counted whole |
//!
//! The last four are stored when a transaction is applied; under power with its record, and here when the pool is closed or
//! recovered. So after a crash they count all that had returned, and of what was under way all, some or nothing.
//!
//! **Lane**: a record; see [`journal`](super::journal) for its use. Where no sync is waited for and it fits, a short
//! one:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | checksum of the word at 8 and the body; seed: the identity XOR the number of the lane |
//! | 8 | 8 | bit 63: 1; bit 62: 0; bits 52 to 61: words in the body, 1 to 510; bits 0 to 51: sequence number |
//! | 16 | | body |
//!
//! Else a header of 96 bytes, then the body:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | checksum of bytes 8 to 88; seed: the identity XOR the number of the lane |
//! | 8 | 8 | sequence number, below 2⁶³; 0 for no record |
//! | 16 | 8 | every record up to this number is in place for good |
//! | 24 | 8 | checksum of the body; seed: the identity |
//! | 32 | 8 | length of the body in bytes, a multiple of 8, not 0 |
//! | 40 | 8 | where the body is, if it did not fit into the lane; else 0 |
//! | 48 | 8 | the first sequence number of those that were synced together; 0 where nothing is synced |
//! | 56 | 4 × 8 | the counters of the super page from transactions on, with all that were synced together; else 0 |
//! | 88 | 8 | unused |
//!
//! A lane whose word at 8 is 0 is empty. A record with a wrong checksum was not written to its end and counts as none. A
//! body is a row of operations: one word `kind | length << 32` (the length is 0 but for kinds 4 and 6), one word of offset,
//! then the operands.
//!
//! | kind | operands | effect |
//! |---|---|---|
//! | 1 | value | the word at offset becomes the value |
//! | 2 | mask | bits of the word are set |
//! | 3 | mask | bits of the word are cleared |
//! | 4 | bytes, a multiple of 8 | `length` bytes are written |
//! | 5 | bitmap, word 0, word 1 | unless the table entry at offset is (word 0, word 1) already: clears the bitmap, then sets it |
//! | 6 | checksum | none; but the record counts only if `length` bytes at offset have that checksum, with the offset as seed |
//!
//! They lie in the super page or behind the log. Kind 6 is asked only of the records with the highest number at 48.
//!
//! **Zone**: a table of 16 bytes a chunk, then bitmaps of 256 bytes a chunk, then (from the next multiple of
//! 64 KiB of the file) the chunks, each of 64 KiB. Table entry:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | kind |
//! | 1 | 3 | chunks that the run or object covers |
//! | 4 | 4 | size of a slot; 0 but for runs |
//! | 8 | 8 | fingerprint of the type of what is in it |
//!
//! Kind 0: free; its first 8 bytes are 0. Kind 1: a run of slots, one after another from the start of its first chunk, as
//! many as are whole and at most 2048; a slot has a multiple of 8 bytes, 32 at least. Bit `i % 64` of word `i / 64` of the
//! bitmap of the first chunk says that slot `i` is live; the bits behind the last slot are 0. Kind 2: one object over all its
//! chunks. Only the first chunk of a run or an object has an entry; the entries of the others are zero.
//!
//! **Fingerprints**: 1 for blocks without a type, 2 for root records, 3 for type records. Of a type: the checksum, with its
//! size as seed, of its alignment and then the bytes of its name, a word each; with bit 63 set. Names have no module paths.
//!
//! **Root record**: next (0 ends the list), offset of the target (0: removed), fingerprint of the target, length of the
//! name, the name in UTF-8, padded with zeros.
//!
//! **Type record**: next, fingerprint; size (4) and alignment (4); stride (4) and offset (4) of elements, 0 where it has
//! none; length of the name (4) and count of pointers (4); the name in UTF-8, padded to words with zeros; for each pointer
//! a word of its offset in the type (in the element where there are such) and the fingerprint of its target.
//!
//! **Pointer** in an object: the identity of the pool, the offset; null where the offset is 0. **Vector**: offset of its
//! block, zero. Block of elements: their count, zero, then from the stride's offset (16, or the alignment if that is more)
//! the elements; its fingerprint is that of `[name]` with size and alignment of an element. **Text**: a vector of bytes in
//! UTF-8. **Map**: offset of its block, count of entries, count of slots that are not empty, seed of the hash; a block of
//! slots: a word of state (0 never used, 1 removed, else the hash of the key with bit 1 set), key, value.

mod checksum;
mod header;

pub(crate) use checksum::Checksum;
pub(crate) use header::Header;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"MEMPOOL\x1a");
pub(crate) const ENDIAN_MARK: u32 = 0x0102_0304;
pub(crate) const VERSION: (u32, u32) = (1, 0);
pub(crate) const HEADER_AT: [u64; 2] = [0, PAGE];
pub(crate) const SUPER: u64 = 2 * PAGE;
pub(crate) const LOG: u64 = 4 * PAGE;
pub(crate) const LANE_SIZE: u64 = 4096;
pub(crate) const LANE_HEADER: u64 = 96;
/// Words of it behind the checksum.
pub(crate) const LANE_FIELDS: usize = 10;
pub(crate) const MAX_LANES: u32 = 64;
pub(crate) const MAX_ZONES: usize = 128;
pub(crate) const MAX_LAYOUT: usize = 128;
pub(crate) const CHUNK: u64 = 64 << 10;
pub(crate) const ENTRY: u64 = 16;
pub(crate) const BITMAP: u64 = 256;
pub(crate) const BITMAP_WORDS: usize = (BITMAP / 8) as usize;
pub(crate) const MAX_SLOTS: u64 = BITMAP * 8;
pub(crate) const MIN_SLOT: u64 = CHUNK / MAX_SLOTS;
pub(crate) const MAX_ZONE_CHUNKS: u64 = (1 << 24) - 1;
/// Smallest file: the log of a small pool and a few chunks.
pub(crate) const MIN_SIZE: u64 = 512 << 10;

/// Words of the super page.
pub(crate) const ROOTS_HEAD: u64 = SUPER;
pub(crate) const TYPES_HEAD: u64 = SUPER + 8;
pub(crate) const CLOSED: u64 = SUPER + 16;

/// Counters of the super page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counter {
    Openings,
    Recoveries,
    Transactions,
    Allocations,
    Frees,
    Bytes,
}

impl Counter {
    pub(crate) const fn at(self) -> u64 {
        SUPER + 24 + 8 * self as u64
    }
}

/// Fingerprints of what the pool itself stores; those of types have the top bit set.
pub(crate) mod internal {
    pub(crate) const RAW: u64 = 1;
    pub(crate) const ROOT: u64 = 2;
    pub(crate) const TYPE: u64 = 3;
    /// Never on disk: scratch blocks are only ever reserved.
    pub(crate) const SCRATCH: u64 = 4;
}

/// The second word of a short record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShortHead {
    pub(crate) words: u64,
    pub(crate) sequence: u64,
}

impl ShortHead {
    const SHORT: u64 = 1 << 63;
    const SEQUENCE: u64 = (1 << 52) - 1;
    /// Where the body begins in the lane.
    pub(crate) const BODY: u64 = 16;
    const MOST: u64 = (LANE_SIZE - Self::BODY) / 8;

    /// `None` where the body does not fit.
    #[inline]
    pub(crate) const fn encode(self) -> Option<u64> {
        if self.words > Self::MOST {
            return None;
        }
        Some(Self::SHORT | self.words << 52 | self.sequence & Self::SEQUENCE)
    }

    /// `None` where the word is that of another record, or of none.
    pub(crate) const fn decode(word: u64) -> Option<Self> {
        if word & Self::SHORT == 0 {
            return None;
        }
        Some(Self { words: word >> 52 & 0x3FF, sequence: word & Self::SEQUENCE })
    }

    /// Whether there is such a body.
    pub(crate) const fn fits(self) -> bool {
        self.words >= 1 && self.words <= Self::MOST
    }
}

/// A stretch of the file with its own table, bitmaps and chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zone {
    pub(crate) start: u64,
    pub(crate) chunks: u32,
}

impl Zone {
    pub(crate) const fn entry(&self, chunk: u32) -> u64 {
        self.start + chunk as u64 * ENTRY
    }

    pub(crate) const fn bitmap(&self, chunk: u32) -> u64 {
        self.start + self.chunks as u64 * ENTRY + chunk as u64 * BITMAP
    }

    pub(crate) const fn chunk(&self, chunk: u32) -> u64 {
        self.data() + chunk as u64 * CHUNK
    }

    /// Where the chunks begin.
    pub(crate) const fn data(&self) -> u64 {
        (self.start + self.chunks as u64 * (ENTRY + BITMAP)).next_multiple_of(CHUNK)
    }

    pub(crate) const fn end(&self) -> u64 {
        self.data() + self.chunks as u64 * CHUNK
    }

    /// The zone that fills `start..end` best; `None` where not one chunk fits.
    pub(crate) fn fitting(start: u64, end: u64) -> Option<Self> {
        let room = end.checked_sub(start)?;
        let mut chunks = (room / (CHUNK + ENTRY + BITMAP)).min(MAX_ZONE_CHUNKS) as u32;
        while chunks > 0 {
            let zone = Self { start, chunks };
            if zone.end() <= end {
                return Some(zone);
            }
            chunks -= 1;
        }
        None
    }
}

/// A table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Free,
    /// `slot` bytes each, over `chunks` chunks.
    Run {
        chunks: u32,
        slot: u32,
    },
    Large {
        chunks: u32,
    },
}

impl Entry {
    pub(crate) const RUN: u8 = 1;
    pub(crate) const LARGE: u8 = 2;

    pub(crate) const fn encode(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Run { chunks, slot } => Self::RUN as u64 | (chunks as u64) << 8 | (slot as u64) << 32,
            Self::Large { chunks } => Self::LARGE as u64 | (chunks as u64) << 8,
        }
    }

    /// Kind, chunks and slot size in `word`, unchecked.
    #[inline]
    pub(crate) const fn fields(word: u64) -> (u8, u32, u32) {
        (word as u8, (word >> 8) as u32 & 0xFF_FFFF, (word >> 32) as u32)
    }

    /// The entry in `word`, if it can stand at a place with `room` chunks up to the end of its zone.
    pub(crate) fn decode(word: u64, room: u32) -> Option<Self> {
        let (kind, chunks, slot) = Self::fields(word);
        let fits = chunks >= 1 && chunks <= room;
        match kind {
            0 if word == 0 => Some(Self::Free),
            Self::RUN if fits => {
                let sized = u64::from(slot) >= MIN_SLOT && slot.is_multiple_of(8);
                let slots = (u64::from(chunks) * CHUNK).checked_div(slot.into())?;
                (sized && (1..=MAX_SLOTS).contains(&slots)).then_some(Self::Run { chunks, slot })
            }
            Self::LARGE if fits && slot == 0 => Some(Self::Large { chunks }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_decode_only_where_they_fit() {
        for entry in [Entry::Free, Entry::Run { chunks: 3, slot: 64 * 1024 }, Entry::Large { chunks: 9 }] {
            assert_eq!(Entry::decode(entry.encode(), 9), Some(entry));
        }
        assert_eq!(Entry::decode(Entry::Large { chunks: 9 }.encode(), 8), None);
        assert_eq!(Entry::decode(Entry::Run { chunks: 1, slot: 24 }.encode(), 8), None);
        assert_eq!(Entry::decode(Entry::Run { chunks: 1, slot: 36 }.encode(), 8), None);
        assert_eq!(Entry::decode(Entry::Run { chunks: 2, slot: 32 }.encode(), 8), None);
        assert_eq!(Entry::decode(Entry::Run { chunks: 1, slot: 128 << 10 }.encode(), 8), None);
        assert_eq!(Entry::decode(0x100, 8), None);
    }

    #[test]
    fn the_metadata_of_a_zone_stays_small() {
        let zone = Zone::fitting(272 << 10, 1 << 30).unwrap();
        let payload = u64::from(zone.chunks) * CHUNK;
        assert!((1u64 << 30) - payload < (1 << 30) / 100, "{} chunks", zone.chunks);
        assert!(zone.end() <= 1 << 30 && zone.bitmap(zone.chunks) <= zone.data());
    }
}

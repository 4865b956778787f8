//! The file, byte by byte. Everything is little-endian; offsets count from the start of the file.
//!
//! ```text
//! 0x0000  header               4 KiB   written at create and at grow, never else
//! 0x1000  copy of the header   4 KiB   written before the header, so one of the two is always whole
//! 0x2000  super page           4 KiB   heads of the lists, counters
//! 0x3000  unused               4 KiB   zero
//! 0x4000  log                  lane count × lane size
//!         zone 0, zone 1, …    back to back to the end of the file
//! ```
//!
//! **Header**
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic, `MEMPOOL` and 0x1A |
//! | 8 | 4 | endianness mark, 0x01020304 |
//! | 12 | 4 | size of the header, 4096 |
//! | 16 | 4 + 4 | version, major and minor |
//! | 24 | 8 | features that any program may ignore |
//! | 32 | 8 | features without which a program must not open the file |
//! | 40 | 8 | features without which a program must not write to the file |
//! | 48 | 8 | identity, random, not 0 |
//! | 56 | 8 | time of creation, seconds since 1970 |
//! | 64 | 4 | size of a chunk, 65536 |
//! | 68 | 4 + 4 | size of a lane, count of lanes |
//! | 76 | 4 | count of zones, 1 to 128 |
//! | 80 | 8 | generation: counts the writings of the header; the higher of two whole copies is right |
//! | 96 | 2 | length of the layout name |
//! | 98 | 1 | durability it was made with: 0 power, 1 process crash, 2 DAX |
//! | 104 | 128 | layout name, UTF-8, then zero |
//! | 256 | 128 × 16 | zones: start (8), chunks (4), zero (4) |
//! | 4088 | 8 | checksum of bytes 0 to 4088 |
//!
//! **Super page**: words of 8 bytes; each changes alone and is checked when it is used.
//!
//! | offset | word |
//! |---|---|
//! | 0 | first root record, or 0 |
//! | 8 | first type record, or 0 |
//! | 16 | 1 if closed in order |
//! | 24 … | [counters](Counter): openings, recoveries, transactions, allocations, frees, bytes allocated |
//!
//! **Lane**: a record; see [`journal`](super::journal) for its use. Where no sync is waited for and it fits, a short
//! one:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | checksum of the word at 8 and the body, begun with the identity XOR the number of the lane |
//! | 8 | 8 | bit 63: set; bits 52 to 61: words in the body, 1 to 510; bits 0 to 51: sequence number |
//! | 16 | | body |
//!
//! Else a header of 64 bytes, then the body:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | checksum of bytes 8 to 56, begun with the identity XOR the number of the lane |
//! | 8 | 8 | sequence number, below 2⁶³; 0 for no record |
//! | 16 | 8 | every record up to this number is in place for good |
//! | 24 | 8 | checksum of the body, begun with the identity |
//! | 32 | 8 | length of the body in bytes, a multiple of 8 |
//! | 40 | 8 | where the body is, if it did not fit into the lane; else 0 |
//! | 48 | 8 | the first sequence number of those that were synced together; 0 where nothing is synced |
//! | 56 | 8 | unused |
//!
//! A body is a row of operations: one word `kind | length << 32`, one word of offset, then the operands.
//!
//! | kind | operands | effect |
//! |---|---|---|
//! | 1 | value | the word at offset becomes the value |
//! | 2 | mask | bits of the word are set |
//! | 3 | mask | bits of the word are cleared |
//! | 4 | bytes, padded to 8 | `length` bytes are written |
//! | 6 | checksum | none; but the record counts only if `length` bytes at offset have that checksum |
//! | 5 | bitmap, word 0, word 1 | unless the table entry at offset is (word 0, word 1) already: clears the bitmap, then sets it |
//!
//! **Zone**: a table of 16 bytes a chunk, then bitmaps of 256 bytes a chunk, then (from the next multiple of
//! 64 KiB) the chunks. Table entry: word 0 is `kind (8 bits) | chunks (24 bits) | slot size (32 bits)`, word 1
//! the fingerprint of the type. Kind 0: free. Kind 1: a run of slots; bit `i` of its bitmap says that slot `i`
//! is live. Kind 2: one object over all its chunks. Only the first chunk of a run or an object has an entry;
//! the entries of the others are zero.

use crate::base::error::{Error, Result};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"MEMPOOL\x1a");
pub(crate) const ENDIAN_MARK: u32 = 0x0102_0304;
pub(crate) const VERSION: (u32, u32) = (1, 0);
pub(crate) const HEADER_AT: [u64; 2] = [0, PAGE];
pub(crate) const SUPER: u64 = 2 * PAGE;
pub(crate) const LOG: u64 = 4 * PAGE;
pub(crate) const LANE_SIZE: u64 = 4096;
pub(crate) const LANE_HEADER: u64 = 64;
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

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) compat: u64,
    pub(crate) incompat: u64,
    pub(crate) ro_compat: u64,
    pub(crate) identity: u64,
    pub(crate) created: u64,
    pub(crate) lanes: u32,
    pub(crate) generation: u64,
    pub(crate) layout: String,
    pub(crate) zones: Vec<Zone>,
    pub(crate) minor: u32,
    pub(crate) durability: u8,
}

/// Features this version knows; none exist yet.
const KNOWN_INCOMPAT: u64 = 0;
const KNOWN_RO_COMPAT: u64 = 0;

impl Header {
    pub(crate) fn log_end(&self) -> u64 {
        LOG + u64::from(self.lanes) * LANE_SIZE
    }

    pub(crate) fn file_len(&self) -> u64 {
        self.zones.last().map_or(self.log_end(), Zone::end)
    }

    pub(crate) fn lane(&self, lane: u32) -> u64 {
        LOG + u64::from(lane) * LANE_SIZE
    }

    /// Whether a program of this version may write to such a file.
    pub(crate) fn writable(&self) -> bool {
        self.ro_compat & !KNOWN_RO_COMPAT == 0
    }

    pub(crate) fn encode(&self) -> Box<[u8; PAGE as usize]> {
        let mut page = Box::new([0u8; PAGE as usize]);
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(8, &ENDIAN_MARK.to_le_bytes());
        put(12, &(PAGE as u32).to_le_bytes());
        put(16, &VERSION.0.to_le_bytes());
        put(20, &self.minor.to_le_bytes());
        put(24, &self.compat.to_le_bytes());
        put(32, &self.incompat.to_le_bytes());
        put(40, &self.ro_compat.to_le_bytes());
        put(48, &self.identity.to_le_bytes());
        put(56, &self.created.to_le_bytes());
        put(64, &(CHUNK as u32).to_le_bytes());
        put(68, &(LANE_SIZE as u32).to_le_bytes());
        put(72, &self.lanes.to_le_bytes());
        put(76, &(self.zones.len() as u32).to_le_bytes());
        put(80, &self.generation.to_le_bytes());
        put(96, &(self.layout.len() as u16).to_le_bytes());
        put(98, &[self.durability]);
        put(104, self.layout.as_bytes());
        for (i, zone) in self.zones.iter().enumerate() {
            put(256 + 16 * i, &zone.start.to_le_bytes());
            put(264 + 16 * i, &zone.chunks.to_le_bytes());
        }
        let sum = header_sum(&page[..]);
        page[4088..].copy_from_slice(&sum.to_le_bytes());
        page
    }

    /// Reads one copy of the header, at offset `at` of a file of `file_len` bytes. Every field is checked.
    pub(crate) fn decode(page: &[u8], at: u64, file_len: u64) -> Result<Self> {
        let bad = |field: u64, what, found: u64| Err(Error::corrupt(at + field, what, found));
        let u32_at = |o: usize| u32::from_le_bytes(page[o..o + 4].try_into().unwrap_or_default());
        let u64_at = |o: usize| u64::from_le_bytes(page[o..o + 8].try_into().unwrap_or_default());
        if page.len() != PAGE as usize {
            return bad(0, "a header of 4096 bytes: this is no pool, or a truncated one", page.len() as u64);
        }
        if u64_at(0) != MAGIC {
            return bad(0, "the magic of a pool (MEMPOOL, 0x1A): this file is something else", u64_at(0));
        }
        if u32_at(8) != ENDIAN_MARK {
            return bad(8, "the endianness mark 0x1020304", u32_at(8).into());
        }
        if u64_at(4088) != header_sum(page) {
            return bad(4088, "the header's checksum: run memory-pool check, then repair", u64_at(4088));
        }
        if u32_at(16) != VERSION.0 {
            return bad(16, "format version 1: open it with the release that wrote it", u32_at(16).into());
        }
        if u64_at(32) & !KNOWN_INCOMPAT != 0 {
            return bad(32, "no unknown feature: open it with a newer release", u64_at(32));
        }
        if u32_at(12) != PAGE as u32 || u32_at(64) != CHUNK as u32 || u32_at(68) != LANE_SIZE as u32 {
            return bad(64, "chunks of 64 KiB and lanes of 4 KiB", u32_at(64).into());
        }
        let lanes = u32_at(72);
        if lanes == 0 || lanes > MAX_LANES {
            return bad(72, "1 to 64 lanes", lanes.into());
        }
        if u64_at(48) == 0 {
            return bad(48, "an identity", 0);
        }
        let layout_len = usize::from(u16::from_le_bytes([page[96], page[97]]));
        let layout = page.get(104..104 + layout_len.min(MAX_LAYOUT + 1)).unwrap_or_default();
        let Ok(layout) = core::str::from_utf8(layout) else {
            return bad(104, "a layout name in UTF-8", layout_len as u64);
        };
        if layout.len() > MAX_LAYOUT {
            return bad(96, "a layout name of at most 128 bytes", layout_len as u64);
        }
        let count = u32_at(76) as usize;
        if count == 0 || count > MAX_ZONES {
            return bad(76, "1 to 128 zones", count as u64);
        }
        let mut header = Self {
            compat: u64_at(24),
            incompat: u64_at(32),
            ro_compat: u64_at(40),
            identity: u64_at(48),
            created: u64_at(56),
            lanes,
            generation: u64_at(80),
            layout: layout.to_owned(),
            zones: Vec::with_capacity(count),
            minor: u32_at(20),
            durability: page[98],
        };
        for i in 0..count {
            let zone = Zone { start: u64_at(256 + 16 * i), chunks: u32_at(264 + 16 * i) };
            let field = 256 + 16 * i as u64;
            if zone.start != header.file_len() {
                return bad(field, "zones back to back", zone.start);
            }
            if zone.chunks == 0 || u64::from(zone.chunks) > MAX_ZONE_CHUNKS {
                return bad(field + 8, "1 to 16777215 chunks", zone.chunks.into());
            }
            header.zones.push(zone);
            if header.file_len() > file_len {
                return bad(
                    field,
                    "a file as long as its zones: it was truncated; restore a backup",
                    file_len,
                );
            }
        }
        Ok(header)
    }

    /// The better of the two copies, and whether the other is as good.
    pub(crate) fn choose(first: Result<Self>, second: Result<Self>) -> Result<(Self, bool)> {
        match (first, second) {
            (Ok(a), Ok(b)) if a == b => Ok((a, true)),
            (Ok(a), Ok(b)) => Ok((if a.generation >= b.generation { a } else { b }, false)),
            (Ok(header), Err(_)) | (Err(_), Ok(header)) => Ok((header, false)),
            (Err(error), Err(_)) => Err(error),
        }
    }
}

fn header_sum(page: &[u8]) -> u64 {
    let words = page[..4088].chunks_exact(8);
    words
        .fold(Checksum::new(0), |sum, w| sum.add(u64::from_le_bytes(w.try_into().unwrap_or_default())))
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let log_end = LOG + 16 * LANE_SIZE;
        Header {
            compat: 0,
            incompat: 0,
            ro_compat: 0,
            identity: 77,
            created: 1,
            lanes: 16,
            generation: 3,
            layout: "orders v1".into(),
            zones: vec![Zone::fitting(log_end, 1 << 20).unwrap()],
            minor: 0,
            durability: 1,
        }
    }

    #[test]
    fn a_header_survives_the_round_trip_and_every_flipped_bit_is_seen() {
        let header = header();
        let page = header.encode();
        let len = header.file_len();
        assert_eq!(Header::decode(&page[..], 0, len).unwrap(), header);
        assert!(Header::decode(&page[..], 0, len - 1).is_err());
        assert!(Header::decode(&page[..100], 0, len).is_err());
        for bit in 0..PAGE as usize * 8 {
            let mut flipped = page.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&flipped[..], 0, len).is_err(), "bit {bit}");
        }
    }

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

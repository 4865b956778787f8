//! The header: written, read back, and chosen of its two copies.

use super::{
    CHUNK, Checksum, ENDIAN_MARK, LANE_SIZE, LOG, MAGIC, MAX_LANES, MAX_LAYOUT, MAX_ZONE_CHUNKS, MAX_ZONES,
    PAGE, VERSION, Zone,
};
use crate::base::error::{Error, Result};

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
}

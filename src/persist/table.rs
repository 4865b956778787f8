//! The tables and bitmaps of the file as look-ups use them: by offset, without a lock.
//!
//! Invariants
//! 1. Every entry was checked when the pool was opened, and every change since was made by this pool.
//! 2. `back[c]` is 0 unless chunk `c` continues a run; then it is the distance to the run's first chunk. It
//!    may be stale where the entry of that first chunk does not cover `c`, which look-ups check.
//!
//! A look-up says what lies at an offset *now*. Whoever acts on the answer holds the object's lock, or the
//! gate, which keep the object in place.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::OnceLock;

use super::format::{BITMAP, CHUNK, Entry, MAX_SLOTS, MAX_ZONES, Zone};
use super::media::Media;

/// A live object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) offset: u64,
    /// Bytes of its slot.
    pub(crate) size: u64,
    pub(crate) fingerprint: u64,
}

/// Where an object is marked live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A bit of a bitmap word.
    Bit { word: u64, mask: u64 },
    /// The entry of its first chunk.
    Entry { at: u64 },
}

#[derive(Debug)]
struct ZoneTable {
    zone: Zone,
    /// Where its bitmaps begin, its chunks, and where it ends.
    bitmaps: u64,
    data: u64,
    end: u64,
    back: Box<[AtomicU32]>,
}

#[derive(Debug)]
pub(crate) struct Table {
    zones: [OnceLock<ZoneTable>; MAX_ZONES],
    count: AtomicUsize,
}

impl Table {
    pub(crate) fn new(zones: &[Zone]) -> Self {
        let table = Self { zones: [const { OnceLock::new() }; MAX_ZONES], count: AtomicUsize::new(0) };
        for zone in zones {
            table.add(*zone);
        }
        table
    }

    /// Adds a zone behind the others.
    pub(crate) fn add(&self, zone: Zone) {
        let at = self.count.load(Ordering::Relaxed);
        let back = (0..zone.chunks).map(|_| AtomicU32::new(0)).collect();
        let (bitmaps, data, end) = (zone.bitmap(0), zone.data(), zone.end());
        let added = self.zones[at].set(ZoneTable { zone, bitmaps, data, end, back });
        debug_assert!(added.is_ok());
        self.count.store(at + 1, Ordering::Release);
    }

    fn all(&self) -> impl Iterator<Item = &ZoneTable> {
        self.zones[..self.count.load(Ordering::Acquire)].iter().filter_map(OnceLock::get)
    }

    pub(crate) fn zones(&self) -> impl Iterator<Item = Zone> {
        self.all().map(|table| table.zone)
    }

    /// Notes that `chunk` of zone number `zone` lies `distance` chunks into a run.
    pub(crate) fn set_back(&self, zone: usize, chunk: u32, distance: u32) {
        if let Some(table) = self.zones[zone].get() {
            table.back[chunk as usize].store(distance, Ordering::Release);
        }
    }

    #[inline]
    fn zone_of(&self, offset: u64) -> Option<&ZoneTable> {
        let first = self.zones[0].get()?;
        if offset < first.end { Some(first) } else { self.all().find(|table| offset < table.end) }
    }

    /// The live object that begins at `offset`.
    #[inline]
    pub(crate) fn live(&self, media: &Media, offset: u64) -> Option<(Object, Mark)> {
        let table = self.zone_of(offset)?;
        let chunk = (offset.checked_sub(table.data)? / CHUNK) as u32;
        let head = chunk.checked_sub(table.back.get(chunk as usize)?.load(Ordering::Acquire))?;
        let at = table.zone.entry(head);
        let inside = offset - table.data - u64::from(head) * CHUNK;
        let [word, fingerprint] = media.load_pair(at);
        // By invariant 1 an entry is free, or one that can stand there.
        let (kind, chunks, slot) = Entry::fields(word);
        if kind == Entry::RUN {
            // 32 bits: a run is at most 16 MiB, and this is on every access.
            let index = (inside as u32).checked_div(slot)?;
            // Bits behind the last slot are never set in the file by this pool; a forged one is behind the end.
            let whole = inside + u64::from(slot) <= u64::from(chunks) * CHUNK;
            if inside as u32 != index * slot || u64::from(index) >= MAX_SLOTS || !whole {
                return None;
            }
            let bit = index % 64;
            let word = table.bitmaps + u64::from(head) * BITMAP + u64::from(index / 64) * 8;
            if media.load(word) >> bit & 1 == 0 {
                return None;
            }
            let object = Object { offset, size: slot.into(), fingerprint };
            return Some((object, Mark::Bit { word, mask: 1 << bit }));
        }
        let object = Object { offset, size: u64::from(chunks) * CHUNK, fingerprint };
        (kind == Entry::LARGE && inside == 0).then_some((object, Mark::Entry { at }))
    }

    /// Calls `visit` with every live object, zone by zone, chunk by chunk; stops when it says `false`.
    pub(crate) fn for_each(&self, media: &Media, mut visit: impl FnMut(Object) -> bool) {
        for zone in self.zones() {
            let mut chunk = 0;
            while chunk < zone.chunks {
                let at = zone.entry(chunk);
                let entry = Entry::decode(media.load(at), zone.chunks - chunk);
                let start = zone.chunk(chunk);
                chunk += match entry {
                    Some(Entry::Run { chunks, slot }) => {
                        let fingerprint = media.load(at + 8);
                        let slots = u64::from(chunks) * CHUNK / u64::from(slot);
                        for word in 0..slots.div_ceil(64) {
                            let mut bits = media.load(zone.bitmap(chunk) + word * 8);
                            while bits != 0 {
                                let index = word * 64 + u64::from(bits.trailing_zeros());
                                bits &= bits - 1;
                                let offset = start + index * u64::from(slot);
                                let object = Object { offset, size: slot.into(), fingerprint };
                                if index < slots && !visit(object) {
                                    return;
                                }
                            }
                        }
                        chunks
                    }
                    Some(Entry::Large { chunks }) => {
                        let size = u64::from(chunks) * CHUNK;
                        if !visit(Object { offset: start, size, fingerprint: media.load(at + 8) }) {
                            return;
                        }
                        chunks
                    }
                    Some(Entry::Free) | None => 1,
                };
            }
        }
    }
}

//! The index in memory: which slots may be handed out. The truth is in the file; this is rebuilt from it.
//!
//! Opening walks the tables. The bitmap of a run is read when something is first allocated of its kind, or
//! freed in it.
//!
//! Invariants
//! 1. A slot is handed out only if its bit is clear here; a bit is set here whenever it is set in the file,
//!    and while the slot is reserved. So a bit is cleared here only after it was cleared in the file and the
//!    record that did so can no longer be replayed over later ones.
//! 2. A run with `bits == None` has no reserved slot, and no free of a slot of it is under way.
//! 3. `fresh` chunks are not yet in the file what they are here: whoever publishes in them logs that, too.
//!    `stale` chunks have an entry in the file that must be cleared by whoever makes them part of another.
//! 4. `backed` chunks have disk space behind all of them, so writing to them cannot fail. Slots come from those only.
//! 5. A run whose slots are all free has nothing reserved, so its chunks may be taken for something else.
//!
//! The pool keeps the one `Heap` behind a lock.

#![forbid(unsafe_code)]

mod chunks;
mod load;

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

use super::fold::{Fold, FoldMap};
use super::format::{CHUNK, MAX_SLOTS, MAX_ZONE_CHUNKS, MIN_SLOT, Zone};
use super::media::{Backing, Media};
use super::table::{Mark, Table};
use crate::base::bits::{floor_log2, round_up};
use crate::base::error::{Error, OomReason, Result};

/// Slots up to this size lie in runs; larger objects have chunks of their own.
const MAX_RUN_SLOT: u64 = 2 * CHUNK;
/// Most chunks of a run.
const MAX_RUN_CHUNKS: u32 = 8;
const MAX_ALIGN: usize = CHUNK as usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Free,
    Run,
    Large,
    /// Belongs to the head so many chunks before.
    Rest(u32),
}

#[derive(Clone, Debug)]
struct Chunk {
    kind: Kind,
    fresh: bool,
    stale: bool,
    backed: bool,
    /// It is in its bin's `open`, or in the heap's `empty`.
    in_open: bool,
    in_empty: bool,
    chunks: u32,
    slot: u32,
    slots: u32,
    free: u32,
    /// No word before this one has a clear bit.
    hint: u32,
    bin: u32,
    fingerprint: u64,
    bits: Option<Box<[u64]>>,
}

const FREE_CHUNK: Chunk = Chunk {
    kind: Kind::Free,
    fresh: false,
    stale: false,
    backed: false,
    in_open: false,
    in_empty: false,
    chunks: 1,
    slot: 0,
    slots: 0,
    free: 0,
    hint: 0,
    bin: u32::MAX,
    fingerprint: 0,
    bits: None,
};

/// The runs of one type and slot size.
#[derive(Debug, Default)]
struct Bin {
    /// Runs that may have room; the last is used first.
    open: Vec<u32>,
    /// Runs whose bitmap was not read yet.
    unread: Vec<u32>,
    registered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BinKey {
    fingerprint: u64,
    slot: u32,
}

impl core::hash::Hash for BinKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.fingerprint ^ u64::from(self.slot));
    }
}

/// A slot handed out, not yet in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    /// How it will be marked live.
    pub(crate) mark: Mark,
    /// The run's entry must be logged together with the mark.
    pub(crate) fresh: bool,
    /// The type is in the file's list of types.
    pub(crate) registered: bool,
}

/// The bin of a type that was asked for lately.
#[derive(Clone, Copy, Debug, Default)]
struct Recent {
    fingerprint: u64,
    /// 0 for none.
    slot: u32,
    bin: u32,
}

const RECENT: usize = 16;

#[derive(Debug)]
pub(crate) struct Heap {
    zones: Vec<(Zone, u32)>,
    chunks: Vec<Chunk>,
    free_chunks: u32,
    /// No chunk before this one is free.
    free_hint: u32,
    bins: Vec<Bin>,
    bin_of: FoldMap<BinKey, u32>,
    recent: [Recent; RECENT],
    registered: HashSet<u64, BuildHasherDefault<Fold>>,
    /// Runs that became empty; checked when they are taken.
    empty: Vec<u32>,
    backing: Backing,
    read_all: bool,
}

/// How many bytes a slot for `size` bytes has. `exact`: for a type, whose objects are all of that size;
/// else sizes are rounded so that few different ones exist.
#[inline]
fn slot_size(size: usize, align: usize, exact: bool) -> Result<u64> {
    let overflow = Error::oom(size, OomReason::Overflow);
    if align > MAX_ALIGN {
        return Err(Error::config("alignment", align, "up to 65536 in a file"));
    }
    let size = size.max(MIN_SLOT as usize);
    let size = if exact {
        size
    } else {
        let step = if size <= 128 { 32 } else { 1 << (floor_log2(size - 1) - 2) };
        round_up(size, step).ok_or(overflow)?
    };
    round_up(size, align.max(8)).filter(|&n| n <= isize::MAX as usize).map(|n| n as u64).ok_or(overflow)
}

impl Heap {
    /// Reads the tables of all zones. `lenient` takes a chunk whose entry is wrong for occupied, so that
    /// what is whole can be read.
    pub(crate) fn new(
        media: &Media,
        table: &Table,
        zones: &[Zone],
        backing: Backing,
        lenient: bool,
    ) -> Result<Self> {
        let mut heap = Self {
            zones: Vec::new(),
            chunks: Vec::new(),
            free_chunks: 0,
            free_hint: 0,
            bins: Vec::new(),
            bin_of: FoldMap::default(),
            recent: [Recent::default(); RECENT],
            registered: HashSet::default(),
            empty: Vec::new(),
            backing,
            read_all: false,
        };
        for zone in zones {
            heap.add_zone(*zone);
        }
        for (number, &zone) in zones.iter().enumerate() {
            heap.read_table(media, table, number, zone, lenient)?;
        }
        Ok(heap)
    }

    /// The bin of a type and slot size.
    #[inline]
    fn bin(&mut self, key: BinKey) -> u32 {
        let recent = &self.recent[(key.fingerprint ^ u64::from(key.slot) >> 5) as usize % RECENT];
        if (recent.fingerprint, recent.slot) == (key.fingerprint, key.slot) {
            return recent.bin;
        }
        self.bin_slow(key)
    }

    #[cold]
    fn bin_slow(&mut self, key: BinKey) -> u32 {
        let registered = self.registered.contains(&key.fingerprint) || key.fingerprint < 1 << 63;
        let bins = &mut self.bins;
        let bin = *self.bin_of.entry(key).or_insert_with(|| {
            bins.push(Bin { registered, ..Bin::default() });
            bins.len() as u32 - 1
        });
        let BinKey { fingerprint, slot } = key;
        self.recent[(fingerprint ^ u64::from(slot) >> 5) as usize % RECENT] =
            Recent { fingerprint, slot, bin };
        bin
    }

    /// The list of types in the file has this one.
    pub(crate) fn set_registered(&mut self, fingerprint: u64) {
        self.registered.insert(fingerprint);
        for (key, &bin) in &self.bin_of {
            if key.fingerprint == fingerprint {
                self.bins[bin as usize].registered = true;
            }
        }
    }

    pub(crate) fn is_registered(&self, fingerprint: u64) -> bool {
        self.registered.contains(&fingerprint)
    }

    /// Reserves room for `size` bytes of type `fingerprint`.
    #[inline]
    pub(crate) fn reserve(
        &mut self,
        media: &Media,
        table: &Table,
        fingerprint: u64,
        size: usize,
        align: usize,
        exact: bool,
    ) -> Result<Slot> {
        let slot = slot_size(size, align, exact)?;
        if slot > MAX_RUN_SLOT {
            return self.reserve_large(media, table, fingerprint, slot);
        }
        let bin = self.bin(BinKey { fingerprint, slot: slot as u32 });
        if let Some(&run) = self.bins[bin as usize].open.last()
            && let Some(found) = self.take(run, bin)
        {
            return Ok(found);
        }
        self.reserve_slow(media, table, fingerprint, slot as u32, bin)
    }

    /// A clear bit of `run`, which is set; `None` where the run is full or of another kind by now.
    #[inline]
    fn take(&mut self, run: u32, bin: u32) -> Option<Slot> {
        let chunk = &mut self.chunks[run as usize];
        if chunk.kind != Kind::Run || chunk.bin != bin || chunk.free == 0 || !chunk.backed {
            return None;
        }
        let bits = chunk.bits.as_mut()?;
        let mut word = chunk.hint as usize;
        while bits[word] == u64::MAX {
            word += 1;
        }
        let bit = bits[word].trailing_ones();
        bits[word] |= 1 << bit;
        chunk.hint = word as u32;
        chunk.free -= 1;
        let (size, fresh) = (u64::from(chunk.slot), chunk.fresh);
        let registered = self.bins[bin as usize].registered;
        let (_, zone, local) = self.place(run);
        Some(Slot {
            offset: zone.chunk(local) + (word as u64 * 64 + u64::from(bit)) * size,
            size,
            mark: Mark::Bit { word: zone.bitmap(local) + word as u64 * 8, mask: 1 << bit },
            fresh,
            registered,
        })
    }

    /// Reserves more slots of the word in which `slot` is, which was just reserved: up to `most`. Returns their bits.
    pub(crate) fn reserve_beside(&mut self, slot: &Slot, most: u32) -> u64 {
        let Some(head) = self.head(slot.offset) else { return 0 };
        let (_, zone, local) = self.place(head);
        let chunk = &mut self.chunks[head as usize];
        let Some(bits) = chunk.bits.as_mut() else { return 0 };
        let word = &mut bits[((slot.offset - zone.chunk(local)) / slot.size / 64) as usize];
        let clear = !*word;
        let (mut rest, mut count) = (clear, 0);
        while rest != 0 && count < most {
            rest &= rest - 1;
            count += 1;
        }
        *word |= clear ^ rest;
        chunk.free -= count;
        clear ^ rest
    }

    #[cold]
    fn reserve_slow(
        &mut self,
        media: &Media,
        table: &Table,
        fingerprint: u64,
        slot: u32,
        bin: u32,
    ) -> Result<Slot> {
        loop {
            if let Some(&run) = self.bins[bin as usize].open.last() {
                if let Some(found) = self.take(run, bin) {
                    return Ok(found);
                }
                if self.back_run(media, run, bin)? {
                    continue;
                }
                self.bins[bin as usize].open.pop();
                let chunk = &mut self.chunks[run as usize];
                chunk.in_open &= chunk.bin != bin;
            } else if let Some(run) = self.bins[bin as usize].unread.pop() {
                self.read_bits(media, run);
            } else {
                self.new_run(media, table, fingerprint, slot, bin)?;
            }
        }
    }

    /// Before the first slot of a run is handed out that was in the file already: it may have holes. Whether it
    /// was that which kept slots back.
    fn back_run(&mut self, media: &Media, run: u32, bin: u32) -> Result<bool> {
        let (_, zone, local) = self.place(run);
        let chunk = &self.chunks[run as usize];
        if chunk.kind != Kind::Run || chunk.bin != bin || chunk.free == 0 || chunk.backed {
            return Ok(false);
        }
        let chunks = chunk.chunks;
        media.keep_backed(zone.chunk(local), u64::from(chunks) * CHUNK)?;
        self.chunks[run as usize..(run + chunks) as usize].iter_mut().for_each(|chunk| chunk.backed = true);
        Ok(true)
    }

    fn new_run(&mut self, media: &Media, table: &Table, fingerprint: u64, slot: u32, bin: u32) -> Result<()> {
        let size = u64::from(slot);
        let least = size.div_ceil(CHUNK) as u32;
        // As few chunks as keep what is left over below a sixteenth.
        let good = |n: &u32| (u64::from(*n) * CHUNK) % size * 16 <= u64::from(*n) * CHUNK;
        let wanted = (least..=MAX_RUN_CHUNKS).find(good).unwrap_or(MAX_RUN_CHUNKS);
        let wanted = wanted.min((MAX_SLOTS * size / CHUNK).max(1) as u32).max(least);
        let mut chunks = wanted;
        let head = loop {
            match self.take_chunks(media, table, chunks, size as usize) {
                Ok(head) => break head,
                Err(_) if chunks > least => chunks -= 1,
                Err(error) => return Err(error),
            }
        };
        self.occupy(head, chunks, Kind::Run);
        let (number, _, local) = self.place(head);
        for distance in 1..chunks {
            table.set_back(number, local + distance, distance);
        }
        let slots = (u64::from(chunks) * CHUNK / size) as u32;
        let mut bits = vec![0u64; slots.div_ceil(64) as usize].into_boxed_slice();
        mask_tail(&mut bits, slots);
        let run = &mut self.chunks[head as usize];
        (run.slot, run.slots, run.free, run.hint) = (slot, slots, slots, 0);
        (run.bin, run.fingerprint, run.fresh, run.bits) = (bin, fingerprint, true, Some(bits));
        self.list(head);
        Ok(())
    }

    #[cold]
    fn reserve_large(&mut self, media: &Media, table: &Table, fingerprint: u64, size: u64) -> Result<Slot> {
        let chunks = size.div_ceil(CHUNK);
        if chunks > MAX_ZONE_CHUNKS {
            return Err(Error::oom(size as usize, OomReason::TooLarge((MAX_ZONE_CHUNKS * CHUNK) as usize)));
        }
        let chunks = chunks as u32;
        let head = self.take_chunks(media, table, chunks, size as usize)?;
        self.occupy(head, chunks, Kind::Large);
        let chunk = &mut self.chunks[head as usize];
        (chunk.fingerprint, chunk.fresh) = (fingerprint, true);
        let (_, zone, local) = self.place(head);
        Ok(Slot {
            offset: zone.chunk(local),
            size: u64::from(chunks) * CHUNK,
            mark: Mark::Entry { at: zone.entry(local) },
            fresh: true,
            registered: self.registered.contains(&fingerprint) || fingerprint < 1 << 63,
        })
    }

    /// To be called before a live object is freed in the file.
    pub(crate) fn prepare_free(&mut self, media: &Media, offset: u64) {
        if let Some(head) = self.head(offset) {
            self.read_bits(media, head);
        }
    }

    /// Takes a slot back: a reserved one that was not published, or one that is free in the file by now.
    /// Returns its size.
    #[inline]
    pub(crate) fn release(&mut self, table: &Table, offset: u64) -> u64 {
        let Some(head) = self.head(offset) else { return 0 };
        let (_, zone, local) = self.place(head);
        let chunk = &mut self.chunks[head as usize];
        if chunk.kind == Kind::Large {
            let size = u64::from(chunk.chunks) * CHUNK;
            // What was reserved only has no entry; what was freed has lost it.
            self.free_chunks_of(head, table, false);
            return size;
        }
        let index = ((offset - zone.chunk(local)) / u64::from(chunk.slot)) as u32;
        let word = index / 64;
        // What was not read yet will be read as it is by then.
        let Some(bits) = chunk.bits.as_mut() else { return chunk.slot.into() };
        debug_assert!(bits[word as usize] & 1 << (index % 64) != 0, "released twice: {offset:#x}");
        bits[word as usize] &= !(1 << (index % 64));
        chunk.hint = chunk.hint.min(word);
        chunk.free += 1;
        let size = chunk.slot.into();
        if !chunk.in_open || chunk.free == chunk.slots {
            self.list(head);
        }
        size
    }

    /// Puts a run that has room into the lists where it will be looked for.
    #[inline]
    fn list(&mut self, run: u32) {
        let chunk = &mut self.chunks[run as usize];
        if !chunk.in_open && chunk.free > 0 {
            chunk.in_open = true;
            self.bins[chunk.bin as usize].open.push(run);
        }
        if !chunk.in_empty && chunk.free == chunk.slots {
            chunk.in_empty = true;
            self.empty.push(run);
        }
    }

    /// The size of the slot at `offset` if it is reserved or live and of type `fingerprint`.
    pub(crate) fn held(&self, offset: u64, fingerprint: u64) -> Option<u64> {
        let head = self.head(offset)?;
        let chunk = &self.chunks[head as usize];
        if chunk.fingerprint != fingerprint {
            return None;
        }
        let (_, zone, local) = self.place(head);
        let inside = offset - zone.chunk(local);
        match chunk.kind {
            Kind::Large => (inside == 0).then_some(u64::from(chunk.chunks) * CHUNK),
            _ => {
                let slot = u64::from(chunk.slot);
                let (index, rest) = (inside / slot, inside % slot);
                let set = chunk.bits.as_ref()?.get(index as usize / 64)? & 1 << (index % 64) != 0;
                (rest == 0 && index < chunk.slots.into() && set).then_some(slot)
            }
        }
    }

    /// Calls `visit` with offset and size of every slot of type `fingerprint` that is reserved or live, as
    /// far as bitmaps were read.
    pub(crate) fn for_each_held(&self, fingerprint: u64, mut visit: impl FnMut(u64, u64)) {
        for (number, chunk) in self.chunks.iter().enumerate() {
            if chunk.fingerprint != fingerprint || !matches!(chunk.kind, Kind::Run | Kind::Large) {
                continue;
            }
            let (_, zone, local) = self.place(number as u32);
            let start = zone.chunk(local);
            if chunk.kind == Kind::Large {
                visit(start, u64::from(chunk.chunks) * CHUNK);
            }
            for slot in 0..chunk.slots {
                let word = chunk.bits.as_ref().map_or(0, |bits| bits[slot as usize / 64]);
                if word & 1 << (slot % 64) != 0 {
                    visit(start + u64::from(slot) * u64::from(chunk.slot), chunk.slot.into());
                }
            }
        }
    }
}

/// Sets the bits behind the last slot.
fn mask_tail(bits: &mut [u64], slots: u32) {
    if !slots.is_multiple_of(64)
        && let Some(last) = bits.last_mut()
    {
        *last |= u64::MAX << (slots % 64);
    }
}

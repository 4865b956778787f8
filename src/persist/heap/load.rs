//! Reading the tables and bitmaps of the file into the index.

#![forbid(unsafe_code)]

use super::{BinKey, FREE_CHUNK, Heap, Kind, mask_tail};
use crate::base::error::{Error, Result};
use crate::persist::format::{BITMAP_WORDS, CHUNK, Entry, Zone};
use crate::persist::media::Media;
use crate::persist::table::Table;

impl Heap {
    pub(crate) fn add_zone(&mut self, zone: Zone) {
        self.zones.push((zone, self.chunks.len() as u32));
        self.chunks.resize(self.chunks.len() + zone.chunks as usize, FREE_CHUNK);
        self.free_chunks += zone.chunks;
    }

    pub(super) fn read_table(
        &mut self,
        media: &Media,
        table: &Table,
        number: usize,
        zone: Zone,
        lenient: bool,
    ) -> Result<()> {
        let first = self.zones[number].1;
        let mut chunk = 0;
        while chunk < zone.chunks {
            let at = zone.entry(chunk);
            let word = media.load(at);
            let fingerprint = media.load(at + 8);
            let global = first + chunk;
            let covered = match Entry::decode(word, zone.chunks - chunk) {
                Some(Entry::Free) => 1,
                Some(Entry::Run { chunks, slot }) => {
                    let slots = (u64::from(chunks) * CHUNK / u64::from(slot)) as u32;
                    self.occupy(global, chunks, Kind::Run);
                    let bin = self.bin(BinKey { fingerprint, slot });
                    let head = &mut self.chunks[global as usize];
                    (head.slot, head.slots, head.bin, head.fingerprint) = (slot, slots, bin, fingerprint);
                    self.bins[bin as usize].unread.push(global);
                    for distance in 1..chunks {
                        table.set_back(number, chunk + distance, distance);
                    }
                    chunks
                }
                Some(Entry::Large { chunks }) => {
                    self.occupy(global, chunks, Kind::Large);
                    chunks
                }
                None if lenient => {
                    self.occupy(global, 1, Kind::Large);
                    1
                }
                None => {
                    let what =
                        "a table entry: run memory-pool check, or open it read-only to save what is whole";
                    return Err(Error::corrupt(at, what, word));
                }
            };
            chunk += covered;
        }
        Ok(())
    }

    /// Reads the bitmap of a run, if that was not done before.
    pub(super) fn read_bits(&mut self, media: &Media, run: u32) {
        let (_, zone, local) = self.place(run);
        let chunk = &mut self.chunks[run as usize];
        if chunk.kind != Kind::Run || chunk.bits.is_some() {
            return;
        }
        let words = chunk.slots.div_ceil(64) as usize;
        let mut bits = [0u64; BITMAP_WORDS];
        media.load_words(zone.bitmap(local), &mut bits[..words]);
        mask_tail(&mut bits[..words], chunk.slots);
        chunk.free = bits[..words].iter().map(|word| word.count_zeros()).sum();
        chunk.hint = 0;
        chunk.bits = Some(bits[..words].into());
        self.list(run);
    }
}

//! Chunks: which are free, which make up a run or an object, and what the file knows of them.

#![forbid(unsafe_code)]

use super::{Chunk, FREE_CHUNK, Heap, Kind};
use crate::base::error::{Error, OomReason, Result};
use crate::persist::format::{CHUNK, Entry, Zone};
use crate::persist::journal::Ops;
use crate::persist::media::Media;
use crate::persist::table::Table;

impl Heap {
    /// Takes chunks out of the free ones.
    pub(super) fn occupy(&mut self, head: u32, chunks: u32, kind: Kind) {
        for distance in 0..chunks {
            let chunk = &mut self.chunks[(head + distance) as usize];
            debug_assert_eq!(chunk.kind, Kind::Free);
            chunk.kind = if distance == 0 { kind } else { Kind::Rest(distance) };
        }
        self.chunks[head as usize].chunks = chunks;
        self.free_chunks -= chunks;
    }

    /// Adjacent free chunks with disk space behind them, still marked free.
    pub(super) fn take_chunks(
        &mut self,
        media: &Media,
        table: &Table,
        chunks: u32,
        size: usize,
    ) -> Result<u32> {
        let head = match self.find_free(chunks) {
            Some(head) => head,
            None => {
                self.collect_empty(media, table);
                let held = self.zones.iter().map(|(zone, _)| zone.end()).max().unwrap_or(0) as usize;
                self.find_free(chunks).ok_or(Error::oom(size, OomReason::PoolFull(held)))?
            }
        };
        let (_, zone, local) = self.place(head);
        let span = head as usize..(head + chunks) as usize;
        if !self.chunks[span.clone()].iter().all(|chunk| chunk.backed) {
            media.back(zone.chunk(local), u64::from(chunks) * CHUNK, self.backing)?;
            for chunk in &mut self.chunks[span] {
                chunk.backed = true;
            }
        }
        Ok(head)
    }

    /// First fit among the free chunks.
    fn find_free(&mut self, wanted: u32) -> Option<u32> {
        if self.free_chunks < wanted {
            return None;
        }
        while self.chunks.get(self.free_hint as usize).is_some_and(|c| c.kind != Kind::Free) {
            self.free_hint += 1;
        }
        for &(zone, first) in &self.zones {
            let end = first + zone.chunks;
            let mut start = first.max(self.free_hint);
            let mut at = start;
            while at < end && end - start >= wanted {
                let chunk = &self.chunks[at as usize];
                match chunk.kind {
                    Kind::Free => at += 1,
                    Kind::Rest(_) => (at, start) = (at + 1, at + 1),
                    _ => (at, start) = (at + chunk.chunks, at + chunk.chunks),
                }
                if at - start == wanted {
                    return Some(start);
                }
            }
        }
        None
    }

    /// Makes the chunks of empty runs free.
    #[cold]
    fn collect_empty(&mut self, media: &Media, table: &Table) {
        if !self.read_all {
            self.read_all = true;
            for chunk in 0..self.chunks.len() as u32 {
                self.read_bits(media, chunk);
            }
        }
        while let Some(run) = self.empty.pop() {
            let chunk = &mut self.chunks[run as usize];
            chunk.in_empty = false;
            if chunk.kind == Kind::Run && chunk.free == chunk.slots && chunk.bits.is_some() {
                let stale = !chunk.fresh;
                self.free_chunks_of(run, table, stale);
            }
        }
    }

    /// Marks all chunks of `head` free.
    pub(super) fn free_chunks_of(&mut self, head: u32, table: &Table, stale: bool) {
        let chunks = self.chunks[head as usize].chunks;
        let (number, _, local) = self.place(head);
        for distance in 0..chunks {
            let chunk = &mut self.chunks[(head + distance) as usize];
            let stale = chunk.stale || (stale && distance == 0);
            *chunk = Chunk { stale, backed: chunk.backed, ..FREE_CHUNK };
            table.set_back(number, local + distance, 0);
        }
        self.free_chunks += chunks;
        self.free_hint = self.free_hint.min(head);
    }

    /// Logs what the file must learn of the run or object around `offset` before, or with, its mark. `logged`
    /// are those that the record has already.
    pub(crate) fn log_fresh(&self, offset: u64, logged: &mut Vec<u32>, ops: &mut Ops) {
        let Some(number) = self.head(offset) else { return };
        let head = &self.chunks[number as usize];
        if !head.fresh || logged.contains(&number) {
            return;
        }
        logged.push(number);
        let (_, zone, local) = self.place(number);
        for distance in 1..head.chunks {
            if self.chunks[(number + distance) as usize].stale {
                ops.set(zone.entry(local + distance), 0);
            }
        }
        let entry = match head.kind {
            Kind::Run => Entry::Run { chunks: head.chunks, slot: head.slot },
            _ => Entry::Large { chunks: head.chunks },
        };
        ops.entry(zone.entry(local), zone.bitmap(local), entry.encode(), head.fingerprint);
    }

    /// What was logged of the run or object around `offset` is in the file.
    pub(crate) fn confirm(&mut self, offset: u64) {
        let Some(head) = self.head(offset).filter(|head| self.chunks[*head as usize].fresh) else { return };
        for distance in 0..self.chunks[head as usize].chunks {
            self.chunks[(head + distance) as usize].stale = false;
        }
        self.chunks[head as usize].fresh = false;
    }

    /// Gives the disk space of free chunks back, but for `keep` bytes of them.
    pub(crate) fn punch_free(&mut self, media: &Media, table: &Table, keep: u64) {
        self.collect_empty(media, table);
        let mut kept = 0;
        for number in 0..self.chunks.len() {
            if self.chunks[number].kind != Kind::Free {
                continue;
            }
            if kept + CHUNK <= keep && self.chunks[number].backed {
                kept += CHUNK;
                continue;
            }
            let (_, zone, local) = self.place(number as u32);
            media.punch(zone.chunk(local), CHUNK);
            self.chunks[number].backed = false;
        }
    }

    /// Bytes of free chunks, and of the longest row of them.
    pub(crate) fn free_space(&self) -> (u64, u64) {
        let mut longest = 0;
        for &(zone, first) in &self.zones {
            let mut row = 0;
            for chunk in &self.chunks[first as usize..(first + zone.chunks) as usize] {
                row = if chunk.kind == Kind::Free { row + 1 } else { 0 };
                longest = longest.max(row);
            }
        }
        (u64::from(self.free_chunks) * CHUNK, longest * CHUNK)
    }

    /// Zone and chunk in it of a chunk counted over all zones.
    #[inline]
    pub(super) fn place(&self, chunk: u32) -> (usize, Zone, u32) {
        let number = self.zones.iter().rposition(|&(_, first)| first <= chunk).unwrap_or(0);
        let (zone, first) = self.zones[number];
        (number, zone, chunk - first)
    }

    /// The head of the chunk at `offset`.
    #[inline]
    pub(super) fn head(&self, offset: u64) -> Option<u32> {
        let (zone, first) = self.zones.iter().find(|(zone, _)| offset < zone.end())?;
        let chunk = first + (offset.checked_sub(zone.data())? / CHUNK) as u32;
        match self.chunks[chunk as usize].kind {
            Kind::Rest(distance) => Some(chunk - distance),
            Kind::Free => None,
            _ => Some(chunk),
        }
    }
}

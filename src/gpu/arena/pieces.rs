//! The physical pieces of a pool, and which of them should fill a gap.
//!
//! The driver's price is one a piece, whatever its size, so pieces are few and large: each new one is about a
//! sixty-fourth of what the pool is about to hold, from one unit up to 32 MiB, and of large pools a four-thousandth
//! more. Where a gap is larger than that, it gets larger pieces.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::gpu::driver::Handle;

/// Pieces grow with the pool up to this size, ...
const LARGE_PIECE: usize = 32 << 20;
/// ... and then by this part of the pool, which so has fewer pieces than this.
const MANY: usize = 4096;
/// The part of the pool that a new piece is, while pieces are smaller than that.
const PART: usize = 64;
/// How much more than usual a piece may be where the gap is as large.
const STRETCH: usize = 4;

/// Physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gpu) struct Piece {
    pub(in crate::gpu) len: usize,
    pub(in crate::gpu) handle: Handle,
}

/// Where the memory for a gap comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gpu) enum From {
    /// A piece that lies at this address, where nobody needs it.
    Mapped(usize, Handle),
    /// A piece that lies nowhere.
    Spare(Handle),
    /// The driver.
    New,
}

/// A stretch of a gap without memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gpu) struct Gap {
    /// What must be filled.
    pub(in crate::gpu) start: usize,
    pub(in crate::gpu) end: usize,
    /// The hole around it.
    pub(in crate::gpu) low: usize,
    pub(in crate::gpu) high: usize,
}

impl Gap {
    /// Bytes that may be filled: the gap, and the hole on the side where no memory adjoins.
    fn room(&self) -> usize {
        if self.upwards() { self.high - self.start } else { self.end - self.low }
    }

    /// Whether the filling begins at the start; otherwise it ends at the end.
    fn upwards(&self) -> bool {
        self.end != self.high || self.start == self.low
    }

    /// The addresses of pieces of these lengths in the gap.
    pub(in crate::gpu) fn addresses(&self, lengths: impl Iterator<Item = usize>) -> Vec<usize> {
        let mut at = if self.upwards() { self.start } else { self.end };
        lengths
            .map(|len| {
                if self.upwards() {
                    at += len;
                    at - len
                } else {
                    at -= len;
                    at
                }
            })
            .collect()
    }
}

/// All pieces of a pool.
#[derive(Debug)]
pub(in crate::gpu) struct Pieces {
    pub(in crate::gpu) unit: usize,
    mapped: BTreeMap<usize, Piece>,
    pub(in crate::gpu) spare: Vec<Piece>,
    bytes: usize,
    spare_bytes: usize,
}

impl Pieces {
    /// Pieces in multiples of `unit`, a power of two.
    pub(in crate::gpu) fn new(unit: usize) -> Self {
        Self { unit, mapped: BTreeMap::new(), spare: Vec::new(), bytes: 0, spare_bytes: 0 }
    }

    /// Bytes of all pieces.
    pub(in crate::gpu) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of those that lie nowhere.
    pub(in crate::gpu) fn spare_bytes(&self) -> usize {
        self.spare_bytes
    }

    pub(in crate::gpu) fn metadata_bytes(&self) -> usize {
        // A B-tree's nodes are two thirds full or more, but for small ones.
        self.mapped.len() * (size_of::<usize>() + size_of::<Piece>()) * 3 / 2
            + self.spare.capacity() * size_of::<Piece>()
    }

    pub(in crate::gpu) fn insert(&mut self, at: usize, piece: Piece) {
        self.bytes += piece.len;
        self.mapped.insert(at, piece);
    }

    pub(in crate::gpu) fn remove(&mut self, at: usize) -> Option<Piece> {
        let piece = self.mapped.remove(&at)?;
        self.bytes -= piece.len;
        Some(piece)
    }

    pub(in crate::gpu) fn put_spare(&mut self, piece: Piece) {
        self.bytes += piece.len;
        self.spare_bytes += piece.len;
        self.spare.push(piece);
    }

    pub(in crate::gpu) fn take_spare(&mut self, handle: Handle) -> Option<Piece> {
        let at = self.spare.iter().position(|piece| piece.handle == handle)?;
        let piece = self.spare.swap_remove(at);
        self.bytes -= piece.len;
        self.spare_bytes -= piece.len;
        Some(piece)
    }

    /// The mapped pieces that begin in `[from, to)`.
    pub(in crate::gpu) fn within(&self, from: usize, to: usize) -> impl Iterator<Item = (usize, Piece)> + '_ {
        // One bound is found faster than two.
        let behind = self.mapped.range(from..).map(|(&at, &piece)| (at, piece));
        behind.take_while(move |&(at, _)| at < to)
    }

    /// Whether there is memory at an address.
    pub(in crate::gpu) fn covers(&self, address: usize) -> bool {
        let last = self.mapped.range(..=address).next_back();
        last.is_some_and(|(at, piece)| address < at + piece.len)
    }

    /// Everything, for the pool's end.
    pub(in crate::gpu) fn drain(&mut self) -> (Vec<(usize, Piece)>, Vec<Piece>) {
        (self.bytes, self.spare_bytes) = (0, 0);
        (std::mem::take(&mut self.mapped).into_iter().collect(), std::mem::take(&mut self.spare))
    }

    /// The usual size of a new piece, where `lacking` bytes are to come to what the pool holds.
    pub(in crate::gpu) fn usual(&self, lacking: usize) -> usize {
        let bytes = self.bytes.saturating_add(lacking);
        let part = (bytes / PART).checked_next_power_of_two().unwrap_or(LARGE_PIECE);
        part.clamp(self.unit, LARGE_PIECE.max(self.unit)) + ((bytes / MANY) & !(self.unit - 1))
    }

    /// The pieces that fill `gap`: from `at_hand` (sorted by length; what is taken leaves it), else new ones, of
    /// `usual` size or larger where `usual` is given, of exactly the size that is missing otherwise.
    pub(in crate::gpu) fn choose(
        &self,
        gap: &Gap,
        at_hand: &mut Vec<(usize, From)>,
        usual: Option<usize>,
    ) -> Vec<(usize, From)> {
        let mut chosen = Vec::new();
        let (mut need, mut room) = (gap.end - gap.start, gap.room());
        while need > 0 {
            // The largest that is not too large; else the smallest for which there is room.
            let fits = at_hand.partition_point(|&(len, _)| len <= need);
            let pick = match fits.checked_sub(1) {
                Some(pick) => Some(pick),
                None => at_hand.first().is_some_and(|&(len, _)| len <= room).then_some(0),
            };
            let (len, from) = match pick {
                Some(pick) => at_hand.remove(pick),
                None => (self.new_len(need, room, usual), From::New),
            };
            chosen.push((len, from));
            need = need.saturating_sub(len);
            room -= len;
        }
        chosen
    }

    fn new_len(&self, need: usize, room: usize, usual: Option<usize>) -> usize {
        let Some(usual) = usual else { return need };
        let most = (usual * STRETCH).min(LARGE_PIECE.max(usual));
        let mut len = usual;
        while len * 2 <= need && len * 2 <= most {
            len *= 2;
        }
        len.min(room)
    }

    /// Whether mapped pieces cover `[from, to)` without a break.
    pub(in crate::gpu) fn cover_all(&self, from: usize, to: usize) -> bool {
        let first = self.mapped.range(..=from).next_back().map(|(&at, _)| at);
        let Some(mut at) = first else { return from == to };
        while at < to {
            match self.mapped.get(&at) {
                Some(piece) => at += piece.len,
                None => return false,
            }
        }
        true
    }

    /// Bytes that are mapped.
    pub(in crate::gpu) fn mapped_bytes(&self) -> usize {
        self.bytes - self.spare_bytes
    }
}

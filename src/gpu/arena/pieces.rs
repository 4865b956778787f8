//! The physical pieces of a pool, and which of them should fill a gap.
//!
//! The driver's price is one a piece, whatever its size, so pieces are few and large: each new one is about a
//! sixty-fourth of what the pool is about to hold, from one unit up to 32 MiB, and of large pools a four-thousandth
//! more. Where several streams use the pool, it is half of that: what each of them freed lies between blocks of
//! others, and a large piece is seldom free as a whole. Where a gap is larger than that, it gets larger pieces.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::Done;
use super::shadows::Shadows;
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

impl From {
    fn handle(self) -> Option<Handle> {
        match self {
            Self::Mapped(_, handle) | Self::Spare(handle) => Some(handle),
            Self::New => None,
        }
    }
}

/// A piece of memory for a stretch of a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gpu) struct Step {
    pub(in crate::gpu) to: usize,
    pub(in crate::gpu) len: usize,
    pub(in crate::gpu) from: From,
    /// The piece's shadow lies there: nothing is to be mapped.
    pub(in crate::gpu) shadowed: bool,
}

/// Bytes that the driver has to make for these steps.
pub(super) fn new_bytes<'a>(steps: impl IntoIterator<Item = &'a Step>) -> usize {
    steps.into_iter().filter(|step| step.from == From::New).map(|step| step.len).sum()
}

/// A piece that is to be given back to the driver, and all addresses at which it is mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::gpu) struct Leaving {
    pub(in crate::gpu) piece: Piece,
    /// Where it lies, if it lies anywhere.
    pub(in crate::gpu) home: Option<usize>,
    pub(in crate::gpu) shadows: Vec<usize>,
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

    /// Pieces of these lengths side by side in the gap.
    fn steps(&self, chosen: Vec<(usize, From)>) -> Vec<Step> {
        let mut at = if self.upwards() { self.start } else { self.end };
        let step = |(len, from)| {
            let to = if self.upwards() { at } else { at - len };
            at = if self.upwards() { at + len } else { at - len };
            Step { to, len, from, shadowed: false }
        };
        chosen.into_iter().map(step).collect()
    }

    /// What is left of the gap in front of a shadow and behind it.
    fn around(&self, from: usize, to: usize) -> (Self, Self) {
        (Self { end: from, high: from, ..*self }, Self { start: to, low: to, ..*self })
    }
}

/// All pieces of a pool.
#[derive(Debug)]
pub(in crate::gpu) struct Pieces {
    pub(in crate::gpu) unit: usize,
    /// By address.
    mapped: Vec<(usize, Piece)>,
    shadows: Shadows,
    pub(in crate::gpu) spare: Vec<Piece>,
    bytes: usize,
    spare_bytes: usize,
}

impl Pieces {
    /// Pieces in multiples of `unit`, a power of two.
    pub(in crate::gpu) fn new(unit: usize) -> Self {
        let shadows = Shadows::default();
        Self { unit, mapped: Vec::new(), shadows, spare: Vec::new(), bytes: 0, spare_bytes: 0 }
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
        self.shadows.len() * size_of::<(usize, Piece)>() * 3 / 2
            + self.mapped.capacity() * size_of::<(usize, Piece)>()
            + self.spare.capacity() * size_of::<Piece>()
    }

    pub(in crate::gpu) fn remove(&mut self, at: usize) -> Option<Piece> {
        let place = self.mapped.binary_search_by_key(&at, |&(at, _)| at).ok()?;
        let (_, piece) = self.mapped.remove(place);
        self.bytes -= piece.len;
        Some(piece)
    }

    fn put_spare(&mut self, piece: Piece) {
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
        self.mapped[self.before(from)..].iter().copied().take_while(move |&(at, _)| at < to)
    }

    /// How many mapped pieces begin in front of an address.
    fn before(&self, address: usize) -> usize {
        self.mapped.partition_point(|&(at, _)| at < address)
    }

    /// How many begin there or in front.
    fn up_to(&self, address: usize) -> usize {
        self.mapped.partition_point(|&(at, _)| at <= address)
    }

    /// Whether there is memory at an address.
    pub(in crate::gpu) fn covers(&self, address: usize) -> bool {
        let last = self.mapped[..self.up_to(address)].last();
        last.is_some_and(|(at, piece)| address < at + piece.len)
    }

    /// Notes where pieces are.
    pub(in crate::gpu) fn keep(&mut self, done: &Done) {
        self.bytes += done.mapped.iter().map(|(_, piece)| piece.len).sum::<usize>();
        for &(at, piece) in &done.mapped {
            self.mapped.insert(self.before(at), (at, piece));
        }
        done.spare.iter().for_each(|&piece| self.put_spare(piece));
        done.shadows.iter().for_each(|&(at, piece)| self.shadows.put(at, piece, true));
        done.stuck.iter().for_each(|&(at, piece)| self.shadows.put(at, piece, false));
    }

    /// A shadow goes, or a piece comes back to it.
    pub(super) fn take_shadow(&mut self, at: usize) {
        self.shadows.take(at);
    }

    /// The shadows that must go before gaps are filled so: what lies in the way, and what is too much.
    pub(super) fn in_the_way(&self, gaps: &[Vec<Step>]) -> Vec<(usize, Piece)> {
        let mut found = self.shadows.surplus(self.mapped.len() + self.spare.len());
        for steps in gaps {
            if let (Some(first), Some(last)) = (steps.first(), steps.last()) {
                found.extend(self.shadows.overlapping(first.to, last.to + last.len));
            }
        }
        let used = |at: usize| gaps.iter().flatten().any(|step| step.shadowed && step.to == at);
        found.retain(|&(at, _)| !used(at));
        found.sort_unstable_by_key(|&(at, _)| at);
        found.dedup();
        found
    }

    /// All places at which pieces are mapped that go; their shadows are forgotten.
    pub(in crate::gpu) fn leave(&mut self, pieces: Vec<(Option<usize>, Piece)>) -> Vec<Leaving> {
        if pieces.is_empty() {
            return Vec::new();
        }
        let mut places: HashMap<Handle, Vec<usize>> =
            pieces.iter().map(|(_, piece)| (piece.handle, Vec::new())).collect();
        self.shadows.take_of(&mut places);
        let leaving = |(home, piece): (Option<usize>, Piece)| Leaving {
            piece,
            home,
            shadows: places.remove(&piece.handle).unwrap_or_default(),
        };
        pieces.into_iter().map(leaving).collect()
    }

    /// Everything, for the pool's end.
    pub(in crate::gpu) fn drain(&mut self) -> Vec<Leaving> {
        (self.bytes, self.spare_bytes) = (0, 0);
        let mapped = std::mem::take(&mut self.mapped).into_iter().map(|(at, piece)| (Some(at), piece));
        let spare = std::mem::take(&mut self.spare).into_iter().map(|piece| (None, piece));
        self.leave(mapped.chain(spare).collect())
    }

    /// The usual size of a new piece, where `lacking` bytes are to come to what the pool holds for so many streams.
    pub(in crate::gpu) fn usual(&self, lacking: usize, streams: usize) -> usize {
        let bytes = self.bytes.saturating_add(lacking);
        let part = (bytes / if streams > 1 { 2 * PART } else { PART })
            .checked_next_power_of_two()
            .unwrap_or(LARGE_PIECE);
        part.clamp(self.unit, LARGE_PIECE.max(self.unit)) + ((bytes / MANY) & !(self.unit - 1))
    }

    /// How to fill `gap` from `at_hand` (sorted by length; what is taken leaves it) and with new pieces (see
    /// [`choose`](Self::choose)): with the pieces whose shadows lie there, unless more were to be made new then.
    pub(in crate::gpu) fn fill(
        &self,
        gap: &Gap,
        at_hand: &mut Vec<(usize, From)>,
        usual: Option<usize>,
    ) -> Vec<Step> {
        let shadowed = self.at_hand_in(gap, at_hand);
        if shadowed.is_empty() {
            return gap.steps(self.choose(gap, at_hand, usual));
        }
        let mut plain_at_hand = at_hand.clone();
        let plain = gap.steps(self.choose(gap, &mut plain_at_hand, usual));
        at_hand.retain(|(_, from)| shadowed.iter().all(|step| step.from != *from));
        let mut steps = Vec::new();
        let mut rest = *gap;
        for step in shadowed {
            let (front, back) = rest.around(step.to, step.to + step.len);
            steps.extend(front.steps(self.choose(&front, at_hand, usual)));
            steps.push(step);
            rest = back;
        }
        steps.extend(rest.steps(self.choose(&rest, at_hand, usual)));
        if new_bytes(&steps) <= new_bytes(&plain) {
            return steps;
        }
        *at_hand = plain_at_hand;
        plain
    }

    /// The pieces at hand whose shadows lie in a gap, by address. One that reaches beyond the gap would take memory that is
    /// needed elsewhere.
    fn at_hand_in(&self, gap: &Gap, at_hand: &[(usize, From)]) -> Vec<Step> {
        let mut found: Vec<Step> = Vec::new();
        for (to, shadow) in self.shadows.overlapping(gap.start, gap.end) {
            let inside = to >= gap.start && to + shadow.len <= gap.end && self.shadows.is_usable(to);
            let its = |(_, from): &&(usize, From)| from.handle() == Some(shadow.handle);
            if let Some(&(len, from)) = at_hand.iter().find(its).filter(|_| inside)
                && found.iter().all(|step| step.from != from)
            {
                found.push(Step { to, len, from, shadowed: true });
            }
        }
        found
    }

    /// The pieces that fill `gap`: from `at_hand` (sorted by length; what is taken leaves it), else new ones, of
    /// `usual` size or larger where `usual` is given, of exactly the size that is missing otherwise.
    fn choose(
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
        let first = self.up_to(from).saturating_sub(1);
        let mut at = from;
        for (start, piece) in &self.mapped[first..] {
            if at >= to || *start > at {
                break;
            }
            at = at.max(start + piece.len);
        }
        at >= to
    }

    /// A mapped piece that does not lie in front of the next.
    pub(super) fn misplaced(&self) -> Option<usize> {
        let wrong = |pair: &&[(usize, Piece)]| pair[0].0 + pair[0].1.len > pair[1].0;
        self.mapped.windows(2).find(wrong).map(|pair| pair[0].0)
    }

    /// A shadow that breaks invariant 5 of the [arena](super), if there is one.
    pub(super) fn misplaced_shadow(&self) -> Option<usize> {
        let known: HashMap<Handle, usize> = self
            .mapped
            .iter()
            .map(|(_, piece)| piece)
            .chain(&self.spare)
            .map(|piece| (piece.handle, piece.len))
            .collect();
        let mut end = 0;
        let mut wrong = |(at, piece): &(usize, Piece)| {
            let overlaps = *at < end || self.within(*at, at + piece.len).next().is_some();
            end = at + piece.len;
            overlaps || self.covers(*at) || known.get(&piece.handle) != Some(&piece.len)
        };
        self.shadows.iter().find(&mut wrong).map(|(at, _)| at)
    }

    /// Bytes that are mapped.
    pub(in crate::gpu) fn mapped_bytes(&self) -> usize {
        self.bytes - self.spare_bytes
    }
}

//! Where pieces that moved away are mapped still.
//!
//! Mapping costs fifty microseconds and more, and programs do the same again and again. So a piece that moves stays
//! mapped where it was, as a *shadow*, until something else is to lie there: if the piece comes back first, no call to
//! the driver is needed. One memory at several addresses is sound, since a piece moves only when all work on it is
//! complete, and what lies at a shadow is a hole, which nobody may use.
//!
//! Shadows take addresses and no memory, and each must be unmapped before its piece can be given back. So there are no
//! more of them than twice the pieces; beyond that the oldest go.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};

use super::Piece;
use crate::gpu::driver::Handle;

/// Shadows a piece, on average, from which on the oldest are unmapped.
const MOST: usize = 2;
/// So many more are unmapped at once, as a part of the pieces.
const AT_ONCE: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Shadow {
    piece: Piece,
    /// When it was left behind.
    since: u64,
    /// Whether the device reaches the memory there: what could not be unmapped after a failure it may not reach.
    usable: bool,
}

/// The shadows of a pool's pieces, by address.
#[derive(Debug, Default)]
pub(super) struct Shadows {
    places: BTreeMap<usize, Shadow>,
    clock: u64,
}

impl Shadows {
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn put(&mut self, at: usize, piece: Piece, usable: bool) {
        self.clock += 1;
        self.places.insert(at, Shadow { piece, since: self.clock, usable });
    }

    /// Whether a piece may come back to its shadow there.
    pub(super) fn is_usable(&self, at: usize) -> bool {
        self.places.get(&at).is_some_and(|shadow| shadow.usable)
    }

    pub(super) fn take(&mut self, at: usize) {
        self.places.remove(&at);
    }

    /// Those that overlap `[from, to)`.
    pub(super) fn overlapping(&self, from: usize, to: usize) -> impl Iterator<Item = (usize, Piece)> + '_ {
        let before = self.places.range(..from).next_back();
        let first = before.filter(|(at, shadow)| **at + shadow.piece.len > from).map_or(from, |(&at, _)| at);
        self.places.range(first..to.max(first)).map(|(&at, shadow)| (at, shadow.piece))
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, Piece)> + '_ {
        self.places.iter().map(|(&at, shadow)| (at, shadow.piece))
    }

    /// Takes out the shadows of the pieces that are named, and adds their places to each.
    pub(super) fn take_of(&mut self, pieces: &mut HashMap<Handle, Vec<usize>>) {
        self.places.retain(|&at, shadow| match pieces.get_mut(&shadow.piece.handle) {
            Some(places) => {
                places.push(at);
                false
            }
            None => true,
        });
    }

    /// The oldest, where there are too many for so many pieces.
    pub(super) fn surplus(&self, pieces: usize) -> Vec<(usize, Piece)> {
        let too_many = self.places.len().saturating_sub(pieces * MOST);
        if too_many == 0 {
            return Vec::new();
        }
        let mut all: Vec<_> =
            self.places.iter().map(|(&at, shadow)| (shadow.since, at, shadow.piece)).collect();
        all.sort_unstable_by_key(|&(since, ..)| since);
        all.truncate(too_many + pieces / AT_ONCE);
        all.into_iter().map(|(_, at, piece)| (at, piece)).collect()
    }
}

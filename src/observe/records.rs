//! What a layer knows of each block: a slab of records, an index by address, and a list per state.
//!
//! Invariants:
//! 1. Every record in use is in exactly one list, that of its state; the others are in the chain of spares.
//! 2. `index` has a power of two of slots, at most half of them used. Each record in use is found from the
//!    slot of its outer address by stepping over used slots only; no two have the same outer address.
//! 3. Room made stays: `insert` after `make_room(n)` succeeds `n` times.

use core::ops::{Index, IndexMut};

use super::metadata::{Metadata, Table, make_room};

/// The place of a record in the slab.
pub(super) type Id = u32;

const NONE: Id = Id::MAX;

/// Where a block is between allocation and oblivion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// The user has it.
    Live,
    /// Freed by the user, held back from the engine.
    Held,
    /// Checked after having been held, about to go to the engine.
    Ripe,
    /// With the engine; remembered to tell a double free from a foreign one.
    Gone,
}

const STATES: usize = 4;

/// When, by whom and from where; 16 bytes for what a [`Site`](crate::base::finding::Site) is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mark {
    pub(super) operation: u64,
    pub(super) thread: u32,
    pub(super) stack: u32,
}

/// A block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    /// Its first byte, as the user knows it.
    pub(super) outer: usize,
    /// Bytes that the user asked for.
    pub(super) size: usize,
    /// Its first byte and length as the engine knows it.
    pub(super) inner: usize,
    pub(super) inner_size: usize,
    /// The alignment that the user asked for.
    pub(super) align: usize,
    /// Pages around it are inaccessible.
    pub(super) fenced: bool,
    pub(super) state: State,
    pub(super) allocated: Mark,
    pub(super) freed: Mark,
    previous: Id,
    next: Id,
}

impl Record {
    pub(super) fn new(outer: usize, size: usize, align: usize, inner: usize, inner_size: usize) -> Self {
        Self {
            outer,
            size,
            inner,
            inner_size,
            align,
            fenced: false,
            state: State::Live,
            allocated: Mark::default(),
            freed: Mark::default(),
            previous: NONE,
            next: NONE,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct List {
    first: Id,
    last: Id,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    outer: usize,
    id: Id,
}

const EMPTY: Slot = Slot { outer: 0, id: NONE };

#[derive(Debug)]
pub(super) struct Records {
    slab: Table<Record>,
    /// First of the spare records, chained by `next`.
    spare: Id,
    spares: usize,
    index: Table<Slot>,
    used: usize,
    lists: [List; STATES],
}

impl Index<Id> for Records {
    type Output = Record;
    fn index(&self, id: Id) -> &Record {
        &self.slab[id as usize]
    }
}

impl IndexMut<Id> for Records {
    fn index_mut(&mut self, id: Id) -> &mut Record {
        &mut self.slab[id as usize]
    }
}

impl Records {
    pub(super) const fn new() -> Self {
        Self {
            slab: Table::new_in(Metadata),
            spare: NONE,
            spares: 0,
            index: Table::new_in(Metadata),
            used: 0,
            lists: [List { first: NONE, last: NONE, len: 0 }; STATES],
        }
    }

    /// Makes room for `more` records; `false` where memory is short.
    #[inline]
    pub(super) fn make_room(&mut self, more: usize) -> bool {
        let slab = self.spares + self.slab.capacity() - self.slab.len();
        let index = (self.index.len() / 2).saturating_sub(self.used);
        (slab >= more && index >= more) || self.make_room_slow(more)
    }

    #[cold]
    fn make_room_slow(&mut self, more: usize) -> bool {
        if self.slab.len() + more > NONE as usize || !make_room(&mut self.slab, more) {
            return false;
        }
        let slots = ((self.used + more) * 2).next_power_of_two();
        slots <= self.index.len() || self.rehash(slots)
    }

    fn rehash(&mut self, slots: usize) -> bool {
        let mut index = Table::new_in(Metadata);
        if !make_room(&mut index, slots) {
            return false;
        }
        index.resize(slots, EMPTY);
        let old = core::mem::replace(&mut self.index, index);
        for slot in old.iter().filter(|slot| slot.id != NONE) {
            let at = self.vacant(slot.outer);
            self.index[at] = *slot;
        }
        true
    }

    fn home(&self, outer: usize) -> usize {
        let hash = (outer >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as usize);
        (hash >> (usize::BITS / 2)) & (self.index.len() - 1)
    }

    /// The slot where `outer` is, or would be.
    #[inline]
    fn vacant(&self, outer: usize) -> usize {
        let mut at = self.home(outer);
        while self.index[at].id != NONE && self.index[at].outer != outer {
            at = (at + 1) & (self.index.len() - 1);
        }
        at
    }

    /// The record of the block that the user knows at `outer`, whatever its state.
    #[inline]
    pub(super) fn find(&self, outer: usize) -> Option<Id> {
        if self.index.is_empty() {
            return None;
        }
        let id = self.index[self.vacant(outer)].id;
        (id != NONE).then_some(id)
    }

    /// Adds a record, for which room was made and whose outer address has none yet.
    #[inline]
    pub(super) fn insert(&mut self, record: Record) -> Id {
        let id = match self.spare {
            NONE => {
                self.slab.push(record);
                self.slab.len() as Id - 1
            }
            id => {
                self.spare = self[id].next;
                self.spares -= 1;
                self[id] = record;
                id
            }
        };
        let at = self.vacant(record.outer);
        debug_assert!(self.index[at].id == NONE, "two records at {:#x}", record.outer);
        self.index[at] = Slot { outer: record.outer, id };
        self.used += 1;
        self.link(id);
        id
    }

    /// Forgets a record.
    #[inline]
    pub(super) fn remove(&mut self, id: Id) {
        self.unlink(id);
        let mask = self.index.len() - 1;
        let mut hole = self.vacant(self[id].outer);
        // Later slots of the run move up, so that none becomes unreachable (invariant 2).
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            if self.index[at].id == NONE {
                break;
            }
            let home = self.home(self.index[at].outer);
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                self.index[hole] = self.index[at];
                hole = at;
            }
        }
        self.index[hole] = EMPTY;
        self.used -= 1;
        self[id].next = self.spare;
        self.spare = id;
        self.spares += 1;
    }

    /// Changes a record's state; it becomes the last of its new list.
    #[inline]
    pub(super) fn set_state(&mut self, id: Id, state: State) {
        self.unlink(id);
        self[id].state = state;
        self.link(id);
    }

    /// The record that is longest in `state`.
    #[inline]
    pub(super) fn first(&self, state: State) -> Option<Id> {
        let first = self.lists[state as usize].first;
        (first != NONE).then_some(first)
    }

    /// How many are in `state`.
    #[inline]
    pub(super) fn count(&self, state: State) -> usize {
        self.lists[state as usize].len
    }

    /// The records in `state`, longest in it first.
    pub(super) fn iter(&self, state: State) -> impl Iterator<Item = Id> + '_ {
        core::iter::successors(self.first(state), |&id| {
            let next = self[id].next;
            (next != NONE).then_some(next)
        })
    }

    /// Forgets all records, and keeps the room.
    pub(super) fn clear(&mut self) {
        self.slab.clear();
        self.index.fill(EMPTY);
        (self.spare, self.spares, self.used) = (NONE, 0, 0);
        self.lists = [List { first: NONE, last: NONE, len: 0 }; STATES];
    }

    #[inline]
    fn link(&mut self, id: Id) {
        let state = self[id].state as usize;
        let last = self.lists[state].last;
        (self[id].previous, self[id].next) = (last, NONE);
        match last {
            NONE => self.lists[state].first = id,
            last => self[last].next = id,
        }
        self.lists[state].last = id;
        self.lists[state].len += 1;
    }

    #[inline]
    fn unlink(&mut self, id: Id) {
        let &Record { previous, next, state, .. } = &self[id];
        let list = &mut self.lists[state as usize];
        list.len -= 1;
        if previous == NONE {
            list.first = next;
        }
        if next == NONE {
            list.last = previous;
        }
        if previous != NONE {
            self[previous].next = next;
        }
        if next != NONE {
            self[next].previous = previous;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Walks every invariant.
    fn check(records: &Records) {
        let mut seen = 0;
        for state in [State::Live, State::Held, State::Ripe, State::Gone] {
            let ids: Vec<Id> = records.iter(state).collect();
            assert_eq!(ids.len(), records.count(state));
            for id in ids {
                assert_eq!(records[id].state, state);
                assert_eq!(records.find(records[id].outer), Some(id));
                seen += 1;
            }
        }
        assert_eq!(seen, records.used);
        assert_eq!(records.index.iter().filter(|slot| slot.id != NONE).count(), seen);
        assert_eq!(records.slab.len(), seen + records.spares);
        assert!(records.used * 2 <= records.index.len());
    }

    #[test]
    fn records_behave_like_a_map_with_lists() {
        let mut records = Records::new();
        let mut model: HashMap<usize, State> = HashMap::new();
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        assert_eq!(records.find(16), None);
        for step in 0..20_000 {
            // Few addresses, so that runs in the index are long and wrap around.
            let outer = 16 * (1 + random(300) as usize);
            match (records.find(outer), random(3)) {
                (None, _) => {
                    assert_eq!(model.insert(outer, State::Live), None);
                    assert!(records.make_room(1));
                    records.insert(Record::new(outer, 8, 8, outer, 16));
                }
                (Some(id), 0) => {
                    assert!(model.remove(&outer).is_some());
                    records.remove(id);
                }
                (Some(id), to) => {
                    let state = if to == 1 { State::Held } else { State::Gone };
                    *model.get_mut(&outer).unwrap() = state;
                    records.set_state(id, state);
                }
            }
            if step % 16 == 0 {
                check(&records);
                assert_eq!(records.used, model.len());
                for (&outer, &state) in &model {
                    assert_eq!(records[records.find(outer).unwrap()].state, state);
                }
            }
        }
        records.clear();
        check(&records);
        assert_eq!(records.find(16), None);
    }

    #[test]
    fn lists_are_in_the_order_of_arrival() {
        let mut records = Records::new();
        assert!(records.make_room(10));
        let ids: Vec<Id> = (1..=10).map(|n| records.insert(Record::new(n * 16, 1, 1, n * 16, 16))).collect();
        for id in ids.iter().rev() {
            records.set_state(*id, State::Held);
        }
        assert!(records.iter(State::Held).eq(ids.iter().rev().copied()));
        assert_eq!(records.first(State::Live), None);
    }
}

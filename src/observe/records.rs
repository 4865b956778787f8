//! What a layer knows of each block: a slab of records, an index by address, and the order in which blocks leave.
//!
//! Invariants:
//! 1. The state of a record says where else it stands: a Held one in the queue, which keeps the order of coming; a
//!    Gone one at its `link` in the ring; a Spare one, which the index does not know, in the chain of spares. Entries
//!    of the ring whose record is not Gone, or has another link, mean nothing.
//! 2. `index` has a power of two of slots, at most half of them used. Each record in use is found from the
//!    slot of its outer address by stepping over used slots only; no two have the same outer address.
//! 3. Room made stays: `insert` after `make_room(n)` succeeds `n` times.

use core::ops::{Index, IndexMut};

use super::metadata::{Metadata, Table, make_room};

/// The place of a record in the slab.
pub(super) type Id = u32;

const NONE: Id = Id::MAX;

/// Blocks remembered after they went back to the engine; a power of two.
const GONE_KEPT: usize = 4096;

/// Where a block is between allocation and oblivion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// The user has it.
    Live,
    /// Freed by the user, held back from the engine.
    Held,
    /// With the engine; remembered to tell a double free from a foreign one.
    Gone,
    /// No block at all.
    Spare,
}

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
    pub(super) allocated: Mark,
    pub(super) freed: Mark,
    /// See invariant 1.
    link: u32,
    pub(super) state: State,
    /// Pages around it are inaccessible.
    pub(super) fenced: bool,
    /// Looked at on its way out of the quarantine: it leaves with the next call.
    pub(super) checked: bool,
}

impl Record {
    #[inline]
    pub(super) fn new(outer: usize, size: usize, align: usize, inner: usize, inner_size: usize) -> Self {
        Self {
            outer,
            size,
            inner,
            inner_size,
            align,
            allocated: Mark::default(),
            freed: Mark::default(),
            link: NONE,
            state: State::Live,
            fenced: false,
            checked: false,
        }
    }
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
    /// First of the spare records, chained by `link`.
    spare: Id,
    index: Table<Slot>,
    /// Records that are not spare.
    used: usize,
    /// Records for which there is room.
    room: usize,
    live: usize,
    /// The queue of Held records, chained by `link`.
    first: Id,
    last: Id,
    held: usize,
    /// The last Gone records, the oldest at `next_gone`.
    gone: Table<Id>,
    next_gone: usize,
}

impl Index<Id> for Records {
    type Output = Record;
    #[inline]
    fn index(&self, id: Id) -> &Record {
        &self.slab[id as usize]
    }
}

impl IndexMut<Id> for Records {
    #[inline]
    fn index_mut(&mut self, id: Id) -> &mut Record {
        &mut self.slab[id as usize]
    }
}

impl Records {
    pub(super) const fn new() -> Self {
        Self {
            slab: Table::new_in(Metadata),
            spare: NONE,
            index: Table::new_in(Metadata),
            used: 0,
            room: 0,
            live: 0,
            first: NONE,
            last: NONE,
            held: 0,
            gone: Table::new_in(Metadata),
            next_gone: 0,
        }
    }

    /// Makes room for `more` records; `false` where memory is short.
    #[inline]
    pub(super) fn make_room(&mut self, more: usize) -> bool {
        self.room >= more || self.make_room_slow(more)
    }

    #[cold]
    fn make_room_slow(&mut self, more: usize) -> bool {
        let fresh = more.saturating_sub(self.slab.len() - self.used);
        if self.slab.len() + fresh > NONE as usize || !make_room(&mut self.slab, fresh) {
            return false;
        }
        if self.gone.is_empty() {
            if !make_room(&mut self.gone, GONE_KEPT) {
                return false;
            }
            self.gone.resize(GONE_KEPT, NONE);
        }
        let slots = ((self.used + more) * 2).next_power_of_two();
        if slots > self.index.len() && !self.rehash(slots) {
            return false;
        }
        self.count_room();
        true
    }

    fn count_room(&mut self) {
        self.room = self.slab.capacity().min(self.index.len() / 2) - self.used;
    }

    fn rehash(&mut self, slots: usize) -> bool {
        let mut index = Table::new_in(Metadata);
        if !make_room(&mut index, slots) {
            return false;
        }
        index.resize(slots, EMPTY);
        let old = core::mem::replace(&mut self.index, index);
        for slot in old.iter().filter(|slot| slot.id != NONE) {
            let at = self.slot(slot.outer);
            self.index[at] = *slot;
        }
        true
    }

    #[inline]
    fn home(&self, outer: usize) -> usize {
        let hash = (outer >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as usize);
        (hash >> (usize::BITS / 2)) & (self.index.len() - 1)
    }

    /// The slot where `outer` is, or would be.
    #[inline]
    fn slot(&self, outer: usize) -> usize {
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
        let id = self.index[self.slot(outer)].id;
        (id != NONE).then_some(id)
    }

    /// Adds a record, for which room was made, in place of a Gone one of the same address.
    #[inline]
    pub(super) fn insert(&mut self, record: Record) {
        let at = self.slot(record.outer);
        self.live += 1;
        match self.index[at].id {
            NONE => {
                self.used += 1;
                self.room -= 1;
                let id = match self.spare {
                    NONE => {
                        self.slab.push(record);
                        self.slab.len() as Id - 1
                    }
                    id => {
                        self.spare = self[id].link;
                        self[id] = record;
                        id
                    }
                };
                self.index[at] = Slot { outer: record.outer, id };
            }
            stale => {
                debug_assert_eq!(self[stale].state, State::Gone, "two blocks at {:#x}", record.outer);
                self[stale] = record;
            }
        }
    }

    /// From Live to Held.
    #[inline]
    pub(super) fn hold(&mut self, id: Id) {
        let record = &mut self[id];
        debug_assert_eq!(record.state, State::Live);
        (record.state, record.link) = (State::Held, NONE);
        match self.last {
            NONE => self.first = id,
            last => self[last].link = id,
        }
        self.last = id;
        self.live -= 1;
        self.held += 1;
    }

    /// The record that is Held for longest.
    #[inline]
    pub(super) fn first_held(&self) -> Option<Id> {
        (self.first != NONE).then_some(self.first)
    }

    /// To Gone, from Live or from the head of the Held ones; the oldest Gone one is forgotten.
    #[inline]
    pub(super) fn let_go(&mut self, id: Id) {
        if self[id].state == State::Live {
            self.live -= 1;
        } else {
            debug_assert_eq!(self.first, id);
            self.first = self[id].link;
            if self.first == NONE {
                self.last = NONE;
            }
            self.held -= 1;
        }
        let at = self.next_gone;
        self.next_gone = (at + 1) % GONE_KEPT;
        let oldest = core::mem::replace(&mut self.gone[at], id);
        if oldest != NONE && (self[oldest].state, self[oldest].link) == (State::Gone, at as u32) {
            self.forget(oldest);
        }
        let record = &mut self[id];
        (record.state, record.link) = (State::Gone, at as u32);
    }

    /// Makes a Gone record a spare one.
    fn forget(&mut self, id: Id) {
        let mask = self.index.len() - 1;
        let mut hole = self.slot(self[id].outer);
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
        self.room += 1;
        (self[id].state, self[id].link) = (State::Spare, self.spare);
        self.spare = id;
    }

    /// How many are Live.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// How many are Held.
    #[inline]
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// The records in `state`, in no particular order.
    pub(super) fn iter(&self, state: State) -> impl Iterator<Item = &Record> + '_ {
        self.slab.iter().filter(move |record| record.state == state)
    }

    /// Forgets all records, and keeps the room.
    pub(super) fn clear(&mut self) {
        self.slab.clear();
        self.index.fill(EMPTY);
        self.gone.fill(NONE);
        (self.spare, self.first, self.last) = (NONE, NONE, NONE);
        (self.used, self.live, self.held) = (0, 0, 0);
        self.count_room();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, VecDeque};

    /// Walks every invariant.
    fn check(records: &Records) {
        let ids = |state| (0..records.slab.len() as Id).filter(move |&id| records[id].state == state);
        for state in [State::Live, State::Held, State::Gone] {
            assert!(ids(state).all(|id| records.find(records[id].outer) == Some(id)));
        }
        let next = |&id: &Id| (records[id].link != NONE).then_some(records[id].link);
        let queue: Vec<Id> = core::iter::successors(records.first_held(), next).collect();
        assert!(queue.iter().all(|&id| records[id].state == State::Held));
        assert_eq!((queue.len(), queue.last()), (records.held, queue.last().and(Some(&records.last))));
        assert!(ids(State::Gone).all(|id| records.gone[records[id].link as usize] == id));
        let spare = (records.spare != NONE).then_some(records.spare);
        assert_eq!(core::iter::successors(spare, next).count(), ids(State::Spare).count());
        assert_eq!((ids(State::Live).count(), ids(State::Held).count()), (records.live, records.held));
        assert_eq!(records.slab.len() - ids(State::Spare).count(), records.used);
        assert_eq!(records.index.iter().filter(|slot| slot.id != NONE).count(), records.used);
        assert!(records.used * 2 <= records.index.len());
        assert_eq!(records.room, records.slab.capacity().min(records.index.len() / 2) - records.used);
    }

    fn random(below: u64) -> impl FnMut() -> u64 {
        let mut seed = 1u64;
        move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        }
    }

    #[test]
    fn records_behave_like_a_map_and_a_queue() {
        let mut records = Records::new();
        let (mut live, mut held, mut gone) = (Vec::new(), VecDeque::new(), HashMap::new());
        let mut random = random(1 << 20);
        assert_eq!(records.find(16), None);
        for step in 0..60_000u64 {
            // Few addresses, so that runs in the index are long and wrap around, and Gone ones come back; at times
            // many, so that Gone ones are forgotten.
            let outer = 16 * (1 + random() as usize % if step % 20_000 < 4_000 { 9_000 } else { 300 });
            match random() % 4 {
                0 | 1 if !live.contains(&outer) && !held.contains(&outer) => {
                    assert!(records.make_room(1));
                    records.insert(Record::new(outer, 8, 8, outer, 16));
                    gone.remove(&outer);
                    live.push(outer);
                }
                2 if !live.is_empty() => {
                    let outer = live.swap_remove(random() as usize % live.len());
                    records.hold(records.find(outer).unwrap());
                    held.push_back(outer);
                }
                3 => {
                    if let Some(outer) = held.pop_front() {
                        let id = records.first_held().unwrap();
                        assert_eq!(records[id].outer, outer);
                        records.let_go(id);
                        gone.insert(outer, step);
                    }
                }
                _ => {}
            }
            if step % 64 == 0 {
                check(&records);
                assert_eq!((records.live(), records.held()), (live.len(), held.len()));
                for &outer in live.iter().chain(&held) {
                    assert!(records.find(outer).is_some());
                }
                let known = gone.keys().filter(|&&outer| records.find(outer).is_some()).count();
                assert!(known == gone.len() || known <= GONE_KEPT);
            }
        }
        records.clear();
        check(&records);
        assert_eq!((records.find(16), records.first_held()), (None, None));
    }

    #[test]
    fn the_last_that_went_are_remembered() {
        let mut records = Records::new();
        for number in 1..=GONE_KEPT + 10 {
            assert!(records.make_room(1));
            records.insert(Record::new(number * 16, 1, 1, number * 16, 16));
            records.let_go(records.find(number * 16).unwrap());
        }
        check(&records);
        assert!((1..=10).all(|number| records.find(number * 16).is_none()));
        assert!((11..=GONE_KEPT + 10).all(|number| records.find(number * 16).is_some()));
    }
}

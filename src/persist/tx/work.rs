//! What a transaction holds: its objects, its images, and what it will write.

use core::cell::Cell;
use core::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use crate::persist::arena::Arena;
use crate::persist::fold::FoldMap;
use crate::persist::heap::Slot;
use crate::persist::journal::Ops;
use crate::persist::locks::{Locks, TxId};
use crate::persist::table::{Mark, Object};

/// What becomes of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A slot that nobody knows but its holder.
    Reserved,
    /// New, and live if the transaction commits.
    Published,
    /// New, and freed before the commit.
    Dropped,
    /// Was there before.
    Live,
    /// Was there before, and is free if the transaction commits.
    Freed,
}

/// An object as a transaction knows it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) fingerprint: u64,
    pub(super) mark: Mark,
    /// Bytes of a new object that count; the rest of its slot is not looked at before it is written.
    pub(super) used: u64,
    pub(super) borrows: i32,
    pub(super) state: State,
    pub(super) exclusive: bool,
    /// Of a new object: its run is not in the file yet.
    pub(super) new_run: bool,
    /// There are, or were, images of it.
    pub(super) has_images: bool,
    pub(super) whole: Option<Whole>,
}

impl Entry {
    pub(super) fn existing(object: Object, mark: Mark, exclusive: bool) -> Self {
        Self {
            offset: object.offset,
            size: object.size,
            fingerprint: object.fingerprint,
            mark,
            used: 0,
            borrows: 0,
            state: State::Live,
            exclusive,
            new_run: false,
            has_images: false,
            whole: None,
        }
    }

    pub(super) fn reserved(slot: &Slot, fingerprint: u64, used: u64) -> Self {
        let object = Object { offset: slot.offset, size: slot.size, fingerprint };
        let existing = Self::existing(object, slot.mark, true);
        Self { used, state: State::Reserved, new_run: slot.fresh, ..existing }
    }

    /// Whether the transaction made it.
    #[inline]
    pub(super) fn is_new(&self) -> bool {
        !matches!(self.state, State::Live | State::Freed)
    }
}

/// A copy of words of an object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image {
    pub(super) at: u64,
    pub(super) words: usize,
    pub(super) copy: NonNull<u64>,
}

/// An image of a whole object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Whole {
    pub(super) image: Image,
    /// From this offset in the object on the file need not have what the image was made from.
    pub(super) all_from: u64,
}

/// Finds a number by an offset: by looking through a few, by hashing many.
#[derive(Debug, Default)]
pub(super) struct Index {
    map: FoldMap<u64, u32>,
}

impl Index {
    const FEW: usize = 12;

    #[inline]
    pub(super) fn find(
        &self,
        all: impl ExactSizeIterator<Item = u64> + DoubleEndedIterator,
        key: u64,
    ) -> Option<u32> {
        let len = all.len();
        if len <= Self::FEW {
            return all.rev().position(|at| at == key).map(|back| (len - 1 - back) as u32);
        }
        self.map.get(&key).copied()
    }

    /// Notes the last of `all`, which was just added.
    #[inline]
    pub(super) fn added(&mut self, all: impl ExactSizeIterator<Item = u64> + DoubleEndedIterator) {
        if all.len() > Self::FEW {
            self.added_slow(all);
        }
    }

    #[cold]
    fn added_slow(&mut self, mut all: impl ExactSizeIterator<Item = u64> + DoubleEndedIterator) {
        let len = all.len();
        if len == Self::FEW + 1 {
            self.map.extend(all.zip(0..));
        } else if let Some(key) = all.next_back() {
            self.map.insert(key, len as u32 - 1);
        }
    }

    #[inline]
    fn clear(&mut self) {
        if !self.map.is_empty() {
            self.map.clear();
        }
    }
}

/// Numbers of the `Work`s there are; given out again, so they stay small.
static NUMBERS: Mutex<(TxId, Vec<TxId>)> = Mutex::new((0, Vec::new()));

/// A number that no other `Work` has now.
#[derive(Debug)]
struct Number(TxId);

impl Default for Number {
    fn default() -> Self {
        let (most, free) = &mut *NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
        Self(free.pop().unwrap_or_else(|| {
            *most += 1;
            *most
        }))
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        NUMBERS.lock().unwrap_or_else(PoisonError::into_inner).1.push(self.0);
    }
}

/// What a transaction holds; kept by the thread for its next one.
#[derive(Debug, Default)]
pub(crate) struct Work {
    number: Number,
    pub(super) arena: Arena,
    pub(super) entries: Vec<Entry>,
    entry_index: Index,
    pub(super) parts: Vec<(u32, Image)>,
    part_index: Index,
    pub(super) rare: Rare,
    pub(super) uses_rare: bool,
    /// An object was reserved in a run that is not in the file yet.
    pub(super) new_runs: bool,
    pub(super) ops: Ops,
}

/// What few transactions have.
#[derive(Debug, Default)]
pub(super) struct Rare {
    /// Where existing objects were written in place, behind what they hold.
    pub(super) appended: Vec<(u32, u64, u64)>,
    /// Words outside objects: heads of lists.
    pub(super) heads: Vec<(u64, u64)>,
    pub(super) head_locks: Vec<u64>,
    pub(super) types: Vec<u64>,
    pub(super) roots: Vec<(String, u64)>,
}

impl Rare {
    const NONE: Self = Self {
        appended: Vec::new(),
        heads: Vec::new(),
        head_locks: Vec::new(),
        types: Vec::new(),
        roots: Vec::new(),
    };

    fn clear(&mut self) {
        self.appended.clear();
        self.heads.clear();
        self.head_locks.clear();
        self.types.clear();
        self.roots.clear();
    }
}

thread_local!(static SPARE: Cell<Option<Box<Work>>> = const { Cell::new(None) });

impl Work {
    /// The one that the thread kept, or another.
    #[inline]
    pub(super) fn take() -> Box<Self> {
        SPARE.try_with(Cell::take).ok().flatten().unwrap_or_default()
    }

    /// Forgets everything and is kept for the next transaction.
    #[inline]
    pub(super) fn keep(mut self: Box<Self>) {
        self.arena.clear();
        self.entries.clear();
        self.entry_index.clear();
        self.parts.clear();
        self.part_index.clear();
        if self.uses_rare {
            self.rare.clear();
            self.uses_rare = false;
        }
        self.new_runs = false;
        self.ops.clear();
        // A thread that is ending keeps nothing.
        let _ = SPARE.try_with(|spare| spare.set(Some(self)));
    }

    #[inline]
    pub(super) fn id(&self) -> TxId {
        self.number.0
    }

    #[inline]
    pub(super) fn rare(&self) -> &Rare {
        static NONE: Rare = Rare::NONE;
        if self.uses_rare { &self.rare } else { &NONE }
    }

    pub(super) fn rare_mut(&mut self) -> &mut Rare {
        self.uses_rare = true;
        &mut self.rare
    }

    #[inline]
    pub(super) fn find(&self, offset: u64) -> Option<u32> {
        self.entry_index.find(self.entries.iter().map(|entry| entry.offset), offset)
    }

    #[inline]
    pub(super) fn add(&mut self, entry: Entry) -> u32 {
        self.entries.push(entry);
        self.entry_index.added(self.entries.iter().map(|entry| entry.offset));
        self.entries.len() as u32 - 1
    }

    #[inline]
    pub(super) fn find_part(&self, at: u64) -> Option<u32> {
        self.part_index.find(self.parts.iter().map(|(_, part)| part.at), at)
    }

    #[inline]
    pub(super) fn add_part(&mut self, entry: u32, image: Image) {
        self.entries[entry as usize].has_images = true;
        self.parts.push((entry, image));
        self.part_index.added(self.parts.iter().map(|(_, part)| part.at));
    }

    /// Gives up what the transaction has locked.
    #[inline]
    pub(super) fn unlock(&self, locks: &Locks) {
        for entry in self.entries.iter().filter(|entry| !entry.is_new()) {
            locks.release(self.id(), entry.offset, entry.exclusive);
        }
        for &head in &self.rare().head_locks {
            locks.release(self.id(), head, true);
        }
    }
}

//! Slots that transactions keep for the next objects of the types they made lately, so that a new object takes
//! neither the lock of the index nor a search.
//!
//! What is kept is reserved in the index and unknown to the file, so a crash leaks none of it; and whoever finds the
//! pool full takes all that is kept back, so none is missed.
//!
//! Invariants
//! 1. Shelves belong to the number of a transaction ([`TxId`]): no two that are open have the same. Only the owner
//!    takes single slots, and only with the index locked does it write anything else.
//! 2. A bit in `left` stands for a slot that is reserved in the index and held by nobody. It is taken out by one
//!    exchange, so by the owner or by who takes all back, never by both.
//! 3. Runs of kept slots are in the file, as are their types; so one bit in the file makes an object of such a slot.

#![cfg_attr(not(loom), forbid(unsafe_code))]

use super::heap::Slot;
use super::locks::TxId;
use super::table::Mark;
use crate::base::sync::atomic::{AtomicU64, Ordering};

/// Transactions with a larger number keep nothing.
const OWNERS: usize = if cfg!(loom) { 1 } else { 64 };
/// Types for which a transaction keeps slots, each at the place that its fingerprint says.
const TYPES: usize = if cfg!(loom) { 1 } else { 8 };
/// Most bytes and slots that are kept of a type.
const BYTES: u64 = 4096;
const SLOTS: u64 = 32;

/// Slots of one type, all of one word of a bitmap.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Shelf {
    /// Fingerprint of the type; 0 for none.
    kind: AtomicU64,
    /// Bits of the word whose slots are here.
    left: AtomicU64,
    /// Offset of the word, and of the slot of its first bit.
    word: AtomicU64,
    first: AtomicU64,
    size: AtomicU64,
}

/// What all transactions of a pool keep.
#[derive(Debug)]
pub(crate) struct Stash {
    shelves: Box<[[Shelf; TYPES]]>,
}

impl Default for Stash {
    fn default() -> Self {
        Self { shelves: (0..OWNERS).map(|_| Default::default()).collect() }
    }
}

impl Shelf {
    fn slot(&self, bit: u32) -> Slot {
        let [word, first, size] = [&self.word, &self.first, &self.size].map(|it| it.load(Ordering::Relaxed));
        let mark = Mark::Bit { word, mask: 1 << bit };
        Slot { offset: first + u64::from(bit) * size, size, mark, fresh: false, registered: true }
    }

    /// Gives what is left back to the index, which is locked, by offsets. Whether there was any.
    pub(crate) fn empty(&self, mut give_back: impl FnMut(u64)) -> bool {
        let mut left = self.left.swap(0, Ordering::Relaxed);
        let any = left != 0;
        while left != 0 {
            give_back(self.slot(left.trailing_zeros()).offset);
            left &= left - 1;
        }
        any
    }

    /// Keeps slots beside `slot`, by their bits, which were just reserved in the locked index; it was empty.
    pub(crate) fn fill(&self, fingerprint: u64, slot: &Slot, beside: u64) {
        let Mark::Bit { word, mask } = slot.mark else { return };
        let bit = u64::from(mask.trailing_zeros());
        self.kind.store(fingerprint, Ordering::Relaxed);
        self.word.store(word, Ordering::Relaxed);
        self.first.store(slot.offset - bit * slot.size, Ordering::Relaxed);
        self.size.store(slot.size, Ordering::Relaxed);
        self.left.store(beside, Ordering::Relaxed);
    }
}

impl Stash {
    #[inline]
    fn shelf(&self, owner: TxId, fingerprint: u64) -> Option<&Shelf> {
        Some(&self.shelves.get(owner as usize - 1)?[fingerprint as usize % TYPES])
    }

    /// A slot for a new object of that type.
    #[inline]
    pub(crate) fn take(&self, owner: TxId, fingerprint: u64) -> Option<Slot> {
        let shelf = self.shelf(owner, fingerprint)?;
        let left = shelf.left.load(Ordering::Relaxed);
        if left == 0 || shelf.kind.load(Ordering::Relaxed) != fingerprint {
            return None;
        }
        // It fails where somebody took all back, and then nothing is left.
        let rest = left & (left - 1);
        shelf.left.compare_exchange(left, rest, Ordering::Relaxed, Ordering::Relaxed).ok()?;
        Some(shelf.slot(left.trailing_zeros()))
    }

    /// Where slots beside `slot`, which was just reserved, are kept, and how many at most; `None` where none are.
    pub(crate) fn shelf_for(&self, owner: TxId, fingerprint: u64, slot: &Slot) -> Option<(&Shelf, u32)> {
        let most = (BYTES / slot.size).min(SLOTS) as u32;
        let suits = matches!(slot.mark, Mark::Bit { .. }) && !slot.fresh && slot.registered && most >= 2;
        if suits { Some((self.shelf(owner, fingerprint)?, most)) } else { None }
    }

    /// Keeps the slot of an object that was just freed in the file, if it is of the word from which slots are kept;
    /// the index is locked.
    #[inline]
    pub(crate) fn keep(&self, owner: TxId, fingerprint: u64, freed: Mark) -> bool {
        let (Some(shelf), Mark::Bit { word, mask }) = (self.shelf(owner, fingerprint), freed) else {
            return false;
        };
        let same = shelf.word.load(Ordering::Relaxed) == word;
        if !same || shelf.kind.load(Ordering::Relaxed) != fingerprint {
            return false;
        }
        // With the index locked nobody takes all back, and the owner is here.
        shelf.left.store(shelf.left.load(Ordering::Relaxed) | mask, Ordering::Relaxed);
        true
    }

    /// Gives all that is kept back to the index, which is locked, by offsets. Whether there was any.
    #[cold]
    pub(crate) fn empty(&self, mut give_back: impl FnMut(u64)) -> bool {
        let mut any = false;
        for shelf in self.shelves.as_flattened() {
            any |= shelf.empty(&mut give_back);
        }
        any
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use crate::base::sync::Mutex;
    use loom::cell::UnsafeCell;
    use loom::thread;
    use std::sync::Arc;

    const KIND: u64 = 1 << 63;
    const COUNT: usize = 3;

    /// An index of three slots, a stash over it, and what the holders of slots write.
    struct Shared {
        index: Mutex<u64>,
        stash: Stash,
        data: [UnsafeCell<u64>; COUNT],
    }
    // SAFETY: the model checks that nobody holds a slot that another holds.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}

    fn slot(bit: u32) -> Slot {
        let (size, mark) = (8, Mark::Bit { word: 64, mask: 1 << bit });
        Slot { offset: 8 * u64::from(bit), size, mark, fresh: false, registered: true }
    }

    impl Shared {
        fn take_clear(index: &mut u64) -> Option<Slot> {
            let bit = index.trailing_ones();
            ((bit as usize) < COUNT).then(|| {
                *index |= 1 << bit;
                slot(bit)
            })
        }

        /// As `Inner::reserve_slot` does.
        fn reserve(&self, owner: TxId) -> Option<Slot> {
            if let Some(slot) = self.stash.take(owner, KIND) {
                return Some(slot);
            }
            let mut index = self.index.lock().unwrap();
            let mut found = Self::take_clear(&mut index);
            if found.is_none() && self.stash.empty(|offset| *index &= !(1 << (offset / 8))) {
                found = Self::take_clear(&mut index);
            }
            let found = found?;
            if let Some((shelf, _)) = self.stash.shelf_for(owner, KIND, &found) {
                shelf.empty(|offset| *index &= !(1 << (offset / 8)));
                let beside = !*index & 0b111;
                *index |= beside;
                shelf.fill(KIND, &found, beside);
            }
            Some(found)
        }

        fn write(&self, slot: Slot) {
            // SAFETY: whoever reserved the slot is alone with it.
            self.data[slot.offset as usize / 8].with_mut(|word| unsafe { *word += 1 });
        }

        fn free(&self, owner: TxId, slot: Slot) {
            let mut index = self.index.lock().unwrap();
            if !self.stash.keep(owner, KIND, slot.mark) {
                *index &= !(1 << (slot.offset / 8));
            }
        }
    }

    #[test]
    fn loom_stash_no_slot_is_handed_out_twice_and_none_is_missed() {
        loom::model(|| {
            let index = Mutex::new(0);
            let data = core::array::from_fn(|_| UnsafeCell::new(0));
            let shared = Arc::new(Shared { index, stash: Stash::default(), data });
            // The owner keeps two slots beside its first one.
            let first = shared.reserve(1).unwrap();
            let other = shared.clone();
            // One that keeps nothing itself takes all back, since no slot is clear.
            let thread = thread::spawn(move || {
                let slot = other.reserve(9).expect("three slots for three objects");
                other.write(slot);
                other.free(9, slot);
            });
            let second = shared.reserve(1).unwrap();
            shared.write(first);
            shared.write(second);
            shared.free(1, first);
            shared.free(1, second);
            thread.join().unwrap();
            let mut index = shared.index.lock().unwrap();
            shared.stash.empty(|offset| *index &= !(1 << (offset / 8)));
            assert_eq!(*index, 0);
        });
    }
}

//! Who of the transactions that are open may use which object.
//!
//! A transaction locks an object when it first touches it and keeps the lock until it has committed or
//! given up: shared to read, exclusive to change or free. A transaction that would wait for one that waits
//! for it gets [`Refusal::Conflict`](crate::base::error::Refusal::Conflict) instead.
//!
//! Each object has a *place* in a small table, by a hash of its offset. Where nobody is in the way, locking is
//! one compare-and-exchange that writes object and holder there, and unlocking one that takes them out. Whoever
//! finds the place taken moves what stands there to a map under a mutex and leaves the mark [`MOVED`]; from
//! then on all locks of that place go through the map, until the map is empty.
//!
//! Invariants
//! 1. An object is held by one transaction exclusively or by any number of them shared.
//! 2. The graph "waits for a holder of" has no circle.
//! 3. A lock is in the table or in the map, never in both; only a holder of the mutex moves it, writes or
//!    removes [`MOVED`]. While a place has that mark, all locks of its objects are in the map.
//! 4. Whoever waits has the mark on the place of what it waits for, so the holder unlocks under the mutex and
//!    wakes it.

#![cfg_attr(not(loom), forbid(unsafe_code))]

use super::fold::FoldMap;
use super::journal::conflict;
use crate::base::error::Result;
use crate::base::sync::atomic::{AtomicU64, Ordering};
use crate::base::sync::{Condvar, Mutex, MutexGuard};

/// Names a transaction among those that are open.
pub(crate) type TxId = u32;

const PLACES: usize = if cfg!(loom) { 1 } else { 1024 };
/// In a place: ask the map.
const MOVED: u64 = 3;
/// Larger numbers do not fit beside an offset.
const MAX_FAST: TxId = (1 << 18) - 1;

fn place_of(object: u64) -> usize {
    ((object >> 3).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as usize % PLACES
}

/// What stands in the table while `id` holds `object`: offset / 8 in the upper 44 bits, then 18 bits of holder,
/// then 1 for exclusive and 2 for shared. `None` where it does not fit.
fn word_of(id: TxId, object: u64, exclusive: bool) -> Option<u64> {
    let fits = id <= MAX_FAST && object < 1 << 47 && object.is_multiple_of(8);
    fits.then_some(object << 17 | u64::from(id) << 2 | if exclusive { 1 } else { 2 })
}

#[derive(Debug)]
enum Holders {
    Exclusive(TxId),
    /// One, and perhaps more.
    Shared(TxId, Vec<TxId>),
}

impl Holders {
    fn each(&self) -> impl Iterator<Item = TxId> {
        let (first, more) = match self {
            Self::Exclusive(id) => (*id, [].as_slice()),
            Self::Shared(id, more) => (*id, more.as_slice()),
        };
        core::iter::once(first).chain(more.iter().copied())
    }
}

/// The map.
#[derive(Debug, Default)]
struct Moved {
    held: FoldMap<u64, Holders>,
    /// What each waiting transaction waits for.
    waits: FoldMap<TxId, u64>,
    /// Places with the mark.
    places: Vec<usize>,
}

impl Moved {
    /// Grants the lock if nobody is in the way.
    fn try_grant(&mut self, id: TxId, object: u64, exclusive: bool) -> bool {
        match self.held.get_mut(&object) {
            None => {
                let holders =
                    if exclusive { Holders::Exclusive(id) } else { Holders::Shared(id, Vec::new()) };
                self.held.insert(object, holders);
                true
            }
            Some(Holders::Exclusive(holder)) => *holder == id,
            Some(holders @ Holders::Shared(..)) if exclusive => {
                let alone = holders.each().all(|holder| holder == id);
                if alone {
                    *holders = Holders::Exclusive(id);
                }
                alone
            }
            Some(Holders::Shared(first, more)) => {
                if *first != id && !more.contains(&id) {
                    more.push(id);
                }
                true
            }
        }
    }

    fn release(&mut self, id: TxId, object: u64) {
        match self.held.get_mut(&object) {
            Some(Holders::Shared(first, more)) if !more.is_empty() => {
                if *first == id {
                    *first = more.swap_remove(0);
                } else {
                    more.retain(|holder| *holder != id);
                }
            }
            _ => _ = self.held.remove(&object),
        }
    }

    /// Whether a holder of `object` waits, directly or not, for `id`.
    fn would_circle(&self, id: TxId, object: u64) -> bool {
        let mut seen = vec![object];
        let mut next = 0;
        while let Some(at) = seen.get(next) {
            let holders = self.held.get(at).into_iter().flat_map(Holders::each);
            let wanted: Vec<u64> =
                holders.filter(|&holder| holder != id).filter_map(|h| self.waits.get(&h).copied()).collect();
            for wanted in wanted {
                if self.held.get(&wanted).is_some_and(|holders| holders.each().any(|holder| holder == id)) {
                    return true;
                }
                if !seen.contains(&wanted) {
                    seen.push(wanted);
                }
            }
            next += 1;
        }
        false
    }
}

/// The locks of one pool.
#[derive(Debug)]
pub(crate) struct Locks {
    table: Box<[AtomicU64]>,
    moved: Mutex<Moved>,
    wake: Condvar,
}

impl Default for Locks {
    fn default() -> Self {
        let table = (0..PLACES).map(|_| AtomicU64::new(0)).collect();
        Self { table, moved: Mutex::new(Moved::default()), wake: Condvar::new() }
    }
}

impl Locks {
    /// Locks `object` for `id`. `may_wait`, asked where somebody is in the way: else that is a conflict.
    #[inline]
    pub(crate) fn acquire(
        &self,
        id: TxId,
        object: u64,
        exclusive: bool,
        may_wait: impl FnOnce() -> bool,
    ) -> Result<()> {
        if let Some(word) = word_of(id, object, exclusive) {
            let place = &self.table[place_of(object)];
            match place.compare_exchange(0, word, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                // Its own shared lock becomes exclusive: nobody else reads.
                Err(held) if exclusive && held == word + 1 => {
                    if place.compare_exchange(held, word, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                        return Ok(());
                    }
                }
                Err(_) => {}
            }
        }
        self.acquire_slow(id, object, exclusive, may_wait())
    }

    fn lock(&self) -> MutexGuard<'_, Moved> {
        self.moved.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    #[cold]
    #[inline(never)]
    fn acquire_slow(&self, id: TxId, object: u64, exclusive: bool, may_wait: bool) -> Result<()> {
        let mut moved = self.lock();
        loop {
            self.use_map(&mut moved, object);
            if moved.try_grant(id, object, exclusive) {
                return Ok(());
            }
            if !may_wait || moved.would_circle(id, object) {
                return Err(conflict());
            }
            moved.waits.insert(id, object);
            moved = self.wake.wait(moved).unwrap_or_else(|poisoned| poisoned.into_inner());
            moved.waits.remove(&id);
        }
    }

    /// Moves the lock in the object's place, if any, to the map.
    fn use_map(&self, moved: &mut Moved, object: u64) {
        let number = place_of(object);
        let place = &self.table[number];
        // Acquire: what the last holder did happened before the mutex hands the place on.
        let held = place.swap(MOVED, Ordering::AcqRel);
        if held == MOVED {
            return;
        }
        moved.places.push(number);
        if held != 0 {
            let holder = (held >> 2) as TxId & MAX_FAST;
            let holders =
                if held & 3 == 1 { Holders::Exclusive(holder) } else { Holders::Shared(holder, Vec::new()) };
            moved.held.insert(held >> 20 << 3, holders);
        }
    }

    /// Gives up an object, which `id` holds exclusively or not.
    #[inline]
    pub(crate) fn release(&self, id: TxId, object: u64, exclusive: bool) {
        let in_table = word_of(id, object, exclusive).is_some_and(|word| {
            let place = &self.table[place_of(object)];
            place.compare_exchange(word, 0, Ordering::Release, Ordering::Relaxed).is_ok()
        });
        if !in_table {
            self.release_slow(id, object);
        }
    }

    #[cold]
    #[inline(never)]
    fn release_slow(&self, id: TxId, object: u64) {
        let mut moved = self.lock();
        moved.release(id, object);
        if moved.held.is_empty() {
            for number in core::mem::take(&mut moved.places) {
                // Release: whoever locks in the table next comes after all that was unlocked in the map.
                self.table[number].store(0, Ordering::Release);
            }
        }
        let waited_for = !moved.waits.is_empty();
        drop(moved);
        if waited_for {
            self.wake.notify_all();
        }
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::thread;
    use std::sync::Arc;

    /// Locks, and what two objects hold. Both have the same place in the table.
    struct Shared(Locks, [UnsafeCell<u64>; 2]);
    // SAFETY: the locks keep the accesses to the objects apart, which is what the models check.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}

    impl Shared {
        /// Changes an object; whether that was no conflict.
        fn change(&self, id: TxId, object: usize) -> bool {
            let held = self.0.acquire(id, 8 + object as u64 * 8, true, || true).is_ok();
            if held {
                // SAFETY: locked exclusively.
                self.1[object].with_mut(|value| unsafe { *value += 1 });
            }
            held
        }

        fn look(&self, id: TxId, object: usize) {
            self.0.acquire(id, 8 + object as u64 * 8, false, || true).unwrap();
            // SAFETY: locked.
            self.1[object].with(|value| assert!(unsafe { *value } <= 2));
        }

        fn release(&self, id: TxId, object: usize, exclusive: bool) {
            self.0.release(id, 8 + object as u64 * 8, exclusive);
        }
    }

    /// Loom reports who touches an object beside one that changes it, and who sleeps for ever.
    fn model(works: [fn(&Shared); 2]) {
        loom::model(move || {
            let shared = Arc::new(Shared(Locks::default(), core::array::from_fn(|_| UnsafeCell::new(0))));
            let other = shared.clone();
            let thread = thread::spawn(move || works[1](&other));
            works[0](&shared);
            thread.join().unwrap();
            assert!(shared.0.lock().held.is_empty());
            assert_eq!(shared.0.table[0].load(Ordering::Relaxed), 0);
        });
    }

    #[test]
    fn loom_locks_two_change_one_object() {
        model([
            |shared| {
                assert!(shared.change(1, 0));
                shared.release(1, 0, true);
            },
            |shared| {
                assert!(shared.change(2, 0));
                shared.release(2, 0, true);
            },
        ]);
    }

    #[test]
    fn loom_locks_a_reader_becomes_a_writer_beside_another_object() {
        model([
            |shared| {
                shared.look(1, 0);
                // Nobody else reads for long, so this waits and is no circle.
                assert!(shared.change(1, 0));
                shared.release(1, 0, true);
            },
            |shared| {
                shared.look(2, 0);
                shared.release(2, 0, false);
                assert!(shared.change(2, 1));
                shared.release(2, 1, true);
            },
        ]);
    }

    #[test]
    fn loom_locks_crossed_ones_end_in_a_conflict_for_one_at_most() {
        fn both(shared: &Shared, id: TxId, [first, second]: [usize; 2]) {
            assert!(shared.change(id, first));
            if shared.change(id, second) {
                shared.release(id, second, true);
            }
            shared.release(id, first, true);
        }
        model([|shared| both(shared, 1, [0, 1]), |shared| both(shared, 2, [1, 0])]);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn shared_locks_go_together_and_exclusive_ones_do_not() {
        let locks = Locks::default();
        locks.acquire(1, 8, false, || true).unwrap();
        locks.acquire(2, 8, false, || true).unwrap();
        assert!(locks.acquire(3, 8, true, || false).is_err());
        locks.release(1, 8, false);
        locks.acquire(2, 8, true, || false).unwrap();
        locks.acquire(2, 8, false, || false).unwrap();
        assert!(locks.acquire(1, 8, false, || false).is_err());
        locks.release(2, 8, true);
        assert!(locks.table.iter().all(|place| place.load(Ordering::Relaxed) == 0));
        assert!(locks.lock().held.is_empty());
    }

    #[test]
    fn a_circle_is_a_conflict_for_one_and_the_other_goes_on() {
        for upgrade in [false, true] {
            let locks = Locks::default();
            let (a, b) = if upgrade { (8, 8) } else { (8, 16) };
            locks.acquire(1, a, !upgrade, || true).unwrap();
            locks.acquire(2, b, !upgrade, || true).unwrap();
            std::thread::scope(|scope| {
                let first = scope.spawn(|| {
                    let outcome = locks.acquire(1, b, true, || true);
                    locks.release(1, a, !upgrade);
                    outcome.is_err()
                });
                let second = scope.spawn(|| {
                    let outcome = locks.acquire(2, a, true, || true);
                    locks.release(2, b, !upgrade);
                    outcome.is_err()
                });
                let failed = [first.join().unwrap(), second.join().unwrap()];
                assert!(failed[0] ^ failed[1], "{failed:?}");
            });
        }
    }
}

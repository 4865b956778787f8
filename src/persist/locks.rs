//! Who of the transactions that are open may use which object.
//!
//! A transaction locks an object when it first touches it and keeps the lock until it has committed or
//! given up: shared to read, exclusive to change or free. A transaction that would wait for one that waits
//! for it gets [`Refusal::Conflict`](crate::base::error::Refusal::Conflict) instead.
//!
//! Invariants
//! 1. An object is held by one transaction exclusively or by any number of them shared.
//! 2. The graph "waits for a holder of" has no circle.

#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard};

use super::heap::FoldMap;
use super::journal::conflict;
use crate::base::error::Result;

/// Names a transaction.
pub(crate) type TxId = u64;

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

#[derive(Debug, Default)]
struct Inner {
    held: FoldMap<u64, Holders>,
    /// What each waiting transaction waits for.
    waits: FoldMap<TxId, u64>,
}

impl Inner {
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
#[derive(Debug, Default)]
pub(crate) struct Locks {
    inner: Mutex<Inner>,
    wake: Condvar,
}

impl Locks {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Locks `object` for `id`. `may_wait`: else a lock that is not free is a conflict.
    pub(crate) fn acquire(&self, id: TxId, object: u64, exclusive: bool, may_wait: bool) -> Result<()> {
        let mut inner = self.lock();
        while !inner.try_grant(id, object, exclusive) {
            if !may_wait || inner.would_circle(id, object) {
                return Err(conflict());
            }
            inner.waits.insert(id, object);
            inner = self.wake.wait(inner).unwrap_or_else(|poisoned| poisoned.into_inner());
            inner.waits.remove(&id);
        }
        Ok(())
    }

    /// Gives up all of `objects`, which `id` holds.
    pub(crate) fn release(&self, id: TxId, objects: impl Iterator<Item = u64>) {
        let mut inner = self.lock();
        for object in objects {
            match inner.held.get_mut(&object) {
                Some(Holders::Shared(first, more)) if !more.is_empty() => {
                    if *first == id {
                        *first = more.swap_remove(0);
                    } else {
                        more.retain(|holder| *holder != id);
                    }
                }
                _ => _ = inner.held.remove(&object),
            }
        }
        let waited_for = !inner.waits.is_empty();
        drop(inner);
        if waited_for {
            self.wake.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_locks_go_together_and_exclusive_ones_do_not() {
        let locks = Locks::default();
        locks.acquire(1, 8, false, true).unwrap();
        locks.acquire(2, 8, false, true).unwrap();
        assert!(locks.acquire(3, 8, true, false).is_err());
        locks.release(1, [8].into_iter());
        locks.acquire(2, 8, true, false).unwrap();
        locks.acquire(2, 8, false, false).unwrap();
        assert!(locks.acquire(1, 8, false, false).is_err());
        locks.release(2, [8].into_iter());
        assert!(locks.lock().held.is_empty());
    }

    #[test]
    fn a_circle_is_a_conflict_for_one_and_the_other_goes_on() {
        for upgrade in [false, true] {
            let locks = Locks::default();
            let (a, b) = if upgrade { (8, 8) } else { (8, 16) };
            locks.acquire(1, a, !upgrade, true).unwrap();
            locks.acquire(2, b, !upgrade, true).unwrap();
            std::thread::scope(|scope| {
                let first = scope.spawn(|| {
                    let outcome = locks.acquire(1, b, true, true);
                    locks.release(1, [a].into_iter());
                    outcome.is_err()
                });
                let second = scope.spawn(|| {
                    let outcome = locks.acquire(2, a, true, true);
                    locks.release(2, [b].into_iter());
                    outcome.is_err()
                });
                let failed = [first.join().unwrap(), second.join().unwrap()];
                assert!(failed[0] ^ failed[1], "{failed:?}");
            });
        }
    }
}

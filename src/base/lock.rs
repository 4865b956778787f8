//! The lock of pools: one word, and a place to sleep that nobody touches unless somebody waits.
//!
//! Taking and leaving it are a few instructions that inline without a frame, which is what separates it from std's:
//! there is no poison (see [`Lock`](super::sync::Lock)), and who leaves may wake others after it did what it came
//! for.
//!
//! Invariants:
//! 1. The value is touched between a change of `state` from `FREE` and the next change to `FREE` alone.
//! 2. Who sleeps has set `state` to `AWAITED` while it held `sleepers`, and has not been woken since. Whoever then
//!    changes `state` to `FREE` sees `AWAITED` and calls `wake_slow`, which waits for `sleepers`: so it comes after
//!    the sleeper fell asleep.
//! 3. Who was woken leaves `AWAITED` behind, for there may be others.

use super::sync::atomic::{AtomicU32, Ordering};
#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

const FREE: u32 = 0;
const HELD: u32 = 1;
const AWAITED: u32 = 2;

/// Looks at a lock that is held, before going to sleep.
const SPINS: usize = if cfg!(loom) { 0 } else { 100 };

/// The lock without what it guards.
#[derive(Debug)]
pub(crate) struct RawLock {
    state: AtomicU32,
    sleepers: Mutex<()>,
    wake: Condvar,
}

impl RawLock {
    #[cfg(not(loom))]
    pub(super) const fn new() -> Self {
        Self { state: AtomicU32::new(FREE), sleepers: Mutex::new(()), wake: Condvar::new() }
    }

    #[cfg(loom)]
    pub(super) fn new() -> Self {
        Self { state: AtomicU32::new(FREE), sleepers: Mutex::new(()), wake: Condvar::new() }
    }

    #[inline(always)]
    pub(super) fn try_take(&self) -> bool {
        self.state.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    #[inline(always)]
    pub(super) fn take(&self) {
        if !self.try_take() {
            self.take_slow();
        }
    }

    #[cold]
    #[inline(never)]
    fn take_slow(&self) {
        for _ in 0..SPINS {
            match self.state.load(Ordering::Relaxed) {
                FREE if self.try_take() => return,
                // Others sleep already: this one would be served before them again and again.
                AWAITED => break,
                _ => core::hint::spin_loop(),
            }
        }
        let mut sleepers = self.sleepers();
        while self.state.swap(AWAITED, Ordering::Acquire) != FREE {
            sleepers = self.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Leaves the lock; whether `wake_slow` must follow.
    #[inline(always)]
    #[must_use]
    pub(super) fn leave(&self) -> bool {
        self.state.swap(FREE, Ordering::Release) == AWAITED
    }

    /// Wakes one of those who wait.
    #[cold]
    #[inline(never)]
    pub(super) fn wake_slow(&self) {
        drop(self.sleepers());
        self.wake.notify_one();
    }

    /// Keeps threads from beginning to sleep or being woken: nobody is in between.
    pub(super) fn keep_sleepers(&self) -> MutexGuard<'_, ()> {
        self.sleepers()
    }

    fn sleepers(&self) -> MutexGuard<'_, ()> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::cell::UnsafeCell;
    use std::sync::Arc;

    /// Counts under the lock; loom reports a touch by two threads at once, and a sleeper that nobody wakes.
    fn counted(threads: usize, rounds: usize, late: bool) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            struct Shared(RawLock, UnsafeCell<usize>);
            // SAFETY: the cell is touched under the lock.
            unsafe impl Sync for Shared {}
            // SAFETY: as above.
            unsafe impl Send for Shared {}
            let shared = Arc::new(Shared(RawLock::new(), UnsafeCell::new(0)));
            let work = |shared: Arc<Shared>| {
                move || {
                    for _ in 0..rounds {
                        shared.0.take();
                        // SAFETY: under the lock.
                        shared.1.with_mut(|count| unsafe { *count += 1 });
                        let owing = shared.0.leave();
                        if late {
                            loom::thread::yield_now();
                        }
                        if owing {
                            shared.0.wake_slow();
                        }
                    }
                }
            };
            let others: Vec<_> = (1..threads).map(|_| loom::thread::spawn(work(shared.clone()))).collect();
            work(shared.clone())();
            others.into_iter().for_each(|other| other.join().unwrap());
            shared.0.take();
            // SAFETY: under the lock.
            assert_eq!(shared.1.with(|count| unsafe { *count }), threads * rounds);
        });
    }

    #[test]
    fn loom_lock_two_threads() {
        counted(2, 2, false);
    }

    #[test]
    fn loom_lock_wakes_late() {
        counted(2, 1, true);
    }

    #[test]
    fn loom_lock_three_threads() {
        counted(3, 1, false);
    }
}

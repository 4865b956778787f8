//! The lock of a pool's index and the door between readers and commits, in one word: a commit passes both with a
//! single exchange.
//!
//! | who | asks for | goes beside |
//! |---|---|---|
//! | a request for room | [`lock`](Gate::lock): the value | readers |
//! | a commit | [`alone`](Gate::alone): the value, and nobody reading | nobody |
//! | a read | [`read`](Gate::read) | other reads, requests for room |
//!
//! A read may last, so nobody waits for one with the value in hand: a commit that finds readers shuts the door for
//! those that come, and takes the value when the last one has left.
//!
//! Invariants
//! 1. The value is touched by who set `HELD`, until it is cleared.
//! 2. While somebody is `alone`, `SHUT` is set and no reader is inside. A reader enters only where `SHUT` is not set.
//! 3. Who sleeps has set `ASLEEP` while holding `sleepers`, in the same exchange that found its way barred. Whoever
//!    then clears the way sees it, waits for `sleepers`, clears it and wakes all.
//! 4. `SHUT` without `HELD` stands for a commit that waits. `sleepers` counts those; each gets in at some time, and
//!    takes `SHUT` away when it leaves unless others still wait.

use core::cell::UnsafeCell;
use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use std::sync::PoisonError;

use crate::base::sync::atomic::{AtomicU32, Ordering};
use crate::base::sync::{Condvar, Mutex, MutexGuard};

const HELD: u32 = 1;
const SHUT: u32 = 2;
const ASLEEP: u32 = 4;
const READER: u32 = 8;

/// Looks at a state that bars the way, before going to sleep.
const SPINS: usize = if cfg!(loom) { 0 } else { 100 };

/// A value, and readers of something else that it keeps apart from those who are alone with it.
pub(crate) struct Gate<T> {
    state: AtomicU32,
    /// Commits that wait.
    sleepers: Mutex<u32>,
    wake: Condvar,
    value: UnsafeCell<T>,
}

// SAFETY: invariant 1: one thread at a time reaches the value.
unsafe impl<T: Send> Sync for Gate<T> {}

impl<T: fmt::Debug> fmt::Debug for Gate<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("state", &self.state.load(Ordering::Relaxed)).finish_non_exhaustive()
    }
}

/// What a state becomes for who wants in; `None` where the way is barred.
type Way = fn(u32) -> Option<u32>;

const LOCK: Way = |state| (state & HELD == 0).then_some(state | HELD);
const ALONE: Way = |state| (state & HELD == 0 && state < READER).then_some(state | HELD | SHUT);
const READ: Way = |state| (state & SHUT == 0).then_some(state + READER);

impl<T> Gate<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            state: AtomicU32::new(0),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
            value: UnsafeCell::new(value),
        }
    }

    #[inline]
    fn exchange(&self, from: u32, to: u32) -> bool {
        self.state.compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// The value. Readers may be inside.
    #[inline]
    pub(crate) fn lock(&self) -> Held<'_, T> {
        if !self.exchange(0, HELD) {
            self.wait(LOCK);
        }
        Held { gate: self, alone: false, value: PhantomData }
    }

    /// The value, and nobody reads.
    #[inline]
    pub(crate) fn alone(&self) -> Held<'_, T> {
        if !self.exchange(0, HELD | SHUT) {
            self.wait(ALONE);
        }
        Held { gate: self, alone: true, value: PhantomData }
    }

    /// Nobody is alone until the result is dropped.
    #[inline]
    pub(crate) fn read(&self) -> Reading<'_, T> {
        if !self.exchange(0, READER) {
            self.wait(READ);
        }
        Reading(self)
    }

    fn sleepers(&self) -> MutexGuard<'_, u32> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cold]
    #[inline(never)]
    fn wait(&self, way: Way) {
        for _ in 0..SPINS {
            let state = self.state.load(Ordering::Relaxed);
            // Where others sleep this one would be served before them again and again.
            if state & ASLEEP != 0 {
                break;
            }
            match way(state) {
                Some(next) if self.exchange(state, next) => return,
                _ => core::hint::spin_loop(),
            }
        }
        // Only a commit finds its way barred by readers alone.
        let commits = way(READER).is_none();
        let mut sleepers = self.sleepers();
        *sleepers += u32::from(commits);
        loop {
            let state = self.state.load(Ordering::Relaxed);
            match way(state) {
                Some(next) if self.exchange(state, next) => break,
                Some(_) => {}
                None => {
                    let asleep = state | ASLEEP | if commits { SHUT } else { 0 };
                    if self.exchange(state, asleep) {
                        sleepers = self.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
                    }
                }
            }
        }
        *sleepers -= u32::from(commits);
    }

    /// Wakes those who sleep; `SHUT` goes where nobody is alone and no commit waits.
    #[cold]
    #[inline(never)]
    fn wake(&self, left_alone: bool) {
        let sleepers = self.sleepers();
        let shut = if left_alone && *sleepers == 0 { SHUT } else { 0 };
        let held = if left_alone { HELD } else { 0 };
        self.state.fetch_and(!(ASLEEP | held | shut), Ordering::Release);
        self.wake.notify_all();
    }
}

/// The value of a [`Gate`], left to others when dropped.
#[derive(Debug)]
pub(crate) struct Held<'a, T> {
    gate: &'a Gate<T>,
    alone: bool,
    /// `Send` and `Sync` as a reference to the value.
    value: PhantomData<&'a mut T>,
}

impl<T> Deref for Held<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: invariant 1.
        unsafe { &*self.gate.value.get() }
    }
}

impl<T> DerefMut for Held<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: invariant 1.
        unsafe { &mut *self.gate.value.get() }
    }
}

impl<T> Drop for Held<'_, T> {
    #[inline]
    fn drop(&mut self) {
        let state = &self.gate.state;
        if self.alone {
            let both = HELD | SHUT;
            if state.compare_exchange(both, 0, Ordering::Release, Ordering::Relaxed).is_err() {
                self.gate.wake(true);
            }
        } else if state.fetch_and(!HELD, Ordering::Release) & ASLEEP != 0 {
            self.gate.wake(false);
        }
    }
}

/// A reader of a [`Gate`].
#[derive(Debug)]
pub(crate) struct Reading<'a, T>(&'a Gate<T>);

impl<T> Drop for Reading<'_, T> {
    #[inline]
    fn drop(&mut self) {
        let before = self.0.state.fetch_sub(READER, Ordering::Release);
        if before & ASLEEP != 0 && before < 2 * READER {
            self.0.wake(false);
        }
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::thread;
    use std::sync::Arc;

    /// The value counts who had it; the other cell is what readers look at and commits change.
    struct Shared(Gate<UnsafeCell<usize>>, UnsafeCell<usize>);
    // SAFETY: the gate keeps the accesses to both apart, which is what the models check.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}

    fn locks(shared: &Shared) {
        let held = shared.0.lock();
        // SAFETY: under the lock.
        held.with_mut(|count| unsafe { *count += 1 });
    }

    fn commits(shared: &Shared) {
        let held = shared.0.alone();
        // SAFETY: under the lock, and alone.
        held.with_mut(|count| unsafe { *count += 1 });
        // SAFETY: as above.
        shared.1.with_mut(|data| unsafe { *data += 1 });
    }

    fn reads(shared: &Shared) {
        let _reading = shared.0.read();
        // SAFETY: nobody is alone.
        shared.1.with(|data| assert!(unsafe { *data } <= 2));
    }

    /// Loom reports a touch of a cell that another thread is changing, and a sleeper that nobody wakes.
    fn model(first: fn(&Shared), others: &'static [fn(&Shared)], had: usize) {
        loom::model(move || {
            let shared = Arc::new(Shared(Gate::new(UnsafeCell::new(0)), UnsafeCell::new(0)));
            let spawn = |work: fn(&Shared)| {
                let shared = shared.clone();
                thread::spawn(move || work(&shared))
            };
            let others: Vec<_> = others.iter().map(|&work| spawn(work)).collect();
            first(&shared);
            others.into_iter().for_each(|other| other.join().unwrap());
            let held = shared.0.alone();
            // SAFETY: under the lock.
            assert_eq!(held.with(|count| unsafe { *count }), had);
        });
    }

    #[test]
    fn loom_gate_two_commits_and_a_read() {
        model(commits, &[commits, reads], 2);
    }

    #[test]
    fn loom_gate_a_commit_a_request_and_a_read() {
        model(commits, &[locks, reads], 2);
    }

    #[test]
    fn loom_gate_a_commit_and_two_reads() {
        model(commits, &[reads, reads], 1);
    }

    #[test]
    fn loom_gate_a_request_inside_a_read_waits_for_no_commit() {
        fn reads_and_locks(shared: &Shared) {
            let _reading = shared.0.read();
            locks(shared);
        }
        model(commits, &[reads_and_locks], 2);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicU64;

    #[test]
    fn many_threads_of_all_kinds_meet_nobody_they_should_not() {
        let gate = Gate::new([0u64; 2]);
        let data = [AtomicU64::new(0), AtomicU64::new(0)];
        std::thread::scope(|scope| {
            for kind in 0..6 {
                let (gate, data) = (&gate, &data);
                scope.spawn(move || {
                    for round in 0..4_000 {
                        match (kind + round) % 3 {
                            0 => gate.lock()[0] += 1,
                            1 => {
                                gate.alone()[1] += 1;
                                let _held = gate.alone();
                                let next = data[0].load(Ordering::Relaxed) + 1;
                                data[0].store(next, Ordering::Relaxed);
                                if round % 64 == 0 {
                                    std::thread::yield_now();
                                }
                                data[1].store(next, Ordering::Relaxed);
                            }
                            _ => {
                                let _reading = gate.read();
                                let [a, b] = [0, 1].map(|i: usize| data[i].load(Ordering::Relaxed));
                                assert_eq!(a, b);
                                drop(gate.lock());
                            }
                        }
                    }
                });
            }
        });
        assert_eq!(*gate.lock(), [8_000; 2]);
        assert_eq!(gate.state.load(Ordering::Relaxed), 0);
    }
}

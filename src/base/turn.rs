//! A lock for a few instructions that nobody sleeps on: leaving it is one plain store, half the price of a lock that
//! may have to wake somebody.
//!
//! Invariants:
//! 1. The value is touched between a change of `held` to true and the store of false that follows it alone.
//! 2. Who holds it waits for nothing, so whoever waits for it waits for a few instructions of a thread that runs, or
//!    lets others run meanwhile.

use core::cell::UnsafeCell;
use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use super::sync::atomic::{AtomicBool, Ordering};

/// Looks at a turn that is held, before others may run.
#[cfg(not(loom))]
const SPINS: usize = 100;

/// The lock without what it guards.
#[derive(Debug)]
struct RawTurn {
    held: AtomicBool,
}

impl RawTurn {
    fn new() -> Self {
        Self { held: AtomicBool::new(false) }
    }

    #[inline(always)]
    fn try_take(&self) -> bool {
        self.held.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    #[inline(always)]
    fn take(&self) {
        if !self.try_take() {
            self.take_slow();
        }
    }

    #[cold]
    fn take_slow(&self) {
        #[cfg(loom)]
        while !self.try_take() {
            loom::thread::yield_now();
        }
        #[cfg(not(loom))]
        loop {
            for _ in 0..SPINS {
                if !self.held.load(Ordering::Relaxed) && self.try_take() {
                    return;
                }
                core::hint::spin_loop();
            }
            std::thread::yield_now();
        }
    }

    #[inline(always)]
    fn leave(&self) {
        self.held.store(false, Ordering::Release);
    }
}

/// A value for one thread at a time.
pub(crate) struct Turn<T> {
    raw: RawTurn,
    value: UnsafeCell<T>,
}

// SAFETY: one thread at a time reaches the value (invariant 1).
unsafe impl<T: Send> Sync for Turn<T> {}

impl<T> Turn<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { raw: RawTurn::new(), value: UnsafeCell::new(value) }
    }

    /// Waits for the turn.
    pub(crate) fn lock(&self) -> TurnGuard<'_, T> {
        self.raw.take();
        TurnGuard { turn: self, held: PhantomData }
    }

    /// The turn, if nobody has it.
    #[inline(always)]
    pub(crate) fn try_lock(&self) -> Option<TurnGuard<'_, T>> {
        // Lazily: a guard that is made is a turn that ends.
        self.raw.try_take().then(|| TurnGuard { turn: self, held: PhantomData })
    }
}

impl<T: fmt::Debug> fmt::Debug for Turn<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.try_lock() {
            Some(value) => f.debug_tuple("Turn").field(&*value).finish(),
            None => f.write_str("Turn(held)"),
        }
    }
}

/// Access to the value while the turn is held. `Send` and `Sync` as a reference to the value.
pub(crate) struct TurnGuard<'a, T> {
    turn: &'a Turn<T>,
    held: PhantomData<&'a mut T>,
}

impl<T> Deref for TurnGuard<'_, T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: the guard has the turn (invariant 1).
        unsafe { &*self.turn.value.get() }
    }
}

impl<T> DerefMut for TurnGuard<'_, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and the guard is borrowed exclusively.
        unsafe { &mut *self.turn.value.get() }
    }
}

impl<T> Drop for TurnGuard<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.turn.raw.leave();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn threads_take_turns() {
        let count = Turn::new(0u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let mut count = count.try_lock().unwrap_or_else(|| count.lock());
                        *count += 1;
                    }
                });
            }
        });
        assert_eq!(*count.lock(), 80_000);
        let held = count.lock();
        assert!(count.try_lock().is_none() && format!("{count:?}").contains("held"));
        drop(held);
        assert_eq!(format!("{count:?}"), "Turn(80000)");
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use std::sync::Arc;

    struct Shared(RawTurn, loom::cell::UnsafeCell<usize>);
    // SAFETY: the cell is touched while the turn is held.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}

    /// One thread never waits and the other does, as owner and flusher of a cache; loom reports a touch by both.
    #[test]
    fn loom_turn_of_owner_and_others() {
        loom::model(|| {
            let shared = Arc::new(Shared(RawTurn::new(), loom::cell::UnsafeCell::new(0)));
            let other = shared.clone();
            let flusher = loom::thread::spawn(move || {
                other.0.take();
                // SAFETY: the turn is held.
                other.1.with_mut(|count| unsafe { *count += 1 });
                other.0.leave();
            });
            let mut mine = 0;
            for _ in 0..2 {
                if shared.0.try_take() {
                    // SAFETY: the turn is held.
                    shared.1.with_mut(|count| unsafe { *count += 1 });
                    mine += 1;
                    shared.0.leave();
                }
            }
            flusher.join().unwrap();
            shared.0.take();
            // SAFETY: the turn is held.
            assert_eq!(shared.1.with(|count| unsafe { *count }), mine + 1);
        });
    }
}

//! The one shim between std's synchronisation and loom's. Code that is model-checked takes its atomics,
//! cells and threads from here.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic;
#[cfg(loom)]
pub(crate) use loom::sync::atomic;

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(loom)]
pub(crate) use modelled::{ForkGuard, Lock, LockGuard};
#[cfg(not(loom))]
pub(crate) use plain::{ForkGuard, Lock, LockGuard};

/// The lock as programs use it.
#[cfg(not(loom))]
mod plain {
    use core::cell::UnsafeCell;
    use core::fmt;
    use core::marker::PhantomData;
    use core::mem;
    use core::ops::{Deref, DerefMut};
    use std::sync::MutexGuard;

    use crate::base::lock::RawLock;

    /// A lock that is never poisoned: our critical sections leave every invariant intact before anything in them
    /// can panic, so a panic of a holder says nothing about the data.
    pub(crate) struct Lock<T> {
        raw: RawLock,
        value: UnsafeCell<T>,
    }

    // SAFETY: one thread at a time reaches the value (invariant 1 of `RawLock`).
    unsafe impl<T: Send> Sync for Lock<T> {}

    impl<T> Lock<T> {
        /// A lock around `value`.
        pub(crate) const fn new(value: T) -> Self {
            Self { raw: RawLock::new(), value: UnsafeCell::new(value) }
        }

        /// Waits for the lock.
        #[inline(always)]
        pub(crate) fn lock(&self) -> LockGuard<'_, T> {
            self.raw.take();
            LockGuard { lock: self, held: PhantomData }
        }

        /// Waits for the lock, and stops all that is going on around it: for a `fork`, in whose child the other
        /// threads are not there to finish it.
        pub(crate) fn lock_around_fork(&self) -> ForkGuard<'_, T> {
            let guard = self.lock();
            ForkGuard { _sleepers: self.raw.keep_sleepers(), guard }
        }

        /// The lock, if nobody has it.
        #[inline(always)]
        pub(crate) fn try_lock(&self) -> Option<LockGuard<'_, T>> {
            // Lazily: a guard that is made is a lock that is left.
            self.raw.try_take().then(|| LockGuard { lock: self, held: PhantomData })
        }

        /// What [`LockGuard::leave`] asks for.
        #[cold]
        pub(crate) fn wake_slow(&self) {
            self.raw.wake_slow();
        }
    }

    impl<T: Default> Default for Lock<T> {
        fn default() -> Self {
            Self::new(T::default())
        }
    }

    impl<T: fmt::Debug> fmt::Debug for Lock<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self.try_lock() {
                Some(value) => f.debug_tuple("Lock").field(&*value).finish(),
                None => f.write_str("Lock(held)"),
            }
        }
    }

    /// Access to the value while the lock is held. `Send` and `Sync` as a reference to the value.
    #[derive(Debug)]
    pub(crate) struct LockGuard<'a, T> {
        lock: &'a Lock<T>,
        held: PhantomData<&'a mut T>,
    }

    /// A lock held around a `fork`. The sleepers go first: who leaves the lock may want to wake them.
    #[derive(Debug)]
    pub(crate) struct ForkGuard<'a, T> {
        _sleepers: MutexGuard<'a, ()>,
        guard: LockGuard<'a, T>,
    }

    impl<T> Deref for ForkGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            &self.guard
        }
    }

    impl<T> LockGuard<'_, T> {
        /// Leaves the lock; whether [`Lock::wake_slow`] must follow, at the caller's leisure.
        #[inline(always)]
        #[must_use]
        pub(crate) fn leave(self) -> bool {
            let lock = self.lock;
            mem::forget(self);
            lock.raw.leave()
        }
    }

    impl<T> Deref for LockGuard<'_, T> {
        type Target = T;
        #[inline(always)]
        fn deref(&self) -> &T {
            // SAFETY: the guard holds the lock.
            unsafe { &*self.lock.value.get() }
        }
    }

    impl<T> DerefMut for LockGuard<'_, T> {
        #[inline(always)]
        fn deref_mut(&mut self) -> &mut T {
            // SAFETY: the guard holds the lock.
            unsafe { &mut *self.lock.value.get() }
        }
    }

    impl<T> Drop for LockGuard<'_, T> {
        #[inline(always)]
        fn drop(&mut self) {
            if self.lock.raw.leave() {
                self.lock.raw.wake_slow();
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn threads_take_turns_and_a_panic_leaves_the_lock_usable() {
            static COUNT: Lock<u64> = Lock::new(0);
            let threads = 4;
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    scope.spawn(move || {
                        for round in 0..20_000 {
                            let mut count = COUNT.try_lock().unwrap_or_else(|| COUNT.lock());
                            *count += 1;
                            if round % 64 == thread {
                                std::thread::yield_now();
                            }
                            if round % 2 == 0 && count.leave() {
                                COUNT.wake_slow();
                            }
                        }
                    });
                }
            });
            let panicked = std::thread::spawn(|| {
                let _held = COUNT.lock();
                panic!("with the lock held");
            });
            assert!(panicked.join().is_err());
            assert_eq!(*COUNT.lock(), threads * 20_000);
            let held = COUNT.lock();
            assert!(COUNT.try_lock().is_none() && format!("{COUNT:?}").contains("held"));
            drop(held);
            assert_eq!(format!("{COUNT:?}"), "Lock(80000)");
        }
    }
}

/// The same on loom's mutex, of which a model need not know the inside: that is modelled by itself.
#[cfg(loom)]
mod modelled {
    use core::ops::{Deref, DerefMut};
    use loom::sync::{Mutex, MutexGuard};
    use std::sync::PoisonError;

    #[derive(Debug, Default)]
    pub(crate) struct Lock<T>(Mutex<T>);

    impl<T> Lock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> LockGuard<'_, T> {
            LockGuard(self.0.lock().unwrap_or_else(PoisonError::into_inner))
        }

        pub(crate) fn try_lock(&self) -> Option<LockGuard<'_, T>> {
            self.0.try_lock().ok().map(LockGuard)
        }

        pub(crate) fn wake_slow(&self) {}

        /// Models do not fork.
        pub(crate) fn lock_around_fork(&self) -> ForkGuard<'_, T> {
            self.lock()
        }
    }

    pub(crate) type ForkGuard<'a, T> = LockGuard<'a, T>;

    #[derive(Debug)]
    pub(crate) struct LockGuard<'a, T>(MutexGuard<'a, T>);

    impl<T> LockGuard<'_, T> {
        pub(crate) fn leave(self) -> bool {
            false
        }
    }

    impl<T> Deref for LockGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            &self.0
        }
    }

    impl<T> DerefMut for LockGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            &mut self.0
        }
    }
}

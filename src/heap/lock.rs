//! A lock that allocates nothing and can be taken around `fork`.
//!
//! Critical sections here are some list operations long, so waiting spins and then yields.

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, Ordering};

/// A lock around `T`.
pub(crate) struct SpinLock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: only the holder of the lock reaches the value.
unsafe impl<T: Send> Sync for SpinLock<T> {}

impl<T> SpinLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Waits for the lock.
    pub(crate) fn lock(&self) -> SpinGuard<'_, T> {
        self.lock_raw();
        SpinGuard(self)
    }

    /// Takes the lock without a guard: before `fork`.
    pub(crate) fn lock_raw(&self) {
        let mut spins = 0;
        while self.held.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            spins += 1;
            if spins < 64 {
                core::hint::spin_loop();
            } else {
                // SAFETY: sched_yield has no preconditions.
                unsafe { libc::sched_yield() };
            }
        }
    }

    /// Lets go of the lock: after `fork`, in parent and child.
    ///
    /// # Safety
    /// The caller took it with `lock_raw`.
    pub(crate) unsafe fn unlock_raw(&self) {
        self.held.store(false, Ordering::Release);
    }

    /// The value, for who took the lock with `lock_raw`.
    ///
    /// # Safety
    /// The caller holds the lock, and makes no other reference to the value meanwhile.
    pub(crate) unsafe fn value_held(&self) -> &T {
        // SAFETY: the caller holds the lock.
        unsafe { &*self.value.get() }
    }
}

/// Access to the value while the lock is held.
pub(crate) struct SpinGuard<'a, T>(&'a SpinLock<T>);

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard holds the lock.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        self.0.held.store(false, Ordering::Release);
    }
}

//! The one shim between std's synchronisation and loom's. Code that is model-checked takes its atomics,
//! cells and threads from here.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic;
#[cfg(loom)]
pub(crate) use loom::sync::atomic;

/// A lock whose guard never reports poisoning: our critical sections leave every invariant intact before
/// anything in them can panic, so a panic of a holder says nothing about the data.
#[derive(Debug, Default)]
pub(crate) struct Lock<T>(Mutex<T>);

#[cfg(loom)]
use loom::sync::Mutex;
#[cfg(loom)]
pub(crate) use loom::sync::MutexGuard as LockGuard;
#[cfg(not(loom))]
use std::sync::Mutex;
#[cfg(not(loom))]
pub(crate) use std::sync::MutexGuard as LockGuard;

impl<T> Lock<T> {
    /// A lock around `value`.
    #[cfg(not(loom))]
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// A lock around `value`.
    #[cfg(loom)]
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Waits for the lock.
    #[inline]
    pub(crate) fn lock(&self) -> LockGuard<'_, T> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

//! A source that fails on command, for tests.

use super::{Region, Source};
use crate::base::error::{Error, OomReason, Result};
use crate::base::sync::atomic::{AtomicUsize, Ordering};

/// A [`Source`] that passes calls on to another one, counts them, and fails those it is told to fail.
///
/// ```
/// use memory_pool::source::{Source, failing::Failing, os::Os};
/// let source = Failing::new(Os::new());
/// source.fail_at(1);
/// let first = source.reserve(4096, 1)?; // call 0
/// assert!(source.reserve(4096, 1).is_err()); // call 1
/// // SAFETY: reserved above and not used after.
/// unsafe { source.release(first) };
/// assert_eq!((source.calls(), source.outstanding()), (2, 0));
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Debug)]
pub struct Failing<S> {
    inner: S,
    /// Calls to `reserve` so far.
    calls: AtomicUsize,
    /// The first call to fail, and how many from there on.
    from: AtomicUsize,
    count: AtomicUsize,
    /// Bytes handed out and not yet released.
    outstanding: AtomicUsize,
}

impl<S: Source> Failing<S> {
    /// Passes every call on to `inner` until told otherwise.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            calls: AtomicUsize::new(0),
            from: AtomicUsize::new(usize::MAX),
            count: AtomicUsize::new(0),
            outstanding: AtomicUsize::new(0),
        }
    }

    /// Fails call number `n` of `reserve` (the first is 0), and no other.
    pub fn fail_at(&self, n: usize) {
        self.fail(n, 1);
    }

    /// Fails every call of `reserve` from number `n` on.
    pub fn fail_from(&self, n: usize) {
        self.fail(n, usize::MAX);
    }

    /// Fails no more.
    pub fn heal(&self) {
        self.fail(usize::MAX, 0);
    }

    fn fail(&self, from: usize, count: usize) {
        self.from.store(from, Ordering::Relaxed);
        self.count.store(count, Ordering::Relaxed);
    }

    /// How often `reserve` was called.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    /// Bytes handed out and not yet released.
    pub fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Relaxed)
    }
}

// SAFETY: forwards to a source that keeps the contract, or fails.
unsafe impl<S: Source> Source for Failing<S> {
    fn granularity(&self) -> usize {
        self.inner.granularity()
    }

    fn limit(&self) -> usize {
        self.inner.limit()
    }

    fn reserve(&self, len: usize, align: usize) -> Result<Region> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let from = self.from.load(Ordering::Relaxed);
        if call >= from && call - from < self.count.load(Ordering::Relaxed) {
            return Err(Error::oom(len, OomReason::Source));
        }
        let region = self.inner.reserve(len, align)?;
        self.outstanding.fetch_add(region.len, Ordering::Relaxed);
        Ok(region)
    }

    unsafe fn release(&self, region: Region) {
        self.outstanding.fetch_sub(region.len, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { self.inner.release(region) }
    }

    unsafe fn discard(&self, part: Region) -> bool {
        // SAFETY: the caller's contract.
        unsafe { self.inner.discard(part) }
    }

    unsafe fn resize(&self, region: Region, new_len: usize, may_move: bool) -> Option<Region> {
        // SAFETY: the caller's contract.
        let resized = unsafe { self.inner.resize(region, new_len, may_move) }?;
        self.outstanding.fetch_add(resized.len, Ordering::Relaxed);
        self.outstanding.fetch_sub(region.len, Ordering::Relaxed);
        Some(resized)
    }
}

//! A handle on a pool whose clones write nothing that other threads write.

use core::alloc::Layout;
use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;
use std::sync::Arc;

use crate::base::error::Result;
use crate::base::host::{HostPool, Resized};

/// A pool as [`PoolManager`](crate::PoolManager) hands it out: dereferences to the pool and, where the CPU may
/// touch the memory, is an allocator itself.
///
/// Cloning a pool's own handle counts in memory that all its users share. Here the count belongs to the thread
/// that looked the pool up, so that look-ups from many threads do not slow each other down. For the pool's
/// own handle clone what this dereferences to.
///
/// ```
/// use memory_pool::{AnyPool, PoolConfig, PoolManager};
/// use allocator_api2::vec::Vec;
/// let manager = PoolManager::new();
/// manager.create_cpu_pool("frames", PoolConfig::default_cpu())?;
/// let mut frames = Vec::new_in(manager.cpu_pool("frames")?);
/// frames.push([0u8; 64]);
/// let pool: AnyPool = (*manager.cpu_pool("frames")?).clone();
/// assert!(pool.has_leaks());
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub struct PoolRef<P>(Arc<P>);

impl<P> PoolRef<P> {
    pub(crate) fn new(shared: Arc<P>) -> Self {
        Self(shared)
    }
}

impl<P> Clone for PoolRef<P> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<P> Deref for PoolRef<P> {
    type Target = P;
    #[inline]
    fn deref(&self) -> &P {
        &self.0
    }
}

impl<P: fmt::Debug> fmt::Debug for PoolRef<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

// SAFETY: forwards to a pool that keeps the contract, and keeps it alive.
unsafe impl<P: HostPool> HostPool for PoolRef<P> {
    #[inline]
    fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
        (**self).obtain(layout, zeroed)
    }
    #[inline]
    unsafe fn give_back(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).give_back(ptr, layout) }
    }
    #[inline]
    unsafe fn grow_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).grow_in_place(ptr, old, new) }
    }
    #[inline]
    unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).shrink_in_place(ptr, old, new) }
    }
    #[inline]
    unsafe fn relocate(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).relocate(ptr, old, new) }
    }
}

//! A [`CpuPool`] with what it does not have itself: an observer around it, and a callback when memory is short.
//! One of the kinds that [`AnyPool`](super::AnyPool) chooses from, and [`WatchedCpuPool`].

use core::alloc::Layout;
use core::mem::MaybeUninit;
use core::ptr::NonNull;
use std::sync::Arc;

use super::core::{OomCallback, pointer};
use super::cpu::CpuPool;
use super::interface::Host;
use crate::base::config::{AllocatorType, DebugConfig, MAX_ALIGNMENT, PoolConfig};
use crate::base::diagnostics::Diagnostics;
use crate::base::error::{Error, OomReason, PointerFault, Result};
use crate::base::host::{Resized, dangling};
use crate::base::pool::{ActiveAllocation, AllocFlags, refuse_device_flags};
use crate::base::stats::MemoryStats;
use crate::base::sync::Lock;
use crate::engine::{Block, Broken};
use crate::observe::{DebugLayer, Observer};

/// A [`CpuPool`] under the debug layer; [`CpuPool::watched`] makes it. Blocks come from the caches of threads as
/// always, the layer's books are behind one lock.
///
/// ```
/// use memory_pool::{CpuPool, FindingKind, OnFinding, PoolConfig};
/// use std::alloc::Layout;
/// let mut config = PoolConfig::debug_cpu();
/// config.debug.on_finding = OnFinding::Collect;
/// let pool = CpuPool::watched(config)?;
/// let block = pool.allocate(Layout::new::<[u8; 24]>())?.cast::<u8>();
/// // SAFETY: the byte behind the block is a canary of the pool; the block is live and freed once.
/// unsafe {
///     block.add(24).write(0);
///     pool.deallocate(block);
/// }
/// assert_eq!(pool.diagnostics().unwrap().findings()[0].kind, FindingKind::Overflow);
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct WatchedCpuPool(pub(super) Arc<Wrapped<DebugLayer>>);

impl CpuPool {
    /// A pool with the debug layer that `config.debug` describes.
    pub fn watched(config: PoolConfig) -> Result<WatchedCpuPool> {
        let config = super::checked(config, AllocatorType::SizeClass)?;
        let layer = DebugLayer::new("", &config)?;
        Ok(WatchedCpuPool(Arc::new(Wrapped::new("", config, layer)?)))
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Wrapped<O: Observer> {
    pool: CpuPool,
    observer: O,
    callback: Callback,
    /// As the user gave it; the pool's own is without debugging.
    config: PoolConfig,
}

#[derive(Default)]
struct Callback(Lock<Option<Arc<OomCallback>>>);

impl core::fmt::Debug for Callback {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Callback")
    }
}

impl<O: Observer> Wrapped<O> {
    pub(super) fn new(name: &str, config: PoolConfig, observer: O) -> Result<Self> {
        let pool = CpuPool::named(name, config.clone().debug(DebugConfig::OFF))?;
        Ok(Self { pool, observer, callback: Callback::default(), config })
    }

    /// A block of the pool's own, and how it came to be.
    fn inner_block(&self, layout: Layout, flags: AllocFlags) -> Result<Block> {
        loop {
            let error = match self.pool.allocate_with(layout, flags) {
                Ok(block) => {
                    let dirty = if flags.contains(AllocFlags::ZEROED) { 0 } else { block.len() };
                    let start = block.cast::<u8>().expose_provenance().get();
                    return Ok(Block { start, size: block.len(), dirty });
                }
                Err(error @ Error::OutOfMemory { .. }) => error,
                // More memory would not help.
                Err(error) => return Err(error),
            };
            let freed = O::ACTIVE && self.evict(true);
            let callback = self.callback.0.lock().clone();
            if !freed && !callback.is_some_and(|callback| callback(layout)) {
                return Err(error);
            }
        }
    }

    /// Frees what the observer held back; whether there was anything.
    fn evict(&self, all: bool) -> bool {
        let mut any = false;
        while let Some(inner) = self.observer.evict(all) {
            any = true;
            // SAFETY: contract of `Observer`: freed by the user, and let go once.
            unsafe { self.pool.deallocate(pointer(inner)) };
        }
        any
    }
}

// SAFETY: blocks come from a pool that keeps the contract, through an observer that keeps it.
unsafe impl<O: Observer> Host for Wrapped<O> {
    #[inline]
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>> {
        self.allocate_with(layout, AllocFlags::NONE)
    }

    fn allocate_with(&self, asked: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>> {
        refuse_device_flags(flags)?;
        if asked.size() == 0 {
            return Ok(dangling(asked));
        }
        let layout = self.observer.inflate(asked).ok_or(Error::oom(asked.size(), OomReason::Overflow))?;
        let inner = self.inner_block(layout, flags)?;
        // SAFETY: the block was just cut and is ours.
        let block = unsafe { self.observer.on_alloc(asked, inner) };
        let start = pointer(block.start);
        if flags.contains(AllocFlags::ZEROED) && O::ACTIVE {
            // SAFETY: a block of ours; the observer may have filled it.
            unsafe { start.write_bytes(0, block.size) };
        }
        Ok(NonNull::slice_from_raw_parts(start, block.size))
    }

    fn allocate_batch(&self, layout: Layout, blocks: &mut [MaybeUninit<NonNull<u8>>]) -> Result<()> {
        for filled in 0..blocks.len() {
            match self.allocate(layout) {
                Ok(block) => _ = blocks[filled].write(block.cast()),
                Err(error) => {
                    // SAFETY: the first `filled` were written just now, and nobody has seen them.
                    unsafe { self.deallocate_batch(blocks[..filled].assume_init_ref()) };
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    unsafe fn deallocate(&self, ptr: NonNull<u8>, layout: Option<Layout>) {
        let outer = ptr.as_ptr() as usize;
        if layout.is_none() && outer <= MAX_ALIGNMENT && !self.pool.owns(ptr) {
            return;
        }
        // SAFETY: the caller's contract.
        unsafe {
            // Without the layout: blocks grow in place here, and their class is that of the first layout.
            if let Some(inner) = self.observer.on_free(outer, layout) {
                self.pool.deallocate(pointer(inner));
            }
        }
        if O::ACTIVE {
            self.evict(false);
        }
    }

    unsafe fn deallocate_batch(&self, blocks: &[NonNull<u8>]) {
        for &block in blocks {
            // SAFETY: the caller's contract.
            unsafe { self.deallocate(block, None) };
        }
    }

    unsafe fn try_deallocate(&self, ptr: NonNull<u8>) -> Result<()> {
        if self.usable_size(ptr).is_some() {
            // SAFETY: a live block begins there.
            unsafe { self.deallocate(ptr, None) };
            return Ok(());
        }
        let fault = if self.owns(ptr) { PointerFault::NotLive } else { PointerFault::Foreign };
        Err(Error::pointer(ptr.as_ptr() as usize, fault))
    }

    unsafe fn grow_in_place(&self, ptr: NonNull<u8>, new: usize) -> Option<Resized> {
        let size = self.pool.usable_size(ptr).filter(|&size| self.observer.in_place() && new <= size)?;
        Some(Resized { block: NonNull::slice_from_raw_parts(ptr, size), zero_from: size })
    }

    unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, new: usize) -> Option<NonNull<[u8]>> {
        let size = self.pool.usable_size(ptr).filter(|&size| self.observer.in_place() && new > size / 2)?;
        Some(NonNull::slice_from_raw_parts(ptr, size))
    }

    unsafe fn relocate(&self, ptr: NonNull<u8>, new: Layout) -> Option<Resized> {
        let _ = (ptr, new);
        None
    }

    fn owns(&self, ptr: NonNull<u8>) -> bool {
        self.pool.owns(ptr)
    }

    fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize> {
        let outer = ptr.as_ptr() as usize;
        let (_, size) = self.observer.find(outer)?;
        size.or_else(|| self.pool.usable_size(ptr))
    }

    fn reserve(&self, bytes: usize) -> Result<()> {
        self.pool.reserve(bytes)
    }

    fn trim(&self, keep: usize) -> Result<usize> {
        self.evict(true);
        self.pool.trim(keep)
    }

    fn reset(&self) -> Result<()> {
        self.evict(true);
        self.pool.reset()
    }

    unsafe fn reset_unchecked(&self) -> Result<()> {
        self.observer.on_reset();
        self.evict(true);
        // SAFETY: the caller's contract.
        unsafe { self.pool.reset_unchecked() }
    }

    fn stats(&self) -> MemoryStats {
        let mut stats = self.pool.stats();
        if let Some(live) = self.observer.live() {
            // What the observer adds to a block, or holds back, is not the user's.
            stats.deallocation_count += self.observer.held().0 as u64;
            stats.current_allocated = live.iter().map(|block| block.size).sum();
        }
        stats.latency = self.observer.latency();
        stats
    }

    fn reset_peak(&self) {
        self.evict(true);
        self.pool.reset_peak();
    }

    fn set_tracking(&self, on: bool) {
        self.pool.set_tracking(on);
    }

    fn is_tracking(&self) -> bool {
        self.pool.is_tracking()
    }

    /// An observer that knows the live blocks knows those of all threads.
    fn active_allocations(&self) -> Vec<ActiveAllocation> {
        self.observer.live().unwrap_or_else(|| self.pool.active_allocations())
    }

    fn live(&self) -> usize {
        self.pool.live().saturating_sub(self.observer.held().0)
    }

    fn name(&self) -> &str {
        self.pool.name()
    }

    fn config(&self) -> &PoolConfig {
        &self.config
    }

    fn set_oom_callback(&self, callback: Option<Arc<OomCallback>>) {
        *self.callback.0.lock() = callback;
    }

    fn check(&self) -> Result<()> {
        let corrupt =
            |Broken { invariant, at }| Error::Corrupt { at: at as u64, what: invariant, found: None };
        self.pool.check().map_err(corrupt)
    }

    /// Its memory is the system's always.
    fn anchor(&self) -> Option<NonNull<u8>> {
        None
    }

    fn close(&self) -> Result<()> {
        self.evict(true);
        self.pool.close()
    }

    fn diagnostics(&self) -> Option<&dyn Diagnostics> {
        self.observer.diagnostics()
    }
}

impl<O: Observer> Drop for Wrapped<O> {
    fn drop(&mut self) {
        self.observer.on_drop();
    }
}

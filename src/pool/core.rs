//! The composition: an engine behind a front, a source behind both, an observer around them.
//!
//! ```text
//!   user ─▶ observer ─▶ front ─▶ engine            fast path: one call, one lock (or none)
//!                         │ nothing fits
//!                         ▼
//!                    growth ticket ─▶ source       slow path: see `growth`
//! ```
//!
//! Invariants:
//! 1. Every span of the engine is a region of the source, its length cut to what the limit allows; it is
//!    released when the engine gives the span back, and all are when the core is dropped.
//! 2. `reserved` counts the payload of all spans, the large blocks, and what is being reserved right now; it
//!    never exceeds `max_size`. It changes before the source is asked and after the source took back.
//! 3. The source and the observer are called with no lock of the pool held but the growth ticket, which only
//!    those wait for who must grow or shrink the pool themselves.

use core::alloc::Layout;
use core::fmt;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::front::Front;
use super::large::{LargeBlocks, PAGE};
use super::owner::Owner;
use crate::base::config::{MAX_ALIGNMENT, PoolConfig};
use crate::base::error::{Error, OomReason, PointerFault, Refusal, Result};
use crate::base::host::{Resized, dangling};
use crate::base::pool::{ActiveAllocation, AllocFlags, refuse_device_flags};
use crate::base::sync::Lock;
use crate::base::tracking::Tracking;
use crate::engine::{Block, Broken};
use crate::observe::Observer;
use crate::source::{Region, Source};

/// What is called when memory is short; whether to try again.
pub(super) type OomCallback = dyn Fn(Layout) -> bool + Send + Sync;

/// A pool of host memory; [`Pool`](super::Pool) is the handle on one.
pub struct Core<F: Front, S: Source, O: Observer> {
    pub(super) front: F,
    owner: Owner,
    pub(super) observer: O,
    pub(super) source: S,
    pub(super) large: LargeBlocks,
    pub(super) reserved: AtomicUsize,
    pub(super) peak_reserved: AtomicUsize,
    pub(super) source_calls: AtomicU64,
    /// Start of the region that was reserved last, unless it was given back.
    pub(super) region: AtomicUsize,
    /// Whether the pool may not grow any more. Only set while the growth ticket is held.
    pub(super) closed: AtomicBool,
    pub(super) failed: AtomicU64,
    pub(super) tracking: Tracking,
    pub(super) oom_callback: Lock<Option<std::sync::Arc<OomCallback>>>,
    config: PoolConfig,
    name: Box<str>,
}

impl<F: Front, S: Source, O: Observer> fmt::Debug for Core<F, S, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.name)
            .field("reserved", &self.reserved)
            .field("source", &self.source)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// The pointer behind an address that the engine gave.
#[inline]
pub(super) fn pointer(start: usize) -> NonNull<u8> {
    // SAFETY: engines never hand out address 0: no span contains it.
    unsafe { NonNull::new_unchecked(ptr::with_exposed_provenance_mut(start)) }
}

#[inline]
fn slice(block: Block) -> NonNull<[u8]> {
    NonNull::slice_from_raw_parts(pointer(block.start), block.size)
}

impl<F: Front, S: Source, O: Observer> Core<F, S, O> {
    /// Puts the parts together and reserves what the configuration asks for at the start.
    pub(super) fn new(name: &str, config: PoolConfig, front: F, source: S, observer: O) -> Result<Self> {
        let core = Self {
            front,
            owner: Owner::new(config.thread_safe || !F::SHARED),
            observer,
            source,
            large: LargeBlocks::default(),
            reserved: AtomicUsize::new(0),
            peak_reserved: AtomicUsize::new(0),
            source_calls: AtomicU64::new(0),
            region: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            failed: AtomicU64::new(0),
            tracking: Tracking::new(config.track_stats),
            oom_callback: Lock::new(None),
            config,
            name: name.into(),
        };
        if core.config.initial_size > 0 {
            core.reserve(core.config.initial_size)?;
        }
        Ok(core)
    }

    pub(super) fn config(&self) -> &PoolConfig {
        &self.config
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn source(&self) -> &S {
        &self.source
    }

    /// Says no to threads that the pool does not belong to.
    #[inline]
    pub(super) fn admit(&self) -> Result<()> {
        if !F::SHARED || self.owner.admits() {
            Ok(())
        } else {
            Err(Error::InvalidOperation(Refusal::WrongThread))
        }
    }

    /// A block for `asked`, whose size is not 0, as the user sees it.
    pub(super) fn block(&self, asked: Layout, flags: AllocFlags) -> Result<Block> {
        self.admit()?;
        let layout = self.observer.inflate(asked).ok_or(Error::oom(asked.size(), OomReason::Overflow))?;
        let block = match self.front.alloc(layout) {
            Some(block) => block,
            None => self.alloc_slow(layout, flags)?,
        };
        // SAFETY: the block was just cut and is ours.
        Ok(unsafe { self.observer.on_alloc(asked, block) })
    }

    /// `allocate` of the interface.
    #[inline(always)]
    pub(super) fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>> {
        let (mut taken, mut owing) = ((0, 0), false);
        if !O::ACTIVE && layout.size() != 0 && (!F::SHARED || self.owner.is_everybody()) {
            (taken, owing) = self.front.take(layout);
            if taken.0 != 0 && !owing {
                return Ok(NonNull::slice_from_raw_parts(pointer(taken.0), taken.1));
            }
        }
        self.allocate_slow(layout, taken, owing)
    }

    /// The rest of `allocate`, whatever came of it so far: one call from one place, for which the fast path keeps
    /// nothing.
    #[cold]
    #[inline(never)]
    fn allocate_slow(&self, layout: Layout, taken: (usize, usize), owing: bool) -> Result<NonNull<[u8]>> {
        if owing {
            self.front.settle_slow();
        }
        if taken.0 != 0 {
            return Ok(NonNull::slice_from_raw_parts(pointer(taken.0), taken.1));
        }
        if layout.size() == 0 {
            return self.admit().map(|()| dangling(layout));
        }
        self.block(layout, AllocFlags::NONE).map(slice)
    }

    pub(super) fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>> {
        refuse_device_flags(flags)?;
        if layout.size() == 0 {
            return self.admit().map(|()| dangling(layout));
        }
        let block = self.block(layout, flags)?;
        if flags.contains(AllocFlags::ZEROED) {
            // SAFETY: the block is ours, and `dirty` does not exceed its size.
            unsafe { pointer(block.start).write_bytes(0, block.dirty.min(block.size)) };
        }
        Ok(slice(block))
    }

    /// Frees the block at `ptr`; an empty block is left alone.
    ///
    /// # Safety
    /// `ptr` came from this pool, is live (or empty) and not used after; `layout`, if given, fits it.
    #[inline(always)]
    pub(super) unsafe fn deallocate(&self, ptr: NonNull<u8>, layout: Option<Layout>) {
        let outer = ptr.as_ptr() as usize;
        let (mut given, mut owing) = (false, false);
        // Empty blocks lie at their alignment.
        if !O::ACTIVE && (layout.is_some() || outer > MAX_ALIGNMENT) && !self.large.may_be::<F>(outer) {
            // SAFETY: the caller's contract, and it is no large block.
            (given, owing) = unsafe { self.front.give(outer) };
            if given && !owing {
                return;
            }
        }
        // SAFETY: the caller's contract.
        unsafe { self.deallocate_slow(ptr, layout, given, owing) }
    }

    /// The rest of `deallocate`, whatever came of it so far.
    ///
    /// # Safety
    /// As for `deallocate`, unless it was `given`.
    #[cold]
    #[inline(never)]
    unsafe fn deallocate_slow(&self, ptr: NonNull<u8>, layout: Option<Layout>, given: bool, owing: bool) {
        if owing {
            self.front.settle_slow();
        }
        let outer = ptr.as_ptr() as usize;
        if given || layout.is_none() && outer <= MAX_ALIGNMENT && !self.owns(ptr) {
            return;
        }
        // SAFETY: the caller's contract.
        unsafe {
            if let Some(inner) = self.observer.on_free(outer, layout) {
                self.free(inner);
            }
        }
        if O::ACTIVE {
            self.evict(false);
        }
    }

    /// Frees a block by the engine's address.
    ///
    /// # Safety
    /// `inner` is live and not used after.
    pub(super) unsafe fn free(&self, inner: usize) {
        if self.large.may_be::<F>(inner) && self.free_large(inner) {
            return;
        }
        // SAFETY: the caller's contract, and it is no large block.
        unsafe { self.front.free(inner) }
    }

    /// Frees what the observer held back; whether there was anything.
    #[cold]
    pub(super) fn evict(&self, all: bool) -> bool {
        let mut any = false;
        while let Some(inner) = self.observer.evict(all) {
            any = true;
            // SAFETY: contract of `Observer`: freed by the user, and let go once.
            unsafe { self.free(inner) };
        }
        any
    }

    /// `deallocate` for a pointer that nobody vouches for.
    ///
    /// # Safety
    /// Nothing else uses the block, if `ptr` is one.
    pub(super) unsafe fn try_deallocate(&self, ptr: NonNull<u8>) -> Result<()> {
        self.admit()?;
        let outer = ptr.as_ptr() as usize;
        let fault = |fault| Err(Error::pointer(outer, fault));
        if O::ACTIVE {
            let Some((inner, _)) = self.observer.find(outer) else {
                return fault(if self.owns(ptr) { PointerFault::NotLive } else { PointerFault::Foreign });
            };
            if self.inner_size(inner).is_none() {
                return fault(PointerFault::NotLive);
            }
            // SAFETY: the observer knows it as live.
            unsafe { self.deallocate(ptr, None) };
            return Ok(());
        }
        if self.large.may_be::<F>(outer) && self.free_large(outer) {
            return Ok(());
        }
        if let Some(region) = self.large.containing(outer) {
            debug_assert_ne!(region.start(), outer);
            return fault(PointerFault::Interior);
        }
        // SAFETY: the caller's contract.
        self.front.with(|engine| unsafe { engine.free_checked(outer) }).map(|_| ()).or_else(fault)
    }

    /// Usable size of the block that the engine or the source knows at `inner`.
    fn inner_size(&self, inner: usize) -> Option<usize> {
        if self.large.may_be::<F>(inner)
            && let Some(region) = self.large.get(inner)
        {
            return Some(region.len);
        }
        self.front.with(|engine| {
            engine.settle();
            engine.usable_size(inner)
        })
    }

    pub(super) fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize> {
        let outer = ptr.as_ptr() as usize;
        let (inner, size) = self.observer.find(outer)?;
        size.or_else(|| self.inner_size(inner))
    }

    pub(super) fn owns(&self, ptr: NonNull<u8>) -> bool {
        let address = ptr.as_ptr() as usize;
        self.front.with(|engine| engine.owns(address)) || self.large.containing(address).is_some()
    }

    /// Grows a block where it is.
    ///
    /// # Safety
    /// As [`HostPool::grow_in_place`](crate::base::host::HostPool::grow_in_place).
    pub(super) unsafe fn grow_in_place(&self, ptr: NonNull<u8>, new: usize) -> Option<Resized> {
        if !self.observer.in_place() || self.admit().is_err() {
            return None;
        }
        let start = ptr.as_ptr() as usize;
        if self.large.may_be::<F>(start)
            && let Some(region) = self.large.get(start)
        {
            return self.resize_large(region, new, false);
        }
        // SAFETY: the caller's contract.
        let size = self.front.with(|engine| unsafe { engine.grow(start, new) })?;
        Some(Resized { block: NonNull::slice_from_raw_parts(ptr, size), zero_from: size })
    }

    /// Cuts a block's tail off where it is.
    ///
    /// # Safety
    /// As [`HostPool::shrink_in_place`](crate::base::host::HostPool::shrink_in_place).
    pub(super) unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, new: usize) -> Option<NonNull<[u8]>> {
        if !self.observer.in_place() {
            return None;
        }
        let start = ptr.as_ptr() as usize;
        if self.large.may_be::<F>(start)
            && let Some(region) = self.large.get(start)
        {
            let resized = self.resize_large(region, new, false).map(|resized| resized.block);
            return resized.or(Some(NonNull::slice_from_raw_parts(region.base, region.len)));
        }
        // SAFETY: the caller's contract.
        let size = self.front.with(|engine| unsafe { engine.shrink(start, new) });
        Some(NonNull::slice_from_raw_parts(ptr, size))
    }

    /// Moves a block without copying it.
    ///
    /// # Safety
    /// As [`HostPool::relocate`](crate::base::host::HostPool::relocate).
    pub(super) unsafe fn relocate(&self, ptr: NonNull<u8>, new: Layout) -> Option<Resized> {
        // A region keeps the alignment of a page when it moves, and no more; a fixed pool knows its own by more.
        if F::DIRECT == usize::MAX || !self.observer.in_place() || new.align() > PAGE {
            return None;
        }
        let region = self.large.get(ptr.as_ptr() as usize)?;
        self.resize_large(region, new.size(), true)
    }

    /// The live blocks as the user sees them.
    pub(super) fn active(&self) -> Vec<ActiveAllocation> {
        if let Some(live) = self.observer.live() {
            return live;
        }
        let mut live = Vec::new();
        self.front.with(|engine| {
            engine.settle();
            engine.for_each_live(&mut |block| live.push(ActiveAllocation::new(block.start, block.size)));
        });
        for Region { base, len, .. } in self.large.all() {
            live.push(ActiveAllocation::new(base.as_ptr() as usize, len));
        }
        live
    }

    /// An address in the pool's memory.
    pub(super) fn anchor(&self) -> Option<NonNull<u8>> {
        NonNull::new(ptr::without_provenance_mut(self.region.load(Ordering::Relaxed)))
    }

    /// Blocks that the user holds.
    pub(super) fn live(&self) -> usize {
        let inner = self.front.with(|engine| {
            engine.settle();
            engine.live_blocks()
        });
        (inner + self.large.totals().live).saturating_sub(self.observer.held().0)
    }

    pub(super) fn reset(&self) -> Result<()> {
        self.admit()?;
        self.evict(true);
        let engine = self.front.with(|engine| engine.reset_if_idle());
        match engine + self.large.totals().live {
            0 => Ok(()),
            live => Err(Error::InvalidOperation(Refusal::StillLive(live))),
        }
    }

    /// # Safety
    /// Nothing that was allocated is used or freed after.
    pub(super) unsafe fn empty(&self) {
        self.observer.on_reset();
        self.evict(true);
        while let Some(region) = self.large.remove_any() {
            self.release(region, region.len);
        }
        // SAFETY: the caller's contract.
        self.front.with(|engine| unsafe { engine.reset() });
    }

    /// Walks every invariant of the engine.
    pub(super) fn check(&self) -> Result<()> {
        let corrupt =
            |Broken { invariant, at }| Error::Corrupt { at: at as u64, what: invariant, found: None };
        self.front.with(|engine| engine.check()).map_err(corrupt)
    }
}

impl<F: Front, S: Source, O: Observer> Drop for Core<F, S, O> {
    fn drop(&mut self) {
        self.observer.on_drop();
        // SAFETY: the last handle is gone, and with it everything that may use or free a block.
        unsafe { self.empty() };
        self.give_back_idle(0);
        debug_assert_eq!(*self.reserved.get_mut(), 0);
    }
}

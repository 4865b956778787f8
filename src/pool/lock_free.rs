//! Fixed-size pools without a lock, and the choice between the two at run time.

use core::alloc::Layout;

use super::front::{BuildFront, Front, Locked, PoolEngine};
use crate::base::config::{AllocatorType, PoolConfig, SyncType};
use crate::base::error::{Error, Result};
use crate::base::sync::Lock;
use crate::engine::atomic_slots::{AtomicSlots, thread_number};
use crate::engine::slots::Slots;
use crate::engine::{Block, Engine};

/// Single blocks without waiting for anybody; runs and growth in turn.
#[derive(Debug)]
pub struct LockFree {
    slots: AtomicSlots,
    ticket: Lock<()>,
}

impl BuildFront for LockFree {
    const KIND: AllocatorType = AllocatorType::FixedSize;

    fn build(config: &PoolConfig) -> Result<Self> {
        let threads = std::thread::available_parallelism().map_or(8, usize::from);
        let slots = AtomicSlots::new(config.block_size, config.alignment, threads);
        let slots =
            slots.ok_or_else(|| Error::config("block_size", config.block_size, "1 to isize::MAX / 2"))?;
        Ok(Self { slots, ticket: Lock::new(()) })
    }
}

// SAFETY: the engine's own calls, which any thread may make at any time.
unsafe impl Front for LockFree {
    const DIRECT: usize = Slots::DIRECT;
    const SHARED: bool = true;

    #[inline(always)]
    fn take(&self, layout: Layout) -> ((usize, usize), bool) {
        if self.slots.serves(layout) { self.slots.take_near(thread_number()) } else { ((0, 0), false) }
    }

    fn alloc(&self, layout: Layout) -> Option<Block> {
        if self.slots.serves(layout) {
            return self.slots.alloc_one(thread_number());
        }
        self.slots.with_slow(|engine| engine.alloc(layout))
    }

    #[inline(always)]
    unsafe fn give(&self, start: usize) -> (bool, bool) {
        // SAFETY: the caller's contract.
        (unsafe { self.slots.give_near(start, thread_number()) }, false)
    }

    unsafe fn free(&self, start: usize) {
        // SAFETY: the caller's contract.
        unsafe { self.slots.free_block(start, thread_number()) };
    }

    #[cold]
    fn settle_slow(&self) {
        self.slots.spill_near(thread_number());
    }

    #[inline]
    fn in_turn(&self) -> bool {
        false
    }

    fn with<R>(&self, act: impl FnOnce(&mut dyn Engine) -> R) -> R {
        self.slots.with_slow(act)
    }

    fn ticket<R>(&self, act: impl FnOnce() -> R) -> Option<R> {
        let _ticket = self.ticket.lock();
        Some(act())
    }
}

/// What `sync_type` of the configuration says: one lock, or none.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one a pool, and a pointer costs every call a load")]
pub enum FixedFront {
    /// One lock.
    Locked(Locked<Slots>),
    /// No lock.
    LockFree(LockFree),
}

impl BuildFront for FixedFront {
    const KIND: AllocatorType = AllocatorType::FixedSize;

    fn build(config: &PoolConfig) -> Result<Self> {
        Ok(match config.sync_type {
            SyncType::LockFree => Self::LockFree(LockFree::build(config)?),
            _ => Self::Locked(Locked::build(config)?),
        })
    }
}

// SAFETY: forwards to fronts that keep the contract; the choice never changes.
unsafe impl Front for FixedFront {
    const DIRECT: usize = Slots::DIRECT;
    const SHARED: bool = true;

    #[inline(always)]
    fn take(&self, layout: Layout) -> ((usize, usize), bool) {
        match self {
            Self::Locked(front) => front.take(layout),
            Self::LockFree(front) => front.take(layout),
        }
    }

    fn alloc(&self, layout: Layout) -> Option<Block> {
        match self {
            Self::Locked(front) => front.alloc(layout),
            Self::LockFree(front) => front.alloc(layout),
        }
    }

    #[inline(always)]
    unsafe fn give(&self, start: usize) -> (bool, bool) {
        // SAFETY: the caller's contract.
        unsafe {
            match self {
                Self::Locked(front) => front.give(start),
                Self::LockFree(front) => front.give(start),
            }
        }
    }

    unsafe fn free(&self, start: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            match self {
                Self::Locked(front) => front.free(start),
                Self::LockFree(front) => front.free(start),
            }
        }
    }

    #[cold]
    fn settle_slow(&self) {
        match self {
            Self::Locked(front) => front.settle_slow(),
            Self::LockFree(front) => front.settle_slow(),
        }
    }

    #[inline]
    fn in_turn(&self) -> bool {
        matches!(self, Self::Locked(_))
    }

    fn with<R>(&self, act: impl FnOnce(&mut dyn Engine) -> R) -> R {
        match self {
            Self::Locked(front) => front.with(act),
            Self::LockFree(front) => front.with(act),
        }
    }

    fn ticket<R>(&self, act: impl FnOnce() -> R) -> Option<R> {
        match self {
            Self::Locked(front) => front.ticket(act),
            Self::LockFree(front) => front.ticket(act),
        }
    }
}

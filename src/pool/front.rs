//! Who may call an engine, and when.

use core::alloc::Layout;
use core::cell::{Cell, UnsafeCell};
use core::fmt;
use core::marker::PhantomData;

use crate::base::config::{AllocatorType, PoolConfig};
use crate::base::error::Result;
use crate::base::sync::Lock;
use crate::engine::{Block, Engine, HostSpace, Serves};

/// Alignments from this on are left to the source.
pub(super) const LARGE_ALIGN: usize = 1 << 20;

/// Access to an engine for those who may have it.
///
/// `take` and `give` are the fast paths: they inline, wait for nobody, and call nothing where all is well, so that a
/// call of the pool that does not inline needs no frame. Where they do not serve, `alloc` and `free` do.
///
/// # Safety
/// `take`, `alloc`, `give` and `free` act as those of an [`Engine`], for every thread that may call the front at
/// all.
pub unsafe trait Front: fmt::Debug {
    /// Requests from this size on that find no room get memory of their own from the source, and so do those
    /// aligned to 1 MiB.
    const DIRECT: usize;

    /// Whether several threads may call.
    const SHARED: bool;

    /// As [`Engine::take`], for who does not wait; and whether [`settle_slow`](Self::settle_slow) must follow.
    fn take(&self, layout: Layout) -> ((usize, usize), bool);

    /// Cuts a block; `None` when nothing fits.
    fn alloc(&self, layout: Layout) -> Option<Block>;

    /// Whether the block was taken back as by `free`, for who does not wait; and whether
    /// [`settle_slow`](Self::settle_slow) must follow.
    ///
    /// # Safety
    /// As for `free`.
    unsafe fn give(&self, start: usize) -> (bool, bool);

    /// Takes a block back.
    ///
    /// # Safety
    /// `start` is the address of a live block of this engine.
    unsafe fn free(&self, start: usize);

    /// Does what a fast path left to be done: wakes who waits for the lock.
    fn settle_slow(&self) {}

    /// Whether calls wait for each other, so that many at once are better done in one turn.
    #[inline]
    fn in_turn(&self) -> bool {
        true
    }

    /// Calls `act` with the engine; whatever fast paths hold is settled first where that matters.
    fn with<R>(&self, act: impl FnOnce(&mut dyn Engine) -> R) -> R;

    /// Calls `act` when nobody else grows or trims the pool; `None` where the caller itself is doing so.
    fn ticket<R>(&self, act: impl FnOnce() -> R) -> Option<R>;
}

/// An engine of host pools, as pools make it.
pub trait PoolEngine: Serves<HostSpace> + fmt::Debug + Sized {
    /// The kind of pool it makes.
    const KIND: AllocatorType;

    /// See [`Front::DIRECT`].
    const DIRECT: usize;

    /// Whether such an engine may call a user's policy.
    const CALLS_OUT: bool;

    /// An empty engine as `config` describes it.
    fn build(config: &PoolConfig) -> Result<Self>;
}

/// A front that a configuration is enough to make.
pub trait BuildFront: Front + Sized {
    /// The kind of pool it makes.
    const KIND: AllocatorType;

    /// An empty pool's front as `config` describes it.
    fn build(config: &PoolConfig) -> Result<Self>;
}

/// One thread at a time, in turn.
#[derive(Debug)]
pub struct Locked<E> {
    engine: Lock<E>,
    ticket: Lock<()>,
}

impl<E: PoolEngine> BuildFront for Locked<E> {
    const KIND: AllocatorType = E::KIND;

    fn build(config: &PoolConfig) -> Result<Self> {
        Ok(Self { engine: Lock::new(E::build(config)?), ticket: Lock::new(()) })
    }
}

// SAFETY: the engine's own methods, one call at a time.
unsafe impl<E: PoolEngine> Front for Locked<E> {
    const DIRECT: usize = E::DIRECT;
    const SHARED: bool = true;

    #[inline(always)]
    fn take(&self, layout: Layout) -> ((usize, usize), bool) {
        let Some(mut engine) = self.engine.try_lock() else { return ((0, 0), false) };
        (engine.take(layout), engine.leave())
    }

    fn alloc(&self, layout: Layout) -> Option<Block> {
        self.engine.lock().alloc(layout)
    }

    #[inline(always)]
    unsafe fn give(&self, start: usize) -> (bool, bool) {
        let Some(mut engine) = self.engine.try_lock() else { return (false, false) };
        // SAFETY: the caller's contract.
        (unsafe { engine.give(start) }, engine.leave())
    }

    unsafe fn free(&self, start: usize) {
        // SAFETY: the caller's contract.
        unsafe { self.engine.lock().free(start) };
    }

    #[cold]
    fn settle_slow(&self) {
        self.engine.wake_slow();
    }

    fn with<R>(&self, act: impl FnOnce(&mut dyn Engine) -> R) -> R {
        act(&mut *self.engine.lock())
    }

    fn ticket<R>(&self, act: impl FnOnce() -> R) -> Option<R> {
        let _ticket = self.ticket.lock();
        Some(act())
    }
}

/// One thread, no lock.
pub struct Local<E> {
    engine: UnsafeCell<E>,
    /// Whether the engine calls a user's policy, which could call the pool again; then `busy` keeps it out.
    guarded: bool,
    busy: Cell<bool>,
    growing: Cell<bool>,
    /// Stays with the thread that made it.
    bound: PhantomData<*const ()>,
}

impl<E> fmt::Debug for Local<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").field("busy", &self.busy.get()).finish_non_exhaustive()
    }
}

/// Clears a flag, on the way of a panic as well.
struct Clear<'a>(&'a Cell<bool>);

impl Drop for Clear<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl<E: PoolEngine> BuildFront for Local<E> {
    const KIND: AllocatorType = E::KIND;

    fn build(config: &PoolConfig) -> Result<Self> {
        let engine = E::build(config)?;
        Ok(Self {
            guarded: engine.calls_out(),
            engine: UnsafeCell::new(engine),
            busy: Cell::new(false),
            growing: Cell::new(false),
            bound: PhantomData,
        })
    }
}

impl<E: PoolEngine> Local<E> {
    #[inline(always)]
    fn enter<R>(&self, act: impl FnOnce(&mut E) -> R) -> R {
        if !E::CALLS_OUT || !self.guarded {
            // SAFETY: not `Sync`, and `act` comes from this module's callers, which call nobody but the engine,
            // which calls nobody: this is the only reference.
            return act(unsafe { &mut *self.engine.get() });
        }
        assert!(!self.busy.replace(true), "a policy called the pool that it was choosing for");
        let _clear = Clear(&self.busy);
        // SAFETY: not `Sync`, and the flag keeps calls from within out.
        act(unsafe { &mut *self.engine.get() })
    }
}

// SAFETY: the engine's own methods, one call at a time.
unsafe impl<E: PoolEngine> Front for Local<E> {
    const DIRECT: usize = E::DIRECT;
    const SHARED: bool = false;

    #[inline(always)]
    fn take(&self, layout: Layout) -> ((usize, usize), bool) {
        (self.enter(|engine| engine.take(layout)), false)
    }

    fn alloc(&self, layout: Layout) -> Option<Block> {
        self.enter(|engine| engine.alloc(layout))
    }

    #[inline(always)]
    unsafe fn give(&self, start: usize) -> (bool, bool) {
        // SAFETY: the caller's contract.
        (self.enter(|engine| unsafe { engine.give(start) }), false)
    }

    unsafe fn free(&self, start: usize) {
        // SAFETY: the caller's contract.
        self.enter(|engine| unsafe { engine.free(start) });
    }

    fn with<R>(&self, act: impl FnOnce(&mut dyn Engine) -> R) -> R {
        self.enter(|engine| act(engine))
    }

    fn ticket<R>(&self, act: impl FnOnce() -> R) -> Option<R> {
        if self.growing.replace(true) {
            return None;
        }
        let _clear = Clear(&self.growing);
        Some(act())
    }
}

//! Pools of host memory: an engine, a front, a source and an observer, put together by type.
//!
//! | pool | blocks | threads |
//! |---|---|---|
//! | [`FixedPool`] | one size, and runs of adjacent blocks | shared; one lock, or none (`sync_type`) |
//! | [`LockFreeFixedPool`] | as above | shared; no lock |
//! | [`VariablePool`] | any size | shared; one lock |
//! | [`LocalFixedPool`], [`LocalVariablePool`] | as above | one thread, no lock |
//! | [`CpuPool`] | size classes | shared; a cache per thread |
//! | [`AnyPool`] | as the configuration says | shared |
//!
//! Shared pools are handles: `clone` shares, and the last handle gives all memory back. Containers and boxes
//! hold a handle or borrow one, so what is in them keeps its memory; who takes raw blocks keeps a handle
//! himself for as long as he uses them.

mod any;
mod batch;
mod core;
mod cpu;
mod front;
mod growth;
mod interface;
mod large;
mod lock_free;
mod memory;
pub(crate) mod owner;
mod tracking;
mod wrapped;

use ::core::alloc::Layout;
use ::core::fmt;
use ::core::mem::MaybeUninit;
use ::core::ptr::NonNull;
use std::sync::Arc;

pub use self::any::AnyPool;
pub use self::core::Core;
pub use self::cpu::CpuPool;
pub use self::front::{BuildFront, Front, Local, Locked, PoolEngine};
pub use self::interface::Host;
pub use self::lock_free::{FixedFront, LockFree};
pub use self::memory::HostMemory;
pub use self::wrapped::WatchedCpuPool;

use self::interface::{inherent, shared};
use crate::base::config::{AllocatorType, PoolConfig};
use crate::base::diagnostics::Diagnostics;
use crate::base::error::{Error, OomReason, Result};
use crate::base::host::{HostPool, Resized};
use crate::base::pool::{ActiveAllocation, AllocFlags, MemoryType, forward, memory_pool};
use crate::base::stats::MemoryStats;
use crate::engine::ranges::{Division, InBlocks, Ranges};
use crate::engine::slots::Slots;
use crate::observe::{DebugLayer, Observer};
use crate::source::Source;

/// A handle on a pool that threads share; [`FixedPool`] and [`VariablePool`] are its names.
///
/// `F` says who may call the engine and when, `S` where memory comes from, `O` what watches.
pub struct Pool<F: Front, S: Source = HostMemory, O: Observer = ()>(Arc<Core<F, S, O>>);

/// Blocks of one size; a larger request takes a run of adjacent blocks. With `sync_type(SyncType::LockFree)` it
/// works without a lock.
///
/// ```
/// use memory_pool::{FixedPool, PoolConfig};
/// use std::alloc::Layout;
/// let pool = FixedPool::new(PoolConfig::fixed_size_cpu(512))?;
/// let block = pool.allocate(Layout::from_size_align(500, 16)?)?;
/// assert_eq!(block.len(), 512);
/// let run = pool.allocate(Layout::from_size_align(1300, 16)?)?;
/// assert_eq!(run.len(), 3 * 512);
/// // SAFETY: both are live and freed once.
/// unsafe {
///     pool.deallocate(block.cast());
///     pool.deallocate(run.cast());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type FixedPool<S = HostMemory, O = ()> = Pool<FixedFront, S, O>;

/// [`FixedPool`] without a lock, whatever the configuration's `sync_type`: threads take and give back single
/// blocks at once, each mostly from memory of its own. Runs and growth still take turns.
///
/// ```
/// use memory_pool::{LockFreeFixedPool, PoolConfig};
/// let pool = LockFreeFixedPool::new(PoolConfig::fixed_size_cpu(64))?;
/// std::thread::scope(|scope| {
///     for _ in 0..4 {
///         scope.spawn(|| drop(allocator_api2::boxed::Box::new_in([0u8; 64], &pool)));
///     }
/// });
/// assert_eq!(pool.stats().allocation_count, 4);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub type LockFreeFixedPool<S = HostMemory, O = ()> = Pool<LockFree, S, O>;

/// Blocks of any size, placed by the configuration's [`Strategy`](crate::Strategy). A request of 1 MiB or more
/// that finds no room gets memory of its own from the source, which can grow without copying.
///
/// ```
/// use memory_pool::{PoolConfig, Strategy, VariablePool};
/// let pool = VariablePool::new(PoolConfig::default_cpu().strategy(Strategy::BestFit))?;
/// let mut words = allocator_api2::vec::Vec::new_in(&pool);
/// words.extend(["any", "size"]);
/// assert_eq!(pool.stats().active_count(), 1);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub type VariablePool<S = HostMemory, O = ()> = Pool<Locked<Ranges<InBlocks>>, S, O>;

/// A pool of one thread: neither `Send` nor `Sync`, and without a lock. [`LocalFixedPool`] and
/// [`LocalVariablePool`] are its names.
pub struct LocalPool<E: PoolEngine, S: Source = HostMemory, O: Observer = ()>(Core<Local<E>, S, O>);

/// [`FixedPool`] for one thread.
///
/// ```
/// use memory_pool::{LocalFixedPool, PoolConfig};
/// use allocator_api2::boxed::Box;
/// let mut pool = LocalFixedPool::new(PoolConfig::fixed_size_cpu(64))?;
/// let number = Box::new_in(7, &pool);
/// assert_eq!(*number, 7);
/// drop(number);
/// pool.reset(); // needs the pool to itself, so nothing can be in use
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub type LocalFixedPool<S = HostMemory, O = ()> = LocalPool<Slots, S, O>;

/// [`VariablePool`] for one thread.
///
/// ```
/// use memory_pool::{LocalVariablePool, PoolConfig};
/// let pool = LocalVariablePool::new(PoolConfig::default_cpu())?;
/// let bytes = allocator_api2::vec::Vec::<u8, _>::with_capacity_in(1000, &pool);
/// assert!(pool.has_leaks());
/// drop(bytes);
/// assert!(!pool.has_leaks());
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub type LocalVariablePool<S = HostMemory, O = ()> = LocalPool<Ranges<InBlocks>, S, O>;

impl PoolEngine for Slots {
    const KIND: AllocatorType = AllocatorType::FixedSize;
    const DIRECT: usize = usize::MAX;
    const CALLS_OUT: bool = false;

    fn build(config: &PoolConfig) -> Result<Self> {
        let slots = Self::new(config.block_size, config.alignment);
        slots.ok_or_else(|| Error::config("block_size", config.block_size, "1 to isize::MAX / 2"))
    }
}

impl PoolEngine for Ranges<InBlocks> {
    const KIND: AllocatorType = AllocatorType::VariableSize;
    const DIRECT: usize = 1 << 20;
    const CALLS_OUT: bool = true;

    fn build(config: &PoolConfig) -> Result<Self> {
        let strategy = config.strategy.clone();
        Self::new(Division { strategy, granule: config.alignment.max(16), min_rest: config.min_block_size })
    }
}

/// The configuration as a pool of `kind` takes it, checked.
fn checked(config: PoolConfig, kind: AllocatorType) -> Result<PoolConfig> {
    let config = config.allocator_type(kind);
    config.validate()?;
    if config.use_pinned_memory {
        return Err(Error::config("use_pinned_memory", "true", "false here; PinnedPool has such memory"));
    }
    if config.use_managed_memory {
        return Err(Error::config("use_managed_memory", "true", "false here; ManagedPool has such memory"));
    }
    if config.stream_ordered {
        return Err(Error::config("stream_ordered", "true", "false here; GPU pools are ordered by stream"));
    }
    if kind == AllocatorType::SizeClass && config.path.is_some() {
        return Err(Error::config("path, allocator_type", "a file", "no file with SizeClass"));
    }
    Ok(config)
}

/// The configuration as the engine takes it: with blocks that hold what the observer puts around the user's.
fn inside(config: &PoolConfig, observer: &impl Observer) -> Result<PoolConfig> {
    if config.allocator_type != AllocatorType::FixedSize {
        return Ok(config.clone());
    }
    let block = Layout::from_size_align(config.block_size, config.alignment)?;
    let block = observer.inflate(block).ok_or(Error::oom(block.size(), OomReason::Overflow))?;
    Ok(config.clone().block_size(block.size()).alignment(block.align()))
}

/// Says no to checks that a pool's type does not carry.
fn no_debug(config: &PoolConfig) -> Result<()> {
    if config.debug.is_on() {
        return Err(Error::config("debug", "on", "off for this type; `watched` and AnyPool add the layer"));
    }
    Ok(())
}

impl<F: BuildFront> Pool<F, HostMemory, ()> {
    /// A pool as `config` describes it.
    pub fn new(config: PoolConfig) -> Result<Self> {
        Self::named("", config)
    }

    /// A pool with a name, which statistics and reports show.
    pub fn named(name: &str, config: PoolConfig) -> Result<Self> {
        no_debug(&config)?;
        let source = HostMemory::new(&config)?;
        Self::assemble(name, config, source, ())
    }
}

impl<F: BuildFront> Pool<F, HostMemory, DebugLayer> {
    /// A pool with the debug layer that `config.debug` describes.
    ///
    /// ```
    /// use memory_pool::{FixedPool, PoolConfig};
    /// let mut config = PoolConfig::fixed_size_cpu(512);
    /// config.debug = PoolConfig::debug_cpu().debug;
    /// let pool = FixedPool::watched(config)?;
    /// assert_eq!(pool.diagnostics().unwrap().check(), 0);
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn watched(config: PoolConfig) -> Result<Self> {
        let layer = DebugLayer::new("", &config)?;
        let source = HostMemory::new(&config)?;
        Self::assemble("", config, source, layer)
    }
}

impl<F: BuildFront, S: Source> Pool<F, S, ()> {
    /// A pool over a source of one's own: a [`Slice`](crate::source::slice::Slice) of memory, an
    /// [`Os`](crate::source::os::Os) with huge pages, or any other.
    ///
    /// ```
    /// use memory_pool::{FixedPool, PoolConfig, source::{os::{HugePages, Os}}};
    /// let os = Os::new().huge_pages(HugePages::Transparent);
    /// let pool = FixedPool::with_source(PoolConfig::fixed_size_cpu(4096), os)?;
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn with_source(config: PoolConfig, source: S) -> Result<Self> {
        no_debug(&config)?;
        Self::assemble("", config, source, ())
    }
}

impl<F: BuildFront, S: Source, O: Observer> Pool<F, S, O> {
    /// A pool from all of its parts.
    pub fn assemble(name: &str, config: PoolConfig, source: S, observer: O) -> Result<Self> {
        let config = checked(config, F::KIND)?;
        let front = F::build(&inside(&config, &observer)?)?;
        Ok(Self(Arc::new(Core::new(name, config, front, source, observer)?)))
    }
}

impl<F: Front, S: Source, O: Observer> Pool<F, S, O> {
    /// Where the pool's memory comes from.
    pub fn source(&self) -> &S {
        self.0.source()
    }

    /// What watches the pool.
    pub fn observer(&self) -> &O {
        &self.0.observer
    }
}

impl<F: Front, S: Source, O: Observer> Clone for Pool<F, S, O> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<F: Front, S: Source, O: Observer> fmt::Debug for Pool<F, S, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<E: PoolEngine> LocalPool<E, HostMemory, ()> {
    /// A pool as `config` describes it.
    pub fn new(config: PoolConfig) -> Result<Self> {
        Self::named("", config)
    }

    /// A pool with a name, which statistics and reports show.
    pub fn named(name: &str, config: PoolConfig) -> Result<Self> {
        no_debug(&config)?;
        let source = HostMemory::new(&config)?;
        Self::assemble(name, config, source, ())
    }
}

impl<E: PoolEngine> LocalPool<E, HostMemory, DebugLayer> {
    /// A pool with the debug layer that `config.debug` describes.
    pub fn watched(config: PoolConfig) -> Result<Self> {
        let layer = DebugLayer::new("", &config)?;
        let source = HostMemory::new(&config)?;
        Self::assemble("", config, source, layer)
    }
}

impl<E: PoolEngine, S: Source> LocalPool<E, S, ()> {
    /// A pool over a source of one's own. Over a [`Slice`](crate::source::slice::Slice) it makes no call to the
    /// operating system at all.
    ///
    /// ```
    /// use memory_pool::{LocalFixedPool, PoolConfig, source::slice::Slice};
    /// use std::{alloc::Layout, mem::MaybeUninit};
    /// let mut memory = [MaybeUninit::uninit(); 4096];
    /// let pool = LocalFixedPool::with_source(PoolConfig::fixed_size_cpu(64), Slice::new(&mut memory))?;
    /// assert!(pool.allocate(Layout::new::<[u64; 8]>()).is_ok());
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn with_source(config: PoolConfig, source: S) -> Result<Self> {
        no_debug(&config)?;
        Self::assemble("", config, source, ())
    }
}

impl<E: PoolEngine, S: Source, O: Observer> LocalPool<E, S, O> {
    /// A pool from all of its parts.
    pub fn assemble(name: &str, config: PoolConfig, source: S, observer: O) -> Result<Self> {
        let config = checked(config, E::KIND)?;
        let front = Local::build(&inside(&config, &observer)?)?;
        Core::new(name, config, front, source, observer).map(Self)
    }

    /// Empties the pool. Whatever was allocated is gone: the exclusive borrow proves that no container holds
    /// any of it.
    pub fn reset(&mut self) {
        // SAFETY: containers borrow the pool or own it, so none exists; raw blocks are their holder's concern,
        // who cannot use them without a promise that the pool keeps them.
        unsafe { self.0.empty() }
    }

    /// Where the pool's memory comes from.
    pub fn source(&self) -> &S {
        self.0.source()
    }

    /// What watches the pool.
    pub fn observer(&self) -> &O {
        &self.0.observer
    }
}

impl<E: PoolEngine, S: Source, O: Observer> fmt::Debug for LocalPool<E, S, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

inherent! {
    [F: Front, S: Source, O: Observer] Pool<F, S, O>;
    [E: PoolEngine, S: Source, O: Observer] LocalPool<E, S, O>;
    [] AnyPool;
    [] WatchedCpuPool;
}

shared! {
    [F: Front + Send + Sync, S: Source, O: Observer] Pool<F, S, O>;
    [] AnyPool;
    [] WatchedCpuPool;
}

//! Pools by name, of every kind, behind one interface.
//!
//! The names are in one table behind a lock, which only creation, destruction and a thread's first look-up of
//! a name take. Each thread keeps what it looked up; see `lookup`.
//!
//! A further kind of pool implements [`Managed`] and gets a pair of functions here, `create_…` and a look-up,
//! each of one line.

mod gpu;
mod helpers;
mod lookup;
mod summary;
mod transfer;

use core::any::Any;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub use gpu::{allocate_gpu, allocate_gpu_in};
pub use helpers::{allocate, allocate_in};
pub use summary::{ManagerStats, PoolSummary};

use crate::api::PoolRef;
use crate::base::config::PoolConfig;
use crate::base::error::{Error, Refusal, Result, ShortText};
use crate::base::pool::MemoryPool;
use crate::base::report;
use crate::base::sync::Lock;
use crate::observe::Observer;
use crate::persist::{PersistentConfig, PersistentPool};
use crate::pool::{AnyPool, CpuPool, Front, Pool, WatchedCpuPool};
use crate::source::Source;

/// A pool that a [`PoolManager`] can keep: a cheap handle whose clones share one pool.
///
/// ```
/// use memory_pool::{FixedPool, PoolConfig, PoolManager};
/// let manager = PoolManager::new();
/// manager.register("tiles", FixedPool::new(PoolConfig::fixed_size_cpu(4096))?)?;
/// assert_eq!(manager.get::<FixedPool>("tiles")?.config().block_size, 4096);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub trait Managed: MemoryPool + Clone + 'static {
    /// What errors call this kind of pool.
    const KIND: &'static str;
}

impl Managed for AnyPool {
    const KIND: &'static str = "cpu";
}

impl Managed for CpuPool {
    const KIND: &'static str = "size-class";
}

impl Managed for WatchedCpuPool {
    const KIND: &'static str = "size-class";
}

impl Managed for PersistentPool {
    const KIND: &'static str = "persistent";
}

impl<F, S, O> Managed for Pool<F, S, O>
where
    F: Front + Send + Sync + 'static,
    S: Source + 'static,
    O: Observer + 'static,
{
    const KIND: &'static str = "host";
}

/// A [`Managed`] pool whose type the table does not know.
trait Entry: Send + Sync {
    fn pool(&self) -> &dyn MemoryPool;
    fn kind(&self) -> &'static str;
    /// A handle of its own for the calling thread, as an `Arc` of the pool's type, which lives as long as the
    /// entry at least.
    fn for_thread(&self) -> Arc<dyn Any + Send + Sync>;
}

struct Kept<P> {
    pool: P,
    /// The handles that threads remember.
    handles: Lock<Vec<Arc<P>>>,
}

impl<P: Managed> Entry for Kept<P> {
    fn pool(&self) -> &dyn MemoryPool {
        &self.pool
    }
    fn kind(&self) -> &'static str {
        P::KIND
    }
    fn for_thread(&self) -> Arc<dyn Any + Send + Sync> {
        let handle = Arc::new(self.pool.clone());
        let mut handles = self.handles.lock();
        // Those of threads that ended, or that began anew.
        handles.retain(|handle| Arc::weak_count(handle) > 0);
        handles.push(Arc::clone(&handle));
        handle
    }
}

type Pools = BTreeMap<String, Arc<dyn Entry>>;

/// The name of the pool that [`allocate`] uses.
const DEFAULT: &str = "default";

/// Pools by name. There is one for the whole process, and a program can have its own.
///
/// ```
/// use memory_pool::{PoolConfig, PoolManager};
/// let manager = PoolManager::new();
/// manager.create_cpu_pool("frames", PoolConfig::fixed_size_cpu(4096))?;
/// let frame = allocator_api2::boxed::Box::new_in([0u8; 4096], manager.cpu_pool("frames")?);
/// assert!(manager.destroy_pool("frames").is_err()); // something is live
/// drop(frame);
/// manager.destroy_pool("frames")?; // and the name is free again
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub struct PoolManager {
    /// Which manager a thread's cache belongs to; never used twice.
    id: u64,
    /// Counts destructions. A thread's cache is good as long as this has not changed since it was begun.
    generation: AtomicU64,
    pools: RwLock<Pools>,
}

impl PoolManager {
    /// A manager without pools.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            generation: AtomicU64::new(0),
            pools: RwLock::default(),
        }
    }

    /// The manager of the whole process.
    pub fn global() -> &'static Self {
        static GLOBAL: LazyLock<PoolManager> = LazyLock::new(PoolManager::new);
        &GLOBAL
    }

    /// Makes a pool of host memory as `config` describes it.
    pub fn create_cpu_pool(&self, name: &str, config: PoolConfig) -> Result<PoolRef<AnyPool>> {
        self.create(name, || AnyPool::named(name, config))
    }

    /// The pool of host memory of that name.
    #[inline]
    pub fn cpu_pool(&self, name: &str) -> Result<PoolRef<AnyPool>> {
        self.get(name)
    }

    /// The pool named `"default"`, made at the first call as [`PoolConfig::from_env`] says.
    pub fn default_cpu_pool(&self) -> Result<PoolRef<AnyPool>> {
        self.get_or_create(DEFAULT, || AnyPool::named(DEFAULT, PoolConfig::from_env()?))
    }

    /// Makes a persistent pool in a new file. One that exists is opened and
    /// [registered](Self::register).
    ///
    /// ```
    /// use memory_pool::{PersistentConfig, PoolManager};
    /// # let dir = std::env::temp_dir().join(format!("managed-{}", std::process::id()));
    /// # std::fs::create_dir_all(&dir).unwrap();
    /// let manager = PoolManager::new();
    /// manager.create_persistent_pool("orders", dir.join("orders"), PersistentConfig::new(1 << 20))?;
    /// let number = manager.persistent_pool("orders")?.transaction(|tx| tx.alloc(17u64))?;
    /// assert!(!number.is_null());
    /// # std::fs::remove_dir_all(&dir).unwrap();
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn create_persistent_pool(
        &self,
        name: &str,
        path: impl AsRef<Path>,
        config: PersistentConfig,
    ) -> Result<PoolRef<PersistentPool>> {
        self.create(name, || PersistentPool::create(path, config))
    }

    /// The persistent pool of that name.
    #[inline]
    pub fn persistent_pool(&self, name: &str) -> Result<PoolRef<PersistentPool>> {
        self.get(name)
    }

    /// Keeps a pool that exists already, of any kind. The pool's own name does not matter.
    pub fn register<P: Managed>(&self, name: &str, pool: P) -> Result<PoolRef<P>> {
        self.create(name, || Ok(pool))
    }

    /// The pool of that name and type. The first look-up of a name by a thread takes a lock, later ones write
    /// nothing that other threads read.
    #[inline]
    pub fn get<P: Managed>(&self, name: &str) -> Result<PoolRef<P>> {
        match lookup::cached(self, name) {
            Some(pool) => Ok(PoolRef::new(pool)),
            None => self.get_slow(name),
        }
    }

    #[cold]
    fn get_slow<P: Managed>(&self, name: &str) -> Result<PoolRef<P>> {
        // Before the table is read: a pool destroyed since then makes the cache stale.
        let generation = self.generation();
        let entry = self.entry(name)?;
        let wrong = Refusal::WrongKind { name: ShortText::new(name), found: entry.kind() };
        let pool = entry.for_thread().downcast::<P>().map_err(|_| Error::InvalidOperation(wrong))?;
        lookup::remember(self, generation, name, &pool);
        Ok(PoolRef::new(pool))
    }

    /// Makes a pool unless there is one of that name.
    pub(crate) fn get_or_create<P: Managed>(
        &self,
        name: &str,
        make: impl FnOnce() -> Result<P>,
    ) -> Result<PoolRef<P>> {
        match self.get(name) {
            Err(Error::InvalidOperation(Refusal::NameUnknown(_))) => match self.create(name, make) {
                // Another thread was faster.
                Err(Error::InvalidOperation(Refusal::NameTaken(_))) => self.get(name),
                made => made,
            },
            found => found,
        }
    }

    /// Makes a pool, with no lock held meanwhile, and enters it.
    pub(crate) fn create<P: Managed>(
        &self,
        name: &str,
        make: impl FnOnce() -> Result<P>,
    ) -> Result<PoolRef<P>> {
        if name.is_empty() {
            return Err(Error::refused("a managed pool needs a name", "give it one that is not empty"));
        }
        let taken = Err(Error::InvalidOperation(Refusal::NameTaken(ShortText::new(name))));
        if self.read().contains_key(name) {
            return taken;
        }
        let pool = make()?;
        let handle = PoolRef::new(Arc::new(pool.clone()));
        let mut pools = self.write();
        if pools.contains_key(name) {
            return taken;
        }
        pools.insert(name.into(), Arc::new(Kept { pool, handles: Lock::default() }));
        drop(pools);
        report::event(format_args!("created {} pool \"{name}\"", P::KIND));
        Ok(handle)
    }

    /// Gives the pool's memory back and forgets its name. An error while anything in it is live, and nothing
    /// changes. Handles that are still around refuse every allocation from then on.
    pub fn destroy_pool(&self, name: &str) -> Result<()> {
        let entry = self.entry(name)?;
        entry.pool().close()?;
        let mut pools = self.write();
        // Only what was closed: the name may have been destroyed and given to another pool meanwhile.
        if pools.get(name).is_some_and(|found| Arc::ptr_eq(found, &entry)) {
            pools.remove(name);
            self.generation.fetch_add(1, Ordering::Release);
        }
        drop(pools);
        lookup::forget(self);
        report::event(format_args!("destroyed pool \"{name}\""));
        Ok(())
    }

    /// Empties every pool. Those in which something is live stay as they are; the error then says how many
    /// blocks that are.
    pub fn reset_all_pools(&self) -> Result<()> {
        let mut live = 0;
        for (_, entry) in self.entries() {
            match entry.pool().reset() {
                Ok(()) => {}
                Err(Error::InvalidOperation(Refusal::StillLive(count))) => live += count,
                Err(other) => return Err(other),
            }
        }
        report::event(format_args!("reset all pools; {live} blocks are live"));
        if live == 0 { Ok(()) } else { Err(Error::InvalidOperation(Refusal::StillLive(live))) }
    }

    /// The statistics of every pool, and of all together.
    pub fn all_stats(&self) -> ManagerStats {
        let entries = self.entries();
        ManagerStats::gather(entries.iter().map(|(name, entry)| (name.as_str(), entry.pool())))
    }

    /// Whether there is a pool of that name, of whatever kind.
    pub fn contains(&self, name: &str) -> bool {
        self.read().contains_key(name)
    }

    /// The names of all pools, sorted.
    pub fn names(&self) -> Vec<String> {
        self.read().keys().cloned().collect()
    }

    /// Calls `act` with the pool of that name, whatever its kind.
    pub fn with_pool<R>(&self, name: &str, act: impl FnOnce(&dyn MemoryPool) -> R) -> Result<R> {
        Ok(act(self.entry(name)?.pool()))
    }

    /// Lets every debug layer look for damage; returns how many findings that made.
    pub fn check_all(&self) -> usize {
        let entries = self.entries();
        entries.iter().filter_map(|(_, entry)| entry.pool().diagnostics()).map(|watch| watch.check()).sum()
    }

    fn entry(&self, name: &str) -> Result<Arc<dyn Entry>> {
        let unknown = Error::InvalidOperation(Refusal::NameUnknown(ShortText::new(name)));
        self.read().get(name).cloned().ok_or(unknown)
    }

    /// All entries, so that pools are called with no lock held.
    fn entries(&self) -> Vec<(String, Arc<dyn Entry>)> {
        self.read().iter().map(|(name, entry)| (name.clone(), Arc::clone(entry))).collect()
    }

    #[inline]
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn read(&self) -> RwLockReadGuard<'_, Pools> {
        self.pools.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Pools> {
        self.pools.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for PoolManager {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for PoolManager {
    /// Pools that somebody has a handle of go on working; the others give all memory back now.
    fn drop(&mut self) {
        lookup::forget(self);
    }
}

impl fmt::Debug for PoolManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pools = self.read();
        f.debug_map().entries(pools.iter().map(|(name, entry)| (name, entry.kind()))).finish()
    }
}

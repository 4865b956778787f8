//! How a pool is to be: one plain description for every kind of pool.

use std::path::PathBuf;

use super::error::{Error, Result};
pub use super::policy::Strategy;

/// Which engine divides the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum AllocatorType {
    /// Blocks of one size (`block_size`); a larger request takes a run of adjacent blocks.
    FixedSize,
    /// Any size, split and merged.
    #[default]
    VariableSize,
    /// Size classes, as the process heap.
    SizeClass,
}

/// How threads share a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum SyncType {
    /// One lock.
    #[default]
    Mutex,
    /// No lock; fixed-size pools only.
    LockFree,
    /// A cache per thread; size-class pools only.
    ThreadCached,
}

/// What a debug layer does when it finds an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum OnFinding {
    /// Write a report to stderr and go on.
    #[default]
    Report,
    /// Report, then panic where unwinding is sound, abort elsewhere.
    Panic,
    /// Report, then abort.
    Abort,
    /// Keep the finding for the program to read, and say nothing.
    Collect,
}

/// What the debug layer of a pool checks. All off by default; with everything off the layer is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct DebugConfig {
    /// Bytes of canary on each side of a block; 0 for none.
    pub canary: usize,
    /// Fill fresh and freed memory with patterns. A write to a freed block is found when the block leaves the
    /// quarantine, and on demand while it is in there.
    pub fill: bool,
    /// Bytes of freed memory held back before reuse, and one block at least; 0 for none.
    pub quarantine: usize,
    /// Put each block against an inaccessible page: an access past it stops the program at once. Each block
    /// then takes three pages or more. Freed blocks are inaccessible as long as the quarantine holds them.
    /// Host memory only.
    pub guard_pages: bool,
    /// Remember the stack of each live allocation.
    pub stacks: bool,
    /// Operations remembered; 0 for none.
    pub history: usize,
    /// Report what is live when the pool is dropped.
    pub leaks: bool,
    /// Take the time of every allocation, for [`MemoryStats::latency`](crate::MemoryStats::latency).
    pub latency: bool,
    /// What happens on a finding.
    pub on_finding: OnFinding,
}

impl DebugConfig {
    /// Nothing is checked.
    pub const OFF: Self = Self {
        canary: 0,
        fill: false,
        quarantine: 0,
        guard_pages: false,
        stacks: false,
        history: 0,
        leaks: false,
        latency: false,
        on_finding: OnFinding::Report,
    };

    /// Canaries, patterns, a quarantine of 1 MiB, stacks, a history of 1024 operations, leaks at drop.
    pub const FULL: Self = Self {
        canary: 16,
        fill: true,
        quarantine: 1 << 20,
        guard_pages: false,
        stacks: true,
        history: 1024,
        leaks: true,
        latency: false,
        on_finding: OnFinding::Report,
    };

    /// Whether anything is checked.
    pub const fn is_on(&self) -> bool {
        self.canary != 0
            || self.fill
            || self.quarantine != 0
            || self.guard_pages
            || self.stacks
            || self.history != 0
            || self.leaks
            || self.latency
    }
}

/// The description of a pool: every field has a documented default and is checked when the pool is made.
///
/// ```
/// use memory_pool::{PoolConfig, Strategy};
/// let config = PoolConfig::default_cpu().strategy(Strategy::BestFit).max_size(64 << 20);
/// assert_eq!(config.max_size, 64 << 20);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct PoolConfig {
    /// The engine. Only [`AnyPool`](crate::AnyPool) and the manager choose by it.
    pub allocator_type: AllocatorType,
    /// Placement in variable pools.
    pub strategy: Strategy,
    /// Bytes reserved when the pool is made; 0 reserves at first use.
    pub initial_size: usize,
    /// Size of a block in fixed-size pools, before rounding to `alignment`.
    pub block_size: usize,
    /// Whether several threads may use the pool. `false` binds a shared pool to the thread that made it.
    pub thread_safe: bool,
    /// How threads share it.
    pub sync_type: SyncType,
    /// Count requests, peaks and sizes.
    pub track_stats: bool,
    /// What is checked.
    pub debug: DebugConfig,
    /// The GPU of device, pinned and managed pools.
    pub device_id: usize,
    /// Page-locked host memory.
    pub use_pinned_memory: bool,
    /// Memory that CPU and GPU share.
    pub use_managed_memory: bool,
    /// Frees wait for the stream, not for the card.
    pub stream_ordered: bool,
    /// Least alignment of every block; a power of two.
    pub alignment: usize,
    /// Each growth reserves this many times what is reserved already, at least once what is missing.
    pub growth_factor: f64,
    /// Most bytes the pool may hold; `usize::MAX` for no limit.
    pub max_size: usize,
    /// Smallest block a variable pool leaves when it splits.
    pub min_block_size: usize,
    /// The file of a persistent pool, or of a mapped-file source.
    pub path: Option<PathBuf>,
}

/// Defines a chaining setter per field.
macro_rules! builder {
    ($($field:ident: $type:ty, $doc:literal;)*) => {$(
        #[doc = $doc]
        #[must_use]
        pub fn $field(mut self, $field: $type) -> Self {
            self.$field = $field;
            self
        }
    )*};
}

impl PoolConfig {
    /// Host memory, any size, one lock, statistics on.
    pub fn default_cpu() -> Self {
        Self {
            allocator_type: AllocatorType::VariableSize,
            strategy: Strategy::Segregated,
            initial_size: 0,
            block_size: 64,
            thread_safe: true,
            sync_type: SyncType::Mutex,
            track_stats: true,
            debug: DebugConfig::OFF,
            device_id: 0,
            use_pinned_memory: false,
            use_managed_memory: false,
            stream_ordered: false,
            alignment: 16,
            growth_factor: 2.0,
            max_size: usize::MAX,
            min_block_size: 32,
            path: None,
        }
    }

    /// Device memory, any size, ordered by stream; each growth takes what is missing, for device memory is
    /// scarce.
    pub fn default_gpu() -> Self {
        Self {
            stream_ordered: true,
            alignment: 256,
            min_block_size: 512,
            growth_factor: 1.0,
            ..Self::default_cpu()
        }
    }

    /// Blocks of `block_size` bytes on the host.
    pub fn fixed_size_cpu(block_size: usize) -> Self {
        Self { allocator_type: AllocatorType::FixedSize, block_size, ..Self::default_cpu() }
    }

    /// Blocks of `block_size` bytes on device `device_id`.
    pub fn fixed_size_gpu(block_size: usize, device_id: usize) -> Self {
        Self { allocator_type: AllocatorType::FixedSize, block_size, device_id, ..Self::default_gpu() }
    }

    /// Size classes with a cache per thread, 64 MiB at the start, statistics off.
    pub fn high_performance_cpu() -> Self {
        Self {
            allocator_type: AllocatorType::SizeClass,
            sync_type: SyncType::ThreadCached,
            initial_size: 64 << 20,
            track_stats: false,
            ..Self::default_cpu()
        }
    }

    /// Device memory, 256 MiB at the start, statistics off.
    pub fn high_performance_gpu(device_id: usize) -> Self {
        Self { device_id, initial_size: 256 << 20, track_stats: false, ..Self::default_gpu() }
    }

    /// Everything checked, on the host.
    pub fn debug_cpu() -> Self {
        Self { debug: DebugConfig::FULL, ..Self::default_cpu() }
    }

    /// Everything checked, on device `device_id`.
    pub fn debug_gpu(device_id: usize) -> Self {
        Self { debug: DebugConfig::FULL, device_id, ..Self::default_gpu() }
    }

    builder! {
        allocator_type: AllocatorType, "Sets the engine.";
        initial_size: usize, "Sets the bytes reserved when the pool is made.";
        block_size: usize, "Sets the block size of fixed-size pools.";
        thread_safe: bool, "Sets whether several threads may use the pool.";
        sync_type: SyncType, "Sets how threads share the pool.";
        track_stats: bool, "Sets whether requests are counted.";
        debug: DebugConfig, "Sets what is checked.";
        device_id: usize, "Sets the GPU.";
        use_pinned_memory: bool, "Sets whether the memory is page-locked.";
        use_managed_memory: bool, "Sets whether CPU and GPU share the memory.";
        stream_ordered: bool, "Sets whether frees are ordered by stream.";
        alignment: usize, "Sets the least alignment of every block.";
        growth_factor: f64, "Sets how much each growth reserves.";
        max_size: usize, "Sets the most bytes the pool may hold.";
        min_block_size: usize, "Sets the smallest block left by a split.";
    }

    /// Sets the placement strategy: a [`Strategy`] or a type that implements [`Policy`](crate::Policy).
    #[must_use]
    pub fn strategy(mut self, strategy: impl Into<Strategy>) -> Self {
        self.strategy = strategy.into();
        self
    }

    /// Sets the file of a persistent pool.
    #[must_use]
    pub fn path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Checks every field alone and against the others; every pool calls it before it reserves anything.
    pub fn validate(&self) -> Result<()> {
        use AllocatorType::{FixedSize, SizeClass, VariableSize};
        let Self { allocator_type, sync_type, alignment, growth_factor, .. } = self;
        if !alignment.is_power_of_two() || *alignment > MAX_ALIGNMENT {
            return Err(Error::config("alignment", alignment, "a power of two up to 1 GiB"));
        }
        if !(1.0..=16.0).contains(growth_factor) {
            return Err(Error::config("growth_factor", growth_factor, "1.0 to 16.0"));
        }
        if self.max_size == 0 {
            return Err(Error::config("max_size", 0, "1 or more; usize::MAX for no limit"));
        }
        if self.initial_size > self.max_size {
            return Err(Error::config(
                "initial_size, max_size",
                self.initial_size,
                "initial_size <= max_size",
            ));
        }
        if *allocator_type == FixedSize {
            if self.block_size == 0 || self.block_size > isize::MAX as usize / 2 {
                return Err(Error::config("block_size", self.block_size, "1 to isize::MAX / 2"));
            }
            if self.block_size > self.max_size {
                return Err(Error::config("block_size, max_size", self.block_size, "block_size <= max_size"));
            }
        }
        if *allocator_type == VariableSize && self.min_block_size > self.max_size {
            return Err(Error::config(
                "min_block_size, max_size",
                self.min_block_size,
                "min_block_size <= max_size",
            ));
        }
        if *sync_type == SyncType::LockFree && *allocator_type != FixedSize {
            return Err(Error::config(
                "sync_type, allocator_type",
                "LockFree",
                "LockFree with FixedSize only",
            ));
        }
        if *sync_type == SyncType::ThreadCached && *allocator_type != SizeClass {
            return Err(Error::config(
                "sync_type, allocator_type",
                "ThreadCached",
                "ThreadCached with SizeClass only",
            ));
        }
        if self.use_pinned_memory && self.use_managed_memory {
            return Err(Error::config("use_pinned_memory, use_managed_memory", "true", "one of the two"));
        }
        Ok(())
    }
}

/// The largest alignment any pool serves.
pub const MAX_ALIGNMENT: usize = 1 << 30;

impl Default for PoolConfig {
    fn default() -> Self {
        Self::default_cpu()
    }
}

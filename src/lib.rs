//! One set of pools for host, pinned, managed, device and persistent memory.

#![warn(unreachable_pub)]
#![cfg_attr(feature = "nightly", feature(allocator_api))]

mod api;
pub mod base;
pub mod engine;
pub mod gpu;
pub mod guide;
mod heap;
mod manager;
pub mod observe;
pub mod persist;
pub mod pool;
pub mod source;
#[cfg(feature = "cli")]
pub mod trace;

pub use api::{GlobalPool, PoolBox, PoolRef, WatchedHeap};
pub use base::config::{AllocatorType, DebugConfig, OnFinding, PoolConfig, Strategy, SyncType};
pub use base::diagnostics::{Diagnostics, FindingLog, Operation, OperationKind};
pub use base::error::{Error, ErrorCategory, Result};
pub use base::finding::{Finding, FindingKind, LeakReport, Site};
pub use base::heap_config::{Hardening, HeapConfig, HugeUse, Purge};
pub use base::host::HostPool;
pub use base::policy::{FreeRange, Policy, Request};
pub use base::pool::{ActiveAllocation, AllocFlags, MemoryPool, MemoryType};
pub use base::stack::{Frame, Stack};
pub use base::stats::{Latency, MemoryStats};
pub use base::transfer::{CopySource, CopyTarget};
pub use gpu::{
    DeviceBox, DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut, DeviceVec, GpuDevice, GpuEvent,
    GpuPool, Graph, HostAccessible, ManagedBuffer, ManagedPool, PinnedBuffer, PinnedPool, SimConfig, Stream,
    Transfer,
};
pub use heap::stats::{ClassStats, HeapStats};
pub use manager::{
    Managed, ManagerStats, PoolManager, PoolSummary, allocate, allocate_gpu, allocate_gpu_in, allocate_in,
};
pub use observe::DebugLayer;
pub use persist::{Durability, PBox, PRef, PRefMut, Persist, PersistentConfig, PersistentPool, Transaction};
pub use pool::{
    AnyPool, CpuPool, FixedPool, LocalFixedPool, LocalVariablePool, LockFreeFixedPool, VariablePool,
    WatchedCpuPool,
};

/// The examples of the README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;

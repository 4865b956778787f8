//! The kinds of memory that a GPU pool can hold, as types.

use std::fmt;

use super::driver::Space;
use crate::base::pool::MemoryType;

mod sealed {
    pub trait Sealed {}
}

/// A kind of memory: [`Device`], [`Pinned`] or [`Managed`].
pub trait MemoryKind: sealed::Sealed + Send + Sync + fmt::Debug + 'static {
    /// The kind, as a value.
    const TYPE: MemoryType;
}

/// Memory that the CPU may touch.
///
/// # Safety
/// Blocks of this kind are ordinary memory to the CPU.
#[diagnostic::on_unimplemented(
    message = "the CPU cannot touch `{Self}` memory, so a pool of it is no `Allocator`",
    label = "`Vec`, `Box` and the like need memory that the CPU may touch",
    note = "use `pool.alloc::<T>(len, &stream)` for a `DeviceBuffer<T>`, or `DeviceVec::new_in(&pool, &stream)`",
    note = "or allocate from a `PinnedPool` or a `ManagedPool`, which are `Allocator`s"
)]
pub unsafe trait HostAccessible: MemoryKind {}

/// Memory on the card, which the CPU cannot touch.
#[derive(Clone, Copy, Debug)]
pub struct Device;

/// Page-locked host memory, which the card reads and writes at full speed.
#[derive(Clone, Copy, Debug)]
pub struct Pinned;

/// Memory that CPU and card share; it moves to who touches it.
#[derive(Clone, Copy, Debug)]
pub struct Managed;

impl sealed::Sealed for Device {}
impl sealed::Sealed for Pinned {}
impl sealed::Sealed for Managed {}

impl MemoryKind for Device {
    const TYPE: MemoryType = MemoryType::Gpu;
}
impl MemoryKind for Pinned {
    const TYPE: MemoryType = MemoryType::Pinned;
}
impl MemoryKind for Managed {
    const TYPE: MemoryType = MemoryType::Managed;
}

// SAFETY: page-locked memory is host memory.
unsafe impl HostAccessible for Pinned {}
// SAFETY: a managed pool is made only where CPU and card may touch managed memory at the same time.
unsafe impl HostAccessible for Managed {}

/// The driver's name for the kind.
pub(super) fn space<K: MemoryKind>(write_combined: bool) -> Space {
    match K::TYPE {
        MemoryType::Pinned => Space::Pinned { write_combined },
        MemoryType::Managed => Space::Managed,
        _ => Space::Device,
    }
}

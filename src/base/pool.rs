//! The interface that every pool has: object safe, and the same for host, pinned, managed, device and
//! persistent memory.

use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use super::config::PoolConfig;
use super::diagnostics::Diagnostics;
use super::error::{Error, Refusal, Result};
use super::stats::MemoryStats;

/// Whose memory a pool hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub enum MemoryType {
    /// Ordinary host memory.
    Cpu,
    /// Page-locked host memory.
    Pinned,
    /// Memory that CPU and GPU share.
    Managed,
    /// Device memory, which the CPU cannot touch.
    Gpu,
    /// A file.
    Persistent,
}

impl MemoryType {
    /// Whether the CPU may read and write such memory.
    pub const fn is_host_accessible(self) -> bool {
        !matches!(self, Self::Gpu)
    }
}

impl fmt::Display for MemoryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cpu => "cpu",
            Self::Pinned => "pinned",
            Self::Managed => "managed",
            Self::Gpu => "gpu",
            Self::Persistent => "persistent",
        })
    }
}

/// Wishes beside the layout; combine with `|`.
///
/// ```
/// use memory_pool::AllocFlags;
/// let flags = AllocFlags::ZEROED | AllocFlags::PINNED;
/// assert!(flags.contains(AllocFlags::ZEROED) && !flags.contains(AllocFlags::MANAGED));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct AllocFlags(u32);

impl AllocFlags {
    /// No wish.
    pub const NONE: Self = Self(0);
    /// All bytes zero.
    pub const ZEROED: Self = Self(1);
    /// Page-locked memory; refused by pools that have none.
    pub const PINNED: Self = Self(2);
    /// Memory that CPU and GPU share; refused by pools that have none.
    pub const MANAGED: Self = Self(4);
    /// Never ask the source: serve from what the pool holds, or fail.
    pub const NO_GROW: Self = Self(8);

    /// Whether all wishes of `other` are in `self`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl core::ops::BitOr for AllocFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for AllocFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::ZEROED, "ZEROED"),
            (Self::PINNED, "PINNED"),
            (Self::MANAGED, "MANAGED"),
            (Self::NO_GROW, "NO_GROW"),
        ];
        let mut set = f.debug_set();
        for (flag, name) in names {
            if self.contains(flag) {
                set.entry(&format_args!("{name}"));
            }
        }
        set.finish()
    }
}

/// One live block, as [`MemoryPool::active_allocations`] lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ActiveAllocation {
    /// Its address.
    pub address: usize,
    /// Its usable size in bytes.
    pub size: usize,
}

impl ActiveAllocation {
    /// A live block at `address` with `size` usable bytes.
    pub const fn new(address: usize, size: usize) -> Self {
        Self { address, size }
    }
}

/// A pool of memory, whatever its kind.
///
/// Every pool has inherent methods of the same names, so that importing this trait together with
/// `Allocator` is never ambiguous.
///
/// ```
/// use memory_pool::{FixedPool, MemoryPool, PoolConfig};
/// use std::alloc::Layout;
/// fn use_any(pool: &dyn MemoryPool) -> memory_pool::Result<()> {
///     let block = pool.allocate(Layout::new::<[u64; 4]>())?;
///     // SAFETY: the block is live and freed once.
///     unsafe { pool.deallocate(block.cast()) };
///     Ok(())
/// }
/// use_any(&FixedPool::new(PoolConfig::fixed_size_cpu(64))?)?;
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub trait MemoryPool: Send + Sync {
    /// A block for `layout`; at least `layout.size()` bytes, the slice says how many may be used. A size of 0
    /// is served with a dangling, aligned, empty slice.
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>>;

    /// [`allocate`](Self::allocate) with wishes.
    fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>>;

    /// Frees the block at `ptr`.
    ///
    /// # Safety
    /// `ptr` came from this pool, is live, and is not used after.
    unsafe fn deallocate(&self, ptr: NonNull<u8>);

    /// Whether `ptr` lies in memory of this pool. Any address may be asked about; none is read.
    fn owns(&self, ptr: NonNull<u8>) -> bool;

    /// Bytes that may be used at `ptr`; `None` where no live block of this pool begins there, as far as the
    /// pool can tell.
    fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize>;

    /// Makes at least `bytes` available without a further call to the source.
    fn reserve(&self, bytes: usize) -> Result<()>;

    /// Gives idle memory back to the source until `keep` idle bytes are left; returns the bytes given back.
    fn trim(&self, keep: usize) -> Result<usize>;

    /// Empties the pool; an error while anything is live.
    fn reset(&self) -> Result<()>;

    /// Empties the pool regardless of what is live.
    ///
    /// # Safety
    /// Nothing that was allocated from this pool is used or freed after.
    unsafe fn reset_unchecked(&self) -> Result<()>;

    /// What the pool did and holds.
    fn stats(&self) -> MemoryStats;

    /// Starts the peaks anew from what is current.
    fn reset_peak(&self);

    /// Switches the counting of requests on or off.
    fn set_tracking(&self, on: bool);

    /// Whether requests are counted.
    fn is_tracking(&self) -> bool;

    /// The live blocks, in no particular order.
    fn active_allocations(&self) -> Vec<ActiveAllocation>;

    /// Whether anything is live.
    fn has_leaks(&self) -> bool;

    /// Whose memory this is.
    fn memory_type(&self) -> MemoryType;

    /// The pool's name; empty where it was given none.
    fn name(&self) -> &str;

    /// What the pool was made with.
    fn config(&self) -> &PoolConfig;

    /// An address in the pool's memory, where it has any and knows one. By it a manager finds out that a pool
    /// divides memory of another.
    fn anchor(&self) -> Option<NonNull<u8>> {
        None
    }

    /// Gives all memory back for good, so that every later allocation is refused; an error while anything is
    /// live. Pools that cannot refuse are emptied and trimmed.
    fn close(&self) -> Result<()> {
        self.reset()?;
        self.trim(0).map(|_| ())
    }

    /// Copies bytes where at least one side is memory of this pool; the other is that, or of the host. Pools
    /// whose memory the CPU cannot touch have a way of their own.
    ///
    /// # Safety
    /// `src` is valid for reads of `len` bytes and `dst` for writes, by whoever copies them, and nobody else
    /// writes to either, or reads `dst`, meanwhile.
    unsafe fn copy(&self, dst: NonNull<u8>, src: NonNull<u8>, len: usize) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { dst.copy_from(src, len) };
        Ok(())
    }

    /// The pool's debugging side, where its configuration has debugging on.
    fn diagnostics(&self) -> Option<&dyn Diagnostics> {
        None
    }
}

/// [`MemoryPool`] for a pool whose inherent methods have the same names; in braces what it has beyond those that
/// every pool must have. The names of the types are those in scope.
macro_rules! memory_pool {
    ($([$($generics:tt)*] $pool:ty { $($more:tt)* })*) => {$(
        impl<$($generics)*> $crate::base::pool::MemoryPool for $pool {
            $crate::base::pool::forward! {
                fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>>;
                fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>>;
                unsafe fn deallocate(&self, ptr: NonNull<u8>);
                fn owns(&self, ptr: NonNull<u8>) -> bool;
                fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize>;
                fn reserve(&self, bytes: usize) -> Result<()>;
                fn trim(&self, keep: usize) -> Result<usize>;
                fn reset(&self) -> Result<()>;
                unsafe fn reset_unchecked(&self) -> Result<()>;
                fn stats(&self) -> MemoryStats;
                fn reset_peak(&self);
                fn set_tracking(&self, on: bool);
                fn is_tracking(&self) -> bool;
                fn active_allocations(&self) -> Vec<ActiveAllocation>;
                fn has_leaks(&self) -> bool;
                fn memory_type(&self) -> MemoryType;
                fn name(&self) -> &str;
                fn config(&self) -> &PoolConfig;
            }
            $($more)*
        }
    )*};
}

/// Methods of a trait that hand on to the inherent ones of the same names.
macro_rules! forward {
    () => {};
    (fn $name:ident(&self $(, $arg:ident: $type:ty)* $(,)?) $(-> $result:ty)?; $($rest:tt)*) => {
        #[inline]
        fn $name(&self $(, $arg: $type)*) $(-> $result)? {
            Self::$name(self $(, $arg)*)
        }
        $crate::base::pool::forward! { $($rest)* }
    };
    (unsafe fn $name:ident(&self $(, $arg:ident: $type:ty)* $(,)?) $(-> $result:ty)?; $($rest:tt)*) => {
        #[inline]
        unsafe fn $name(&self $(, $arg: $type)*) $(-> $result)? {
            // SAFETY: the caller's contract is the same.
            unsafe { Self::$name(self $(, $arg)*) }
        }
        $crate::base::pool::forward! { $($rest)* }
    };
}

pub(crate) use {forward, memory_pool};

/// Says no to wishes that host pools cannot grant.
pub(crate) fn refuse_device_flags(flags: AllocFlags) -> Result<()> {
    if flags.contains(AllocFlags::PINNED) || flags.contains(AllocFlags::MANAGED) {
        return Err(Error::InvalidOperation(Refusal::Unsupported(
            "a host pool has no pinned or managed memory",
            "allocate from a PinnedPool or a ManagedPool",
        )));
    }
    Ok(())
}

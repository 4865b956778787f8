//! `Allocator` in all its versions, from one macro: allocator-api2 0.4 and 0.2, and std's.
//!
//! The three traits have the same methods and are different traits. With feature `nightly`, allocator-api2
//! 0.2 re-exports std's trait, so that one impl serves both.
//!
//! The functions here are what all of them do, on top of [`HostPool`]; they cover sizes of 0 and changes of
//! alignment, which pools need not know of. References need no impl of their own: each version of the trait
//! covers `&A` where it covers `A`.

use core::alloc::Layout;
use core::ptr::NonNull;

use super::named::PoolRef;
use crate::base::error::Result;
use crate::base::host::{HostPool, dangling};
use crate::gpu::{GpuPool, HostAccessible};
use crate::observe::Observer;
use crate::persist::PersistentPool;
use crate::pool::{AnyPool, Front, LocalPool, Pool, PoolEngine};
use crate::source::Source;

#[inline]
pub(super) fn allocate<P: HostPool + ?Sized>(
    pool: &P,
    layout: Layout,
    zeroed: bool,
) -> Result<NonNull<[u8]>> {
    if layout.size() == 0 { Ok(dangling(layout)) } else { pool.obtain(layout, zeroed) }
}

/// # Safety
/// `ptr` came from [`allocate`] or [`resize`] of this pool with a layout that `layout` fits, and is live.
#[inline]
pub(super) unsafe fn deallocate<P: HostPool + ?Sized>(pool: &P, ptr: NonNull<u8>, layout: Layout) {
    if layout.size() != 0 {
        // SAFETY: the caller's contract; a size above 0 was served by the pool.
        unsafe { pool.give_back(ptr, layout) }
    }
}

/// Grows; with `zeroed` every byte after `old.size()` reads as zero.
///
/// # Safety
/// As for [`deallocate`], with `new.size() >= old.size()`.
pub(super) unsafe fn grow<P: HostPool + ?Sized>(
    pool: &P,
    ptr: NonNull<u8>,
    old: Layout,
    new: Layout,
    zeroed: bool,
) -> Result<NonNull<[u8]>> {
    debug_assert!(new.size() >= old.size());
    if old.size() == 0 {
        return allocate(pool, new, zeroed);
    }
    if (ptr.as_ptr() as usize).is_multiple_of(new.align()) {
        // SAFETY: the caller's contract, and the alignment was checked.
        let resized = unsafe { pool.grow_in_place(ptr, old, new).or_else(|| pool.relocate(ptr, old, new)) };
        if let Some(resized) = resized {
            let known = resized.zero_from.min(resized.block.len());
            if zeroed && known > old.size() {
                // SAFETY: within the block, which is ours.
                unsafe { resized.block.cast::<u8>().add(old.size()).write_bytes(0, known - old.size()) };
            }
            return Ok(resized.block);
        }
    }
    let block = pool.obtain(new, zeroed)?;
    // SAFETY: both blocks are live, distinct, and hold at least `old.size()` bytes; the old one is used no
    // more after.
    unsafe {
        block.cast::<u8>().copy_from_nonoverlapping(ptr, old.size());
        pool.give_back(ptr, old);
    }
    Ok(block)
}

/// # Safety
/// As for [`deallocate`], with `new.size() <= old.size()`.
pub(super) unsafe fn shrink<P: HostPool + ?Sized>(
    pool: &P,
    ptr: NonNull<u8>,
    old: Layout,
    new: Layout,
) -> Result<NonNull<[u8]>> {
    debug_assert!(new.size() <= old.size());
    if new.size() == 0 {
        // SAFETY: the caller's contract.
        unsafe { deallocate(pool, ptr, old) };
        return Ok(dangling(new));
    }
    if (ptr.as_ptr() as usize).is_multiple_of(new.align()) {
        // SAFETY: the caller's contract, and the alignment was checked.
        if let Some(block) = unsafe { pool.shrink_in_place(ptr, old, new) } {
            return Ok(block);
        }
    }
    // A pool may take the size class of a block from the layout at its free, so a smaller layout needs either
    // the pool's consent or a new block.
    let block = pool.obtain(new, false)?;
    // SAFETY: both blocks are live, distinct, and hold at least `new.size()` bytes; the old one is used no
    // more after.
    unsafe {
        block.cast::<u8>().copy_from_nonoverlapping(ptr, new.size());
        pool.give_back(ptr, old);
    }
    Ok(block)
}

/// One version of the trait for one pool.
macro_rules! implement {
    ($api:path, $error:path, [$($generics:tt)*] $pool:ty) => {
        // SAFETY: blocks are valid until freed as long as the pool or a clone lives, and moving the pool does
        // not move them (contract of HostPool); sizes of 0 are served with dangling blocks that are never
        // freed.
        unsafe impl<$($generics)*> $api for $pool {
            #[inline]
            fn allocate(&self, layout: Layout) -> core::result::Result<NonNull<[u8]>, $error> {
                allocate(self, layout, false).map_err(|_| $error)
            }
            #[inline]
            fn allocate_zeroed(&self, layout: Layout) -> core::result::Result<NonNull<[u8]>, $error> {
                allocate(self, layout, true).map_err(|_| $error)
            }
            #[inline]
            unsafe fn deallocate(&self, ptr: NonNull<u8>, layout: Layout) {
                // SAFETY: the caller's contract is the same.
                unsafe { deallocate(self, ptr, layout) }
            }
            #[inline]
            unsafe fn grow(
                &self,
                ptr: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> core::result::Result<NonNull<[u8]>, $error> {
                // SAFETY: the caller's contract is the same.
                unsafe { grow(self, ptr, old, new, false) }.map_err(|_| $error)
            }
            #[inline]
            unsafe fn grow_zeroed(
                &self,
                ptr: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> core::result::Result<NonNull<[u8]>, $error> {
                // SAFETY: the caller's contract is the same.
                unsafe { grow(self, ptr, old, new, true) }.map_err(|_| $error)
            }
            #[inline]
            unsafe fn shrink(
                &self,
                ptr: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> core::result::Result<NonNull<[u8]>, $error> {
                // SAFETY: the caller's contract is the same.
                unsafe { shrink(self, ptr, old, new) }.map_err(|_| $error)
            }
        }
    };
}

/// All versions of `Allocator` for pools that are `HostPool`: `allocators! { [generics] Pool<…>; … }`.
macro_rules! allocators {
    ($([$($generics:tt)*] $pool:ty;)*) => {$(
        implement!(allocator_api2::alloc::Allocator, allocator_api2::alloc::AllocError, [$($generics)*] $pool);
        // With `nightly` this is std's trait.
        implement!(
            allocator_api2_02::alloc::Allocator,
            allocator_api2_02::alloc::AllocError,
            [$($generics)*] $pool
        );
    )*};
}

allocators! {
    [F: Front, S: Source, O: Observer] Pool<F, S, O>;
    [E: PoolEngine, S: Source, O: Observer] LocalPool<E, S, O>;
    [] AnyPool;
    [P: HostPool] PoolRef<P>;
    [] crate::pool::CpuPool;
    [] super::global::GlobalPool;
    [] PersistentPool;
    [K: HostAccessible] GpuPool<K>;
}

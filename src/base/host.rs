//! What a pool over memory that the CPU may touch offers to the allocator traits and containers: one
//! interface with full errors, from which `crate::api` derives every version of `Allocator`.

use core::alloc::Layout;
use core::ptr::NonNull;

use super::error::Result;

/// A block whose size changed, with what is known of its contents.
#[derive(Clone, Copy, Debug)]
pub struct Resized {
    /// The block, at its new size.
    pub block: NonNull<[u8]>,
    /// Bytes from here to the end of the block are known to read as zero.
    pub zero_from: usize,
}

/// A pool that serves memory the CPU may read and write at any time.
///
/// Every host pool implements it, and so do pinned and managed pools; the `Allocator` traits and [`PoolBox`]
/// are built on it. Sizes are never 0 here: the callers serve those.
///
/// # Safety
/// Blocks are valid for reads and writes, as large and aligned as asked, overlap no other live block, and
/// stay where they are until given back, as long as `self` or a clone of it is alive; moving `self` does not
/// move them. `zeroed` blocks read as zero.
///
/// [`PoolBox`]: crate::PoolBox
pub unsafe trait HostPool {
    /// A new block; all of it zero where `zeroed` is set. `layout.size() > 0`.
    fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>>;

    /// Frees a block.
    ///
    /// # Safety
    /// `ptr` is a live block of this pool and `layout` fits it: the alignment asked for, and a size from the
    /// one asked for to the one returned.
    unsafe fn give_back(&self, ptr: NonNull<u8>, layout: Layout);

    /// Grows a block where it is; `None` where there is no room, and the block is as it was.
    ///
    /// # Safety
    /// As for `give_back`; `new.size() >= old.size()` and the block satisfies `new.align()`.
    unsafe fn grow_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        let _ = (ptr, old, new);
        None
    }

    /// Cuts a block's tail off where it is; `None` where the block cannot stay, and it is as it
    /// was. A pool that takes any layout at free says `Some` even where it cuts nothing.
    ///
    /// # Safety
    /// As for `give_back`; `0 < new.size() <= old.size()` and the block satisfies `new.align()`.
    unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        let _ = (ptr, old, new);
        None
    }

    /// Moves a block with its contents without copying them (by remapping pages), or `None`, and the block is
    /// as it was.
    ///
    /// # Safety
    /// As for `grow_in_place`; on success the old address is used no more.
    unsafe fn relocate(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        let _ = (ptr, old, new);
        None
    }
}

// SAFETY: forwards to a pool that keeps the contract, and which outlives the reference.
unsafe impl<P: HostPool + ?Sized> HostPool for &P {
    #[inline]
    fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
        (**self).obtain(layout, zeroed)
    }
    #[inline]
    unsafe fn give_back(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).give_back(ptr, layout) }
    }
    #[inline]
    unsafe fn grow_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).grow_in_place(ptr, old, new) }
    }
    #[inline]
    unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).shrink_in_place(ptr, old, new) }
    }
    #[inline]
    unsafe fn relocate(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).relocate(ptr, old, new) }
    }
}

/// The empty block that serves a size of 0: aligned as asked, and nothing behind it.
#[inline]
pub(crate) fn dangling(layout: Layout) -> NonNull<[u8]> {
    let align = core::num::NonZero::new(layout.align()).unwrap_or(core::num::NonZero::<usize>::MIN);
    NonNull::slice_from_raw_parts(NonNull::without_provenance(align), 0)
}

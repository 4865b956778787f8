//! What every host pool can do, as one object-safe trait, and the macros that turn it into inherent methods
//! and into the public interfaces.

use core::alloc::Layout;
use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use super::core::{Core, OomCallback};
use super::front::Front;
use crate::base::config::PoolConfig;
use crate::base::diagnostics::Diagnostics;
use crate::base::error::Result;
use crate::base::host::Resized;
use crate::base::pool::{ActiveAllocation, AllocFlags, forward};
use crate::base::stats::MemoryStats;
use crate::observe::Observer;
use crate::source::Source;

/// A host pool behind its handle. Methods are named and behave as those of [`MemoryPool`](crate::base::pool::MemoryPool) and
/// [`HostPool`](crate::base::host::HostPool); the ones that exist here alone are described.
///
/// # Safety
/// As for `HostPool`.
pub unsafe trait Host: fmt::Debug {
    /// `layout.size()` may be 0.
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>>;
    /// With wishes; all wishes of other memory types are refused.
    fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>>;
    /// Fills `blocks` or nothing.
    fn allocate_batch(&self, layout: Layout, blocks: &mut [MaybeUninit<NonNull<u8>>]) -> Result<()>;
    /// # Safety
    /// Empty blocks may be freed too; `layout`, if given, fits the block.
    unsafe fn deallocate(&self, ptr: NonNull<u8>, layout: Option<Layout>);
    /// # Safety
    /// As for `deallocate`, for each of them.
    unsafe fn deallocate_batch(&self, blocks: &[NonNull<u8>]);
    /// Frees a block that nobody vouches for, or says what is wrong with the address.
    ///
    /// # Safety
    /// Nothing else uses the block, if `ptr` is one.
    unsafe fn try_deallocate(&self, ptr: NonNull<u8>) -> Result<()>;
    /// # Safety
    /// As for `HostPool`.
    unsafe fn grow_in_place(&self, ptr: NonNull<u8>, new: usize) -> Option<Resized>;
    /// # Safety
    /// As for `HostPool`.
    unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, new: usize) -> Option<NonNull<[u8]>>;
    /// # Safety
    /// As for `HostPool`.
    unsafe fn relocate(&self, ptr: NonNull<u8>, new: Layout) -> Option<Resized>;
    /// Any address may be asked about.
    fn owns(&self, ptr: NonNull<u8>) -> bool;
    /// Of a live block.
    fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize>;
    /// Ahead of need.
    fn reserve(&self, bytes: usize) -> Result<()>;
    /// Until `keep` free bytes are left.
    fn trim(&self, keep: usize) -> Result<usize>;
    /// If nothing is live.
    fn reset(&self) -> Result<()>;
    /// # Safety
    /// Nothing that was allocated is used or freed after.
    unsafe fn reset_unchecked(&self) -> Result<()>;
    /// As shown by the pool.
    fn stats(&self) -> MemoryStats;
    /// Of what is current.
    fn reset_peak(&self);
    /// Of requests.
    fn set_tracking(&self, on: bool);
    /// Of requests.
    fn is_tracking(&self) -> bool;
    /// As the user sees them.
    fn active_allocations(&self) -> Vec<ActiveAllocation>;
    /// Blocks that the user holds.
    fn live(&self) -> usize;
    /// Empty where it was given none.
    fn name(&self) -> &str;
    /// What it was made with.
    fn config(&self) -> &PoolConfig;
    /// Called when memory is short; the request is tried again while it returns true.
    fn set_oom_callback(&self, callback: Option<std::sync::Arc<OomCallback>>);
    /// Walks all invariants.
    fn check(&self) -> Result<()>;
    /// An address in the pool's memory.
    fn anchor(&self) -> Option<NonNull<u8>>;
    /// Empties the pool for good, if nothing is live.
    fn close(&self) -> Result<()>;
    /// What watches the pool.
    fn diagnostics(&self) -> Option<&dyn Diagnostics>;
}

// SAFETY: blocks come from engines and sources that keep the same contract; the source's memory stays where
// it is until the core is dropped, wherever the core itself moves.
unsafe impl<F: Front, S: Source, O: Observer> Host for Core<F, S, O> {
    forward! {
        fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>>;
        fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>>;
        fn allocate_batch(&self, layout: Layout, blocks: &mut [MaybeUninit<NonNull<u8>>]) -> Result<()>;
        unsafe fn deallocate(&self, ptr: NonNull<u8>, layout: Option<Layout>);
        unsafe fn deallocate_batch(&self, blocks: &[NonNull<u8>]);
        unsafe fn try_deallocate(&self, ptr: NonNull<u8>) -> Result<()>;
        unsafe fn grow_in_place(&self, ptr: NonNull<u8>, new: usize) -> Option<Resized>;
        unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, new: usize) -> Option<NonNull<[u8]>>;
        unsafe fn relocate(&self, ptr: NonNull<u8>, new: Layout) -> Option<Resized>;
        fn owns(&self, ptr: NonNull<u8>) -> bool;
        fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize>;
        fn reserve(&self, bytes: usize) -> Result<()>;
        fn trim(&self, keep: usize) -> Result<usize>;
        fn reset(&self) -> Result<()>;
        fn stats(&self) -> MemoryStats;
        fn reset_peak(&self);
        fn set_tracking(&self, on: bool);
        fn live(&self) -> usize;
        fn name(&self) -> &str;
        fn config(&self) -> &PoolConfig;
        fn check(&self) -> Result<()>;
        fn anchor(&self) -> Option<NonNull<u8>>;
        fn close(&self) -> Result<()>;
    }
    unsafe fn reset_unchecked(&self) -> Result<()> {
        self.admit()?;
        // SAFETY: the caller's contract.
        unsafe { self.empty() };
        Ok(())
    }
    fn is_tracking(&self) -> bool {
        self.tracking.is_on()
    }
    fn active_allocations(&self) -> Vec<ActiveAllocation> {
        self.active()
    }
    fn set_oom_callback(&self, callback: Option<std::sync::Arc<OomCallback>>) {
        *self.oom_callback.lock() = callback;
    }
    fn diagnostics(&self) -> Option<&dyn Diagnostics> {
        self.observer.diagnostics()
    }
}

/// The inherent methods of a handle whose field 0 points to a [`Host`], under the names of `MemoryPool`.
macro_rules! inherent {
    ($([$($generics:tt)*] $pool:ty;)*) => {$(
        impl<$($generics)*> $pool {
            /// A block for `layout`: at least `layout.size()` bytes, all of the slice may be used. A size of 0
            /// is served with a dangling, aligned, empty slice.
            #[inline]
            pub fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>> {
                self.0.allocate(layout)
            }

            /// [`allocate`](Self::allocate) with wishes.
            pub fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>> {
                self.0.allocate_with(layout, flags)
            }

            /// [`allocate`](Self::allocate), every byte zero. Pages known to be fresh are not touched.
            pub fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>> {
                self.0.allocate_with(layout, AllocFlags::ZEROED)
            }

            /// `count` blocks for `layout`, or none: cheaper than one by one, as the lock is taken once.
            pub fn allocate_batch(&self, layout: Layout, count: usize) -> Result<Vec<NonNull<u8>>> {
                let mut blocks = Vec::new();
                let short = |_| Error::oom(count.saturating_mul(layout.size()), OomReason::Source);
                blocks.try_reserve_exact(count).map_err(short)?;
                self.0.allocate_batch(layout, &mut blocks.spare_capacity_mut()[..count])?;
                // SAFETY: the batch is all or nothing, so `count` elements were written.
                unsafe { blocks.set_len(count) };
                Ok(blocks)
            }

            /// Fills `blocks` with blocks for `layout`, or leaves it untouched; allocates nothing else.
            pub fn allocate_batch_into(
                &self,
                layout: Layout,
                blocks: &mut [MaybeUninit<NonNull<u8>>],
            ) -> Result<()> {
                self.0.allocate_batch(layout, blocks)
            }

            /// Frees the block at `ptr`.
            ///
            /// # Safety
            /// `ptr` came from this pool, is live, and is not used after.
            #[inline]
            pub unsafe fn deallocate(&self, ptr: NonNull<u8>) {
                // SAFETY: the caller's contract.
                unsafe { self.0.deallocate(ptr, None) }
            }

            /// Frees the block at `ptr`, whose layout is known.
            ///
            /// # Safety
            /// As for [`deallocate`](Self::deallocate), and `layout` fits the block: the alignment asked for,
            /// and any size from the one asked for to the one returned.
            #[inline]
            pub unsafe fn deallocate_sized(&self, ptr: NonNull<u8>, layout: Layout) {
                if layout.size() != 0 {
                    // SAFETY: the caller's contract.
                    unsafe { self.0.deallocate(ptr, Some(layout)) }
                }
            }

            /// Frees every block of `blocks`, with the lock taken once.
            ///
            /// # Safety
            /// As for [`deallocate`](Self::deallocate), for each of them.
            pub unsafe fn deallocate_batch(&self, blocks: &[NonNull<u8>]) {
                // SAFETY: the caller's contract.
                unsafe { self.0.deallocate_batch(blocks) }
            }

            /// Frees the block at `ptr`, or says what is wrong with the address: it may be foreign, inside a
            /// block, or free already.
            ///
            /// # Safety
            /// Nothing uses the block after, if `ptr` is one.
            pub unsafe fn try_deallocate(&self, ptr: NonNull<u8>) -> Result<()> {
                // SAFETY: the caller's contract.
                unsafe { self.0.try_deallocate(ptr) }
            }

            /// Whether `ptr` lies in memory of this pool. Any address may be asked about; none is read.
            pub fn owns(&self, ptr: NonNull<u8>) -> bool {
                self.0.owns(ptr)
            }

            /// Bytes that may be used at `ptr`; `None` where no live block of this pool begins there.
            pub fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize> {
                self.0.usable_size(ptr)
            }

            /// Makes at least `bytes` available without a further call to the source.
            pub fn reserve(&self, bytes: usize) -> Result<()> {
                self.0.reserve(bytes)
            }

            /// Gives idle memory back to the source until `keep` idle bytes are left; returns the bytes given
            /// back.
            pub fn trim(&self, keep: usize) -> Result<usize> {
                self.0.trim(keep)
            }

            /// Empties the pool regardless of what is live.
            ///
            /// # Safety
            /// Nothing that was allocated from this pool is used or freed after.
            pub unsafe fn reset_unchecked(&self) -> Result<()> {
                // SAFETY: the caller's contract.
                unsafe { self.0.reset_unchecked() }
            }

            /// What the pool did and holds.
            pub fn stats(&self) -> MemoryStats {
                self.0.stats()
            }

            /// Starts the peaks anew from what is current.
            pub fn reset_peak(&self) {
                self.0.reset_peak();
            }

            /// Switches the counting of requests on or off.
            pub fn set_tracking(&self, on: bool) {
                self.0.set_tracking(on);
            }

            /// Whether requests are counted.
            pub fn is_tracking(&self) -> bool {
                self.0.is_tracking()
            }

            /// The live blocks, in no particular order.
            pub fn active_allocations(&self) -> Vec<ActiveAllocation> {
                self.0.active_allocations()
            }

            /// Whether anything is live.
            pub fn has_leaks(&self) -> bool {
                self.0.live() > 0
            }

            /// Always [`MemoryType::Cpu`].
            pub fn memory_type(&self) -> MemoryType {
                MemoryType::Cpu
            }

            /// The pool's name; empty where it was given none.
            pub fn name(&self) -> &str {
                self.0.name()
            }

            /// What the pool was made with.
            pub fn config(&self) -> &PoolConfig {
                self.0.config()
            }

            /// Sets what is called when a request finds no memory, with no lock held; the request is tried
            /// again for as long as it returns true, so it should do that only after it freed something.
            pub fn set_oom_callback(&self, callback: impl Fn(Layout) -> bool + Send + Sync + 'static) {
                self.0.set_oom_callback(Some(std::sync::Arc::new(callback)));
            }

            /// Calls nothing any more when memory is short.
            pub fn clear_oom_callback(&self) {
                self.0.set_oom_callback(None);
            }

            /// Walks all invariants of the pool's books; an error says what is broken and where. For tests and
            /// for the hunt after a stray write.
            pub fn check(&self) -> Result<()> {
                self.0.check()
            }

            /// Gives all memory back for good: every later allocation is refused with
            /// [`Refusal::Destroyed`](crate::base::error::Refusal::Destroyed). An error while anything is live,
            /// and the pool is then as it was.
            pub fn close(&self) -> Result<()> {
                self.0.close()
            }

            /// The debugging side, where the pool carries a debug layer.
            pub fn diagnostics(&self) -> Option<&dyn Diagnostics> {
                self.0.diagnostics()
            }
        }

        // SAFETY: as for the `Host` behind the handle, which stays as long as the handle or a clone of it.
        unsafe impl<$($generics)*> HostPool for $pool {
            #[inline]
            fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
                if zeroed {
                    return self.0.allocate_with(layout, AllocFlags::ZEROED);
                }
                self.0.allocate(layout)
            }
            #[inline]
            unsafe fn give_back(&self, ptr: NonNull<u8>, layout: Layout) {
                // SAFETY: the caller's contract.
                unsafe { self.0.deallocate(ptr, Some(layout)) }
            }
            unsafe fn grow_in_place(&self, ptr: NonNull<u8>, _: Layout, new: Layout) -> Option<Resized> {
                // SAFETY: the caller's contract.
                unsafe { self.0.grow_in_place(ptr, new.size()) }
            }
            unsafe fn shrink_in_place(
                &self,
                ptr: NonNull<u8>,
                _: Layout,
                new: Layout,
            ) -> Option<NonNull<[u8]>> {
                // SAFETY: the caller's contract.
                unsafe { self.0.shrink_in_place(ptr, new.size()) }
            }
            unsafe fn relocate(&self, ptr: NonNull<u8>, _: Layout, new: Layout) -> Option<Resized> {
                // SAFETY: the caller's contract.
                unsafe { self.0.relocate(ptr, new) }
            }
        }
    )*};
}

/// `MemoryPool` and a safe `reset` for handles that threads share.
macro_rules! shared {
    ($([$($generics:tt)*] $pool:ty;)*) => {$(
        impl<$($generics)*> $pool {
            /// Empties the pool; an error while anything is live.
            pub fn reset(&self) -> Result<()> {
                self.0.reset()
            }
        }

        memory_pool! {
            [$($generics)*] $pool {
                forward! {
                    fn close(&self) -> Result<()>;
                    fn diagnostics(&self) -> Option<&dyn Diagnostics>;
                }
                fn anchor(&self) -> Option<NonNull<u8>> {
                    self.0.anchor()
                }
            }
        }
    )*};
}

pub(super) use {inherent, shared};

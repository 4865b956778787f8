//! The interface that every pool has, and the one for memory that the CPU may touch.

use core::alloc::Layout;
use core::ptr::NonNull;

use super::GpuPool;
use crate::base::config::PoolConfig;
use crate::base::diagnostics::Diagnostics;
use crate::base::error::{Error, Refusal, Result};
use crate::base::host::{HostPool, Resized, dangling};
use crate::base::pool::{ActiveAllocation, AllocFlags, MemoryType, forward, memory_pool};
use crate::base::stats::MemoryStats;
use crate::base::tracking::Counts;
use crate::gpu::kind::{HostAccessible, MemoryKind};
use crate::gpu::stream::Stream;

impl<K: MemoryKind> GpuPool<K> {
    /// The stream that a block without one is for: device memory is always some stream's, while pinned and
    /// managed memory belongs to the CPU until it is given to one.
    fn implicit_stream(&self) -> Option<Stream> {
        (K::TYPE == MemoryType::Gpu).then(|| self.stream())
    }

    /// A block for `layout`: device memory for the pool's stream, other memory for the CPU.
    pub fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>> {
        self.allocate_with(layout, AllocFlags::NONE)
    }

    /// [`allocate`](Self::allocate) with wishes. A wish for pinned or managed memory is granted by pools of
    /// that kind.
    pub fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>> {
        for (flag, kind) in
            [(AllocFlags::PINNED, MemoryType::Pinned), (AllocFlags::MANAGED, MemoryType::Managed)]
        {
            if flags.contains(flag) && K::TYPE != kind {
                return Err(Error::InvalidOperation(Refusal::Unsupported(
                    "this pool holds memory of another kind",
                    "allocate from a PinnedPool or a ManagedPool",
                )));
            }
        }
        if layout.size() == 0 {
            return Ok(dangling(layout));
        }
        let stream = self.implicit_stream();
        let block = self.raw(layout.size(), layout.align(), stream.as_ref(), flags)?;
        if flags.contains(AllocFlags::ZEROED) {
            let start = block.cast::<u8>().as_ptr() as usize;
            match &stream {
                None => {
                    // SAFETY: the CPU may touch this kind of memory, and the block is ours.
                    unsafe { block.cast::<u8>().write_bytes(0, block.len()) };
                }
                Some(stream) => {
                    let driver = &self.inner.device.0.driver;
                    // SAFETY: the block is ours until freed, and a free is ordered after the fill.
                    let filled = unsafe { driver.fill(start, 0, block.len(), stream.raw()) };
                    if let Err(error) = filled {
                        self.inner.give_at(start, Some(stream))?;
                        return Err(error);
                    }
                }
            }
        }
        Ok(block)
    }

    /// Frees the block at `ptr`: device memory in the order of the stream it was allocated for and of the
    /// pool's stream. An address that is no live block is left alone.
    ///
    /// # Safety
    /// `ptr` came from this pool, is live, and is not used after. Work that uses it was issued to those
    /// streams, or to streams that were recorded, or is complete.
    pub unsafe fn deallocate(&self, ptr: NonNull<u8>) {
        let freed = self.inner.give_at(ptr.as_ptr() as usize, self.implicit_stream().as_ref());
        // Dangling pointers of size 0 end here too.
        debug_assert!(freed.is_ok() || self.diagnostics().is_some() || !self.owns(ptr), "{freed:?}");
    }

    /// Whether `ptr` lies in memory of this pool.
    pub fn owns(&self, ptr: NonNull<u8>) -> bool {
        self.inner.core.lock().owns(ptr.as_ptr() as usize)
    }

    /// Bytes that may be used at `ptr`; `None` where no block begins there that was handed out by address.
    pub fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize> {
        self.inner.find(ptr.as_ptr() as usize).ok().map(|(_, len)| len)
    }

    /// Makes `bytes` available in one piece without a further call to the driver.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        self.inner.reserve(bytes)
    }

    /// Gives idle memory back to the driver until at most `keep` free bytes are left; returns the bytes given
    /// back. Memory whose work is not complete is not idle.
    pub fn trim(&self, keep: usize) -> Result<usize> {
        self.inner.empty_quarantine();
        Ok(self.inner.release_idle(keep))
    }

    /// Empties the pool; an error while anything is live.
    pub fn reset(&self) -> Result<()> {
        self.inner.empty_quarantine();
        let live = self.inner.live_blocks();
        if live != 0 {
            return Err(Error::InvalidOperation(Refusal::StillLive(live)));
        }
        self.inner.wait_for_frees();
        Ok(())
    }

    /// Gives all memory back for good: every later allocation is refused with [`Refusal::Destroyed`]. An error
    /// while anything is live, and the pool is then as it was.
    pub fn close(&self) -> Result<()> {
        self.inner.close()
    }

    /// Empties the pool regardless of what is live, after all work on the device is done.
    ///
    /// # Safety
    /// Nothing that was allocated from this pool is used or freed after.
    pub unsafe fn reset_unchecked(&self) -> Result<()> {
        // SAFETY: the caller's contract is the same.
        unsafe { self.inner.reset() }
    }

    /// Copies bytes between any two kinds of memory in the order of the pool's stream, and waits.
    ///
    /// # Safety
    /// `src` is valid for reads of `len` bytes and `dst` for writes, each memory of the host or of a device
    /// that this one can reach. Work on either that is not complete was issued to the pool's stream, or is
    /// ordered before what it does next, and nobody touches them meanwhile.
    pub unsafe fn copy(&self, dst: NonNull<u8>, src: NonNull<u8>, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let stream = self.stream();
        stream.check_thread()?;
        stream.refuse_capture()?;
        let (dst, src) = (dst.as_ptr() as usize, src.as_ptr() as usize);
        // SAFETY: the caller's contract, and the copy is waited for.
        let issued = unsafe { self.inner.device.0.driver.copy(dst, src, len, stream.raw()) };
        stream.settle();
        issued
    }

    /// What the pool did and holds.
    pub fn stats(&self) -> MemoryStats {
        self.inner.stats()
    }

    /// Starts the peaks anew from what is current.
    pub fn reset_peak(&self) {
        self.inner.empty_quarantine();
        let mut core = self.inner.core.lock();
        core.reset_peak(self.inner.front.bytes());
        self.inner.front.settle_lows();
    }

    /// Switches the counting of requests on or off.
    pub fn set_tracking(&self, on: bool) {
        self.inner.tracking.switch(on, Counts::of(&self.inner.counts()));
    }

    /// Whether requests are counted.
    pub fn is_tracking(&self) -> bool {
        self.inner.tracking.is_on()
    }

    /// The live blocks, in no particular order.
    pub fn active_allocations(&self) -> Vec<ActiveAllocation> {
        self.inner.active()
    }

    /// Whether anything is live.
    pub fn has_leaks(&self) -> bool {
        self.inner.live_blocks() != 0
    }

    /// Whose memory this is.
    pub fn memory_type(&self) -> MemoryType {
        K::TYPE
    }

    /// The pool's name; empty where it was given none.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What the pool was made with.
    pub fn config(&self) -> &PoolConfig {
        &self.inner.config
    }

    /// The pool's debugging side, where its configuration has debugging on.
    pub fn diagnostics(&self) -> Option<&dyn Diagnostics> {
        self.inner.diagnostics()
    }

    /// Walks every invariant of the pool's books.
    pub fn check(&self) -> Result<()> {
        let broken = |broken: crate::engine::Broken| Error::Corrupt {
            at: broken.at as u64,
            what: broken.invariant,
            found: None,
        };
        // Growth takes blocks and memory apart.
        let _growth = self.inner.growth.lock();
        let core = self.inner.core.lock();
        core.check().and_then(|()| self.inner.front.check(&core)).map_err(broken)
    }
}

memory_pool! {
    [K: MemoryKind] GpuPool<K> {
        forward! {
            fn close(&self) -> Result<()>;
            fn diagnostics(&self) -> Option<&dyn Diagnostics>;
            unsafe fn copy(&self, dst: NonNull<u8>, src: NonNull<u8>, len: usize) -> Result<()>;
        }
    }
}

// SAFETY: blocks of these kinds are ordinary memory to the CPU, cut from live segments without overlap, and
// segments stay until the last handle is gone.
unsafe impl<K: HostAccessible> HostPool for GpuPool<K> {
    fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
        self.allocate_with(layout, if zeroed { AllocFlags::ZEROED } else { AllocFlags::NONE })
    }

    unsafe fn give_back(&self, ptr: NonNull<u8>, _layout: Layout) {
        // SAFETY: the caller's contract is the same.
        unsafe { self.deallocate(ptr) }
    }

    unsafe fn grow_in_place(&self, ptr: NonNull<u8>, _old: Layout, new: Layout) -> Option<Resized> {
        let (ticket, len) = self.inner.find(ptr.as_ptr() as usize).ok()?;
        let len = if len >= new.size() { len } else { self.inner.grow_in_place(ticket, new.size(), None)? };
        Some(Resized { block: NonNull::slice_from_raw_parts(ptr, len), zero_from: len })
    }

    unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, _old: Layout, _new: Layout) -> Option<NonNull<[u8]>> {
        let (_, len) = self.inner.find(ptr.as_ptr() as usize).ok()?;
        // Any layout frees a block here, so it may stay as it is.
        Some(NonNull::slice_from_raw_parts(ptr, len))
    }
}

//! Blocks that no work in flight touches: for callers that cannot say which stream their work goes to.

use core::ffi::c_void;
use core::ptr::NonNull;

use super::GpuPool;
use crate::base::error::Result;
use crate::base::pool::AllocFlags;
use crate::gpu::kind::MemoryKind;

impl<K: MemoryKind> GpuPool<K> {
    /// A block of `bytes` on which all earlier work is complete, so that any stream may use it at once. Memory whose
    /// work is in flight does not serve; the pool grows instead, unless `flags` forbid it. For a size of 0, a dangling
    /// pointer.
    ///
    /// ```
    /// use memory_pool::{AllocFlags, DevicePool, GpuDevice, PoolConfig, SimConfig};
    /// let gpu = GpuDevice::simulated(SimConfig::default());
    /// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
    /// let block = pool.allocate_settled(4096, AllocFlags::NONE)?;
    /// // … work on it on any stream …
    /// gpu.synchronize()?;
    /// // SAFETY: the device was waited for after the last work on the block.
    /// unsafe { pool.deallocate_settled(block) }?;
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn allocate_settled(&self, bytes: usize, flags: AllocFlags) -> Result<NonNull<c_void>> {
        if bytes == 0 {
            return Ok(NonNull::without_provenance(core::num::NonZero::<usize>::MIN));
        }
        Ok(self.raw(bytes, 1, None, flags)?.cast())
    }

    /// Frees a block on which all work is known to be complete. Dangling pointers of size 0 are ignored, foreign ones
    /// an error.
    ///
    /// # Safety
    /// `ptr` came from this pool and is live. All work on it is complete, and the CPU has learned that from the driver.
    pub unsafe fn deallocate_settled(&self, ptr: NonNull<c_void>) -> Result<()> {
        if ptr.as_ptr() as usize == 1 {
            return Ok(());
        }
        self.inner.give_at(ptr.as_ptr() as usize, None)
    }
}

//! Copies between pools of any kind.

use core::ptr::NonNull;

use super::PoolManager;
use crate::base::error::{Error, PointerFault, Result};
use crate::base::pool::MemoryPool;
use crate::base::transfer::{CopySource, CopyTarget};

impl PoolManager {
    /// Copies `len` bytes from `src` to `dst`, each in any pool of this manager, or in host memory that belongs
    /// to none. The owners are found by address; memory that the CPU cannot touch is copied by its pool. The
    /// ranges may overlap in host memory.
    ///
    /// A range that begins in a pool and leaves its memory is an error.
    ///
    /// ```
    /// use memory_pool::{PoolBox, PoolConfig, PoolManager};
    /// use std::ptr::NonNull;
    /// let manager = PoolManager::new();
    /// let pool = manager.create_cpu_pool("frames", PoolConfig::default_cpu())?;
    /// let from = PoolBox::<[u8]>::from_slice_in(b"pixels", pool.clone())?;
    /// let mut to = PoolBox::<[u8]>::new_zeroed_slice_in(6, pool)?;
    /// // SAFETY: both are 6 bytes, and nothing else uses them meanwhile.
    /// unsafe { manager.copy(NonNull::from(&mut *to).cast(), NonNull::from(&*from).cast(), 6)? };
    /// assert_eq!(&*to, b"pixels");
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    ///
    /// # Safety
    /// `src` is valid for reads of `len` bytes and `dst` for writes, by the CPU or by the pool that owns them,
    /// and nobody else writes to either, or reads `dst`, meanwhile.
    pub unsafe fn copy(&self, dst: NonNull<u8>, src: NonNull<u8>, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let entries = self.entries();
        let owner = |at: NonNull<u8>| -> Result<Option<&dyn MemoryPool>> {
            let outside = Err(Error::pointer(at.as_ptr() as usize, PointerFault::OutOfRange));
            let Some(last) = (at.as_ptr() as usize).checked_add(len - 1) else { return outside };
            let Some(pool) = entries.iter().map(|(_, entry)| entry.pool()).find(|pool| pool.owns(at)) else {
                return Ok(None);
            };
            let ends_inside = NonNull::new(last as *mut u8).is_some_and(|last| pool.owns(last));
            let fits = pool.usable_size(at).is_none_or(|size| len <= size);
            if ends_inside && fits { Ok(Some(pool)) } else { outside }
        };
        let (to, from) = (owner(dst)?, owner(src)?);
        // SAFETY: the caller's contract.
        unsafe { transfer(to, from, dst, src, len) }
    }

    /// Copies elements between slices and buffers of any pools, on the host and on devices; an error where
    /// their numbers differ, and nothing is copied.
    ///
    /// ```
    /// use memory_pool::{PoolBox, PoolConfig, PoolManager, VariablePool};
    /// let pool = VariablePool::new(PoolConfig::default_cpu())?;
    /// let mut samples = PoolBox::<[f32]>::new_zeroed_slice_in(3, &pool)?;
    /// PoolManager::global().copy_slice(&mut *samples, &[1.0, 2.0, 3.0][..])?;
    /// assert_eq!(*samples, [1.0, 2.0, 3.0]);
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn copy_slice<T: Copy>(
        &self,
        dst: &mut (impl CopyTarget<T> + ?Sized),
        src: &(impl CopySource<T> + ?Sized),
    ) -> Result<()> {
        let (to, room, target) = dst.target();
        let (from, count, source) = src.source();
        if room != count {
            return Err(Error::refused("the slices differ in length", "copy between slices of one length"));
        }
        if count == 0 || size_of::<T>() == 0 {
            return Ok(());
        }
        // SAFETY: contracts of the two traits: as many elements there to read as here to overwrite, borrowed
        // for the call.
        unsafe { transfer(target, source, to.cast(), from.cast(), count * size_of::<T>()) }
    }
}

/// Lets the pool copy that owns memory which the CPU cannot touch.
///
/// # Safety
/// As for [`PoolManager::copy`]; `to` and `from` own the memory, or it is of the host.
unsafe fn transfer(
    to: Option<&dyn MemoryPool>,
    from: Option<&dyn MemoryPool>,
    dst: NonNull<u8>,
    src: NonNull<u8>,
    len: usize,
) -> Result<()> {
    let distant = |pool: &&dyn MemoryPool| !pool.memory_type().is_host_accessible();
    match to.filter(distant).or(from.filter(distant)) {
        // SAFETY: the caller's contract.
        Some(pool) => unsafe { pool.copy(dst, src, len) },
        None => {
            // SAFETY: the caller's contract; the CPU may touch both.
            unsafe { dst.copy_from(src, len) };
            Ok(())
        }
    }
}

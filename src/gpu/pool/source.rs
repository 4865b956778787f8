//! Where a pool's segments come from: physical handles mapped into address space of their own where the
//! device can, the driver's plain allocations elsewhere.
//!
//! Mapping costs the same whatever the size, and neither mapping nor unmapping waits for the device, while a
//! plain free waits for all of its work.
//!
//! Invariant: `mapped` has an entry for each segment made of a handle, and for no other.

use std::collections::HashMap;

use super::super::device::GpuDevice;
use super::super::driver::{Driver, Handle, Space};
use crate::base::bits::round_up;
use crate::base::error::{Error, OomReason, Result};
use crate::base::sync::Lock;

/// A segment made of a physical handle.
#[derive(Debug)]
struct Mapped {
    len: usize,
    handle: Handle,
}

#[derive(Debug)]
pub(super) struct Source {
    space: Space,
    /// Granularity of handles; `None` for plain allocations.
    granularity: Option<usize>,
    mapped: Lock<HashMap<usize, Mapped>>,
}

impl Source {
    /// Handles come in multiples of some MiB, so a pool that may hold little takes plain memory.
    pub(super) fn new(device: &GpuDevice, space: Space, max_size: usize) -> Self {
        let granularity = device
            .0
            .driver
            .info()
            .vmm_granularity
            .filter(|granularity| space == Space::Device && max_size / granularity >= 16);
        Self { space, granularity, mapped: Lock::default() }
    }

    /// A segment of at least `len` bytes.
    pub(super) fn take(&self, driver: &dyn Driver, len: usize) -> Result<(usize, usize)> {
        let Some(granularity) = self.granularity else {
            return Ok((driver.alloc(self.space, len)?, len));
        };
        let len = round_up(len, granularity).ok_or(Error::oom(len, OomReason::Overflow))?;
        let handle = driver.create_handle(len)?;
        let start = driver.reserve_va(len).inspect_err(|_| {
            // SAFETY: the handle is mapped nowhere.
            let _ = unsafe { driver.release_handle(handle) };
        })?;
        // SAFETY: the range was just reserved.
        if let Err(error) = unsafe { driver.map(start, len, handle) } {
            // SAFETY: nothing is mapped in the range, and the handle nowhere.
            unsafe {
                let _ = driver.free_va(start, len);
                let _ = driver.release_handle(handle);
            }
            return Err(error);
        }
        self.mapped.lock().insert(start, Mapped { len, handle });
        Ok((start, len))
    }

    /// Gives a segment back; on failure it is as it was.
    ///
    /// # Safety
    /// `start` is a segment from [`take`](Self::take); all work on it is known to be complete, and it is used
    /// no more.
    pub(super) unsafe fn give(&self, driver: &dyn Driver, start: usize) -> Result<()> {
        let mut mapped = self.mapped.lock();
        let Some(segment) = mapped.get(&start) else {
            drop(mapped);
            // SAFETY: the caller's contract; it is no mapped segment, so it came from `alloc`.
            return unsafe { driver.free(self.space, start) };
        };
        // SAFETY: mapped by one call in `take`, and no work touches it.
        unsafe { driver.unmap(start, segment.len) }?;
        let segment = mapped.remove(&start);
        drop(mapped);
        if let Some(Mapped { len, handle }) = segment {
            // The segment is gone; address space or memory that the driver refuses to take back is leaked.
            // A second try gets past a passing failure.
            // SAFETY: the handle is mapped nowhere any more, and the range is empty.
            unsafe {
                let _ = driver.release_handle(handle).or_else(|_| driver.release_handle(handle));
                let _ = driver.free_va(start, len).or_else(|_| driver.free_va(start, len));
            }
        }
        Ok(())
    }
}

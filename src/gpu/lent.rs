//! Slices of cudarc's that become buffers, and buffers that become slices of cudarc's, without a copy.
//!
//! cudarc frees a slice with `cuMemFreeAsync`, which is right for its own memory and wrong for a part of ours. So
//! memory keeps the owner it had: an adopted slice is dropped by cudarc when the buffer goes, and a lent buffer goes
//! back to its pool when the slice does.
//!
//! Invariants
//! 1. The slice inside a [`LentSlice`] is never dropped as a slice, and never moved out by others: they only borrow
//!    it, and exclusively only as a view.
//! 2. The slice's stream is the buffer's own or was recorded, and the buffer is freed only when the slice is at its
//!    end; a leaked slice leaks the buffer.

use core::fmt;
use core::mem::ManuallyDrop;
use core::ops::Deref;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut, DevicePtr};

use super::block::{Block, Foreign};
use super::buffer::DeviceBuffer;
use super::pool::DevicePool;
use super::stream::Stream;
use crate::base::error::{Error, Result};

impl<T> DeviceBuffer<T> {
    /// Makes a buffer of a cudarc slice, in place: the memory stays cudarc's, which frees it when the buffer is
    /// dropped, in the order of both streams. `pool` is of the slice's device, and where copies that grow go to.
    pub fn adopt_cuda(pool: &DevicePool, slice: CudaSlice<T>, home: &Stream) -> Result<Self>
    where
        T: 'static,
    {
        pool.inner.accept(home)?;
        let theirs = slice.stream().clone();
        let stream = pool.device().stream_from_cuda(&theirs)?;
        let len = slice.len();
        // cudarc orders its stream after what was written, and the home stream goes after that.
        let (start, guard) = slice.device_ptr(&theirs);
        drop(guard);
        home.wait_for(&stream)?;
        let foreign = Foreign::new(stream, Box::new(slice));
        Ok(Self::from_block(Block::adopted(pool, start as usize, len * size_of::<T>(), home, foreign), len))
    }

    /// Lends the buffer to cudarc as a slice of its own type, in place, for interfaces that take nothing else.
    pub fn into_cuda(self, stream: &Arc<CudaStream>) -> Result<LentSlice<T>> {
        let ours = self.device().stream_from_cuda(stream)?;
        ours.wait_for(self.stream())?;
        if !ours.same(self.stream()) {
            self.record_stream(&ours)?;
        }
        if stream.context().is_event_tracking() {
            // cudarc would panic where it cannot make its events.
            let made = stream.context().new_event(None);
            made.map_err(|error| Error::Cuda { code: error.0 as i32, call: "cuEventCreate" })?;
        }
        // SAFETY: the block is live as long as `buffer`, which stays beside the slice, and holds `len` elements.
        let slice = unsafe { stream.upgrade_device_ptr(self.as_device_ptr(), self.len()) };
        Ok(LentSlice { slice: ManuallyDrop::new(slice), buffer: ManuallyDrop::new(self), ours })
    }
}

/// A [`DeviceBuffer`] as a `CudaSlice`; made by [`DeviceBuffer::into_cuda`]. When it goes, the memory goes back to
/// its pool, after the work that cudarc knows of.
pub struct LentSlice<T> {
    slice: ManuallyDrop<CudaSlice<T>>,
    buffer: ManuallyDrop<DeviceBuffer<T>>,
    ours: Stream,
}

impl<T> LentSlice<T> {
    /// The elements, for calls that write.
    pub fn as_view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.slice.as_view_mut()
    }

    /// Takes the buffer back.
    pub fn into_buffer(self) -> DeviceBuffer<T> {
        let mut this = ManuallyDrop::new(self);
        this.end();
        // SAFETY: `this` is not used or dropped after; `end` has left the buffer in place.
        let buffer = unsafe { ManuallyDrop::take(&mut this.buffer) };
        // SAFETY: as above.
        unsafe { core::ptr::drop_in_place(&raw mut this.ours) };
        buffer
    }

    /// Ends the slice, which is used no more, and orders the buffer's own stream after its work.
    fn end(&mut self) {
        // SAFETY: called once, and the slice is not used after.
        let slice = unsafe { ManuallyDrop::take(&mut self.slice) };
        // Orders the slice's stream after its events; the memory is left alone (invariant 1).
        let _ = slice.leak();
        if self.buffer.stream().wait_for(&self.ours).is_err() {
            self.ours.settle();
        }
    }
}

impl<T> Deref for LentSlice<T> {
    type Target = CudaSlice<T>;
    fn deref(&self) -> &CudaSlice<T> {
        &self.slice
    }
}

impl<T> Drop for LentSlice<T> {
    fn drop(&mut self) {
        self.end();
        // SAFETY: the buffer is taken out here alone; `into_buffer` does not come here.
        unsafe { ManuallyDrop::drop(&mut self.buffer) };
    }
}

impl<T> fmt::Debug for LentSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LentSlice").field(&*self.buffer).finish()
    }
}

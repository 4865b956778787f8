//! cudarc and these pools together: its contexts and streams under our pools, our buffers in its calls.
//!
//! cudarc tracks the use of its own slices by events; ours are ordered through their home stream. So our
//! buffers are first bound to a cudarc stream ([`DeviceBuffer::for_cuda`]), which orders that stream after the
//! home stream, and the home stream after it when the binding ends.

use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice as CudaDeviceSlice,
    HostSlice, LaunchArgs, PushKernelArg, SyncOnDrop,
};

use super::buffer::DeviceBuffer;
use super::device::GpuDevice;
use super::driver::RawStream;
use super::driver::cuda::CudaDevice;
use super::host::HostBuffer;
use super::kind::HostAccessible;
use super::stream::{Owner, Stream};
use crate::base::error::{Error, Result};

impl GpuDevice {
    /// The device behind a cudarc context, over that very context.
    pub fn from_cuda_context(context: &Arc<CudaContext>) -> Result<Self> {
        let keep = Box::new(context.clone());
        // SAFETY: the context belongs to its own ordinal and lives as long as the clone.
        let device = unsafe { CudaDevice::adopt(context.ordinal(), context.cu_ctx().cast(), keep) }?;
        Ok(Self::from_driver(Arc::new(device)))
    }

    /// A cudarc stream as ours; it stays cudarc's and is kept alive.
    pub fn stream_from_cuda(&self, stream: &Arc<CudaStream>) -> Result<Stream> {
        let cuda = self.0.driver.cuda().ok_or(Error::NoDriver)?;
        if stream.context().cu_ctx().cast() != cuda.context() {
            return Err(Error::pointer(
                stream.cu_stream() as usize,
                crate::base::error::PointerFault::WrongOwner,
            ));
        }
        Ok(match stream.cu_stream() as usize {
            0 | 1 => self.default_stream(),
            2 => self.per_thread_stream(),
            raw => Stream::new(self, RawStream(raw), Owner::Borrowed, Some(Box::new(stream.clone()))),
        })
    }
}

/// A [`DeviceBuffer`] bound to the cudarc stream that its work goes to: what cudarc's copy, fill and library
/// calls take.
///
/// Made by [`DeviceBuffer::for_cuda`]; work issued through it is ordered after everything before, and the
/// buffer's own stream after it when the binding ends.
#[derive(Debug)]
pub struct CudaBuffer<'a, T> {
    buffer: &'a mut DeviceBuffer<T>,
    stream: Arc<CudaStream>,
    ours: Stream,
    address: CUdeviceptr,
}

impl<T> DeviceBuffer<T> {
    /// Binds the buffer to a cudarc stream of the same context.
    pub fn for_cuda(&mut self, stream: &Arc<CudaStream>) -> Result<CudaBuffer<'_, T>> {
        let ours = self.device().stream_from_cuda(stream)?;
        ours.wait_for(self.stream())?;
        if !ours.same(self.stream()) {
            // Also if the binding is leaked, the memory is not reused before the stream's work is done.
            self.record_stream(&ours)?;
        }
        let address = self.as_device_ptr();
        Ok(CudaBuffer { buffer: self, stream: stream.clone(), ours, address })
    }
}

impl<T> Drop for CudaBuffer<'_, T> {
    fn drop(&mut self) {
        // What cannot be ordered is waited for.
        if self.buffer.stream().wait_for(&self.ours).is_err() {
            self.ours.settle();
        }
    }
}

impl<T> CudaDeviceSlice<T> for CudaBuffer<'_, T> {
    fn len(&self) -> usize {
        self.buffer.len()
    }
    fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl<T> CudaBuffer<'_, T> {
    /// Orders another stream than the bound one around the use of the pointer.
    fn order(&self, stream: &CudaStream) {
        if stream.cu_stream() != self.stream.cu_stream() {
            // cudarc's own ordering of streams; the bound stream is ordered behind by waiting for it.
            let ordered = stream.join(&self.stream);
            stream.context().record_err(ordered);
        }
    }
}

impl<T> DevicePtr<T> for CudaBuffer<'_, T> {
    fn device_ptr<'a>(&'a self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        self.order(stream);
        let foreign = stream.cu_stream() != self.stream.cu_stream();
        (self.address, if foreign { SyncOnDrop::sync_stream(stream) } else { SyncOnDrop::Sync(None) })
    }
}

impl<T> DevicePtrMut<T> for CudaBuffer<'_, T> {
    fn device_ptr_mut<'a>(&'a mut self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        self.device_ptr(stream)
    }
}

// SAFETY: the argument is the buffer's address, which outlives the launch; ordering is the binding's.
unsafe impl<'a, 'b: 'a, T: DeviceRepr> PushKernelArg<&'b CudaBuffer<'_, T>> for LaunchArgs<'a> {
    fn arg(&mut self, arg: &'b CudaBuffer<'_, T>) -> &mut Self {
        self.arg(&arg.address)
    }
}

// SAFETY: as above.
unsafe impl<'a, 'b: 'a, T: DeviceRepr> PushKernelArg<&'b mut CudaBuffer<'_, T>> for LaunchArgs<'a> {
    fn arg(&mut self, arg: &'b mut CudaBuffer<'_, T>) -> &mut Self {
        let arg: &'b CudaBuffer<'_, T> = arg;
        self.arg(&arg.address)
    }
}

impl<T, K: HostAccessible> HostSlice<T> for HostBuffer<T, K> {
    fn len(&self) -> usize {
        (**self).len()
    }
    unsafe fn stream_synced_slice<'a>(&'a self, stream: &'a CudaStream) -> (&'a [T], SyncOnDrop<'a>) {
        // The borrow ends with the guard, so the guard must wait.
        (self, SyncOnDrop::sync_stream(stream))
    }
    unsafe fn stream_synced_mut_slice<'a>(
        &'a mut self,
        stream: &'a CudaStream,
    ) -> (&'a mut [T], SyncOnDrop<'a>) {
        (self, SyncOnDrop::sync_stream(stream))
    }
}

/// Copies a cudarc slice's elements into a buffer of `pool`, on the device. [`DeviceBuffer::adopt_cuda`] takes the
/// slice over without a copy.
pub fn copy_from_cuda<T: Copy>(
    pool: &super::pool::DevicePool,
    slice: &CudaSlice<T>,
    stream: &Arc<CudaStream>,
) -> Result<DeviceBuffer<T>> {
    let ours = pool.device().stream_from_cuda(stream)?;
    let buffer = DeviceBuffer::<T>::uninit(pool, slice.len(), &ours)?;
    let (source, guard) = slice.device_ptr(stream);
    let bytes = slice.len() * size_of::<T>();
    if bytes != 0 {
        let driver = &pool.device().0.driver;
        // SAFETY: cudarc has ordered `stream` after the slice's writes and its guard records the read; our
        // block is live until freed on the same stream.
        unsafe { driver.copy(buffer.as_device_ptr() as usize, source as usize, bytes, ours.raw()) }?;
    }
    drop(guard);
    // SAFETY: the copy fills every element.
    Ok(unsafe { buffer.assume_init() })
}

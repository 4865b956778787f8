//! Typed device memory: buffers, slices of them, and copies.
//!
//! Invariants
//! 1. The block is live, and all work on it is ordered (invariants of `block`).
//! 2. A `DeviceBuffer<T>` holds `len` initialised elements, `len * size_of::<T>()` at most the block's bytes.
//! 3. Nothing asynchronous borrows host memory, except inside `Stream::scope`, which waits.

use core::fmt;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::ops::{Bound, RangeBounds};
use core::ptr::NonNull;
use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit, Zeroable};

use super::block::Block;
use super::device::GpuDevice;
use super::host::{HostBuffer, Transfer};
use super::kind::HostAccessible;
use super::pool::{DevicePool, bytes_of};
use super::seat::Seat;
use super::stream::Stream;
use crate::base::error::{Error, PointerFault, Refusal, Result};
use crate::base::pool::MemoryPool;
use crate::base::transfer::{CopySource, CopyTarget};

/// Memory on the device for `T`s, freed in the order of its stream when dropped.
///
/// ```
/// use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let (stream, other) = (gpu.new_stream()?, gpu.new_stream()?);
/// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
/// let mut buffer = pool.alloc::<u32>(8, &stream)?;
/// buffer.copy_from_host(&[1, 2, 3, 4, 5, 6, 7, 8], &stream)?;
/// let (mut left, right) = buffer.split_at_mut(4)?;
/// left.copy_from_device(&right, &other)?;          // ordered against everything before and after
/// assert_eq!(buffer.to_vec(&stream)?, [5, 6, 7, 8, 5, 6, 7, 8]);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub struct DeviceBuffer<T> {
    pub(super) block: Block,
    pub(super) len: usize,
    holds: PhantomData<T>,
}

// SAFETY: the buffer owns its elements, which lie on the device; the CPU reaches them through copies alone.
unsafe impl<T: Send> Send for DeviceBuffer<T> {}
// SAFETY: shared handles can only copy the elements out.
unsafe impl<T: Sync> Sync for DeviceBuffer<T> {}

impl<T> DeviceBuffer<T> {
    #[inline]
    pub(super) fn from_block(block: Block, len: usize) -> Self {
        Self { block, len, holds: PhantomData }
    }

    #[inline]
    pub(super) fn uninit(
        pool: &DevicePool,
        len: usize,
        stream: &Stream,
    ) -> Result<DeviceBuffer<MaybeUninit<T>>> {
        // Apart from all that may fail, so that the common way moves no results about.
        let seat = match len.checked_mul(size_of::<T>()) {
            Some(bytes) => match Block::cached::<T>(pool, bytes, stream) {
                Ok(block) => return Ok(DeviceBuffer::from_block(block, len)),
                Err(seat) => seat,
            },
            None => None,
        };
        Self::uninit_from_books(pool, len, stream, seat)
    }

    #[inline(never)]
    fn uninit_from_books(
        pool: &DevicePool,
        len: usize,
        stream: &Stream,
        seat: Option<Arc<Seat>>,
    ) -> Result<DeviceBuffer<MaybeUninit<T>>> {
        let block = Block::from_books::<T>(pool, bytes_of::<T>(len)?, stream, seat)?;
        Ok(DeviceBuffer::from_block(block, len))
    }

    pub(super) fn zeroed(pool: &DevicePool, len: usize, stream: &Stream) -> Result<Self>
    where
        T: Zeroable,
    {
        let bytes = bytes_of::<T>(len)?;
        let block = Block::new::<T>(pool, bytes, stream)?;
        if bytes != 0 {
            // SAFETY: the block is ours; its free is ordered after the fill on the same stream.
            unsafe { block.device().0.driver.fill(block.start(), 0, bytes, stream.raw()) }?;
        }
        Ok(Self::from_block(block, len))
    }

    pub(super) fn from_host(pool: &DevicePool, source: &[T], stream: &Stream) -> Result<Self>
    where
        T: NoUninit,
    {
        Self::uninit(pool, source.len(), stream)?.init_from_host(source, stream)
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device address of the first element, for kernels. Work that uses it is ordered after this buffer's
    /// stream and before what that stream does next, or its stream is recorded.
    pub fn as_device_ptr(&self) -> u64 {
        self.block.start() as u64
    }

    /// The stream that the buffer is freed on.
    pub fn stream(&self) -> &Stream {
        self.block.home()
    }

    /// The device that the buffer lies on.
    pub fn device(&self) -> &GpuDevice {
        self.block.device()
    }

    /// Says that work on `stream` uses this buffer too: once dropped, its memory is not reused before the
    /// work that `stream` was issued until then is done.
    pub fn record_stream(&self, stream: &Stream) -> Result<()> {
        if let Some(foreign) = self.block.lease.foreign() {
            self.block.pool().inner.accept(stream)?;
            foreign.users.lock().push(stream.clone());
        }
        self.block.lease.ticket.map_or(Ok(()), |ticket| self.block.pool().inner.share(ticket, stream))
    }

    /// All elements.
    pub fn as_slice(&self) -> DeviceSlice<'_, T> {
        DeviceSlice { block: &self.block, start: self.block.start(), len: self.len, holds: PhantomData }
    }

    /// All elements, writable.
    pub fn as_mut_slice(&mut self) -> DeviceSliceMut<'_, T> {
        DeviceSliceMut { block: &self.block, start: self.block.start(), len: self.len, holds: PhantomData }
    }

    /// Some of the elements; an error where the range leaves the buffer.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<DeviceSlice<'_, T>> {
        self.as_slice().slice(range)
    }

    /// Some of the elements, writable.
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> Result<DeviceSliceMut<'_, T>> {
        self.as_mut_slice().slice_mut(range)
    }

    /// Two parts, the first with `mid` elements.
    pub fn split_at(&self, mid: usize) -> Result<(DeviceSlice<'_, T>, DeviceSlice<'_, T>)> {
        Ok((self.slice(..mid)?, self.slice(mid..)?))
    }

    /// Two writable parts, the first with `mid` elements.
    pub fn split_at_mut(&mut self, mid: usize) -> Result<(DeviceSliceMut<'_, T>, DeviceSliceMut<'_, T>)> {
        self.as_mut_slice().split_at_mut(mid)
    }

    /// Copies `source` to the device and returns once it is no longer read.
    pub fn copy_from_host(&mut self, source: &[T], stream: &Stream) -> Result<()>
    where
        T: NoUninit,
    {
        self.as_mut_slice().copy_from_host(source, stream)
    }

    /// Copies the elements to the host, once all work before is done.
    pub fn copy_to_host(&self, into: &mut [T], stream: &Stream) -> Result<()>
    where
        T: AnyBitPattern,
    {
        self.as_slice().copy_to_host(into, stream)
    }

    /// Copies from another buffer, of this device or another, in the order of `stream`.
    pub fn copy_from_device(&mut self, source: &Self, stream: &Stream) -> Result<()>
    where
        T: Copy,
    {
        self.as_mut_slice().copy_from_device(&source.as_slice(), stream)
    }

    /// Copies from a pinned or managed buffer without waiting; it is given back by [`Transfer::wait`].
    pub fn copy_from_pinned<K: HostAccessible>(
        &mut self,
        source: HostBuffer<T, K>,
        stream: &Stream,
    ) -> Result<Transfer<T, K>>
    where
        T: NoUninit,
    {
        self.as_mut_slice().copy_from_pinned(source, stream)
    }

    /// Copies to a pinned or managed buffer without waiting; it is given back by [`Transfer::wait`].
    pub fn copy_to_pinned<K: HostAccessible>(
        &self,
        into: HostBuffer<T, K>,
        stream: &Stream,
    ) -> Result<Transfer<T, K>>
    where
        T: AnyBitPattern,
    {
        self.as_slice().copy_to_pinned(into, stream)
    }

    /// Sets every byte to zero, in the order of `stream`.
    pub fn set_zero(&mut self, stream: &Stream) -> Result<()>
    where
        T: Zeroable,
    {
        self.as_mut_slice().set_zero(stream)
    }

    /// The elements on the host.
    pub fn to_vec(&self, stream: &Stream) -> Result<Vec<T>>
    where
        T: AnyBitPattern,
    {
        self.as_slice().to_vec(stream)
    }

    /// Gives the memory away: its address, to be freed with `deallocate_async` of a handle on its pool. The
    /// pool does not live on for its sake. Memory that was adopted cannot be given away.
    pub fn into_raw(mut self) -> Result<u64> {
        if self.block.lease.foreign().is_some() {
            return Err(Error::refused("the memory is not the pool's", "copy it into a buffer of the pool"));
        }
        if let Some(ticket) = self.block.lease.ticket
            && !self.block.pool().inner.core.lock().publish(ticket)
        {
            return Err(Error::oom(self.block.bytes(), crate::base::error::OomReason::Source));
        }
        let start = self.block.start() as u64;
        self.block.lease.leave_block();
        Ok(start)
    }
}

impl<T> DeviceBuffer<MaybeUninit<T>> {
    /// Takes the elements for initialised.
    ///
    /// # Safety
    /// Work on this buffer's stream, or ordered before it, has made every element a valid `T`.
    pub unsafe fn assume_init(self) -> DeviceBuffer<T> {
        DeviceBuffer { block: self.block, len: self.len, holds: PhantomData }
    }

    /// Fills the buffer from the host.
    pub fn init_from_host(self, source: &[T], stream: &Stream) -> Result<DeviceBuffer<T>>
    where
        T: NoUninit,
    {
        // SAFETY: the copy fills every element, and if it fails the buffer is dropped, not read.
        let mut buffer = unsafe { self.assume_init() };
        buffer.copy_from_host(source, stream)?;
        Ok(buffer)
    }
}

impl<T> DeviceBuffer<T> {
    /// The elements for a copy by their pool, once all work before is done.
    fn settled(&self) -> (NonNull<T>, usize, Option<&dyn MemoryPool>) {
        self.block.home().settle();
        let at = NonNull::new(self.block.start() as *mut T).unwrap_or(NonNull::dangling());
        (at, self.len, Some(self.block.pool()))
    }
}

// SAFETY: invariant 2; all work on the elements is complete, and more is issued through `self` alone.
unsafe impl<T> CopySource<T> for DeviceBuffer<T> {
    fn source(&self) -> (NonNull<T>, usize, Option<&dyn MemoryPool>) {
        self.settled()
    }
}

// SAFETY: as above, and the borrow is exclusive.
unsafe impl<T> CopyTarget<T> for DeviceBuffer<T> {
    fn target(&mut self) -> (NonNull<T>, usize, Option<&dyn MemoryPool>) {
        self.settled()
    }
}

impl<T> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBuffer")
            .field("address", &format_args!("{:#x}", self.block.start()))
            .field("len", &self.len)
            .field("stream", self.block.home())
            .finish_non_exhaustive()
    }
}

/// A shared view of a [`DeviceBuffer`].
pub struct DeviceSlice<'a, T> {
    block: &'a Block,
    start: usize,
    len: usize,
    holds: PhantomData<&'a [T]>,
}

/// An exclusive view of a [`DeviceBuffer`].
pub struct DeviceSliceMut<'a, T> {
    block: &'a Block,
    start: usize,
    len: usize,
    holds: PhantomData<&'a mut [T]>,
}

impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<'_, T> {}

fn part<T>(start: usize, len: usize, range: impl RangeBounds<usize>) -> Result<(usize, usize)> {
    let bad = Error::pointer(start, PointerFault::OutOfRange);
    let from = match range.start_bound() {
        Bound::Included(&at) => at,
        Bound::Excluded(&at) => at.checked_add(1).ok_or(bad)?,
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(&at) => at.checked_add(1).ok_or(bad)?,
        Bound::Excluded(&at) => at,
        Bound::Unbounded => len,
    };
    if from > to || to > len {
        return Err(bad);
    }
    Ok((start + from * size_of::<T>(), to - from))
}

fn same_length(source: usize, target: usize) -> Result<()> {
    if source == target {
        return Ok(());
    }
    Err(Error::InvalidOperation(Refusal::Lengths { source, target }))
}

impl<'a, T> DeviceSlice<'a, T> {
    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device address of the first element.
    pub fn as_device_ptr(&self) -> u64 {
        self.start as u64
    }

    /// Some of the elements.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<DeviceSlice<'a, T>> {
        let (start, len) = part::<T>(self.start, self.len, range)?;
        Ok(DeviceSlice { block: self.block, start, len, holds: PhantomData })
    }

    /// Copies the elements to the host, once all work before is done.
    pub fn copy_to_host(&self, into: &mut [T], stream: &Stream) -> Result<()>
    where
        T: AnyBitPattern,
    {
        stream.refuse_capture()?;
        // SAFETY: waited for below, whatever happens, while `into` is borrowed.
        let issued = unsafe { self.issue_to_host(into, stream) };
        stream.settle();
        issued
    }

    /// # Safety
    /// `into` is not touched before the stream's work is complete.
    pub(super) unsafe fn issue_to_host(&self, into: &mut [T], stream: &Stream) -> Result<()>
    where
        T: AnyBitPattern,
    {
        same_length(self.len, into.len())?;
        let (dst, bytes) = (into.as_mut_ptr() as usize, size_of_val(into));
        if bytes == 0 {
            return Ok(());
        }
        let driver = &stream.device().0.driver;
        // SAFETY: the block is live until freed, which is ordered after the copy; `into` by the contract.
        self.block.on(stream, || unsafe { driver.copy(dst, self.start, bytes, stream.raw()) })
    }

    /// Copies to a pinned or managed buffer without waiting; it is given back by [`Transfer::wait`].
    pub fn copy_to_pinned<K: HostAccessible>(
        &self,
        mut into: HostBuffer<T, K>,
        stream: &Stream,
    ) -> Result<Transfer<T, K>>
    where
        T: AnyBitPattern,
    {
        stream.refuse_capture()?;
        into.in_use(stream)?;
        // SAFETY: the transfer owns the buffer and hands it out only when the copy is done.
        unsafe { self.issue_to_host(&mut into, stream) }?;
        Transfer::new(into, stream)
    }

    /// The elements on the host.
    pub fn to_vec(&self, stream: &Stream) -> Result<Vec<T>>
    where
        T: AnyBitPattern,
    {
        let mut elements = Vec::new();
        let full = |_| Error::oom(self.len * size_of::<T>(), crate::base::error::OomReason::Source);
        elements.try_reserve_exact(self.len).map_err(full)?;
        elements.resize_with(self.len, T::zeroed);
        self.copy_to_host(&mut elements, stream)?;
        Ok(elements)
    }
}

impl<T> DeviceSliceMut<'_, T> {
    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device address of the first element.
    pub fn as_device_ptr(&self) -> u64 {
        self.start as u64
    }

    /// The elements, for reading.
    pub fn as_slice(&self) -> DeviceSlice<'_, T> {
        DeviceSlice { block: self.block, start: self.start, len: self.len, holds: PhantomData }
    }

    /// Some of the elements.
    pub fn slice_mut(self, range: impl RangeBounds<usize>) -> Result<Self> {
        let (start, len) = part::<T>(self.start, self.len, range)?;
        Ok(Self { start, len, ..self })
    }

    /// Two parts, the first with `mid` elements.
    pub fn split_at_mut(self, mid: usize) -> Result<(Self, Self)> {
        let (start, len) = part::<T>(self.start, self.len, mid..)?;
        let right = Self { start, len, ..self };
        Ok((Self { len: mid, ..self }, right))
    }

    /// Copies `source` to the device and returns once it is no longer read.
    pub fn copy_from_host(&mut self, source: &[T], stream: &Stream) -> Result<()>
    where
        T: NoUninit,
    {
        stream.refuse_capture()?;
        // SAFETY: waited for below, whatever happens, while `source` is borrowed.
        let issued = unsafe { self.issue_from_host(source, stream) };
        stream.settle();
        issued
    }

    /// # Safety
    /// `source` stays as it is until the stream's work is complete.
    pub(super) unsafe fn issue_from_host(&mut self, source: &[T], stream: &Stream) -> Result<()>
    where
        T: NoUninit,
    {
        same_length(source.len(), self.len)?;
        let (src, bytes) = (source.as_ptr() as usize, size_of_val(source));
        if bytes == 0 {
            return Ok(());
        }
        let driver = &stream.device().0.driver;
        // SAFETY: the block is live until freed, which is ordered after the copy; `source` by the contract.
        self.block.on(stream, || unsafe { driver.copy(self.start, src, bytes, stream.raw()) })
    }

    /// Copies from other device memory, of this device or another, in the order of `stream`.
    pub fn copy_from_device(&mut self, source: &impl AsDeviceSlice<T>, stream: &Stream) -> Result<()>
    where
        T: Copy,
    {
        let source = source.as_device_slice();
        same_length(source.len, self.len)?;
        let bytes = self.len * size_of::<T>();
        if bytes == 0 {
            return Ok(());
        }
        let driver = &stream.device().0.driver;
        stream.wait_for(source.block.home())?;
        let (to, from) = (self.block.device(), source.block.device());
        // SAFETY: both blocks are live until freed, which is ordered after the copy; a mutable slice overlaps
        // no other.
        self.block.on(stream, || unsafe {
            if to.same(from) {
                return driver.copy(self.start, source.start, bytes, stream.raw());
            }
            let (to, from) = ((self.start, &*to.0.driver), (source.start, &*from.0.driver));
            driver.copy_peer(to, from, bytes, stream.raw())
        })?;
        source.block.joined(stream)
    }

    /// Copies from a pinned or managed buffer without waiting; it is given back by [`Transfer::wait`].
    pub fn copy_from_pinned<K: HostAccessible>(
        &mut self,
        mut source: HostBuffer<T, K>,
        stream: &Stream,
    ) -> Result<Transfer<T, K>>
    where
        T: NoUninit,
    {
        stream.refuse_capture()?;
        source.in_use(stream)?;
        // SAFETY: the transfer owns the buffer and hands it out only when the copy is done.
        unsafe { self.issue_from_host(&source, stream) }?;
        Transfer::new(source, stream)
    }

    /// Sets every byte to zero, in the order of `stream`.
    pub fn set_zero(&mut self, stream: &Stream) -> Result<()>
    where
        T: Zeroable,
    {
        let bytes = self.len * size_of::<T>();
        if bytes == 0 {
            return Ok(());
        }
        let driver = &stream.device().0.driver;
        // SAFETY: the block is live until freed, which is ordered after the fill.
        self.block.on(stream, || unsafe { driver.fill(self.start, 0, bytes, stream.raw()) })
    }
}

/// What can be read as device memory: buffers and slices of both kinds.
pub trait AsDeviceSlice<T> {
    /// All of it.
    fn as_device_slice(&self) -> DeviceSlice<'_, T>;
}

impl<T> AsDeviceSlice<T> for DeviceBuffer<T> {
    fn as_device_slice(&self) -> DeviceSlice<'_, T> {
        self.as_slice()
    }
}

impl<T> AsDeviceSlice<T> for DeviceSlice<'_, T> {
    fn as_device_slice(&self) -> DeviceSlice<'_, T> {
        *self
    }
}

impl<T> AsDeviceSlice<T> for DeviceSliceMut<'_, T> {
    fn as_device_slice(&self) -> DeviceSlice<'_, T> {
        self.as_slice()
    }
}

impl<'a, T> From<&'a DeviceBuffer<T>> for DeviceSlice<'a, T> {
    fn from(buffer: &'a DeviceBuffer<T>) -> Self {
        buffer.as_slice()
    }
}

impl<'a, T> From<&'a mut DeviceBuffer<T>> for DeviceSliceMut<'a, T> {
    fn from(buffer: &'a mut DeviceBuffer<T>) -> Self {
        buffer.as_mut_slice()
    }
}

impl<T> fmt::Debug for DeviceSlice<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceSlice({:#x}, {} elements)", self.start, self.len)
    }
}

impl<T> fmt::Debug for DeviceSliceMut<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceSliceMut({:#x}, {} elements)", self.start, self.len)
    }
}

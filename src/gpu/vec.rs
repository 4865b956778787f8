//! A growable vector and a box on the device.

use core::fmt;
use core::marker::PhantomData;

use bytemuck::{AnyBitPattern, NoUninit, Zeroable};

use super::block::Block;
use super::buffer::{DeviceBuffer, DeviceSlice, DeviceSliceMut};
use super::pool::{DevicePool, bytes_of};
use super::stream::Stream;
use crate::base::error::{Error, OomReason, Result};

/// A vector on the device. It grows in place where the memory behind it is free, and moves otherwise.
///
/// ```
/// use memory_pool::{DevicePool, DeviceVec, GpuDevice, PoolConfig, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let stream = gpu.new_stream()?;
/// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
/// let mut vec = DeviceVec::<u32>::new_in(&pool, &stream);
/// vec.extend_from_host(&[1, 2, 3])?;
/// vec.push(4)?;
/// vec.resize_zeroed(6)?;
/// assert_eq!(vec.to_vec()?, [1, 2, 3, 4, 0, 0]);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub struct DeviceVec<T> {
    pool: DevicePool,
    stream: Stream,
    buffer: Option<DeviceBuffer<T>>,
    capacity: usize,
}

impl<T> DeviceVec<T> {
    /// An empty vector, which holds no memory yet.
    pub fn new_in(pool: &DevicePool, stream: &Stream) -> Self {
        Self { pool: pool.clone(), stream: stream.clone(), buffer: None, capacity: 0 }
    }

    /// An empty vector with room for `capacity` elements.
    pub fn with_capacity_in(capacity: usize, pool: &DevicePool, stream: &Stream) -> Result<Self> {
        let mut vec = Self::new_in(pool, stream);
        vec.reserve(capacity)?;
        Ok(vec)
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.buffer.as_ref().map_or(0, DeviceBuffer::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many elements fit without growing.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The stream of all its work.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Makes room for `additional` more elements.
    pub fn reserve(&mut self, additional: usize) -> Result<()> {
        let overflow = Error::oom(additional, OomReason::Overflow);
        let needed = self.len().checked_add(additional).ok_or(overflow)?;
        if needed <= self.capacity {
            return Ok(());
        }
        if let Some(buffer) = &mut self.buffer
            && buffer.block.grow(bytes_of::<T>(needed)?).is_some()
        {
            self.capacity = buffer.block.bytes() / size_of::<T>().max(1);
            return Ok(());
        }
        // Half again as much, so that pushing one by one stays linear.
        let roomy = needed.max(self.capacity.saturating_add(self.capacity / 2));
        let block = Block::new::<T>(&self.pool, bytes_of::<T>(roomy)?, &self.stream)?;
        let moved = DeviceBuffer::from_block(block, self.len());
        if let Some(old) = &self.buffer {
            let bytes = old.len * size_of::<T>();
            if bytes != 0 {
                let driver = &self.pool.device().0.driver;
                let (dst, src) = (moved.block.start(), old.block.start());
                // SAFETY: both blocks are live until freed on this stream, after the copy.
                unsafe { driver.copy(dst, src, bytes, self.stream.raw()) }?;
            }
        }
        self.capacity = if size_of::<T>() == 0 { usize::MAX } else { moved.block.bytes() / size_of::<T>() };
        self.buffer = Some(moved);
        Ok(())
    }

    /// Appends one element.
    pub fn push(&mut self, value: T) -> Result<()>
    where
        T: NoUninit,
    {
        self.extend_from_host(&[value])
    }

    /// Appends elements from the host and returns once they are no longer read.
    pub fn extend_from_host(&mut self, source: &[T]) -> Result<()>
    where
        T: NoUninit,
    {
        self.reserve(source.len())?;
        let (stream, len) = (self.stream.clone(), self.len());
        let Some(buffer) = &mut self.buffer else { return Ok(()) };
        buffer.len = len + source.len();
        let mut tail = buffer.slice_mut(len..)?;
        let copied = tail.copy_from_host(source, &stream);
        if copied.is_err() {
            buffer.len = len;
        }
        copied
    }

    /// Makes the vector `len` elements long; new ones are zero.
    pub fn resize_zeroed(&mut self, len: usize) -> Result<()>
    where
        T: Zeroable,
    {
        let old = self.len();
        if len > old {
            self.reserve(len - old)?;
            let stream = self.stream.clone();
            let Some(buffer) = &mut self.buffer else { return Ok(()) };
            buffer.len = len;
            let zeroed = buffer.slice_mut(old..)?.set_zero(&stream);
            if zeroed.is_err() {
                buffer.len = old;
            }
            return zeroed;
        }
        self.truncate(len);
        Ok(())
    }

    /// Forgets all elements but the first `len`; the memory stays.
    pub fn truncate(&mut self, len: usize) {
        if let Some(buffer) = &mut self.buffer {
            buffer.len = buffer.len.min(len);
        }
    }

    /// The elements; `None` before there was any.
    pub fn as_slice(&self) -> Option<DeviceSlice<'_, T>> {
        self.buffer.as_ref().map(DeviceBuffer::as_slice)
    }

    /// The elements, writable; `None` before there was any.
    pub fn as_mut_slice(&mut self) -> Option<DeviceSliceMut<'_, T>> {
        self.buffer.as_mut().map(DeviceBuffer::as_mut_slice)
    }

    /// The elements on the host.
    pub fn to_vec(&self) -> Result<Vec<T>>
    where
        T: AnyBitPattern,
    {
        self.buffer.as_ref().map_or(Ok(Vec::new()), |buffer| buffer.to_vec(&self.stream))
    }
}

impl<T> fmt::Debug for DeviceVec<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceVec")
            .field("len", &self.len())
            .field("capacity", &self.capacity)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

/// One value on the device.
///
/// ```
/// use memory_pool::{DeviceBox, DevicePool, GpuDevice, PoolConfig, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let stream = gpu.new_stream()?;
/// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
/// let mut value = DeviceBox::new_in(41u64, &pool, &stream)?;
/// value.set(value.get(&stream)? + 1, &stream)?;
/// assert_eq!(value.get(&stream)?, 42);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub struct DeviceBox<T> {
    buffer: DeviceBuffer<T>,
    holds: PhantomData<T>,
}

impl<T> DeviceBox<T> {
    /// Copies `value` to the device.
    pub fn new_in(value: T, pool: &DevicePool, stream: &Stream) -> Result<Self>
    where
        T: NoUninit,
    {
        let buffer = pool.alloc_from_host(&[value], stream)?;
        Ok(Self { buffer, holds: PhantomData })
    }

    /// The value, once all work before is done.
    pub fn get(&self, stream: &Stream) -> Result<T>
    where
        T: AnyBitPattern,
    {
        let mut value = [T::zeroed()];
        self.buffer.copy_to_host(&mut value, stream)?;
        Ok(value[0])
    }

    /// Replaces the value.
    pub fn set(&mut self, value: T, stream: &Stream) -> Result<()>
    where
        T: NoUninit,
    {
        self.buffer.copy_from_host(&[value], stream)
    }

    /// The device address, for kernels.
    pub fn as_device_ptr(&self) -> u64 {
        self.buffer.as_device_ptr()
    }

    /// The value as a buffer of one element.
    pub fn into_buffer(self) -> DeviceBuffer<T> {
        self.buffer
    }
}

impl<T> fmt::Debug for DeviceBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceBox").field(&self.buffer).finish()
    }
}

//! Typed memory that CPU and device can touch, and transfers that own it.
//!
//! Invariants
//! 1. While `used_on` is set, the device may touch the buffer; nobody can reach its elements then, for only a
//!    [`Transfer`] holds it. Dropped in that state it is freed in that stream's order; leaked, it is never
//!    reused.
//! 2. The `len` elements are initialised.

use bytemuck::Zeroable;
use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use super::kind::{HostAccessible, Managed, Pinned};
use super::pool::{GpuPool, bytes_of};
use super::seat::Lease;
use super::stream::{GpuEvent, Stream};
use crate::base::error::Result;

/// Elements in memory that CPU and device can touch: a slice to the CPU, and what asynchronous copies take
/// by value.
///
/// ```
/// use memory_pool::{DevicePool, GpuDevice, PinnedPool, PoolConfig, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let stream = gpu.new_stream()?;
/// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
/// let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu())?;
/// let mut device = pool.alloc::<f32>(4, &stream)?;
/// let mut host = pinned.alloc::<f32>(4)?;
/// host.fill(2.5);
/// let transfer = device.copy_from_pinned(host, &stream)?;    // nothing waits
/// let host = transfer.wait()?;                               // and here it is again
/// assert_eq!(device.to_vec(&stream)?, host[..]);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub struct HostBuffer<T, K: HostAccessible> {
    lease: Lease,
    len: usize,
    used_on: Option<Stream>,
    holds: PhantomData<(T, K)>,
}

/// A [`HostBuffer`] in page-locked memory.
pub type PinnedBuffer<T> = HostBuffer<T, Pinned>;
/// A [`HostBuffer`] in managed memory.
pub type ManagedBuffer<T> = HostBuffer<T, Managed>;

// SAFETY: the buffer owns its elements.
unsafe impl<T: Send, K: HostAccessible> Send for HostBuffer<T, K> {}
// SAFETY: a shared buffer gives shared access to the elements alone.
unsafe impl<T: Sync, K: HostAccessible> Sync for HostBuffer<T, K> {}

impl<T, K: HostAccessible> HostBuffer<T, K> {
    #[inline]
    fn space(pool: &GpuPool<K>, len: usize) -> Result<Self> {
        let seat = match len.checked_mul(size_of::<T>()) {
            Some(bytes) => match Lease::cached::<T, K>(pool, bytes, None) {
                Ok(lease) => return Ok(Self { lease, len, used_on: None, holds: PhantomData }),
                Err(seat) => seat,
            },
            None => None,
        };
        let lease = Lease::from_books::<T, K>(pool, bytes_of::<T>(len)?, None, seat)?;
        Ok(Self { lease, len, used_on: None, holds: PhantomData })
    }

    pub(super) fn zeroed(pool: &GpuPool<K>, len: usize) -> Result<Self>
    where
        T: Zeroable,
    {
        let buffer = Self::space(pool, len)?;
        // SAFETY: the block is ours and ordinary memory; zeros are valid `T`s (invariant 2).
        unsafe { (buffer.lease.start as *mut u8).write_bytes(0, len * size_of::<T>()) };
        Ok(buffer)
    }

    pub(super) fn from_slice(pool: &GpuPool<K>, source: &[T]) -> Result<Self>
    where
        T: Copy,
    {
        let buffer = Self::space(pool, source.len())?;
        // SAFETY: the block is ours, large enough, and new, so it overlaps nothing.
        unsafe {
            core::ptr::copy_nonoverlapping(source.as_ptr(), buffer.lease.start as *mut T, source.len())
        };
        Ok(buffer)
    }

    /// From now on the device may touch the buffer, in the order of `stream`.
    pub(super) fn in_use(&mut self, stream: &Stream) -> Result<()> {
        stream.check_thread()?;
        // The free must find the stream's lane, so the pool gets to know the stream while errors can be told.
        let pool = &self.lease.pool().inner;
        if let Some(ticket) = self.lease.ticket
            && pool.device.same(stream.device())
        {
            pool.share(ticket, stream)?;
        }
        self.used_on = Some(stream.clone());
        Ok(())
    }
}

impl<T, K: HostAccessible> Drop for HostBuffer<T, K> {
    fn drop(&mut self) {
        let Some(stream) = self.used_on.take() else { return };
        if self.lease.pool().device().same(stream.device()) {
            self.lease.give_on(&stream);
        } else {
            // A stream of another device has no lane here: its work is waited for.
            stream.settle();
        }
    }
}

impl<T, K: HostAccessible> Deref for HostBuffer<T, K> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: invariant 2; no device work touches it (invariant 1).
        unsafe { core::slice::from_raw_parts(self.lease.start as *const T, self.len) }
    }
}

impl<T, K: HostAccessible> DerefMut for HostBuffer<T, K> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`, and the borrow is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.lease.start as *mut T, self.len) }
    }
}

impl<T: fmt::Debug, K: HostAccessible> fmt::Debug for HostBuffer<T, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// An asynchronous copy under way, which owns the host's side of it.
///
/// Dropping it waits for nothing: the buffer is freed in the stream's order.
#[must_use]
pub struct Transfer<T, K: HostAccessible> {
    buffer: HostBuffer<T, K>,
    event: GpuEvent,
}

impl<T, K: HostAccessible> Transfer<T, K> {
    pub(super) fn new(buffer: HostBuffer<T, K>, stream: &Stream) -> Result<Self> {
        let event = stream.record_event()?;
        Ok(Self { buffer, event })
    }

    /// Whether the copy is done.
    pub fn is_done(&self) -> Result<bool> {
        self.event.is_done()
    }

    /// Waits for the copy and gives the buffer back.
    pub fn wait(self) -> Result<HostBuffer<T, K>> {
        self.event.synchronize()?;
        let mut buffer = self.buffer;
        if let Some(ticket) = buffer.lease.ticket {
            buffer.lease.pool().inner.unshare(ticket);
        }
        buffer.used_on = None;
        Ok(buffer)
    }
}

impl<T, K: HostAccessible> fmt::Debug for Transfer<T, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer")
            .field("elements", &self.buffer.len)
            .field("stream", &self.buffer.used_on)
            .finish_non_exhaustive()
    }
}

//! Pools of GPU memory: handles, and what is made with them.

mod cached;
mod giving;
mod growth;
mod inner;
mod interface;
mod options;
mod patience;
mod settled;
mod source;
mod watch;

use core::alloc::Layout;
use core::ffi::c_void;
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Zeroable;

pub(super) use inner::Inner;

use super::buffer::DeviceBuffer;
use super::device::GpuDevice;
use super::driver::Space;
use super::front::PUBLISHED;
use super::handle::Handle;
use super::host::HostBuffer;
use super::kind::{Device, HostAccessible, Managed, MemoryKind, Pinned};
use super::stream::Stream;
use crate::base::config::PoolConfig;
use crate::base::error::{Error, OomReason, Result};
use crate::base::finding::{Finding, Site};
use crate::base::host::dangling;
use crate::base::pool::{AllocFlags, MemoryType};

/// A pool of one kind of GPU memory: [`DevicePool`], [`PinnedPool`] or [`ManagedPool`].
///
/// A cheap handle; clones are the same pool. Buffers keep their pool alive, and the last of handles and
/// buffers gives all memory back to the driver.
///
/// ```
/// use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let stream = gpu.new_stream()?;
/// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
/// let zeros = pool.alloc::<f32>(1024, &stream)?;
/// drop(zeros);                                        // freed in the order of its stream
/// let again = pool.alloc::<f32>(1024, &stream)?;      // the same block, at once, without an event
/// assert_eq!(pool.stats().source_calls, 1);
/// # Ok::<(), memory_pool::Error>(())
/// ```
///
/// Freed blocks up to 256 MiB, of sizes that were asked for again lately, wait in a cache of their stream (the CPU's, in
/// sixteen that threads share) for the next request of that size: at most 4096, and at most 256 MiB or a sixteenth of the
/// pool. They count as free, and go back before the pool asks the driver for memory. Who wants them back sooner
/// calls [`trim`](Self::trim) or [`process_deferred`](Self::process_deferred); a pool whose strategy places by
/// address (`Strategy::FirstFit`) caches nothing.
///
/// A device pool is no `Allocator`:
/// ```compile_fail
/// # use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
/// let v: allocator_api2::vec::Vec<u8, _> = allocator_api2::vec::Vec::new_in(&pool);
/// ```
pub struct GpuPool<K: MemoryKind> {
    pub(super) inner: Handle<Inner>,
    kind: PhantomData<K>,
}

/// A pool of memory on the card.
pub type DevicePool = GpuPool<Device>;
/// A pool of page-locked host memory.
pub type PinnedPool = GpuPool<Pinned>;
/// A pool of memory that CPU and card share.
pub type ManagedPool = GpuPool<Managed>;

impl<K: MemoryKind> Clone for GpuPool<K> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), kind: PhantomData }
    }
}

impl<K: MemoryKind> fmt::Debug for GpuPool<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuPool")
            .field("name", &self.inner.name)
            .field("memory", &K::TYPE)
            .field("device", &self.inner.device)
            .field("live", &self.inner.live())
            .field("reserved", &self.pool_size())
            .finish_non_exhaustive()
    }
}

impl<K: MemoryKind> GpuPool<K> {
    /// A pool on `device`. The device is the one given, whatever `device_id` the configuration names.
    ///
    /// A managed pool is refused where CPU and card may not touch managed memory at the same time.
    pub fn new(device: &GpuDevice, config: PoolConfig) -> Result<Self> {
        Self::named(device, "", config)
    }

    /// [`new`](Self::new), with a name.
    pub fn named(device: &GpuDevice, name: &str, config: PoolConfig) -> Result<Self> {
        Self::make(device, name, config, super::kind::space::<K>(false))
    }

    fn make(device: &GpuDevice, name: &str, config: PoolConfig, space: Space) -> Result<Self> {
        if K::TYPE == MemoryType::Managed && !device.0.driver.info().concurrent_managed {
            return Err(Error::InvalidOperation(crate::base::error::Refusal::Unsupported(
                "this device and the CPU may not touch managed memory at the same time",
                "use a PinnedPool, or a DevicePool and copies",
            )));
        }
        let inner = Inner::new(device, name, config, K::TYPE, space)?;
        Ok(Self { inner: Handle::new(inner), kind: PhantomData })
    }

    /// A handle that no user holds, with another kind in its type.
    pub(super) fn keep<L: MemoryKind>(&self) -> GpuPool<L> {
        GpuPool { inner: self.inner.keep(), kind: PhantomData }
    }

    /// A block of `bytes` for work on `stream`, to be freed with
    /// [`deallocate_async`](Self::deallocate_async). For a size of 0, a dangling pointer.
    ///
    /// Work on `stream` may use it from now on; work on another stream only if it is ordered after, and then
    /// [`record_stream`](Self::record_stream) says so.
    pub fn allocate_async(&self, bytes: usize, stream: &Stream) -> Result<NonNull<c_void>> {
        if bytes == 0 {
            return Ok(NonNull::without_provenance(core::num::NonZero::<usize>::MIN));
        }
        Ok(self.raw(bytes, 1, Some(stream), AllocFlags::NONE)?.cast())
    }

    /// A block that can be found by its address.
    pub(super) fn raw(
        &self,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        flags: AllocFlags,
    ) -> Result<NonNull<[u8]>> {
        match self.inner.take_record(bytes, align, stream) {
            Some(record) if record.flags() & PUBLISHED != 0 => Inner::block(record.start(), record.len()),
            Some(record) => self.inner.published(record.placed(), stream),
            None => self.inner.take_raw(bytes, align, stream, flags),
        }
    }

    /// Frees a block in the order of `stream`: work issued to it so far may still use the block. Work on
    /// other streams may too, if [`record_stream`](Self::record_stream) named them. Dangling pointers of size
    /// 0 are ignored, foreign ones an error.
    ///
    /// # Safety
    /// `ptr` came from this pool, is live, and no work issued from now on uses it. All work on it is ordered
    /// before what `stream` does next, or was issued to recorded streams.
    pub unsafe fn try_deallocate_async(&self, ptr: NonNull<c_void>, stream: &Stream) -> Result<()> {
        if ptr.as_ptr() as usize == 1 {
            return Ok(());
        }
        self.inner.device.must_be(stream.device())?;
        self.inner.give_at(ptr.as_ptr() as usize, Some(stream))
    }

    /// [`try_deallocate_async`](Self::try_deallocate_async); what cannot be freed is left alone.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn deallocate_async(&self, ptr: NonNull<c_void>, stream: &Stream) {
        // SAFETY: the caller's contract is the same.
        let freed = unsafe { self.try_deallocate_async(ptr, stream) };
        // A debug layer has told it already.
        debug_assert!(freed.is_ok() || self.diagnostics().is_some(), "{freed:?}");
    }

    /// Says that work on `stream` uses the block at `ptr` too: once freed, it is not reused before the work
    /// that `stream` was issued until the free is done.
    pub fn record_stream(&self, ptr: NonNull<c_void>, stream: &Stream) -> Result<()> {
        let (ticket, _) = self.inner.find(ptr.as_ptr() as usize)?;
        self.inner.share(ticket, stream)
    }

    /// Asks the driver which freed memory is no longer in use by the device, and makes it available to all
    /// streams. Never needed for correctness. Returns the bytes that are free for everybody.
    pub fn process_deferred(&self) -> usize {
        let mut core = self.inner.core.lock();
        let driver = &*self.inner.device.0.driver;
        self.inner.front.take_all_back(&mut core, driver);
        core.seal_all(driver);
        core.settle(driver);
        core.clean_bytes()
    }

    /// The stream that calls without one use: [`allocate`](Self::allocate), `deallocate` and the
    /// [`MemoryPool`](crate::MemoryPool) interface.
    pub fn stream(&self) -> Stream {
        self.inner.stream.lock().clone()
    }

    /// Sets the stream that calls without one use.
    pub fn set_stream(&self, stream: &Stream) -> Result<()> {
        self.inner.device.must_be(stream.device())?;
        let fresh = stream.clone();
        // The old one may be the last handle, and a stream that ends calls back into the pool.
        let old = std::mem::replace(&mut *self.inner.stream.lock(), fresh);
        drop(old);
        Ok(())
    }

    /// The pool's device.
    pub fn device(&self) -> &GpuDevice {
        &self.inner.device
    }

    /// Sets the pool's device, which it cannot change once it holds memory of another: only the device that
    /// it has is accepted.
    pub fn set_device(&self, device: &GpuDevice) -> Result<()> {
        if self.inner.device.same(device) {
            return Ok(());
        }
        Err(Error::refused("a pool stays on its device", "make a pool on the other device"))
    }

    /// Bytes live now.
    pub fn allocated_size(&self) -> usize {
        self.inner.live()
    }

    /// Bytes held from the driver.
    pub fn pool_size(&self) -> usize {
        self.inner.core.lock().reserved
    }

    /// Most bytes that the pool may hold now.
    pub fn max_size(&self) -> usize {
        self.inner.limit.load(core::sync::atomic::Ordering::Relaxed)
    }

    /// Sets the most bytes that the pool may hold from now on. Idle memory above it is given back; what is live may
    /// exceed it, and then nothing is added until enough was freed.
    pub fn set_max_size(&self, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Err(Error::config("max_size", 0, "1 or more; usize::MAX for no limit"));
        }
        self.inner.limit.store(bytes, core::sync::atomic::Ordering::Relaxed);
        if self.pool_size() > bytes {
            self.inner.release_idle(bytes.saturating_sub(self.allocated_size()));
        }
        Ok(())
    }

    /// Bytes of host memory that the pool's books take.
    pub fn metadata_size(&self) -> usize {
        self.inner.core.lock().metadata_bytes() + self.inner.front.metadata_bytes()
    }

    /// Sets what is asked when memory is short: it may free blocks, then returns `true` to try again. It is
    /// called with no lock held.
    pub fn set_oom_callback(&self, callback: impl Fn(Layout) -> bool + Send + Sync + 'static) {
        *self.inner.callback.lock() = Some(Arc::new(callback));
    }

    /// Takes the callback back.
    pub fn clear_oom_callback(&self) {
        *self.inner.callback.lock() = None;
    }

    /// The statistics as a table on stdout.
    pub fn print_stats(&self) {
        println!("{} pool {:?} on {}\n{}", K::TYPE, self.inner.name, self.inner.device.name(), self.stats());
    }

    /// Every live block on stdout: who it was allocated for, and in pools with a debug layer by whom.
    pub fn print_allocated_blocks(&self) {
        if let Some(watch) = self.diagnostics() {
            let blocks = watch.leaks();
            println!("{} live blocks in {} pool {:?}", blocks.len(), K::TYPE, self.inner.name);
            for Finding { address, size, allocated, .. } in blocks {
                print!("{address:#014x} {size:>12}");
                if let Some(Site { operation, thread, stack, .. }) = allocated {
                    println!("  thread {thread}, operation {operation}");
                    stack.iter().for_each(|stack| println!("{stack}"));
                }
            }
            return;
        }
        let mut blocks = Vec::new();
        self.inner.core.lock().for_each_live(&mut |start, len, lane| blocks.push((start, len, lane)));
        println!("{} live blocks in {} pool {:?}", blocks.len(), K::TYPE, self.inner.name);
        for (start, len, lane) in blocks {
            match lane {
                0 => println!("{start:#014x} {len:>12}  the CPU"),
                lane => println!("{start:#014x} {len:>12}  stream {lane}"),
            }
        }
    }

    /// Whether both are handles of one pool.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl DevicePool {
    /// `len` elements of zeros on the device, for work on `stream`; freed on it when dropped.
    pub fn alloc<T: Zeroable>(&self, len: usize, stream: &Stream) -> Result<DeviceBuffer<T>> {
        DeviceBuffer::zeroed(self, len, stream)
    }

    /// Space for `len` elements on the device, whose contents are undefined.
    #[inline]
    pub fn alloc_uninit<T>(
        &self,
        len: usize,
        stream: &Stream,
    ) -> Result<DeviceBuffer<core::mem::MaybeUninit<T>>> {
        DeviceBuffer::uninit(self, len, stream)
    }

    /// A copy of `source` on the device.
    pub fn alloc_from_host<T: bytemuck::NoUninit>(
        &self,
        source: &[T],
        stream: &Stream,
    ) -> Result<DeviceBuffer<T>> {
        DeviceBuffer::from_host(self, source, stream)
    }
}

impl PinnedPool {
    /// A pool whose memory the CPU writes fast and reads very slowly (write-combined), for buffers that only
    /// travel to the card.
    pub fn write_combined(device: &GpuDevice, config: PoolConfig) -> Result<Self> {
        Self::make(device, "", config, super::kind::space::<Pinned>(true))
    }
}

impl<K: HostAccessible> GpuPool<K> {
    /// `len` elements of zeros that CPU and device can touch; what asynchronous copies take.
    pub fn alloc<T: Zeroable>(&self, len: usize) -> Result<HostBuffer<T, K>> {
        HostBuffer::zeroed(self, len)
    }

    /// A copy of `source`.
    pub fn alloc_from<T: Copy>(&self, source: &[T]) -> Result<HostBuffer<T, K>> {
        HostBuffer::from_slice(self, source)
    }
}

/// The size in bytes of `len` elements.
pub(super) fn bytes_of<T>(len: usize) -> Result<usize> {
    let overflow = Error::oom(len.saturating_mul(size_of::<T>()), OomReason::Overflow);
    len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize).ok_or(overflow)
}

pub(super) fn empty<T>() -> usize {
    dangling(Layout::new::<T>()).as_ptr() as *mut u8 as usize
}

//! Device memory that several processes use: the physical handles under a block travel as file descriptors.
//!
//! The exporter's pool keeps the block where it is as long as it is live; the importer's mapping keeps the physical
//! memory alive beyond that, but not the block: so the exporter must keep its buffer until the others are done. Work is
//! ordered between processes by waiting: the one that writes synchronises its stream before it tells the other.
//!
//! Whole handles travel, so who gets the descriptors can reach what else lies in the same handles (some MiB around the
//! block). Give them to processes that are trusted with the pool.

mod message;

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bytemuck::{AnyBitPattern, NoUninit};

use super::buffer::DeviceBuffer;
use super::device::GpuDevice;
use super::driver::Handle;
use super::pool::DevicePool;
use super::stream::Stream;
use crate::base::error::{Error, OomReason, PointerFault, Result};

/// One physical handle and its length in bytes.
#[derive(Debug)]
struct Part {
    descriptor: OwnedFd,
    bytes: usize,
}

/// A block of device memory on its way to another process: the descriptors of the handles under it.
///
/// ```
/// use memory_pool::gpu::{SharedDeviceMemory, SharedExport};
/// use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};
/// use std::os::unix::net::UnixStream;
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let stream = gpu.new_stream()?;
/// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
/// let buffer = pool.alloc_from_host(&[1u32, 2, 3], &stream)?;
/// stream.synchronize()?;
/// let (here, there) = UnixStream::pair().unwrap();     // there: usually in another process
/// buffer.share()?.send(&here)?;
///
/// # let other = GpuDevice::simulated(SimConfig::default());
/// // SAFETY: `buffer` outlives the import, and nobody writes to it meanwhile.
/// let import = unsafe { SharedDeviceMemory::import(&other, SharedExport::receive(&there)?) }?;
/// let mut values = [0u32; 3];
/// # let stream = other.new_stream()?;
/// import.copy_to_host(0, &mut values, &stream)?;
/// assert_eq!(values, [1, 2, 3]);
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Debug)]
pub struct SharedExport {
    parts: Vec<Part>,
    /// Where the block begins in the first part.
    offset: usize,
    bytes: usize,
}

impl SharedExport {
    /// Bytes of the block.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the block has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Sends the descriptors; the other end calls [`receive`](Self::receive).
    pub fn send(&self, to: &UnixStream) -> Result<()> {
        message::send(self, to)
    }

    /// Takes what the other end sends. A message that is none is an error, and nothing of it is kept.
    pub fn receive(from: &UnixStream) -> Result<Self> {
        message::receive(from)
    }
}

impl DevicePool {
    /// The memory of a live block for another process. It refuses memory that the driver gave in one piece of its own
    /// (no virtual memory on the device, or a pool with a small `max_size`).
    pub fn share(&self, block: NonNull<c_void>) -> Result<SharedExport> {
        let address = block.as_ptr() as usize;
        let bytes = self.usable_size(block.cast()).ok_or(Error::pointer(address, PointerFault::NotLive))?;
        export(self.device(), address, bytes)
    }
}

impl<T> DeviceBuffer<T> {
    /// The buffer's memory for another process, which may use it as long as this buffer lives. What was written must be
    /// waited for before the other process is told.
    pub fn share(&self) -> Result<SharedExport> {
        export(self.device(), self.as_device_ptr() as usize, self.len() * size_of::<T>())
    }
}

fn export(gpu: &GpuDevice, address: usize, bytes: usize) -> Result<SharedExport> {
    let mut export = SharedExport { parts: Vec::new(), offset: 0, bytes };
    let mut at = address;
    while at < address + bytes {
        let around = gpu.0.driver.export(at).map_err(|error| match error {
            Error::InvalidPointer(_) => Error::refused(
                "the driver gave this memory in one piece, without a handle",
                "share from a pool without a small max_size, on a device with virtual memory",
            ),
            other => other,
        })?;
        if export.parts.is_empty() {
            export.offset = at - around.start;
        }
        at = around.start + around.bytes;
        export.parts.push(Part { descriptor: around.descriptor, bytes: around.bytes });
    }
    Ok(export)
}

/// Device memory of another process, mapped here until it is dropped.
pub struct SharedDeviceMemory {
    gpu: GpuDevice,
    /// The reserved range, and what is mapped in it in order.
    start: usize,
    reserved: usize,
    mapped: Vec<(Handle, usize)>,
    offset: usize,
    bytes: usize,
}

impl SharedDeviceMemory {
    /// Maps what another process exported, on the same device there and here (or on one that can reach it).
    ///
    /// # Safety
    /// The exporter's block lives as long as this value. Whoever writes to it, there or here, has waited for that work
    /// before the others touch it.
    pub unsafe fn import(gpu: &GpuDevice, export: SharedExport) -> Result<Self> {
        let driver = &gpu.0.driver;
        let overflow = Error::oom(export.bytes, OomReason::Overflow);
        let total =
            export.parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.bytes)).ok_or(overflow)?;
        if export.offset.checked_add(export.bytes).is_none_or(|end| end > total) {
            return Err(Error::refused("the export does not hold its own block", "send it unchanged"));
        }
        let start = if total == 0 { 0 } else { driver.reserve_va(total)? };
        // From here on the value gives back what was taken.
        let SharedExport { parts, offset, bytes } = export;
        let mut import = Self { gpu: gpu.clone(), start, reserved: total, mapped: Vec::new(), offset, bytes };
        let mut at = start;
        for part in parts {
            let handle = driver.import(part.descriptor.as_fd(), part.bytes)?;
            // SAFETY: the next free part of the range that was just reserved.
            if let Err(error) = unsafe { driver.map(at, part.bytes, handle) } {
                // SAFETY: mapped nowhere.
                let _ = unsafe { driver.release_handle(handle) };
                return Err(error);
            }
            import.mapped.push((handle, part.bytes));
            at += part.bytes;
        }
        if total != 0 {
            // SAFETY: the whole range was mapped, part by part.
            unsafe { driver.set_access(start, total)? };
        }
        Ok(import)
    }

    /// The device address of the block's first byte, for kernels.
    pub fn as_device_ptr(&self) -> u64 {
        (self.start + self.offset) as u64
    }

    /// Bytes of the block.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the block has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The device it is mapped on.
    pub fn device(&self) -> &GpuDevice {
        &self.gpu
    }

    /// The address of `count` elements from byte `at` on.
    fn part<T>(&self, at: usize, count: usize) -> Result<usize> {
        let bytes = count.checked_mul(size_of::<T>());
        let end = bytes.and_then(|bytes| at.checked_add(bytes)).filter(|&end| end <= self.bytes);
        let out = Error::pointer((self.start + self.offset).wrapping_add(at), PointerFault::OutOfRange);
        end.map(|_| self.start + self.offset + at).ok_or(out)
    }

    fn copy(&self, to: usize, from: usize, bytes: usize, stream: &Stream) -> Result<()> {
        self.gpu.must_be(stream.device())?;
        stream.check_thread()?;
        stream.refuse_capture()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: one side was checked by `part` and is mapped as long as `self`; the other is a slice that stays
        // borrowed until the copy was waited for.
        let issued = unsafe { self.gpu.0.driver.copy(to, from, bytes, stream.raw()) };
        stream.settle();
        issued
    }

    /// Copies elements from byte `at` on to the host, and waits.
    pub fn copy_to_host<T: AnyBitPattern>(&self, at: usize, into: &mut [T], stream: &Stream) -> Result<()> {
        let from = self.part::<T>(at, into.len())?;
        self.copy(into.as_mut_ptr() as usize, from, size_of_val(into), stream)
    }

    /// Copies elements from the host to byte `at` on, and waits.
    pub fn copy_from_host<T: NoUninit>(&mut self, at: usize, source: &[T], stream: &Stream) -> Result<()> {
        let to = self.part::<T>(at, source.len())?;
        self.copy(to, source.as_ptr() as usize, size_of_val(source), stream)
    }
}

impl fmt::Debug for SharedDeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedDeviceMemory")
            .field("device", &self.gpu)
            .field("bytes", &self.bytes)
            .field("handles", &self.mapped.len())
            .finish_non_exhaustive()
    }
}

impl Drop for SharedDeviceMemory {
    fn drop(&mut self) {
        let driver = &self.gpu.0.driver;
        // Work may be in flight still; if not even waiting works, the mapping stays.
        if driver.device_sync().is_err() && driver.device_sync().is_err() {
            return;
        }
        let (mut at, mut empty) = (self.start, true);
        for &(handle, bytes) in &self.mapped {
            // SAFETY: mapped by `import`, the device is idle, and nobody can name the memory any more. A second try
            // gets past a passing failure; else address space and memory are leaked.
            unsafe {
                if driver.unmap(at, bytes).or_else(|_| driver.unmap(at, bytes)).is_ok() {
                    let _ = driver.release_handle(handle).or_else(|_| driver.release_handle(handle));
                } else {
                    empty = false;
                }
            }
            at += bytes;
        }
        if empty && self.reserved != 0 {
            // SAFETY: nothing is mapped in the range any more.
            unsafe {
                let _ = driver
                    .free_va(self.start, self.reserved)
                    .or_else(|_| driver.free_va(self.start, self.reserved));
            }
        }
    }
}

//! What the pools ask of a driver: one trait, two implementations.
//!
//! A [`Driver`] value is one device. [`sim`] is a simulated device on any machine; [`cuda`] a real card.
//!
//! Rules that both keep and that the pools rely on:
//! 1. Work issued to one stream runs in the order of issue. Work on different streams is ordered only by
//!    events (`event_record` then `stream_wait`), by the legacy default stream, or by the host waiting.
//! 2. An event stands for all work issued to its stream before the record.
//! 3. Nothing here unwinds; a failed call has no effect.
//! 4. `unmap`, `release_handle` and `free_va` do not wait for work in flight. `free` may.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod sim;

use core::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::LazyLock;
use std::time::Instant;

use crate::base::error::Result;

/// A stream as the driver names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RawStream(pub(crate) usize);

impl RawStream {
    /// The legacy default stream: ordered with every blocking stream of its device.
    pub(crate) const LEGACY: Self = Self(1);
    /// The default stream of the calling thread.
    pub(crate) const PER_THREAD: Self = Self(2);

    /// Whether it is one of these, which are of the context that is current.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_default(self) -> bool {
        self.0 <= Self::PER_THREAD.0
    }
}

/// An event as the driver names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RawEvent(pub(crate) usize);

/// A piece of physical memory, to be mapped at addresses of choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Handle(pub(crate) u64);

/// A mapped handle as another process may have it.
#[derive(Debug)]
pub(crate) struct Exported {
    /// Where it is mapped here.
    pub(crate) start: usize,
    pub(crate) bytes: usize,
    pub(crate) descriptor: OwnedFd,
}

/// An executable graph as the driver names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RawGraph(pub(crate) usize);

/// Where memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Space {
    /// On the card; the CPU cannot touch it.
    Device,
    /// Page-locked host memory.
    Pinned {
        /// Fast to write for the CPU, very slow to read.
        write_combined: bool,
    },
    /// Shared by CPU and card.
    Managed,
}

/// What is known of a device once and for all.
#[derive(Clone, Debug)]
pub(crate) struct Info {
    pub(crate) name: String,
    pub(crate) ordinal: usize,
    pub(crate) simulated: bool,
    /// Bytes of memory on the device.
    pub(crate) total_memory: usize,
    /// Granularity of physical handles; `None` where the driver has no virtual memory calls.
    pub(crate) vmm_granularity: Option<usize>,
    /// Whether CPU and card may touch managed memory at the same time.
    pub(crate) concurrent_managed: bool,
    /// Whether [`Driver::block_taken`] and [`Driver::block_freed`] do anything.
    pub(crate) watches_blocks: bool,
}

/// Whether a stream records into a graph instead of running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capture {
    None,
    Active,
}

/// One device's driver.
///
/// # Safety
/// Memory returned by `alloc`, `reserve_va` overlaps nothing else until given back, and the rules in the
/// module's documentation hold.
pub(crate) unsafe trait Driver: Send + Sync + fmt::Debug {
    fn info(&self) -> &Info;

    /// Nanoseconds since some moment, by which the price of calls is known.
    fn now_ns(&self) -> u64 {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed().as_nanos() as u64
    }

    /// Free and total bytes on the device.
    fn memory_info(&self) -> Result<(usize, usize)>;

    /// Memory in `space`; the bytes are undefined.
    fn alloc(&self, space: Space, bytes: usize) -> Result<usize>;

    /// # Safety
    /// `addr` came from `alloc` in the same space; no work issued later touches it.
    unsafe fn free(&self, space: Space, addr: usize) -> Result<()>;

    /// Address space without memory.
    fn reserve_va(&self, bytes: usize) -> Result<usize>;

    /// # Safety
    /// The range came from `reserve_va` and nothing is mapped in it.
    unsafe fn free_va(&self, addr: usize, bytes: usize) -> Result<()>;

    /// Physical memory of `bytes`, a multiple of the granularity.
    fn create_handle(&self, bytes: usize) -> Result<Handle>;

    /// # Safety
    /// The handle is mapped nowhere.
    unsafe fn release_handle(&self, handle: Handle) -> Result<()>;

    /// Maps a whole handle; nobody may touch it before [`set_access`](Self::set_access).
    ///
    /// # Safety
    /// The range lies in one reserved here and is unmapped.
    unsafe fn map(&self, addr: usize, bytes: usize, handle: Handle) -> Result<()>;

    /// Makes what one or more calls of `map` put side by side readable and writable from the device.
    ///
    /// # Safety
    /// The range is made of whole mappings.
    unsafe fn set_access(&self, addr: usize, bytes: usize) -> Result<()>;

    /// # Safety
    /// The range is made of whole mappings; work in flight does not touch it.
    unsafe fn unmap(&self, addr: usize, bytes: usize) -> Result<()>;

    /// The handle mapped around `addr`, for another process. The descriptor keeps the memory alive, and so does
    /// whatever was imported from it.
    fn export(&self, addr: usize) -> Result<Exported>;

    /// The physical memory behind a descriptor from `export`, of this process or another. It may be `map`ped like one
    /// from `create_handle`; its bytes are those of the exporter.
    fn import(&self, descriptor: BorrowedFd<'_>, bytes: usize) -> Result<Handle>;

    /// A stream that does not wait for the legacy default stream.
    fn stream_create(&self) -> Result<RawStream>;
    /// # Safety
    /// The stream came from `stream_create` and is not used again.
    unsafe fn stream_destroy(&self, stream: RawStream) -> Result<()>;
    fn stream_sync(&self, stream: RawStream) -> Result<()>;
    /// Whether all work issued so far is done.
    fn stream_query(&self, stream: RawStream) -> Result<bool>;
    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()>;
    fn device_sync(&self) -> Result<()>;

    fn event_create(&self) -> Result<RawEvent>;
    /// # Safety
    /// The event came from `event_create` and is not used again.
    unsafe fn event_destroy(&self, event: RawEvent) -> Result<()>;
    fn event_record(&self, event: RawEvent, stream: RawStream) -> Result<()>;
    fn event_query(&self, event: RawEvent) -> Result<bool>;
    fn event_sync(&self, event: RawEvent) -> Result<()>;

    /// Copies between any two spaces, in the order of `stream`.
    ///
    /// # Safety
    /// Both ranges are memory of this process's devices or host memory, and stay valid until the copy ran.
    unsafe fn copy(&self, dst: usize, src: usize, bytes: usize, stream: RawStream) -> Result<()>;

    /// Copies from memory of device `from` to memory of device `to`, in the order of a `stream` of this device. Neither
    /// need reach the other.
    ///
    /// # Safety
    /// As for `copy`, and the ranges lie on those devices.
    unsafe fn copy_peer(
        &self,
        (dst, to): (usize, &dyn Driver),
        (src, from): (usize, &dyn Driver),
        bytes: usize,
        stream: RawStream,
    ) -> Result<()> {
        let _ = (to, from);
        // SAFETY: the caller's contract.
        unsafe { self.copy(dst, src, bytes, stream) }
    }

    /// Fills with one byte, in the order of `stream`.
    ///
    /// # Safety
    /// As for `copy`.
    unsafe fn fill(&self, dst: usize, byte: u8, bytes: usize, stream: RawStream) -> Result<()>;

    /// Runs a function on a thread of the driver in the order of `stream`. It must not call the driver.
    fn host_call(&self, stream: RawStream, call: Box<dyn FnOnce() + Send>) -> Result<()>;

    fn capture_state(&self, stream: RawStream) -> Result<Capture>;
    /// The number of the capture in progress on a stream; no other of this process has the same.
    fn capture_id(&self, stream: RawStream) -> Result<Option<u64>>;
    /// Runs `end`, on a thread of its own, when the graph that is being captured on `stream` is gone, and all that
    /// was made from it, and the last launch is complete.
    fn on_graph_end(&self, stream: RawStream, end: Box<dyn FnOnce() + Send>) -> Result<()>;
    fn begin_capture(&self, stream: RawStream) -> Result<()>;
    /// Ends the capture and makes the graph executable.
    fn end_capture(&self, stream: RawStream) -> Result<RawGraph>;
    fn graph_launch(&self, graph: RawGraph, stream: RawStream) -> Result<()>;
    /// # Safety
    /// The graph came from `end_capture` and is not used again.
    unsafe fn graph_destroy(&self, graph: RawGraph) -> Result<()>;

    /// Lets this device reach the memory of another: what that one holds, and what it takes or maps from now on.
    fn enable_peer(&self, other: &dyn Driver) -> Result<()>;

    /// A pool hands out `[addr, addr + len)` for work on `stream`, or for the CPU where that is `None`.
    fn block_taken(&self, addr: usize, len: usize, stream: Option<RawStream>) {
        let _ = (addr, len, stream);
    }

    /// A pool took the block back; work issued from now on must not touch it.
    fn block_freed(&self, addr: usize, len: usize) {
        let _ = (addr, len);
    }

    /// The simulated device behind this driver.
    fn simulation(&self) -> Option<&sim::SimDevice> {
        None
    }

    /// The real card behind this driver.
    #[cfg(feature = "cuda")]
    fn cuda(&self) -> Option<&cuda::CudaDevice> {
        None
    }
}

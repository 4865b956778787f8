//! A GPU, real or simulated: where streams come from and what pools are made over.
//!
//! Who locks what: `slots` and `members` are leaves (nothing is called with them held). A pool's lock may be
//! held while the driver is called; `members` is released before a pool is entered.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::capture::Session;
use super::driver::sim::{SimConfig, SimDevice, Simulation};
use super::driver::{Driver, RawEvent, RawStream};
use super::stream::{Owner, Stream};
use crate::base::error::{Error, Refusal, Result};
use crate::base::sync::Lock;

/// What a device tells those who order their memory by its streams.
pub(super) trait Member: Send + Sync {
    /// The stream of this slot goes away; it can still be named.
    fn stream_closes(&self, slot: u32);
    /// No user has a handle of the stream of this slot, but buffers or caches.
    fn stream_unused(&self, slot: u32);
    /// All work issued so far is about to be waited for.
    fn device_waits(&self);
    /// The graph that this capture became is gone, and all work of it is complete.
    fn capture_ends(&self, id: u64);
    /// Memory is short on the device: give back what is idle. Returns the bytes given back.
    fn give_back(&self) -> usize;
}

/// Numbers of streams, given on when a stream is gone.
#[derive(Debug, Default)]
struct Slots {
    next: u32,
    free: Vec<u32>,
}

/// The device behind its handles.
pub(super) struct Device {
    pub(super) driver: Arc<dyn Driver>,
    slots: Lock<Slots>,
    members: Lock<Vec<Weak<dyn Member>>>,
    events: Lock<Vec<RawEvent>>,
    captures: AtomicU64,
    /// Captures that somebody else began, by the driver's number.
    pub(super) foreign: Lock<HashMap<u64, Weak<Session>>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.driver, f)
    }
}

/// Slot 0 is the legacy default stream.
pub(super) const DEFAULT_SLOT: u32 = 0;

impl Device {
    pub(super) fn take_slot(&self) -> u32 {
        let mut slots = self.slots.lock();
        slots.free.pop().unwrap_or_else(|| {
            slots.next += 1;
            slots.next
        })
    }

    /// A stream is gone: everybody who orders by it hears of it, then its number is free.
    pub(super) fn close_slot(&self, slot: u32) {
        self.each_member(|member| member.stream_closes(slot));
        self.slots.lock().free.push(slot);
    }

    pub(super) fn join(&self, member: Weak<dyn Member>) {
        let mut members = self.members.lock();
        members.retain(|member| member.strong_count() > 0);
        members.push(member);
    }

    pub(super) fn each_member(&self, mut tell: impl FnMut(&dyn Member)) {
        let members: Vec<_> = self.members.lock().iter().filter_map(Weak::upgrade).collect();
        members.iter().for_each(|member| tell(&**member));
    }

    pub(super) fn next_capture(&self) -> u64 {
        self.captures.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// An event for a moment's use, or for longer; give it back with [`put_event`](Self::put_event).
    pub(super) fn get_event(&self) -> Result<RawEvent> {
        let spare = self.events.lock().pop();
        spare.map_or_else(|| self.driver.event_create(), Ok)
    }

    pub(super) fn put_event(&self, event: RawEvent) {
        self.events.lock().push(event);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        for event in std::mem::take(&mut *self.events.lock()) {
            // SAFETY: the events came from `event_create` and leave the list. A failure leaks one event.
            let _ = unsafe { self.driver.event_destroy(event) };
        }
    }
}

/// A GPU: a real card, or a simulated one. A cheap handle; clones are the same device.
///
/// ```
/// use memory_pool::{GpuDevice, SimConfig};
/// // A real card where there is one, else a simulated device.
/// let gpu = GpuDevice::open(0).unwrap_or_else(|_| GpuDevice::simulated(SimConfig::default()));
/// println!("{} ({})", gpu.name(), if gpu.is_simulated() { "simulated" } else { "real" });
/// ```
#[derive(Clone)]
pub struct GpuDevice(pub(super) Arc<Device>);

impl GpuDevice {
    pub(super) fn from_driver(driver: Arc<dyn Driver>) -> Self {
        Self(Arc::new(Device {
            driver,
            slots: Lock::default(),
            members: Lock::default(),
            events: Lock::default(),
            captures: AtomicU64::new(0),
            foreign: Lock::default(),
        }))
    }

    /// The CUDA device number `ordinal`, over its primary context.
    ///
    /// Never panics: [`Error::NoDriver`] without a CUDA driver (or without feature `cuda`),
    /// [`Error::NoDevice`] without such a card.
    ///
    /// ```
    /// use memory_pool::{Error, GpuDevice};
    /// match GpuDevice::open(4096) {
    ///     Err(Error::NoDriver | Error::NoDevice { .. }) => {}
    ///     other => panic!("{other:?}"),
    /// }
    /// ```
    pub fn open(ordinal: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            let device = super::driver::cuda::CudaDevice::open(ordinal)?;
            Ok(Self::from_driver(Arc::new(device)))
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = ordinal;
            Err(Error::NoDriver)
        }
    }

    /// How many CUDA devices there are; 0 without a driver.
    pub fn count() -> usize {
        #[cfg(feature = "cuda")]
        {
            super::driver::cuda::device_count().unwrap_or(0)
        }
        #[cfg(not(feature = "cuda"))]
        {
            0
        }
    }

    /// A simulated device, on any machine.
    pub fn simulated(config: SimConfig) -> Self {
        let mut devices = Self::simulated_group(config, 1);
        devices.remove(0)
    }

    /// Several simulated devices in one machine, with the numbers `0..count`.
    pub fn simulated_group(config: SimConfig, count: usize) -> Vec<Self> {
        let devices = SimDevice::group(config, count.max(1));
        devices.into_iter().map(|device| Self::from_driver(Arc::new(device))).collect()
    }

    /// What only a simulated device can do; `None` on a real card.
    pub fn simulation(&self) -> Option<Simulation> {
        self.0.driver.simulation().map(|device| Simulation::new(device.clone()))
    }

    /// Whether this device is simulated.
    pub fn is_simulated(&self) -> bool {
        self.0.driver.info().simulated
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.0.driver.info().name
    }

    /// The device's number.
    pub fn ordinal(&self) -> usize {
        self.0.driver.info().ordinal
    }

    /// Bytes of memory on the device.
    pub fn total_memory(&self) -> usize {
        self.0.driver.info().total_memory
    }

    /// Free and total bytes on the device, for all its users together.
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        self.0.driver.memory_info()
    }

    /// A new stream of its own: it waits for no other, and is destroyed with its last handle.
    pub fn new_stream(&self) -> Result<Stream> {
        let raw = self.0.driver.stream_create()?;
        Ok(Stream::new(self, raw, Owner::Owned, None))
    }

    /// The legacy default stream, which is ordered with every blocking stream of the device.
    pub fn default_stream(&self) -> Stream {
        Stream::new(self, RawStream::LEGACY, Owner::Default, None)
    }

    /// The default stream of the calling thread. Only this thread can issue work to it.
    pub fn per_thread_stream(&self) -> Stream {
        Stream::new(self, RawStream::PER_THREAD, Owner::Thread(std::thread::current().id()), None)
    }

    /// A stream that somebody else made and destroys, by its raw `CUstream`. Null is the legacy default
    /// stream.
    ///
    /// # Safety
    /// The stream belongs to this device and exists until the last clone of the returned handle, and the
    /// last buffer on it, are dropped.
    pub unsafe fn stream_from_raw(&self, raw: *mut core::ffi::c_void) -> Stream {
        match raw as usize {
            0 | 1 => self.default_stream(),
            2 => self.per_thread_stream(),
            raw => Stream::new(self, RawStream(raw), Owner::Borrowed, None),
        }
    }

    /// Waits until all work on the device is done. What was freed before is then idle, and may be trimmed.
    pub fn synchronize(&self) -> Result<()> {
        self.0.each_member(|member| member.device_waits());
        self.0.driver.device_sync()
    }

    /// Lets this device reach the memory of `other`, for copies between them and for kernels.
    pub fn enable_peer_access(&self, other: &Self) -> Result<()> {
        if self.same(other) {
            return Ok(());
        }
        self.0.driver.enable_peer(&*other.0.driver)
    }

    /// Whether both are handles of one device.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// An error unless a stream of `other` can order memory of this device.
    #[inline]
    pub(super) fn must_be(&self, other: &Self) -> Result<()> {
        if self.same(other) {
            return Ok(());
        }
        let (found, needed) = (other.ordinal(), self.ordinal());
        Err(Error::InvalidOperation(Refusal::WrongDevice { found, needed }))
    }
}

impl fmt::Debug for GpuDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = self.0.driver.info();
        f.debug_struct("GpuDevice")
            .field("ordinal", &info.ordinal)
            .field("name", &info.name)
            .field("simulated", &info.simulated)
            .finish_non_exhaustive()
    }
}

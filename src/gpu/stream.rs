//! Streams and events: who may destroy them, and what waits for what.
//!
//! Invariants
//! 1. A stream's slot is its number among the living streams of its device; no two share one.
//! 2. Pools hear of a stream's end (`close_slot`) before it is destroyed and before its slot is given on.
//! 3. `session` is set exactly while work on the stream is recorded into a graph whose capture was begun here.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};
use std::thread::ThreadId;

use bytemuck::{AnyBitPattern, NoUninit};

use super::buffer::{DeviceSlice, DeviceSliceMut};
use super::capture::Session;
use super::device::{DEFAULT_SLOT, GpuDevice};
use super::driver::{Capture as CaptureState, RawEvent, RawStream};
use super::handle::{Handle, Shared, Users};
use crate::base::error::{Error, Refusal, Result};
use crate::base::sync::Lock;

/// Who destroys a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// We do, with the last handle.
    Owned,
    /// Somebody else.
    Borrowed,
    /// Nobody: the legacy default stream.
    Default,
    /// Nobody: the default stream of a thread, which only that thread can name.
    Thread(ThreadId),
}

/// A capture that was begun here records the stream's work.
const CAPTURING: u8 = 1;
/// Somebody else may begin a capture on the stream, or only one thread can name it: at no glance is it known to be plain.
const EXPOSED: u8 = 2;

pub(super) struct Inner {
    users: Users,
    device: GpuDevice,
    raw: RawStream,
    slot: u32,
    owner: Owner,
    session: Lock<Option<Arc<Session>>>,
    /// `CAPTURING` and `EXPOSED`.
    looks: AtomicU8,
    /// Keeps a foreign owner of the stream alive.
    _keep: Option<Box<dyn Any + Send + Sync>>,
}

/// A queue of work on a GPU. A cheap handle; clones are the same stream.
///
/// ```
/// use memory_pool::{GpuDevice, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let (a, b) = (gpu.new_stream()?, gpu.new_stream()?);
/// b.wait_for(&a)?;        // what is issued to b from now on runs after what was issued to a
/// b.synchronize()?;
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone)]
pub struct Stream(Handle<Inner>);

impl Stream {
    pub(super) fn new(
        device: &GpuDevice,
        raw: RawStream,
        owner: Owner,
        keep: Option<Box<dyn Any + Send + Sync>>,
    ) -> Self {
        let slot = if owner == Owner::Default { DEFAULT_SLOT } else { device.0.take_slot() };
        Self(Handle::new(Arc::new(Inner {
            users: Users::one(),
            device: device.clone(),
            raw,
            slot,
            owner,
            session: Lock::default(),
            looks: AtomicU8::new(if matches!(owner, Owner::Borrowed | Owner::Thread(_)) {
                EXPOSED
            } else {
                0
            }),
            _keep: keep,
        })))
    }

    /// A handle that no user holds.
    pub(super) fn keep(&self) -> Self {
        Self(self.0.keep())
    }

    /// Whether no user has a handle of the stream.
    pub(super) fn is_unused(&self) -> bool {
        self.0.users.is_none()
    }

    #[inline]
    pub(crate) fn raw(&self) -> RawStream {
        self.0.raw
    }

    #[inline]
    pub(super) fn slot(&self) -> u32 {
        self.0.slot
    }

    pub(super) fn thread(&self) -> Option<ThreadId> {
        match self.0.owner {
            Owner::Thread(thread) => Some(thread),
            _ => None,
        }
    }

    /// The raw `CUstream`, for foreign calls. Work issued through it counts as work on this stream. From now on a
    /// pool asks the driver at each operation on the stream whether it is being captured.
    pub fn as_raw(&self) -> *mut core::ffi::c_void {
        self.expose();
        self.0.raw.0 as *mut _
    }

    /// The stream's device.
    pub fn device(&self) -> &GpuDevice {
        &self.0.device
    }

    /// Whether both are handles of one stream.
    pub fn same(&self, other: &Self) -> bool {
        // While both handles live, so do their streams, and no two streams have one name.
        Arc::ptr_eq(&self.0, &other.0)
            || (self.0.raw == other.0.raw
                && self.thread() == other.thread()
                && self.0.device.same(&other.0.device))
    }

    /// Says no where the calling thread cannot name this stream.
    #[inline]
    pub(super) fn check_thread(&self) -> Result<()> {
        match self.0.owner {
            Owner::Thread(thread) if thread != std::thread::current().id() => Err(Error::refused(
                "this is the default stream of another thread",
                "use it there, or make a stream with new_stream",
            )),
            _ => Ok(()),
        }
    }

    /// Waits until everything issued so far is done.
    pub fn synchronize(&self) -> Result<()> {
        self.check_thread()?;
        self.refuse_capture()?;
        self.0.device.0.driver.stream_sync(self.0.raw)
    }

    /// Whether everything issued so far is done.
    pub fn is_idle(&self) -> Result<bool> {
        self.check_thread()?;
        self.refuse_capture()?;
        self.0.device.0.driver.stream_query(self.0.raw)
    }

    /// Orders what is issued to this stream from now on after what was issued to `other` so far.
    pub fn wait_for(&self, other: &Self) -> Result<()> {
        self.check_thread()?;
        other.check_thread()?;
        if self.same(other) {
            return Ok(());
        }
        let device = &other.0.device.0;
        let event = device.get_event()?;
        let recorded = device.driver.event_record(event, other.0.raw);
        let ordered = recorded.and_then(|()| self.0.device.0.driver.stream_wait(self.0.raw, event));
        // A wait keeps what the event stood for when it was issued, so the event can be used again at once.
        device.put_event(event);
        ordered?;
        self.join_capture(other.capture_session()?);
        Ok(())
    }

    /// An event that stands for everything issued so far.
    pub fn record_event(&self) -> Result<GpuEvent> {
        self.check_thread()?;
        let device = &self.0.device;
        let raw = device.0.get_event()?;
        let event = GpuEvent { raw, device: device.clone(), captured: self.capture_session()? };
        device.0.driver.event_record(raw, self.0.raw)?;
        Ok(event)
    }

    /// Orders what is issued to this stream from now on after an event.
    pub fn wait_event(&self, event: &GpuEvent) -> Result<()> {
        self.check_thread()?;
        self.0.device.0.driver.stream_wait(self.0.raw, event.raw)?;
        self.join_capture(event.captured.clone());
        Ok(())
    }

    /// Runs `call` on the CPU in the stream's order. It must use neither streams nor pools.
    pub fn on_host(&self, call: impl FnOnce() + Send + 'static) -> Result<()> {
        self.check_thread()?;
        self.0.device.0.driver.host_call(self.0.raw, Box::new(call))
    }

    /// Lets asynchronous copies borrow plain slices: whatever `body` issues through the scope is complete
    /// when this returns, also if `body` panics.
    ///
    /// ```
    /// use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};
    /// let gpu = GpuDevice::simulated(SimConfig::default());
    /// let stream = gpu.new_stream()?;
    /// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
    /// let mut buffer = pool.alloc::<u32>(4, &stream)?;
    /// let (from, mut to) = ([1, 2, 3, 4], [0; 4]);
    /// stream.scope(|s| {
    ///     s.copy_from_host(&mut buffer, &from)?;
    ///     s.copy_to_host(&buffer, &mut to)
    /// })?;
    /// assert_eq!(to, from);
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn scope<'env, R>(
        &'env self,
        body: impl for<'scope> FnOnce(&'scope StreamScope<'scope, 'env>) -> Result<R>,
    ) -> Result<R> {
        /// Waits even while a panic unwinds.
        struct Wait<'a>(&'a Stream);
        impl Drop for Wait<'_> {
            fn drop(&mut self) {
                self.0.settle();
            }
        }
        self.check_thread()?;
        self.refuse_capture()?;
        let wait = Wait(self);
        let scope = StreamScope { stream: self, scope: PhantomData, env: PhantomData };
        let result = body(&scope);
        drop(wait);
        result
    }

    /// Waits for all work, by whatever means there are. If the driver cannot even tell that the device is
    /// idle, borrowed memory may still be written to, and the only sound thing left is to stop.
    pub(super) fn settle(&self) {
        let driver = &self.0.device.0.driver;
        if driver.stream_sync(self.0.raw).is_err() && driver.stream_sync(self.0.raw).is_err() {
            let lost = driver.device_sync().is_err() && driver.stream_query(self.0.raw) == Ok(false);
            if lost {
                std::process::abort();
            }
        }
    }

    /// The graph capture in progress on this stream, if it was begun here.
    #[inline]
    pub(super) fn session(&self) -> Option<Arc<Session>> {
        if !self.looks(CAPTURING) {
            return None;
        }
        self.0.session.lock().clone()
    }

    pub(super) fn set_session(&self, session: Option<Arc<Session>>) -> Option<Arc<Session>> {
        if session.is_some() {
            self.0.looks.fetch_or(CAPTURING, Ordering::Relaxed);
        } else {
            self.0.looks.fetch_and(!CAPTURING, Ordering::Relaxed);
        }
        std::mem::replace(&mut *self.0.session.lock(), session)
    }

    /// Whether it takes a closer look to say that no capture is in progress.
    #[inline(always)]
    pub(super) fn may_be_captured(&self) -> bool {
        self.looks(CAPTURING | EXPOSED)
    }

    /// Whether the stream looks like one of these.
    #[inline(always)]
    fn looks(&self, like: u8) -> bool {
        self.0.looks.load(Ordering::Relaxed) & like != 0
    }

    fn expose(&self) {
        self.0.looks.fetch_or(EXPOSED, Ordering::Relaxed);
    }

    /// The capture in progress on this stream, whoever began it.
    pub(super) fn capture_session(&self) -> Result<Option<Arc<Session>>> {
        match self.session() {
            None if self.is_foreign() => self.foreign_session(),
            session => Ok(session),
        }
    }

    /// The capture that somebody else began on this stream. The driver tells when its graph is gone.
    fn foreign_session(&self) -> Result<Option<Arc<Session>>> {
        let device = &self.0.device;
        // The cheaper question first: the answer is almost always no.
        if device.0.driver.capture_state(self.0.raw)? == CaptureState::None {
            return Ok(None);
        }
        let Some(id) = device.0.driver.capture_id(self.0.raw)? else { return Ok(None) };
        let known = device.0.foreign.lock().get(&id).and_then(Weak::upgrade);
        if known.is_some() {
            return Ok(known);
        }
        let session = Arc::new(Session::new(device, super::capture::Ends::WhenTold));
        let kept = session.clone();
        device.0.driver.on_graph_end(self.0.raw, Box::new(move || drop(kept)))?;
        let mut foreign = device.0.foreign.lock();
        foreign.retain(|_, session| session.strong_count() > 0);
        foreign.insert(id, Arc::downgrade(&session));
        Ok(Some(session))
    }

    /// This stream waited for captured work, which drew it into the capture.
    fn join_capture(&self, session: Option<Arc<Session>>) {
        let Some(session) = session else { return };
        if session.is_ours() {
            if self.session().is_none() {
                session.drew_in(self);
                self.set_session(Some(session));
            }
        } else {
            // The driver knows.
            self.expose();
        }
    }

    /// Whether work issued now is recorded into a graph instead of running.
    pub fn is_capturing(&self) -> bool {
        if self.looks(CAPTURING) {
            return true;
        }
        self.is_foreign() && self.0.device.0.driver.capture_state(self.0.raw) == Ok(CaptureState::Active)
    }

    /// Whether a capture of this stream could be in progress without a session here.
    #[inline]
    pub(super) fn is_foreign(&self) -> bool {
        self.looks(EXPOSED)
    }

    pub(super) fn refuse_capture(&self) -> Result<()> {
        if self.is_capturing() {
            return Err(Error::InvalidOperation(Refusal::Capturing));
        }
        Ok(())
    }
}

impl Shared for Inner {
    fn users(&self) -> &Users {
        &self.users
    }

    fn unused(&self) {
        // Of the default stream every handle is the first: its caches stay for the others.
        if self.owner != Owner::Default {
            self.device.0.each_member(|member| member.stream_unused(self.slot));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.owner == Owner::Default {
            return;
        }
        // Invariant 2.
        self.device.0.close_slot(self.slot);
        if self.owner == Owner::Owned {
            // SAFETY: made by `stream_create`, and this was the last handle. A failure leaks a stream.
            let _ = unsafe { self.device.0.driver.stream_destroy(self.raw) };
        }
    }
}

impl PartialEq for Stream {
    fn eq(&self, other: &Self) -> bool {
        self.same(other)
    }
}

impl Eq for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("raw", &format_args!("{:#x}", self.0.raw.0))
            .field("owner", &self.0.owner)
            .field("device", &self.0.device.ordinal())
            .finish_non_exhaustive()
    }
}

/// Inside [`Stream::scope`]: asynchronous copies that borrow.
pub struct StreamScope<'scope, 'env: 'scope> {
    pub(super) stream: &'env Stream,
    scope: PhantomData<&'scope mut &'scope ()>,
    env: PhantomData<&'env mut &'env ()>,
}

impl<'env> StreamScope<'_, 'env> {
    /// The stream of the scope.
    pub fn stream(&self) -> &'env Stream {
        self.stream
    }

    /// Copies from the host without waiting; the slice is borrowed until the scope ends.
    pub fn copy_from_host<'b, T: NoUninit + 'b>(
        &self,
        into: impl Into<DeviceSliceMut<'b, T>>,
        source: &'env [T],
    ) -> Result<()> {
        // SAFETY: the scope waits before the borrow ends.
        unsafe { into.into().issue_from_host(source, self.stream) }
    }

    /// Copies to the host without waiting; the slice is borrowed until the scope ends.
    pub fn copy_to_host<'b, T: AnyBitPattern + 'b>(
        &self,
        source: impl Into<DeviceSlice<'b, T>>,
        into: &'env mut [T],
    ) -> Result<()> {
        // SAFETY: the scope waits before the borrow ends.
        unsafe { source.into().issue_to_host(into, self.stream) }
    }
}

impl fmt::Debug for StreamScope<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamScope").field("stream", self.stream).finish()
    }
}

/// A point in a stream's work.
///
/// ```
/// use memory_pool::{GpuDevice, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let event = gpu.new_stream()?.record_event()?;
/// event.synchronize()?;
/// assert!(event.is_done()?);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub struct GpuEvent {
    raw: RawEvent,
    device: GpuDevice,
    /// The capture that it was recorded in.
    captured: Option<Arc<Session>>,
}

impl GpuEvent {
    fn refuse_capture(&self) -> Result<()> {
        if self.captured.is_some() {
            return Err(Error::InvalidOperation(Refusal::Capturing));
        }
        Ok(())
    }

    /// Whether all work up to the event is done.
    pub fn is_done(&self) -> Result<bool> {
        self.refuse_capture()?;
        self.device.0.driver.event_query(self.raw)
    }

    /// Waits until all work up to the event is done.
    pub fn synchronize(&self) -> Result<()> {
        self.refuse_capture()?;
        self.device.0.driver.event_sync(self.raw)
    }
}

impl Drop for GpuEvent {
    fn drop(&mut self) {
        self.device.0.put_event(self.raw);
    }
}

impl fmt::Debug for GpuEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuEvent").field("raw", &self.raw.0).finish_non_exhaustive()
    }
}

//! Graph capture: work that is recorded now and runs later, as often as the graph is launched.
//!
//! A graph keeps the addresses that it was captured with. So what is allocated while a stream is captured
//! comes from memory private to the capture, which only this capture reuses, and which goes back to the pool
//! when the graph is gone and its last launch is complete. Nothing is recorded or asked that would invalidate
//! the capture.
//!
//! A capture that somebody else began on a borrowed stream is found by asking the driver, which is also asked to tell
//! when the graph, all that was made from it and its last launch are gone.

use std::fmt;
use std::sync::Arc;

use super::driver::RawGraph;
use super::pool::Inner;
use super::stream::{GpuEvent, Stream};
use crate::base::error::{Error, Result};
use crate::base::sync::Lock;
use crate::gpu::GpuDevice;

/// One capture and what became of it; alive as long as the capture or its graph.
pub(super) struct Session {
    pub(super) id: u64,
    device: GpuDevice,
    ends: Ends,
    /// Streams that waited for captured work and so became part of the capture.
    drawn_in: Lock<Vec<Stream>>,
    /// The last launch on each stream.
    launches: Lock<Vec<(Stream, GpuEvent)>>,
    /// The pools whose memory the graph uses.
    pools: Lock<Vec<Arc<Inner>>>,
}

/// When the work of a capture is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    /// After the launches seen here.
    WithLaunches,
    /// Somebody else launches unseen, so the device is waited for.
    WithDevice,
    /// The driver told it before the last handle went.
    WhenTold,
}

impl Session {
    pub(super) fn new(device: &GpuDevice, ends: Ends) -> Self {
        Self {
            id: device.0.next_capture(),
            device: device.clone(),
            ends,
            drawn_in: Lock::default(),
            launches: Lock::default(),
            pools: Lock::default(),
        }
    }

    /// Whether the capture was begun here, and so ends here.
    pub(super) fn is_ours(&self) -> bool {
        self.ends == Ends::WithLaunches
    }

    /// Notes a stream that belongs to the capture until it ends.
    pub(super) fn drew_in(&self, stream: &Stream) {
        self.drawn_in.lock().push(stream.clone());
    }

    /// The capture is over.
    fn let_go(&self) {
        for stream in std::mem::take(&mut *self.drawn_in.lock()) {
            stream.set_session(None);
        }
    }

    /// Keeps a pool alive as long as the graph.
    pub(super) fn keep(&self, pool: Arc<Inner>) {
        let mut pools = self.pools.lock();
        if !pools.iter().any(|known| Arc::ptr_eq(known, &pool)) {
            pools.push(pool);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for (stream, event) in std::mem::take(&mut *self.launches.lock()) {
            // A launch that cannot be waited for keeps its memory private for ever.
            if event.synchronize().is_err() && stream.device().synchronize().is_err() {
                return;
            }
        }
        // As above.
        if self.ends == Ends::WithDevice && self.device.synchronize().is_err() {
            return;
        }
        if self.pools.lock().is_empty() {
            return;
        }
        let id = self.id;
        self.device.0.each_member(|member| member.capture_ends(id));
    }
}

/// A capture in progress; [`end`](Capture::end) makes it a graph, dropping it throws it away.
#[must_use]
pub struct Capture<'a> {
    stream: &'a Stream,
    open: bool,
}

impl Stream {
    /// Records what is issued to this stream from now on into a graph, instead of running it.
    ///
    /// ```
    /// use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};
    /// let gpu = GpuDevice::simulated(SimConfig::default());
    /// let stream = gpu.new_stream()?;
    /// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
    /// pool.reserve(1 << 20)?;
    /// let capture = stream.begin_capture()?;
    /// let scratch = pool.alloc::<f32>(1024, &stream)?;   // its zeroing becomes part of the graph
    /// drop(scratch);                                      // stays with the graph
    /// let graph = capture.end()?;
    /// graph.launch(&stream)?;
    /// stream.synchronize()?;
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn begin_capture(&self) -> Result<Capture<'_>> {
        self.check_thread()?;
        self.refuse_capture()?;
        let device = self.device().clone();
        device.0.driver.begin_capture(self.raw())?;
        self.set_session(Some(Arc::new(Session::new(&device, Ends::WithLaunches))));
        Ok(Capture { stream: self, open: true })
    }
}

impl Capture<'_> {
    /// Ends the capture and makes the graph executable.
    pub fn end(mut self) -> Result<Graph> {
        self.open = false;
        let raw = self.stream.device().0.driver.end_capture(self.stream.raw());
        let session = self.stream.set_session(None);
        let session = session.ok_or(Error::refused("no capture is in progress", "begin one first"))?;
        session.let_go();
        Ok(Graph { raw: raw?, session })
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.open {
            let driver = &self.stream.device().0.driver;
            if let Ok(graph) = driver.end_capture(self.stream.raw()) {
                // SAFETY: the graph was just made and nobody else knows it.
                let _ = unsafe { driver.graph_destroy(graph) };
            }
            if let Some(session) = self.stream.set_session(None) {
                session.let_go();
            }
        }
    }
}

impl fmt::Debug for Capture<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("stream", self.stream).finish_non_exhaustive()
    }
}

/// Memory that several graphs of somebody else share: a framework that begins and ends captures on streams which are
/// only borrowed here, and says itself when their memory ends.
///
/// It is not needed for safety: what is allocated while somebody else captures a borrowed stream is private to that
/// graph in any case, until the driver tells that the graph is gone. While a stream has a memory
/// ([`Stream::set_graph_memory`]), what is allocated on that stream is private to these graphs. Several captures, one
/// after the other, may share it. It ends with its last handle, which waits for the device.
///
/// ```
/// use memory_pool::gpu::GraphMemory;
/// use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// let owner = gpu.new_stream()?;
/// // SAFETY: `owner` outlives the borrowed handle.
/// let borrowed = unsafe { gpu.stream_from_raw(owner.as_raw()) };
/// let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
///
/// let capture = owner.begin_capture()?;                       // by the framework
/// let memory = GraphMemory::new(&gpu);
/// borrowed.set_graph_memory(Some(&memory))?;
/// let scratch = pool.allocate_async(4096, &borrowed)?;
/// borrowed.set_graph_memory(None)?;
/// let graph = capture.end()?;
/// # // SAFETY: live, and no graph uses it.
/// # unsafe { pool.deallocate_async(scratch, &borrowed) };
/// # drop(graph);
/// drop(memory);                                               // the graphs are gone
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone)]
pub struct GraphMemory(Arc<Session>);

impl GraphMemory {
    /// Memory for graphs on `device`, of any of its pools.
    pub fn new(device: &GpuDevice) -> Self {
        Self(Arc::new(Session::new(device, Ends::WithDevice)))
    }
}

impl fmt::Debug for GraphMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GraphMemory").field("capture", &self.0.id).finish_non_exhaustive()
    }
}

impl Stream {
    /// Says that the owner of this borrowed stream captures it into graphs that use `memory`, or with `None` that the
    /// capture is over. What is allocated through this handle in between is reused in its own order, so each captured
    /// stream needs a memory of its own.
    pub fn set_graph_memory(&self, memory: Option<&GraphMemory>) -> Result<()> {
        if !self.is_foreign() {
            return Err(Error::refused("the stream is not borrowed", "use begin_capture"));
        }
        if let Some(GraphMemory(session)) = memory {
            self.device().must_be(&session.device)?;
        }
        self.set_session(memory.map(|GraphMemory(session)| session.clone()));
        Ok(())
    }
}

/// A captured graph. While it lives, the memory that it uses is its own.
pub struct Graph {
    raw: RawGraph,
    session: Arc<Session>,
}

impl Graph {
    /// Runs the graph's work in the order of `stream`.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        stream.check_thread()?;
        stream.refuse_capture()?;
        let device = &self.session.device;
        device.must_be(stream.device())?;
        device.0.driver.graph_launch(self.raw, stream.raw())?;
        let event = stream.record_event().or_else(|error| {
            // Without the event nobody could tell when the launch is over.
            stream.synchronize().and(Err(error))
        })?;
        let mut launches = self.session.launches.lock();
        match launches.iter_mut().find(|(known, _)| known.same(stream)) {
            Some(entry) => entry.1 = event,
            None => launches.push((stream.clone(), event)),
        }
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `end_capture`; launches in flight keep what they need. A failure leaks a graph.
        let _ = unsafe { self.session.device.0.driver.graph_destroy(self.raw) };
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("capture", &self.session.id).finish_non_exhaustive()
    }
}

//! A simulated device: host memory, streams that run late and in any order the rules allow, events, virtual
//! memory, limits, faults on demand, graph capture, a virtual clock, and a detector of ordering mistakes.
//!
//! ```
//! use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};
//! let gpu = GpuDevice::simulated(SimConfig::default().seed(7));
//! let stream = gpu.new_stream()?;
//! let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
//! let buffer = pool.alloc_from_host(&[1.0f32, 2.0], &stream)?;
//! assert_eq!(buffer.to_vec(&stream)?, [1.0, 2.0]);
//! assert!(gpu.simulation().unwrap().hazards().is_empty());
//! # Ok::<(), memory_pool::Error>(())
//! ```

mod costs;
mod detector;
mod memory;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

pub use detector::{Hazard, HazardKind};
use world::{Act, Op, World, code};

use super::{Capture, Driver, Exported, Handle, Info, RawEvent, RawGraph, RawStream, Space};
use crate::base::error::{Error, PointerFault, Result};
use crate::base::sync::Lock;

/// How the simulated device behaves.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SimConfig {
    /// Decides every choice the device makes; the same seed and calls give the same run.
    pub seed: u64,
    /// Bytes of device memory.
    pub memory: usize,
    /// How readily streams work between calls, of 256: 0 runs nothing before somebody waits.
    pub eagerness: u8,
    /// Whether physical memory can be mapped at addresses of choice.
    pub virtual_memory: bool,
    /// Whether CPU and device may touch managed memory at once.
    pub concurrent_managed: bool,
    /// Whether blocks and work are watched for [hazards](Simulation::hazards). Pools on a device that watches nothing
    /// take the ways that they take on a card.
    pub detector: bool,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            memory: 64 << 30,
            eagerness: 64,
            virtual_memory: true,
            concurrent_managed: true,
            detector: true,
        }
    }
}

impl SimConfig {
    /// Sets the seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the bytes of device memory. Memory is committed as it is touched, so this may exceed the host's.
    #[must_use]
    pub fn memory(mut self, bytes: usize) -> Self {
        self.memory = bytes;
        self
    }

    /// Sets how readily streams work between calls, of 256.
    #[must_use]
    pub fn eagerness(mut self, of_256: u8) -> Self {
        self.eagerness = of_256;
        self
    }

    /// Sets whether the device has virtual memory calls.
    #[must_use]
    pub fn virtual_memory(mut self, on: bool) -> Self {
        self.virtual_memory = on;
        self
    }

    /// Sets whether CPU and device may touch managed memory at once.
    #[must_use]
    pub fn concurrent_managed(mut self, on: bool) -> Self {
        self.concurrent_managed = on;
        self
    }

    /// Sets whether blocks and work are watched for hazards.
    #[must_use]
    pub fn detector(mut self, on: bool) -> Self {
        self.detector = on;
        self
    }
}

/// A range that a simulated kernel touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// First address.
    pub address: usize,
    /// Length in bytes.
    pub len: usize,
    /// Whether it is written.
    pub write: bool,
}

impl Touch {
    /// A range that is only read.
    pub const fn read(address: usize, len: usize) -> Self {
        Self { address, len, write: false }
    }

    /// A range that is written.
    pub const fn write(address: usize, len: usize) -> Self {
        Self { address, len, write: true }
    }
}

/// The memory of the simulated devices as a kernel sees it.
#[derive(Debug)]
pub struct SimMemory<'a> {
    memory: &'a memory::Memory,
}

impl SimMemory<'_> {
    /// Reads device memory; false where nothing is mapped, or the range is not the device's.
    pub fn read(&self, address: usize, into: &mut [u8]) -> bool {
        // SAFETY: the source is checked to be device memory, the destination is exclusively ours.
        self.memory.is_device(address)
            && unsafe { self.memory.copy(into.as_mut_ptr() as usize, address, into.len()) }
    }

    /// Writes device memory; false where nothing is mapped, or the range is not the device's.
    pub fn write(&self, address: usize, from: &[u8]) -> bool {
        // SAFETY: the destination is checked to be device memory, which no reference points into.
        self.memory.is_device(address)
            && unsafe { self.memory.copy(address, from.as_ptr() as usize, from.len()) }
    }
}

/// The body of a simulated kernel. It may run more than once if it was captured into a graph.
pub(crate) type Kernel = Arc<dyn Fn(&SimMemory<'_>) + Send + Sync>;

/// One device of a simulated world.
#[derive(Clone)]
pub(crate) struct SimDevice {
    world: Arc<Lock<World>>,
    info: Info,
}

impl fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDevice").field("ordinal", &self.info.ordinal).finish_non_exhaustive()
    }
}

/// Granularity of physical handles, as on current cards.
const GRANULARITY: usize = 2 << 20;

impl SimDevice {
    /// `count` devices that share a clock, a detector and an address space.
    pub(crate) fn group(config: SimConfig, count: usize) -> Vec<Self> {
        let info = |ordinal| Info {
            name: "simulated device".into(),
            ordinal,
            simulated: true,
            total_memory: config.memory,
            vmm_granularity: config.virtual_memory.then_some(GRANULARITY),
            concurrent_managed: config.concurrent_managed,
            watches_blocks: config.detector,
        };
        let world = Arc::new(Lock::new(World::new(config.clone(), count)));
        (0..count).map(|ordinal| Self { world: world.clone(), info: info(ordinal) }).collect()
    }

    fn device(&self) -> usize {
        self.info.ordinal
    }

    fn with<R>(&self, call: &'static str, cost: u64, run: impl FnOnce(&mut World) -> Result<R>) -> Result<R> {
        let mut world = self.world.lock();
        world.enter(call, cost)?;
        run(&mut world)
    }

    fn on<R>(
        &self,
        stream: RawStream,
        call: &'static str,
        cost: u64,
        run: impl FnOnce(&mut World, usize) -> Result<R>,
    ) -> Result<R> {
        self.with(call, cost, |world| {
            let index = world.resolve(self.device(), stream, call)?;
            run(world, index)
        })
    }

    /// Makes a physical piece if the device has room.
    fn piece(&self, world: &mut World, bytes: usize, call: &'static str) -> Result<u64> {
        let full = Error::Cuda { code: code::OUT_OF_MEMORY, call };
        let used = world.memory.used[self.device()];
        if used.checked_add(bytes).is_none_or(|sum| sum > self.info.total_memory) {
            return Err(full);
        }
        world.memory.create(self.device(), bytes).map_err(|_| full)
    }

    /// Issues a kernel.
    pub(crate) fn launch(&self, raw: RawStream, ns: u64, touches: &[Touch], kernel: Kernel) -> Result<()> {
        let op = Op { act: Act::Kernel(kernel), touches: touches.to_vec(), ns };
        self.on(raw, "cuLaunchKernel", costs::LAUNCH, |world, index| world.issue(index, op, "cuLaunchKernel"))
    }
}

fn invalid(call: &'static str) -> Error {
    Error::Cuda { code: code::INVALID_VALUE, call }
}

// SAFETY: memory is fresh mappings that overlap nothing until given back, and the executor keeps the order
// of streams and events (invariants 1 and 2 of `world`).
unsafe impl Driver for SimDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn now_ns(&self) -> u64 {
        self.world.lock().now_ns
    }

    fn memory_info(&self) -> Result<(usize, usize)> {
        self.with("cuMemGetInfo", costs::MEMORY_INFO, |world| {
            Ok((self.info.total_memory - world.memory.used[self.device()], self.info.total_memory))
        })
    }

    fn alloc(&self, space: Space, bytes: usize) -> Result<usize> {
        match space {
            Space::Device => self.with("cuMemAlloc", costs::device(bytes), |world| {
                let piece = self.piece(world, bytes, "cuMemAlloc")?;
                let full = |_| Error::Cuda { code: code::OUT_OF_MEMORY, call: "cuMemAlloc" };
                let addr = world.memory.reserve(bytes).map_err(full).inspect_err(|_| {
                    world.memory.release(piece);
                })?;
                world.memory.map(addr, bytes, piece);
                world.memory.set_access(addr, bytes);
                world.memory.make_plain(piece);
                Ok(addr)
            }),
            Space::Pinned { .. } => self.with("cuMemHostAlloc", costs::pinned(bytes), |world| {
                let full = |_| Error::Cuda { code: code::OUT_OF_MEMORY, call: "cuMemHostAlloc" };
                world.memory.alloc_host(bytes).map_err(full)
            }),
            Space::Managed => self.with("cuMemAllocManaged", costs::MANAGED, |world| {
                let full = |_| Error::Cuda { code: code::OUT_OF_MEMORY, call: "cuMemAllocManaged" };
                world.memory.alloc_host(bytes).map_err(full)
            }),
        }
    }

    unsafe fn free(&self, space: Space, addr: usize) -> Result<()> {
        let call = if space == Space::Device { "cuMemFree" } else { "cuMemFreeHost" };
        self.with(call, costs::device(0), |world| {
            // The driver waits for everything before it frees.
            world.sync_device(self.device());
            if space == Space::Device {
                let (piece, len) = world.memory.piece_at(addr).ok_or(invalid(call))?;
                world.given_back(addr, len);
                world.memory.unmap(addr, len);
                world.memory.release(piece);
                world.memory.unreserve(addr);
            } else {
                let len = world.memory.free_host(addr).ok_or(invalid(call))?;
                world.given_back(addr, len);
            }
            Ok(())
        })
    }

    fn reserve_va(&self, bytes: usize) -> Result<usize> {
        self.with("cuMemAddressReserve", costs::RESERVE, |world| world.memory.reserve(bytes))
    }

    unsafe fn free_va(&self, addr: usize, _bytes: usize) -> Result<()> {
        let call = "cuMemAddressFree";
        self.with(call, costs::RESERVE, |world| match world.memory.unreserve(addr) {
            true => Ok(()),
            false => Err(invalid(call)),
        })
    }

    fn create_handle(&self, bytes: usize) -> Result<Handle> {
        self.with("cuMemCreate", costs::CREATE, |world| {
            if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) || self.info.vmm_granularity.is_none() {
                return Err(invalid("cuMemCreate"));
            }
            self.piece(world, bytes, "cuMemCreate").map(Handle)
        })
    }

    unsafe fn release_handle(&self, handle: Handle) -> Result<()> {
        let call = "cuMemRelease";
        self.with(call, 0, |world| {
            world.now_ns += costs::release(world.memory.piece_len(handle.0));
            match world.memory.release(handle.0) {
                true => Ok(()),
                false => Err(invalid(call)),
            }
        })
    }

    unsafe fn map(&self, addr: usize, bytes: usize, handle: Handle) -> Result<()> {
        self.with("cuMemMap", costs::MAP, |world| match world.memory.map(addr, bytes, handle.0) {
            true => Ok(()),
            false => Err(invalid("cuMemMap")),
        })
    }

    unsafe fn set_access(&self, addr: usize, bytes: usize) -> Result<()> {
        let call = "cuMemSetAccess";
        self.with(call, 0, |world| {
            let pieces = world.memory.pieces_in(addr, bytes).ok_or(invalid(call))?;
            world.now_ns += costs::access(pieces);
            world.memory.set_access(addr, bytes);
            Ok(())
        })
    }

    unsafe fn unmap(&self, addr: usize, bytes: usize) -> Result<()> {
        self.with("cuMemUnmap", 0, |world| {
            world.now_ns += costs::unmap(world.memory.pieces_in(addr, bytes).unwrap_or(0));
            world.given_back(addr, bytes);
            match world.memory.unmap(addr, bytes) {
                true => Ok(()),
                false => Err(invalid("cuMemUnmap")),
            }
        })
    }

    fn export(&self, addr: usize) -> Result<Exported> {
        self.with("cuMemExportToShareableHandle", costs::EVENT, |world| {
            let exported = world.memory.export(addr).ok_or(Error::pointer(addr, PointerFault::Foreign))?;
            exported.map(|(start, bytes, descriptor)| Exported { start, bytes, descriptor })
        })
    }

    fn import(&self, descriptor: BorrowedFd<'_>, bytes: usize) -> Result<Handle> {
        self.with("cuMemImportFromShareableHandle", costs::CREATE, |world| {
            world.memory.import(self.device(), descriptor, bytes).map(Handle)
        })
    }

    fn stream_create(&self) -> Result<RawStream> {
        self.with("cuStreamCreate", costs::STREAM, |world| Ok(world.create_stream(self.device())))
    }

    unsafe fn stream_destroy(&self, stream: RawStream) -> Result<()> {
        self.on(stream, "cuStreamDestroy", costs::STREAM, |world, index| {
            world.destroy_stream(index);
            Ok(())
        })
    }

    fn stream_sync(&self, stream: RawStream) -> Result<()> {
        let call = "cuStreamSynchronize";
        self.on(stream, call, costs::SYNC, |world, index| world.sync_stream(index, call))
    }

    fn stream_query(&self, stream: RawStream) -> Result<bool> {
        let call = "cuStreamQuery";
        self.on(stream, call, costs::QUERY, |world, index| world.query_stream(index, call))
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        let call = "cuStreamWaitEvent";
        self.on(stream, call, costs::WAIT, |world, index| world.wait(index, event.0, call))
    }

    fn device_sync(&self) -> Result<()> {
        self.with("cuCtxSynchronize", costs::SYNC, |world| {
            world.sync_device(self.device());
            Ok(())
        })
    }

    fn event_create(&self) -> Result<RawEvent> {
        self.with("cuEventCreate", costs::EVENT, |world| Ok(RawEvent(world.create_event())))
    }

    unsafe fn event_destroy(&self, event: RawEvent) -> Result<()> {
        let call = "cuEventDestroy";
        self.with(call, costs::EVENT, |world| world.destroy_event(event.0, call))
    }

    fn event_record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        let call = "cuEventRecord";
        self.on(stream, call, costs::RECORD, |world, index| world.record(event.0, index, call))
    }

    fn event_query(&self, event: RawEvent) -> Result<bool> {
        let call = "cuEventQuery";
        self.with(call, costs::QUERY, |world| world.query_event(event.0, call))
    }

    fn event_sync(&self, event: RawEvent) -> Result<()> {
        let call = "cuEventSynchronize";
        self.with(call, costs::SYNC, |world| world.sync_event(event.0, call))
    }

    unsafe fn copy(&self, dst: usize, src: usize, bytes: usize, stream: RawStream) -> Result<()> {
        let touches = vec![Touch::read(src, bytes), Touch::write(dst, bytes)];
        let op = Op { act: Act::Copy { dst, src, bytes }, touches, ns: costs::transfer(bytes) };
        let call = "cuMemcpyAsync";
        self.on(stream, call, costs::LAUNCH, |world, index| world.issue(index, op, call))
    }

    unsafe fn fill(&self, dst: usize, byte: u8, bytes: usize, stream: RawStream) -> Result<()> {
        let touches = vec![Touch::write(dst, bytes)];
        let op = Op { act: Act::Fill { dst, byte, bytes }, touches, ns: costs::transfer(bytes) };
        let call = "cuMemsetD8Async";
        self.on(stream, call, costs::LAUNCH, |world, index| world.issue(index, op, call))
    }

    fn host_call(&self, stream: RawStream, run: Box<dyn FnOnce() + Send>) -> Result<()> {
        let act = Act::Host(Arc::new(Mutex::new(Some(run))));
        let op = Op { act, touches: Vec::new(), ns: costs::HOST_CALL };
        let call = "cuLaunchHostFunc";
        self.on(stream, call, costs::HOST_CALL, |world, index| world.issue(index, op, call))
    }

    fn capture_state(&self, stream: RawStream) -> Result<Capture> {
        self.on(stream, "cuStreamIsCapturing", costs::QUERY, |world, index| {
            Ok(if world.capturing(index).is_some() { Capture::Active } else { Capture::None })
        })
    }

    fn capture_id(&self, stream: RawStream) -> Result<Option<u64>> {
        self.on(stream, "cuStreamGetCaptureInfo", costs::QUERY, |world, index| {
            Ok(world.capturing(index).map(|recording| recording as u64))
        })
    }

    fn on_graph_end(&self, stream: RawStream, end: Box<dyn FnOnce() + Send>) -> Result<()> {
        let call = "cuGraphRetainUserObject";
        self.on(stream, call, costs::EVENT, |world, index| world.on_graph_end(index, end, call))
    }

    fn begin_capture(&self, stream: RawStream) -> Result<()> {
        let call = "cuStreamBeginCapture";
        self.on(stream, call, costs::LAUNCH, |world, index| world.begin_capture(index, call))
    }

    fn end_capture(&self, stream: RawStream) -> Result<RawGraph> {
        let call = "cuStreamEndCapture";
        let graph = self.on(stream, call, costs::LAUNCH, |world, index| world.end_capture(index, call))?;
        Ok(RawGraph(graph))
    }

    fn graph_launch(&self, graph: RawGraph, stream: RawStream) -> Result<()> {
        let call = "cuGraphLaunch";
        self.on(stream, call, costs::LAUNCH, |world, index| world.launch(graph.0, index, call))
    }

    unsafe fn graph_destroy(&self, graph: RawGraph) -> Result<()> {
        self.with("cuGraphExecDestroy", costs::EVENT, |world| {
            world.forget_graph(graph.0);
            Ok(())
        })
    }

    fn enable_peer(&self, other: &dyn Driver) -> Result<()> {
        let call = "cuCtxEnablePeerAccess";
        let same = other.simulation().is_some_and(|other| Arc::ptr_eq(&other.world, &self.world));
        self.with(call, costs::EVENT, |_| if same { Ok(()) } else { Err(invalid(call)) })
    }

    fn block_taken(&self, addr: usize, len: usize, stream: Option<RawStream>) {
        let mut world = self.world.lock();
        // A stream that is unknown has no work either; the host's clock then decides.
        let index = stream.and_then(|raw| world.resolve(self.device(), raw, "").ok());
        world.taken(addr, len, index);
    }

    fn block_freed(&self, addr: usize, _len: usize) {
        self.world.lock().detector.freed(addr);
    }

    fn simulation(&self) -> Option<&SimDevice> {
        Some(self)
    }
}

/// What only a simulated device can do: look inside, inject faults, run kernels written in Rust.
#[derive(Clone, Debug)]
pub struct Simulation {
    device: SimDevice,
}

impl Simulation {
    pub(crate) fn new(device: SimDevice) -> Self {
        Self { device }
    }

    /// The ordering mistakes found so far, in the whole group of devices.
    pub fn hazards(&self) -> Vec<Hazard> {
        self.device.world.lock().detector.found.clone()
    }

    /// Driver calls made so far.
    pub fn calls(&self) -> u64 {
        self.device.world.lock().calls
    }

    /// Driver calls made so far, by name.
    pub fn calls_by_name(&self) -> BTreeMap<&'static str, u64> {
        self.device.world.lock().by_name.clone()
    }

    /// How often the driver call `name` was made.
    pub fn count(&self, name: &str) -> u64 {
        self.device.world.lock().by_name.get(name).copied().unwrap_or(0)
    }

    /// Makes the `nth` driver call from now on fail with `code`, once; 1 is the next.
    pub fn fail_call(&self, nth: u64, code: i32) {
        let mut world = self.device.world.lock();
        let at = world.calls + nth;
        world.fault = Some((at, code));
    }

    /// Takes an injected fault back; returns whether it was still waiting.
    pub fn cancel_fault(&self) -> bool {
        self.device.world.lock().fault.take().is_some()
    }

    /// Nanoseconds on the virtual clock: what the calls and the waiting would have cost on a card.
    pub fn virtual_ns(&self) -> u64 {
        self.device.world.lock().now_ns
    }

    /// Bytes of physical device memory in use on this device.
    pub fn memory_in_use(&self) -> usize {
        self.device.world.lock().memory.used[self.device.device()]
    }

    /// Runs everything that is queued, on all devices of the group. The host has not *seen* it complete: to
    /// learn that, it must ask the driver as ever.
    pub fn run_all(&self) {
        self.device.world.lock().run_all();
    }

    /// Device memory straight from the simulated driver, as `cuMemAlloc` gives it: its address.
    pub fn malloc(&self, bytes: usize) -> Result<usize> {
        self.device.alloc(Space::Device, bytes)
    }

    /// Frees what [`malloc`](Self::malloc) gave, and waits for all work as `cuMemFree` does. The simulated device
    /// refuses any other address.
    pub fn free(&self, address: usize) -> Result<()> {
        // SAFETY: the simulation checks the address; work that comes too late is a hazard that it reports.
        unsafe { self.device.free(Space::Device, address) }
    }

    /// Issues a kernel to `stream` that takes `ns` nanoseconds, touches `touches` (and nothing else), and
    /// computes with `body` when its turn comes. A kernel must not use pools or streams.
    pub fn launch(
        &self,
        stream: &crate::gpu::Stream,
        ns: u64,
        touches: &[Touch],
        body: impl Fn(&SimMemory<'_>) + Send + Sync + 'static,
    ) -> Result<()> {
        self.device.launch(stream.raw(), ns, touches, Arc::new(body))
    }
}

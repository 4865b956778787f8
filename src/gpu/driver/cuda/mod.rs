//! A real card, through the CUDA driver.
//!
//! Every call makes the device's context current if it is not, and restores what was: a library must not
//! change the calling thread's context behind the program's back. Calls that a graph capture in progress
//! anywhere in the process would forbid (allocation, queries) run in the relaxed capture mode, since none of
//! them belongs to the captured work.
//!
//! Invariants, which the calls below rest on
//! 1. `api` holds the driver's functions under their C signatures, and is never unloaded.
//! 2. What a call writes to or reads from by pointer is a local or a field that outlives the call; the driver
//!    keeps none of these pointers.
//! 3. Streams, events, graphs and handles were handed out by this driver and not taken back since, and
//!    addresses are as each method's contract says: who calls an `unsafe` method vouches for it, and
//!    `stream_from_raw` asks it of those who bring a stream.
//! 4. `context` lives as long as the value: it was retained, or its owner is kept.
//!
//! Who locks what: `mapped` is a leaf, held while a mapping is made, shown to a peer, exported or removed, so that a
//! peer that comes late sees every mapping exactly once.

mod api;
mod mapped;

use core::ffi::{c_int, c_void};
use core::fmt;
use core::mem::ManuallyDrop;
use core::ptr::null_mut;
use std::any::Any;
use std::os::fd::{AsRawFd, BorrowedFd};

use api::{AllocationProp, Api, Code, Opaque, api, check};

use mapped::Mapped;

use super::{Capture, Driver, Exported, Handle, Info, RawEvent, RawGraph, RawStream, Space};
use crate::base::error::{Error, Result};
use crate::base::sync::Lock;

const NOT_READY: Code = 600;
const PEER_ALREADY_ENABLED: Code = 704;
const PEER_UNSUPPORTED: Code = 217;
const OUT_OF_MEMORY: Code = 2;

const ATTRIBUTE_CONCURRENT_MANAGED: c_int = 89;
const ATTRIBUTE_VIRTUAL_MEMORY: c_int = 102;
const ATTRIBUTE_DESCRIPTORS: c_int = 103;

/// How many CUDA devices there are.
pub(crate) fn device_count() -> Result<usize> {
    let mut count = 0;
    // SAFETY: invariants 1 and 2: `count` is a local.
    check(unsafe { (api()?.device_count)(&mut count) }, "cuDeviceGetCount")?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// One card.
pub(crate) struct CudaDevice {
    api: &'static Api,
    device: c_int,
    context: Opaque,
    /// Whether the primary context was retained here and is released at the end.
    retained: bool,
    /// Keeps somebody else's context alive.
    _keep: Option<Box<dyn Any + Send + Sync>>,
    info: Info,
    mapped: Lock<Mapped>,
}

// SAFETY: the driver's functions may be called from any thread, on objects of any other (CUDA driver API, "API
// synchronization behavior"); what a call needs current is made current in it.
unsafe impl Send for CudaDevice {}
// SAFETY: as above.
unsafe impl Sync for CudaDevice {}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice").field("name", &self.info.name).finish_non_exhaustive()
    }
}

/// Makes a context current while it lives.
struct Current<'a> {
    api: &'a Api,
    pushed: bool,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = null_mut();
            // SAFETY: invariants 1 and 2; it pops what `current` pushed on this thread, which the value never leaves.
            unsafe { (self.api.context_pop)(&mut popped) };
        }
    }
}

/// Lets a call through that a capture on some other stream would forbid.
struct Relaxed<'a> {
    api: &'a Api,
    mode: c_int,
}

impl<'a> Relaxed<'a> {
    fn new(api: &'a Api) -> Self {
        const RELAXED: c_int = 2;
        let mut mode = RELAXED;
        // SAFETY: invariants 1 and 2; it swaps a setting of this thread with `mode`.
        unsafe { (api.exchange_capture_mode)(&mut mode) };
        Self { api, mode }
    }
}

impl Drop for Relaxed<'_> {
    fn drop(&mut self) {
        // SAFETY: as in `new`.
        unsafe { (self.api.exchange_capture_mode)(&mut self.mode) };
    }
}

/// What the driver calls back: runs a boxed function, which it gives back here.
///
/// # Safety
/// `data` is a `Box<Box<dyn FnOnce() + Send>>` as a pointer, and this is its only use.
unsafe extern "C" fn run_once(data: *mut c_void) {
    // SAFETY: the contract.
    let run = unsafe { Box::from_raw(data.cast::<Box<dyn FnOnce() + Send>>()) };
    // A panic must not cross into the driver.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
}

fn stream(raw: RawStream) -> Opaque {
    raw.0 as Opaque
}

fn event(raw: RawEvent) -> Opaque {
    raw.0 as Opaque
}

impl CudaDevice {
    /// The card of this number, over its primary context.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        let api = api()?;
        let device = Self::device(api, ordinal)?;
        let mut context = null_mut();
        // SAFETY: invariants 1 and 2; `device` was named by the driver.
        check(unsafe { (api.primary_retain)(&mut context, device) }, "cuDevicePrimaryCtxRetain")?;
        Self::over(api, device, ordinal, context, true, None)
    }

    /// The card of this number, over a context that somebody else owns.
    ///
    /// # Safety
    /// `context` belongs to the device `ordinal` and lives as long as `keep`.
    pub(crate) unsafe fn adopt(
        ordinal: usize,
        context: *mut c_void,
        keep: Box<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let api = api()?;
        let device = Self::device(api, ordinal)?;
        Self::over(api, device, ordinal, context, false, Some(keep))
    }

    fn device(api: &Api, ordinal: usize) -> Result<c_int> {
        let available = device_count()?;
        if ordinal >= available {
            return Err(Error::NoDevice { ordinal, available });
        }
        let mut device = 0;
        // SAFETY: invariants 1 and 2; the ordinal is one that the driver has.
        check(unsafe { (api.device_get)(&mut device, ordinal as c_int) }, "cuDeviceGet")?;
        Ok(device)
    }

    fn over(
        api: &'static Api,
        device: c_int,
        ordinal: usize,
        context: Opaque,
        retained: bool,
        keep: Option<Box<dyn Any + Send + Sync>>,
    ) -> Result<Self> {
        let info = Info {
            name: String::new(),
            ordinal,
            simulated: false,
            total_memory: 0,
            vmm_granularity: None,
            concurrent_managed: false,
            watches_blocks: false,
        };
        // From here on the value releases what was retained.
        let mapped = Lock::default();
        let mut this = Self { api, device, context, retained, _keep: keep, info, mapped };
        let mut name = [0u8; 128];
        // SAFETY: invariants 1 and 2; the buffer is as long as stated.
        let named = unsafe { (api.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device) };
        check(named, "cuDeviceGetName")?;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        this.info.name = String::from_utf8_lossy(&name[..end]).into_owned();
        // SAFETY: invariants 1 and 2.
        let total = unsafe { (api.device_total_memory)(&mut this.info.total_memory, device) };
        check(total, "cuDeviceTotalMem")?;
        this.info.concurrent_managed = this.attribute(ATTRIBUTE_CONCURRENT_MANAGED) == 1;
        if this.attribute(ATTRIBUTE_VIRTUAL_MEMORY) == 1 {
            this.mapped.lock().exportable = this.attribute(ATTRIBUTE_DESCRIPTORS) == 1;
            let current = this.current()?;
            let mut granularity = 0;
            // SAFETY: invariants 1 and 2.
            let asked = unsafe { (api.granularity)(&mut granularity, &this.prop(false), 0) };
            drop(current);
            this.info.vmm_granularity = (asked == 0 && granularity.is_power_of_two()).then_some(granularity);
        }
        Ok(this)
    }

    fn attribute(&self, attribute: c_int) -> c_int {
        let mut value = 0;
        // SAFETY: invariants 1 and 2. An attribute that the driver does not know leaves it 0.
        unsafe { (self.api.device_attribute)(&mut value, attribute, self.device) };
        value
    }

    fn prop(&self, exportable: bool) -> AllocationProp {
        const PINNED: c_int = 1;
        AllocationProp {
            kind: PINNED,
            requested_handles: if exportable { mapped::DESCRIPTOR } else { 0 },
            location: mapped::location(self.device),
            win32: null_mut(),
            flags: [0; 8],
        }
    }

    /// The raw `CUcontext`.
    pub(crate) fn context(&self) -> *mut c_void {
        self.context
    }

    fn current(&self) -> Result<Current<'_>> {
        let mut context = null_mut();
        // SAFETY: invariants 1 and 2.
        check(unsafe { (self.api.context_get)(&mut context) }, "cuCtxGetCurrent")?;
        let pushed = context != self.context;
        if pushed {
            // SAFETY: invariants 1 and 4.
            check(unsafe { (self.api.context_push)(self.context) }, "cuCtxPushCurrent")?;
        }
        Ok(Current { api: self.api, pushed })
    }

    /// A call that needs the context.
    fn call(&self, name: &'static str, call: impl FnOnce(&Api) -> Code) -> Result<()> {
        let _current = self.current()?;
        check(call(self.api), name)
    }

    /// A call that belongs to no capture.
    fn relaxed(&self, name: &'static str, call: impl FnOnce(&Api) -> Code) -> Result<()> {
        let _current = self.current()?;
        let _relaxed = Relaxed::new(self.api);
        check(call(self.api), name)
    }

    /// Number and graph of the capture in progress on a stream.
    fn capture_info(&self, raw: RawStream) -> Result<Option<(u64, Opaque)>> {
        const INVALIDATED: c_int = 2;
        let (mut state, mut id, mut graph) = (0, 0, null_mut());
        // SAFETY: invariants 1, 2 and 3; the last two may be null.
        self.relaxed("cuStreamGetCaptureInfo", |api| unsafe {
            (api.capture_info)(stream(raw), &mut state, &mut id, &mut graph, null_mut(), null_mut())
        })?;
        // What an invalidated capture recorded will never run.
        Ok((state != 0 && state != INVALIDATED).then_some((id, graph)))
    }

    fn ask(&self, name: &'static str, call: impl FnOnce(&Api) -> Code) -> Result<bool> {
        match self.relaxed(name, call) {
            Ok(()) => Ok(true),
            Err(Error::Cuda { code: NOT_READY, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if self.retained {
            // SAFETY: invariant 1; retained once in `open`, released once.
            unsafe { (self.api.primary_release)(self.device) };
        }
    }
}

// SAFETY: the driver hands out memory that overlaps nothing until it is given back, runs a stream's work in order and
// others' after the events they wait for (CUDA driver API, "Stream Management"), and each method is one call of it.
unsafe impl Driver for CudaDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn memory_info(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: invariants 1 and 2.
        self.relaxed("cuMemGetInfo", |api| unsafe { (api.memory_info)(&mut free, &mut total) })?;
        Ok((free, total))
    }

    fn alloc(&self, space: Space, bytes: usize) -> Result<usize> {
        const PORTABLE: u32 = 1;
        const WRITE_COMBINED: u32 = 4;
        const ATTACH_GLOBAL: u32 = 1;
        let mut at = 0u64;
        match space {
            // SAFETY: invariants 1 and 2.
            Space::Device => self.relaxed("cuMemAlloc", |api| unsafe { (api.alloc)(&mut at, bytes) })?,
            // SAFETY: invariants 1 and 2.
            Space::Managed => self.relaxed("cuMemAllocManaged", |api| unsafe {
                (api.alloc_managed)(&mut at, bytes, ATTACH_GLOBAL)
            })?,
            Space::Pinned { write_combined } => {
                let flags = PORTABLE | if write_combined { WRITE_COMBINED } else { 0 };
                let mut host = null_mut();
                // SAFETY: invariants 1 and 2.
                self.relaxed("cuMemHostAlloc", |api| unsafe { (api.alloc_host)(&mut host, bytes, flags) })?;
                at = host as u64;
            }
        }
        Ok(at as usize)
    }

    unsafe fn free(&self, space: Space, addr: usize) -> Result<()> {
        match space {
            Space::Device | Space::Managed => {
                // SAFETY: invariants 1 and 3.
                self.relaxed("cuMemFree", |api| unsafe { (api.free)(addr as u64) })
            }
            Space::Pinned { .. } => {
                // SAFETY: invariants 1 and 3.
                self.relaxed("cuMemFreeHost", |api| unsafe { (api.free_host)(addr as *mut c_void) })
            }
        }
    }

    fn reserve_va(&self, bytes: usize) -> Result<usize> {
        let mut at = 0;
        // SAFETY: invariants 1 and 2.
        self.relaxed("cuMemAddressReserve", |api| unsafe { (api.va_reserve)(&mut at, bytes, 0, 0, 0) })?;
        Ok(at as usize)
    }

    unsafe fn free_va(&self, addr: usize, bytes: usize) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.relaxed("cuMemAddressFree", |api| unsafe { (api.va_free)(addr as u64, bytes) })
    }

    fn create_handle(&self, bytes: usize) -> Result<Handle> {
        let create = |exportable| {
            let (mut handle, prop) = (0, self.prop(exportable));
            // SAFETY: invariants 1, 2 and 3.
            self.relaxed("cuMemCreate", |api| unsafe { (api.handle_create)(&mut handle, bytes, &prop, 0) })?;
            Ok(Handle(handle))
        };
        let exportable = self.mapped.lock().exportable;
        match create(exportable) {
            Err(Error::Cuda { code, .. }) if exportable && code != OUT_OF_MEMORY => {
                // Some systems announce descriptors and refuse them; plain memory serves all but sharing.
                let plain = create(false)?;
                self.mapped.lock().exportable = false;
                Ok(plain)
            }
            made => made,
        }
    }

    unsafe fn release_handle(&self, handle: Handle) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.relaxed("cuMemRelease", |api| unsafe { (api.handle_release)(handle.0) })
    }

    unsafe fn map(&self, addr: usize, bytes: usize, handle: Handle) -> Result<()> {
        self.map_and_note(addr, bytes, handle)
    }

    unsafe fn set_access(&self, addr: usize, bytes: usize) -> Result<()> {
        self.show_to_all(addr, bytes)
    }

    unsafe fn unmap(&self, addr: usize, bytes: usize) -> Result<()> {
        self.unmap_and_forget(addr, bytes)
    }

    fn export(&self, addr: usize) -> Result<Exported> {
        self.export_around(addr)
    }

    fn import(&self, descriptor: BorrowedFd<'_>, _bytes: usize) -> Result<Handle> {
        let (mut handle, number) = (0, descriptor.as_raw_fd());
        // SAFETY: invariants 1 and 2; the descriptor is open, and passed as the value of the pointer.
        self.relaxed("cuMemImportFromShareableHandle", |api| unsafe {
            (api.handle_import)(&mut handle, number as usize as *mut c_void, mapped::DESCRIPTOR)
        })?;
        Ok(Handle(handle))
    }

    fn stream_create(&self) -> Result<RawStream> {
        const NON_BLOCKING: u32 = 1;
        let mut made = null_mut();
        // SAFETY: invariants 1 and 2.
        self.relaxed("cuStreamCreate", |api| unsafe { (api.stream_create)(&mut made, NON_BLOCKING) })?;
        Ok(RawStream(made as usize))
    }

    unsafe fn stream_destroy(&self, raw: RawStream) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.relaxed("cuStreamDestroy", |api| unsafe { (api.stream_destroy)(stream(raw)) })
    }

    fn stream_sync(&self, raw: RawStream) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.relaxed("cuStreamSynchronize", |api| unsafe { (api.stream_sync)(stream(raw)) })
    }

    fn stream_query(&self, raw: RawStream) -> Result<bool> {
        // SAFETY: invariants 1 and 3.
        self.ask("cuStreamQuery", |api| unsafe { (api.stream_query)(stream(raw)) })
    }

    fn stream_wait(&self, raw: RawStream, after: RawEvent) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.call("cuStreamWaitEvent", |api| unsafe { (api.stream_wait)(stream(raw), event(after), 0) })
    }

    fn device_sync(&self) -> Result<()> {
        // SAFETY: invariants 1 and 4.
        self.relaxed("cuCtxSynchronize", |api| unsafe { (api.context_sync)() })
    }

    fn event_create(&self) -> Result<RawEvent> {
        const DISABLE_TIMING: u32 = 2;
        let mut made = null_mut();
        // SAFETY: invariants 1 and 2.
        self.relaxed("cuEventCreate", |api| unsafe { (api.event_create)(&mut made, DISABLE_TIMING) })?;
        Ok(RawEvent(made as usize))
    }

    unsafe fn event_destroy(&self, raw: RawEvent) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.relaxed("cuEventDestroy", |api| unsafe { (api.event_destroy)(event(raw)) })
    }

    fn event_record(&self, raw: RawEvent, on: RawStream) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.call("cuEventRecord", |api| unsafe { (api.event_record)(event(raw), stream(on)) })
    }

    fn event_query(&self, raw: RawEvent) -> Result<bool> {
        // SAFETY: invariants 1 and 3.
        self.ask("cuEventQuery", |api| unsafe { (api.event_query)(event(raw)) })
    }

    fn event_sync(&self, raw: RawEvent) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.relaxed("cuEventSynchronize", |api| unsafe { (api.event_sync)(event(raw)) })
    }

    unsafe fn copy(&self, dst: usize, src: usize, bytes: usize, on: RawStream) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.call("cuMemcpyAsync", |api| unsafe { (api.copy)(dst as u64, src as u64, bytes, stream(on)) })
    }

    unsafe fn copy_peer(
        &self,
        (dst, to): (usize, &dyn Driver),
        (src, from): (usize, &dyn Driver),
        bytes: usize,
        on: RawStream,
    ) -> Result<()> {
        let (dst, src) = (dst as u64, src as u64);
        let call = "cuMemcpyPeerAsync";
        let (Some(to), Some(from)) = (to.cuda(), from.cuda()) else {
            return Err(Error::Cuda { code: 1, call });
        };
        // SAFETY: invariants 1, 3 and 4.
        self.call(call, |api| unsafe {
            (api.copy_peer)(dst, to.context, src, from.context, bytes, stream(on))
        })
    }

    unsafe fn fill(&self, dst: usize, byte: u8, bytes: usize, on: RawStream) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.call("cuMemsetD8Async", |api| unsafe { (api.fill)(dst as u64, byte, bytes, stream(on)) })
    }

    fn host_call(&self, on: RawStream, run: Box<dyn FnOnce() + Send>) -> Result<()> {
        let data = Box::into_raw(Box::new(run));
        // SAFETY: invariants 1 and 3; the driver hands `data`, which nobody else knows, to `run_once` once.
        let issued = self
            .call("cuLaunchHostFunc", |api| unsafe { (api.host_call)(stream(on), run_once, data.cast()) });
        if issued.is_err() {
            // SAFETY: the driver did not take it, so it is ours again.
            drop(unsafe { Box::from_raw(data) });
        }
        issued
    }

    fn capture_state(&self, raw: RawStream) -> Result<Capture> {
        let mut state = 0;
        // SAFETY: invariants 1, 2 and 3.
        let mut ask = |api: &Api| unsafe { (api.is_capturing)(stream(raw), &mut state) };
        // A stream that was made knows its context; the default ones are those of whichever is current. This is asked
        // at each operation on a borrowed stream, and what is current is half of the price.
        if raw.is_default() || ask(self.api) != 0 {
            self.call("cuStreamIsCapturing", ask)?;
        }
        Ok(if state == 0 { Capture::None } else { Capture::Active })
    }

    fn capture_id(&self, raw: RawStream) -> Result<Option<u64>> {
        self.capture_info(raw).map(|info| info.map(|(id, _)| id))
    }

    fn on_graph_end(&self, raw: RawStream, end: Box<dyn FnOnce() + Send>) -> Result<()> {
        const NO_DESTRUCTOR_SYNC: u32 = 1;
        const MOVE: u32 = 1;
        let Some((_, graph)) = self.capture_info(raw)? else { return Ok(()) };
        // The driver calls back where it must not be called: the end gets a thread of its own. Where there is none to
        // be had it never comes, and the memory stays the graph's.
        let end = ManuallyDrop::new(end);
        let end: Box<dyn FnOnce() + Send> = Box::new(move || {
            _ = std::thread::Builder::new().spawn(move || ManuallyDrop::into_inner(end)());
        });
        let data = Box::into_raw(Box::new(end));
        let mut object = null_mut();
        // SAFETY: invariants 1 and 2; the driver hands `data`, which nobody else knows, to `run_once` once.
        let made = self.relaxed("cuUserObjectCreate", |api| unsafe {
            (api.user_object_create)(&mut object, data.cast(), run_once, 1, NO_DESTRUCTOR_SYNC)
        });
        if let Err(error) = made {
            // SAFETY: the driver did not take it, so it is ours again.
            let end = unsafe { Box::from_raw(data) };
            end();
            return Err(error);
        }
        // SAFETY: invariants 1 and 3; the graph takes over the only reference to the object.
        let kept = self.relaxed("cuGraphRetainUserObject", |api| unsafe {
            (api.graph_retain_object)(graph, object, 1, MOVE)
        });
        if kept.is_err() {
            // SAFETY: invariants 1 and 3; the reference is ours still. This runs `end`.
            self.relaxed("cuUserObjectRelease", |api| unsafe { (api.user_object_release)(object, 1) })?;
        }
        kept
    }

    fn begin_capture(&self, raw: RawStream) -> Result<()> {
        const THREAD_LOCAL: c_int = 1;
        // SAFETY: invariants 1 and 3.
        self.call("cuStreamBeginCapture", |api| unsafe { (api.begin_capture)(stream(raw), THREAD_LOCAL) })
    }

    fn end_capture(&self, raw: RawStream) -> Result<RawGraph> {
        let mut graph = null_mut();
        // SAFETY: invariants 1, 2 and 3.
        self.call("cuStreamEndCapture", |api| unsafe { (api.end_capture)(stream(raw), &mut graph) })?;
        let mut exec = null_mut();
        // SAFETY: invariants 1, 2 and 3.
        let made =
            self.relaxed("cuGraphInstantiate", |api| unsafe { (api.graph_instantiate)(&mut exec, graph, 0) });
        // SAFETY: invariants 1 and 3.
        self.relaxed("cuGraphDestroy", |api| unsafe { (api.graph_destroy)(graph) })?;
        made.map(|()| RawGraph(exec as usize))
    }

    fn graph_launch(&self, graph: RawGraph, on: RawStream) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.call("cuGraphLaunch", |api| unsafe { (api.graph_launch)(graph.0 as Opaque, stream(on)) })
    }

    unsafe fn graph_destroy(&self, graph: RawGraph) -> Result<()> {
        // SAFETY: invariants 1 and 3.
        self.relaxed("cuGraphExecDestroy", |api| unsafe { (api.graph_exec_destroy)(graph.0 as Opaque) })
    }

    fn enable_peer(&self, other: &dyn Driver) -> Result<()> {
        let call = "cuCtxEnablePeerAccess";
        let Some(other) = other.cuda() else { return Err(Error::Cuda { code: 1, call }) };
        let mut can = 0;
        // SAFETY: invariants 1 and 2.
        let asked = unsafe { (self.api.can_peer)(&mut can, self.device, other.device) };
        check(asked, "cuDeviceCanAccessPeer")?;
        if can == 0 {
            return Err(Error::Cuda { code: PEER_UNSUPPORTED, call });
        }
        // SAFETY: invariants 1 and 4.
        match self.call(call, |api| unsafe { (api.enable_peer)(other.context, 0) }) {
            Ok(()) | Err(Error::Cuda { code: PEER_ALREADY_ENABLED, .. }) => other.let_in(self.device),
            refused => refused,
        }
    }

    fn cuda(&self) -> Option<&CudaDevice> {
        Some(self)
    }
}

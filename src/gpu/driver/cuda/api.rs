//! The functions of the CUDA driver library that are used here, found at run time.
//!
//! cudarc's own bindings panic where the library or a symbol is missing, and return a closed enum that a
//! newer driver could leave. So the library is loaded here, every symbol is looked up before anything is
//! called, and results are plain numbers. cudarc loads the same library.

use core::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library;

use crate::base::error::{Error, Result};

/// `CUresult`.
pub(super) type Code = c_int;
/// `CUcontext`, `CUstream`, `CUevent`, `CUgraph`, `CUgraphExec`: pointers to what only the driver knows.
pub(super) type Opaque = *mut c_void;

/// `CUmemAllocationProp`.
#[repr(C)]
pub(super) struct AllocationProp {
    pub(super) kind: c_int,
    pub(super) requested_handles: c_int,
    pub(super) location: Location,
    pub(super) win32: *mut c_void,
    pub(super) flags: [u8; 8],
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Location {
    pub(super) kind: c_int,
    pub(super) id: c_int,
}

/// `CUmemAccessDesc`.
#[repr(C)]
pub(super) struct AccessDesc {
    pub(super) location: Location,
    pub(super) flags: c_int,
}

/// Declares the table of functions and how it is filled.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($arg:ty),*);)*) => {
        /// The driver's functions.
        pub(super) struct Api {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> Code,)*
        }

        impl Api {
            fn find(library: &'static Library) -> Option<Self> {
                Some(Self {
                    $($field: {
                        // SAFETY: the symbol is the driver's function of this name, whose C signature the
                        // table states; the library is never unloaded.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($arg),*) -> Code>(concat!($symbol, "\0").as_bytes())
                        };
                        *symbol.ok()?
                    },)*
                })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    driver_version = "cuDriverGetVersion": fn(*mut c_int);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device_get = "cuDeviceGet": fn(*mut c_int, c_int);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
    device_total_memory = "cuDeviceTotalMem_v2": fn(*mut usize, c_int);
    primary_retain = "cuDevicePrimaryCtxRetain": fn(*mut Opaque, c_int);
    primary_release = "cuDevicePrimaryCtxRelease_v2": fn(c_int);
    context_get = "cuCtxGetCurrent": fn(*mut Opaque);
    context_push = "cuCtxPushCurrent_v2": fn(Opaque);
    context_pop = "cuCtxPopCurrent_v2": fn(*mut Opaque);
    context_sync = "cuCtxSynchronize": fn();
    enable_peer = "cuCtxEnablePeerAccess": fn(Opaque, c_uint);
    memory_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize);
    alloc = "cuMemAlloc_v2": fn(*mut u64, usize);
    free = "cuMemFree_v2": fn(u64);
    alloc_host = "cuMemHostAlloc": fn(*mut *mut c_void, usize, c_uint);
    free_host = "cuMemFreeHost": fn(*mut c_void);
    alloc_managed = "cuMemAllocManaged": fn(*mut u64, usize, c_uint);
    va_reserve = "cuMemAddressReserve": fn(*mut u64, usize, usize, u64, u64);
    va_free = "cuMemAddressFree": fn(u64, usize);
    handle_create = "cuMemCreate": fn(*mut u64, usize, *const AllocationProp, u64);
    handle_release = "cuMemRelease": fn(u64);
    handle_map = "cuMemMap": fn(u64, usize, usize, u64, u64);
    handle_unmap = "cuMemUnmap": fn(u64, usize);
    set_access = "cuMemSetAccess": fn(u64, usize, *const AccessDesc, usize);
    granularity = "cuMemGetAllocationGranularity": fn(*mut usize, *const AllocationProp, c_int);
    stream_create = "cuStreamCreate": fn(*mut Opaque, c_uint);
    stream_destroy = "cuStreamDestroy_v2": fn(Opaque);
    stream_sync = "cuStreamSynchronize": fn(Opaque);
    stream_query = "cuStreamQuery": fn(Opaque);
    stream_wait = "cuStreamWaitEvent": fn(Opaque, Opaque, c_uint);
    event_create = "cuEventCreate": fn(*mut Opaque, c_uint);
    event_destroy = "cuEventDestroy_v2": fn(Opaque);
    event_record = "cuEventRecord": fn(Opaque, Opaque);
    event_query = "cuEventQuery": fn(Opaque);
    event_sync = "cuEventSynchronize": fn(Opaque);
    copy = "cuMemcpyAsync": fn(u64, u64, usize, Opaque);
    fill = "cuMemsetD8Async": fn(u64, u8, usize, Opaque);
    host_call = "cuLaunchHostFunc": fn(Opaque, unsafe extern "C" fn(*mut c_void), *mut c_void);
    is_capturing = "cuStreamIsCapturing": fn(Opaque, *mut c_int);
    begin_capture = "cuStreamBeginCapture_v2": fn(Opaque, c_int);
    end_capture = "cuStreamEndCapture": fn(Opaque, *mut Opaque);
    exchange_capture_mode = "cuThreadExchangeStreamCaptureMode": fn(*mut c_int);
    graph_instantiate = "cuGraphInstantiateWithFlags": fn(*mut Opaque, Opaque, u64);
    graph_launch = "cuGraphLaunch": fn(Opaque, Opaque);
    graph_destroy = "cuGraphDestroy": fn(Opaque);
    graph_exec_destroy = "cuGraphExecDestroy": fn(Opaque);
}

/// The oldest driver served: CUDA 11.4.
const OLDEST: c_int = 11040;

/// The driver's functions; `None` where there is no driver, or one too old.
pub(super) fn api() -> Result<&'static Api> {
    static API: OnceLock<Option<Api>> = OnceLock::new();
    let api = API.get_or_init(|| {
        let names = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
        // SAFETY: loading the vendor's driver library runs its initialisers, which is what it is for.
        let library = names.iter().find_map(|name| unsafe { Library::new(*name) }.ok())?;
        // Never unloaded: threads of the driver may run for as long as the process does.
        let api = Api::find(Box::leak(Box::new(library)))?;
        let mut version = 0;
        // SAFETY: both calls take what their C signatures say; `version` outlives the call.
        let ready = unsafe { (api.init)(0) == 0 && (api.driver_version)(&mut version) == 0 };
        (ready && version >= OLDEST).then_some(api)
    });
    api.as_ref().ok_or(Error::NoDriver)
}

/// A result of the driver as ours.
#[inline]
pub(super) fn check(code: Code, call: &'static str) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::Cuda { code, call }) }
}

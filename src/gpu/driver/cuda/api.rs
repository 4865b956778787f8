//! The functions of the CUDA driver library that are used here, found at run time.
//!
//! cudarc's own bindings panic where the library or a symbol is missing, and return a closed enum that a
//! newer driver could leave. So the library is loaded here, every symbol is looked up before anything is
//! called, and results are plain numbers. cudarc loads the same library.

use core::ffi::{c_char, c_int, c_uint, c_void};
use core::ptr::NonNull;
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
            /// The whole table, or the first symbol that is missing.
            ///
            /// # Safety
            /// `find` answers with the function of that name of the CUDA driver, or one of its signature,
            /// which stays loaded for ever.
            unsafe fn find(find: Find<'_>) -> Result<Self, &'static str> {
                Ok(Self {
                    $($field: {
                        let symbol = find($symbol).ok_or($symbol)?;
                        // SAFETY: by the contract, it is the function whose C signature the table states.
                        unsafe {
                            core::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> Code>(
                                symbol.as_ptr(),
                            )
                        }
                    },)*
                })
            }
        }

        #[cfg(test)]
        const SYMBOLS: &[&str] = &[$($symbol),*];
    };
}

functions! {
    init = "cuInit": fn(c_uint);
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
    can_peer = "cuDeviceCanAccessPeer": fn(*mut c_int, c_int, c_int);
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
    handle_export = "cuMemExportToShareableHandle": fn(*mut c_void, u64, c_int, u64);
    handle_import = "cuMemImportFromShareableHandle": fn(*mut u64, *mut c_void, c_int);
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
    copy_peer = "cuMemcpyPeerAsync": fn(u64, Opaque, u64, Opaque, usize, Opaque);
    fill = "cuMemsetD8Async": fn(u64, u8, usize, Opaque);
    host_call = "cuLaunchHostFunc": fn(Opaque, unsafe extern "C" fn(*mut c_void), *mut c_void);
    is_capturing = "cuStreamIsCapturing": fn(Opaque, *mut c_int);
    capture_info = "cuStreamGetCaptureInfo_v2": fn(
        Opaque, *mut c_int, *mut u64, *mut Opaque, *mut *const Opaque, *mut usize
    );
    user_object_create = "cuUserObjectCreate": fn(
        *mut Opaque, *mut c_void, unsafe extern "C" fn(*mut c_void), c_uint, c_uint
    );
    user_object_release = "cuUserObjectRelease": fn(Opaque, c_uint);
    graph_retain_object = "cuGraphRetainUserObject": fn(Opaque, Opaque, c_uint, c_uint);
    begin_capture = "cuStreamBeginCapture_v2": fn(Opaque, c_int);
    end_capture = "cuStreamEndCapture": fn(Opaque, *mut Opaque);
    exchange_capture_mode = "cuThreadExchangeStreamCaptureMode": fn(*mut c_int);
    graph_instantiate = "cuGraphInstantiateWithFlags": fn(*mut Opaque, Opaque, u64);
    graph_launch = "cuGraphLaunch": fn(Opaque, Opaque);
    graph_destroy = "cuGraphDestroy": fn(Opaque);
    graph_exec_destroy = "cuGraphExecDestroy": fn(Opaque);
}

/// Where a symbol lies, if it is there.
type Find<'a> = &'a dyn Fn(&'static str) -> Option<NonNull<c_void>>;

/// The oldest driver served: CUDA 11.4.
const OLDEST: c_int = 11040;

/// Asks a driver library what it is, and takes its functions if it is new enough.
///
/// # Safety
/// As for [`Api::find`].
unsafe fn open(find: Find<'_>) -> Result<Api> {
    const NO_DEVICE: Code = 100;
    let incomplete = |found, missing| Error::OldDriver { found, needed: OLDEST, missing: Some(missing) };
    let version_of = find("cuDriverGetVersion").ok_or(incomplete(0, "cuDriverGetVersion"))?;
    // SAFETY: the C signature of that function.
    let version_of: unsafe extern "C" fn(*mut c_int) -> Code =
        unsafe { core::mem::transmute(version_of.as_ptr()) };
    let mut found = 0;
    // SAFETY: `found` outlives the call, which may be made before any other.
    check(unsafe { version_of(&mut found) }, "cuDriverGetVersion")?;
    if found < OLDEST {
        return Err(Error::OldDriver { found, needed: OLDEST, missing: None });
    }
    // SAFETY: the caller's contract.
    let api = unsafe { Api::find(find) }.map_err(|missing| incomplete(found, missing))?;
    // SAFETY: its only argument must be 0.
    match unsafe { (api.init)(0) } {
        NO_DEVICE => Err(Error::NoDevice { ordinal: 0, available: 0 }),
        code => check(code, "cuInit").map(|()| api),
    }
}

/// The driver's functions, or why they are not to be had.
pub(super) fn api() -> Result<&'static Api> {
    static API: OnceLock<Result<Api>> = OnceLock::new();
    let api = API.get_or_init(|| {
        let names = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
        // SAFETY: loading the vendor's driver library runs its initialisers, which is what it is for.
        let library = names.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        // Never unloaded: threads of the driver may run for as long as the process does.
        let library = Box::leak(Box::new(library.ok_or(Error::NoDriver)?));
        let find = |name: &'static str| {
            // SAFETY: only the address is taken here.
            let symbol = unsafe { library.get::<*mut c_void>(name) }.ok()?;
            // SAFETY: the library is never unloaded.
            unsafe { symbol.try_as_raw_ptr() }.and_then(NonNull::new)
        };
        // SAFETY: symbols of the vendor's library, which is never unloaded.
        unsafe { open(&find) }
    });
    api.as_ref().map_err(|error| *error)
}

/// A result of the driver as ours.
#[inline]
pub(super) fn check(code: Code, call: &'static str) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::Cuda { code, call }) }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicI32, Ordering};

    use super::*;

    static VERSION: AtomicI32 = AtomicI32::new(0);
    static INIT: AtomicI32 = AtomicI32::new(0);

    unsafe extern "C" fn version(out: *mut c_int) -> Code {
        // SAFETY: the caller's local.
        unsafe { *out = VERSION.load(Ordering::Relaxed) };
        0
    }

    unsafe extern "C" fn init(_: c_uint) -> Code {
        INIT.load(Ordering::Relaxed)
    }

    /// A driver of which one symbol is missing.
    fn driver(missing: &'static str) -> impl Fn(&'static str) -> Option<NonNull<c_void>> {
        move |name| match name {
            _ if name == missing => None,
            "cuDriverGetVersion" => NonNull::new(version as *mut c_void),
            // The others are not called here.
            _ => NonNull::new(init as *mut c_void),
        }
    }

    fn error(missing: &'static str, found: i32, code: i32) -> Error {
        VERSION.store(found, Ordering::Relaxed);
        INIT.store(code, Ordering::Relaxed);
        // SAFETY: what is called of it has the right signature.
        unsafe { open(&driver(missing)) }.map(|_| ()).unwrap_err()
    }

    #[test]
    fn a_driver_that_will_not_do_says_why() {
        let old = error("", 11_030, 0);
        assert_eq!(old, Error::OldDriver { found: 11_030, needed: OLDEST, missing: None });
        assert!(old.to_string().contains("11.3") && old.to_string().contains("11.4"), "{old}");
        // A driver that is too old says so, whatever it lacks.
        assert_eq!(
            error("cuMemMap", 10_020, 0),
            Error::OldDriver { found: 10_020, needed: OLDEST, missing: None }
        );
        for &missing in SYMBOLS {
            let error = error(missing, 12_040, 0);
            assert_eq!(error, Error::OldDriver { found: 12_040, needed: OLDEST, missing: Some(missing) });
            assert!(error.to_string().contains(missing) && error.to_string().contains("12.4"), "{error}");
        }
        let none = error("cuDriverGetVersion", 0, 0);
        assert!(none.to_string().contains("cuDriverGetVersion"), "{none}");
        assert_eq!(error("", 13_000, 100), Error::NoDevice { ordinal: 0, available: 0 });
        assert_eq!(error("", 13_000, 803), Error::Cuda { code: 803, call: "cuInit" });
        VERSION.store(13_000, Ordering::Relaxed);
        INIT.store(0, Ordering::Relaxed);
        // SAFETY: as above.
        assert!(unsafe { open(&driver("")) }.is_ok());
    }
}

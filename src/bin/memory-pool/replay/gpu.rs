//! Pools of device memory, and what the driver itself offers, on a card or on the simulated device.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::NonNull;

use memory_pool::gpu::Simulation;
use memory_pool::trace::Trace;
use memory_pool::{DevicePool, Error, GpuDevice, MemoryStats, PoolConfig, SimConfig, Stream};

use super::{Held, Target};
use crate::Failure;

/// Streams that one pool can order.
const MOST_STREAMS: usize = 4093;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pool {
    Device,
    Async,
    Malloc,
}

/// Which pool is wanted, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    pool: Pool,
    /// `None`: a card if there is one.
    simulated: Option<bool>,
    /// Bytes of memory of the simulated device.
    memory: Option<usize>,
}

impl Wish {
    /// `None` for a pool that is none of the device's.
    pub(super) fn parse(
        pool: &str,
        driver: Option<&str>,
        memory: Option<&str>,
    ) -> Result<Option<Self>, Failure> {
        let pool = match pool {
            "device" => Pool::Device,
            "cuda-async" => Pool::Async,
            "cuda-malloc" => Pool::Malloc,
            _ if driver.is_some() || memory.is_some() => {
                return Err(Failure::Usage(format!("`{pool}` is no pool of a device")));
            }
            _ => return Ok(None),
        };
        let simulated = match driver {
            None => None,
            Some("sim") => Some(true),
            Some("cuda") => Some(false),
            Some(other) => return Err(Failure::Usage(format!("no driver `{other}`"))),
        };
        let gib = |text: &str| text.parse::<usize>().ok().and_then(|gib| gib.checked_mul(1 << 30));
        let memory = match memory.map(|text| gib(text).ok_or(text)) {
            None => None,
            Some(Ok(bytes)) => Some(bytes),
            Some(Err(text)) => return Err(Failure::Usage(format!("`{text}` is no number of GiB"))),
        };
        if memory.is_some() && simulated == Some(false) {
            return Err(Failure::Usage("--memory is for the simulated device".into()));
        }
        Ok(Some(Self { pool, simulated, memory }))
    }

    fn device(self) -> Result<GpuDevice, Failure> {
        let simulated = || {
            // As much as an H200 has.
            let memory = self.memory.unwrap_or(140 << 30);
            GpuDevice::simulated(SimConfig::default().memory(memory).eagerness(255))
        };
        match self.simulated {
            Some(true) => Ok(simulated()),
            Some(false) => Ok(GpuDevice::open(0)?),
            None if self.memory.is_some() => Ok(simulated()),
            None => Ok(GpuDevice::open(0).unwrap_or_else(|_| simulated())),
        }
    }
}

pub(super) fn target(wish: Wish, trace: &Trace) -> Result<Box<dyn Target>, Failure> {
    let device = wish.device()?;
    let (live, total) = (trace.peak_live(), device.total_memory());
    if live > total as u64 {
        return Err(Failure::Error(format!(
            "the trace has {live} bytes live at once, and {} has {total}",
            device.name()
        )));
    }
    if trace.streams() > MOST_STREAMS {
        let streams = trace.streams();
        return Err(Failure::Error(format!("{streams} streams are more than the {MOST_STREAMS} of a pool")));
    }
    let streams: Result<Vec<Stream>, Error> = (0..trace.streams()).map(|_| device.new_stream()).collect();
    let streams = streams?;
    match wish.pool {
        Pool::Device => {
            let pool = DevicePool::new(&device, PoolConfig::default_gpu().track_stats(false))?;
            Ok(Box::new(OnPool { pool, streams, sim: device.simulation() }))
        }
        Pool::Malloc => match device.simulation() {
            Some(sim) => Ok(Box::new(Plain { sim, sizes: RefCell::default(), held: RefCell::default() })),
            None => cuda::malloc(&device),
        },
        Pool::Async if device.is_simulated() => {
            Err(Failure::Error("the driver's own pool is the card's; use --driver cuda".into()))
        }
        Pool::Async => cuda::pool(&device, streams),
    }
}

impl From<&MemoryStats> for Held {
    fn from(stats: &MemoryStats) -> Self {
        let &MemoryStats { reserved, peak_reserved, source_calls, free, largest_free, .. } = stats;
        Self { reserved, peak_reserved, source_calls, free, largest_free }
    }
}

/// This crate's pool.
struct OnPool {
    pool: DevicePool,
    streams: Vec<Stream>,
    sim: Option<Simulation>,
}

impl Target for OnPool {
    fn alloc(&self, bytes: usize, stream: u16) -> Result<usize, String> {
        let block = self.pool.allocate_async(bytes, &self.streams[stream as usize]);
        Ok(block.map_err(|error| error.to_string())?.as_ptr() as usize)
    }

    fn free(&self, block: usize, stream: u16) {
        let block = NonNull::new(block as *mut c_void);
        // SAFETY: a live block (contract of `Target`), freed once; no work uses it.
        block
            .into_iter()
            .for_each(|block| unsafe { self.pool.deallocate_async(block, &self.streams[stream as usize]) });
    }

    fn held(&self) -> Held {
        Held::from(&self.pool.stats())
    }

    fn place(&self) -> String {
        self.pool.device().name().into()
    }

    fn driver(&self) -> Option<(u64, u64)> {
        self.sim.as_ref().map(|sim| (sim.calls(), sim.virtual_ns()))
    }

    fn books(&self) -> Option<usize> {
        Some(self.pool.metadata_size())
    }

    fn settle(&self) {
        // A failure shows in the next round.
        let _ = self.pool.device().synchronize();
    }
}

/// `cuMemAlloc` and `cuMemFree` of the simulated device.
struct Plain {
    sim: Simulation,
    sizes: RefCell<HashMap<usize, usize>>,
    held: RefCell<Held>,
}

impl Held {
    fn add(&mut self, bytes: usize) {
        self.reserved += bytes;
        self.peak_reserved = self.peak_reserved.max(self.reserved);
        self.source_calls += 1;
    }

    fn sub(&mut self, bytes: usize) {
        self.reserved -= bytes;
        self.source_calls += 1;
    }
}

impl Target for Plain {
    fn alloc(&self, bytes: usize, _: u16) -> Result<usize, String> {
        let block = self.sim.malloc(bytes).map_err(|error| error.to_string())?;
        // What a card rounds to.
        let bytes = bytes.next_multiple_of(512);
        self.sizes.borrow_mut().insert(block, bytes);
        self.held.borrow_mut().add(bytes);
        Ok(block)
    }

    fn free(&self, block: usize, _: u16) {
        if let Some(bytes) = self.sizes.borrow_mut().remove(&block)
            && self.sim.free(block).is_ok()
        {
            self.held.borrow_mut().sub(bytes);
        }
    }

    fn held(&self) -> Held {
        *self.held.borrow()
    }

    fn place(&self) -> String {
        "simulated device".into()
    }

    fn driver(&self) -> Option<(u64, u64)> {
        Some((self.sim.calls(), self.sim.virtual_ns()))
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use super::{Failure, GpuDevice, Stream, Target};

    pub(super) fn malloc(_: &GpuDevice) -> Result<Box<dyn Target>, Failure> {
        Err(memory_pool::Error::NoDriver.into())
    }

    pub(super) fn pool(_: &GpuDevice, _: Vec<Stream>) -> Result<Box<dyn Target>, Failure> {
        Err(memory_pool::Error::NoDriver.into())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    //! The driver's own allocators on a card.

    use std::sync::Arc;

    use cudarc::driver::{CudaContext, DriverError, result, sys};

    use super::*;

    fn failed(call: &'static str) -> impl Fn(DriverError) -> String {
        move |error| format!("{call}: {error:?}")
    }

    struct Common {
        device: GpuDevice,
        context: Arc<CudaContext>,
        sizes: RefCell<HashMap<usize, usize>>,
        held: RefCell<Held>,
    }

    fn common(device: &GpuDevice) -> Result<Common, Failure> {
        let context = CudaContext::new(device.ordinal())
            .map_err(failed("cuDevicePrimaryCtxRetain"))
            .map_err(Failure::Error)?;
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent")).map_err(Failure::Error)?;
        let (sizes, held) = (RefCell::default(), RefCell::default());
        Ok(Common { device: device.clone(), context, sizes, held })
    }

    struct Malloc(Common);

    pub(super) fn malloc(device: &GpuDevice) -> Result<Box<dyn Target>, Failure> {
        Ok(Box::new(Malloc(common(device)?)))
    }

    impl Target for Malloc {
        fn alloc(&self, bytes: usize, _: u16) -> Result<usize, String> {
            // SAFETY: the context is current on this thread.
            let block = unsafe { result::malloc_sync(bytes) }.map_err(failed("cuMemAlloc"))? as usize;
            let bytes = bytes.next_multiple_of(512);
            self.0.sizes.borrow_mut().insert(block, bytes);
            self.0.held.borrow_mut().add(bytes);
            Ok(block)
        }

        fn free(&self, block: usize, _: u16) {
            if let Some(bytes) = self.0.sizes.borrow_mut().remove(&block)
                // SAFETY: live (contract of `Target`), freed once.
                && unsafe { result::free_sync(block as u64) }.is_ok()
            {
                self.0.held.borrow_mut().sub(bytes);
            }
        }

        fn held(&self) -> Held {
            *self.0.held.borrow()
        }

        fn place(&self) -> String {
            self.0.device.name().into()
        }
    }

    struct Async {
        common: Common,
        pool: sys::CUmemoryPool,
        streams: Vec<Stream>,
    }

    pub(super) fn pool(device: &GpuDevice, streams: Vec<Stream>) -> Result<Box<dyn Target>, Failure> {
        let common = common(device)?;
        let mut pool = std::ptr::null_mut();
        let mut threshold = u64::MAX;
        // SAFETY: plain data whose zeros are valid; pointers to locals that outlive the calls.
        unsafe {
            let mut wishes: sys::CUmemPoolProps = std::mem::zeroed();
            wishes.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
            // Kind and number; what the second field is called depends on the version of the bindings.
            const DEVICE: i32 = 1;
            (&raw mut wishes.location).cast::<[i32; 2]>().write([DEVICE, device.ordinal() as i32]);
            let made = sys::cuMemPoolCreate(&mut pool, &wishes).result();
            made.map_err(failed("cuMemPoolCreate")).map_err(Failure::Error)?;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let set = sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast());
            set.result().map_err(failed("cuMemPoolSetAttribute")).map_err(Failure::Error)?;
        }
        Ok(Box::new(Async { common, pool, streams }))
    }

    impl Async {
        fn attribute(&self, attribute: sys::CUmemPool_attribute) -> usize {
            let mut value = 0u64;
            // SAFETY: the pool lives as long as `self`; the answer is a u64.
            unsafe { sys::cuMemPoolGetAttribute(self.pool, attribute, (&raw mut value).cast()) };
            value as usize
        }
    }

    impl Target for Async {
        fn alloc(&self, bytes: usize, stream: u16) -> Result<usize, String> {
            let stream = self.streams[stream as usize].as_raw().cast();
            let mut block = 0;
            // SAFETY: pool and stream live as long as `self`.
            let taken = unsafe { sys::cuMemAllocFromPoolAsync(&mut block, bytes, self.pool, stream) };
            taken.result().map_err(failed("cuMemAllocFromPoolAsync"))?;
            Ok(block as usize)
        }

        fn free(&self, block: usize, stream: u16) {
            let stream = self.streams[stream as usize].as_raw().cast();
            // SAFETY: live (contract of `Target`), freed once.
            let _ = unsafe { result::free_async(block as u64, stream) };
        }

        fn held(&self) -> Held {
            use sys::CUmemPool_attribute as Ask;
            let reserved = self.attribute(Ask::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
            let used = self.attribute(Ask::CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
            Held {
                reserved,
                peak_reserved: self.attribute(Ask::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH),
                free: reserved.saturating_sub(used),
                ..Held::default()
            }
        }

        fn place(&self) -> String {
            self.common.device.name().into()
        }

        fn settle(&self) {
            // A failure shows in the next round.
            let _ = self.common.context.synchronize();
        }
    }

    impl Drop for Async {
        fn drop(&mut self) {
            // SAFETY: made by `pool`, used no more.
            unsafe { sys::cuMemPoolDestroy(self.pool) };
        }
    }
}

//! One pool a device: made by the first call that names the device, and never taken down, since the driver may be
//! gone before the last destructors of a process run.

use core::ffi::{c_int, c_void};
use core::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use memory_pool::{AllocFlags, DevicePool, Error, GpuDevice, PoolConfig, SimConfig};

use crate::captures::Captures;
use crate::report::Fault;
use crate::streams::Streams;

/// Devices that can be served.
const DEVICES: usize = 64;

static SITES: [AtomicPtr<Site>; DEVICES] = [const { AtomicPtr::new(null_mut()) }; DEVICES];
/// Held while a site is made.
static MAKING: Mutex<()> = Mutex::new(());

/// What stands on one device.
#[derive(Debug)]
pub struct Site {
    pub gpu: GpuDevice,
    pub pool: DevicePool,
    pub streams: Streams,
    pub captures: Captures,
    /// Requests answered with null.
    pub failures: AtomicU64,
    /// Freed by callers that name no stream: any stream may still be at work on it.
    loose: Mutex<Vec<usize>>,
}

/// The site of a device, made if it must be.
#[inline]
pub fn site(device: c_int) -> Result<&'static Site, Fault> {
    match open_site(device) {
        Some(site) => Ok(site),
        None => make(device),
    }
}

/// The site of a device that was used already.
#[inline]
pub fn open_site(device: c_int) -> Option<&'static Site> {
    let slot = SITES.get(usize::try_from(device).ok()?)?;
    // SAFETY: null, or a leaked site.
    unsafe { slot.load(Ordering::Acquire).as_ref() }
}

/// All sites there are.
pub fn sites() -> impl Iterator<Item = &'static Site> {
    (0..DEVICES as c_int).filter_map(open_site)
}

#[cold]
fn make(device: c_int) -> Result<&'static Site, Fault> {
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(site) = open_site(device) {
        return Ok(site);
    }
    let gpu = open_device(device)?;
    let config = PoolConfig::default_gpu().with_env_gpu()?;
    let pool = DevicePool::named(&gpu, "plugin", config)?;
    for other in sites() {
        // Cards that cannot reach each other copy through the host; that is no failure.
        let _ = gpu.enable_peer_access(&other.gpu);
        let _ = other.gpu.enable_peer_access(&gpu);
    }
    let site = Box::leak(Box::new(Site {
        streams: Streams::new(&gpu),
        captures: Captures::default(),
        failures: AtomicU64::new(0),
        loose: Mutex::default(),
        pool,
        gpu,
    }));
    SITES[device as usize].store(site, Ordering::Release);
    Ok(site)
}

fn open_device(device: c_int) -> Result<GpuDevice, Fault> {
    let ordinal = usize::try_from(device).ok().filter(|&ordinal| ordinal < DEVICES);
    let ordinal = ordinal.ok_or_else(|| Fault(format!("device {device} is not there")))?;
    match std::env::var("MEMORY_POOL_GPU_DRIVER").as_deref() {
        Err(_) | Ok("cuda") => Ok(GpuDevice::open(ordinal)?),
        Ok("sim") => {
            let group = simulated();
            let none = || Fault(format!("device {device} is not there; {} simulated ones are", group.len()));
            group.get(ordinal).cloned().ok_or_else(none)
        }
        Ok(other) => Err(Fault(format!("MEMORY_POOL_GPU_DRIVER is {other:?}; allowed: cuda, sim"))),
    }
}

/// The simulated devices: `MEMORY_POOL_GPU_SIM_DEVICES` of them (1), with `MEMORY_POOL_GPU_SIM_MEMORY` bytes
/// each (64 GiB).
fn simulated() -> &'static [GpuDevice] {
    static GROUP: OnceLock<Vec<GpuDevice>> = OnceLock::new();
    GROUP.get_or_init(|| {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
        let mut config = SimConfig::default();
        if let Some(bytes) = number("MEMORY_POOL_GPU_SIM_MEMORY") {
            config = config.memory(bytes);
        }
        GpuDevice::simulated_group(config, number("MEMORY_POOL_GPU_SIM_DEVICES").unwrap_or(1))
    })
}

impl Site {
    /// A block for work on the stream of this raw handle.
    #[inline]
    pub fn take(&self, bytes: usize, raw: usize) -> Result<*mut c_void, Fault> {
        if bytes == 0 {
            return Ok(null_mut());
        }
        if self.captures.any() {
            self.captures.adopt(self, raw)?;
        }
        match self.streams.with(raw, |stream| self.pool.allocate_async(bytes, stream)) {
            Ok(block) => Ok(block.as_ptr()),
            Err(error) => self.take_slow(bytes, raw, error),
        }
    }

    /// The pool waited for its own frees and gave idle memory back already; what is left is memory that only a
    /// still device frees, and what other pools of the process hold.
    #[cold]
    fn take_slow(&self, bytes: usize, raw: usize, error: Error) -> Result<*mut c_void, Fault> {
        if matches!(error, Error::OutOfMemory { .. }) && self.gpu.synchronize().is_ok() {
            self.free_loose();
            self.pool.trim(0)?;
            let again = self.streams.with(raw, |stream| self.pool.allocate_async(bytes, stream));
            if let Ok(block) = again {
                return Ok(block.as_ptr());
            }
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
        Err(error.into())
    }

    /// Frees a block in the order of the stream of this raw handle.
    ///
    /// # Safety
    /// Work on the block was issued to that stream, to recorded ones, or is complete; none follows.
    #[inline]
    pub unsafe fn give(&self, block: *mut c_void, raw: usize) -> Result<(), Fault> {
        let Some(block) = NonNull::new(block) else { return Ok(()) };
        // SAFETY: the caller's contract; the pool refuses what is no live block of its own.
        self.streams
            .with(raw, |stream| unsafe { self.pool.try_deallocate_async(block, stream) })
            .map_err(|error| self.stray(block, error))
    }

    /// Why a block cannot be freed here.
    #[cold]
    fn stray(&self, block: NonNull<c_void>, error: Error) -> Fault {
        let owner = sites().find(|site| site.pool.owns(block.cast()) && !self.gpu.same(&site.gpu));
        match owner {
            Some(owner) => Fault(format!(
                "{block:p} is a block of device {}, not of {}: name the device it was allocated on",
                owner.gpu.ordinal(),
                self.gpu.ordinal()
            )),
            None if !self.pool.owns(block.cast()) => Fault(format!(
                "{block:p} is not memory of this library: was it loaded after the first allocation, or is the block \
                 of another allocator?"
            )),
            None => error.into(),
        }
    }

    /// A block for work on any stream: nothing in flight touches it.
    pub fn take_for_all(&self, bytes: usize) -> Result<*mut c_void, Fault> {
        if bytes == 0 {
            return Ok(null_mut());
        }
        if let Ok(block) = self.pool.allocate_settled(bytes, AllocFlags::NO_GROW) {
            return Ok(block.as_ptr());
        }
        // Waiting for the device frees what callers gave back; worth it where that is more than what is asked for.
        if self.loose_bytes() >= bytes && self.gpu.synchronize().is_ok() {
            self.free_loose();
        }
        match self.pool.allocate_settled(bytes, AllocFlags::NONE) {
            Ok(block) => Ok(block.as_ptr()),
            Err(error) => {
                if self.gpu.synchronize().is_ok() {
                    self.free_loose();
                    if let Ok(block) = self.pool.allocate_settled(bytes, AllocFlags::NONE) {
                        return Ok(block.as_ptr());
                    }
                }
                self.failures.fetch_add(1, Ordering::Relaxed);
                Err(error.into())
            }
        }
    }

    /// Takes a block back that any stream may be at work on: it is freed when the device was next waited for.
    pub fn give_for_all(&self, block: *mut c_void) -> Result<(), Fault> {
        let Some(block) = NonNull::new(block) else { return Ok(()) };
        let mut loose = self.loose.lock().unwrap_or_else(PoisonError::into_inner);
        let address = block.as_ptr() as usize;
        if self.pool.usable_size(block.cast()).is_none() || loose.contains(&address) {
            return Err(Fault(format!("{block:p} is no live block of device {}", self.gpu.ordinal())));
        }
        loose.push(address);
        Ok(())
    }

    fn loose_bytes(&self) -> usize {
        let loose = self.loose.lock().unwrap_or_else(PoisonError::into_inner);
        let size = |&address: &usize| self.pool.usable_size(NonNull::new(address as *mut u8)?);
        loose.iter().filter_map(size).sum()
    }

    /// All work of the device that was issued before the blocks were given back is complete.
    fn free_loose(&self) {
        let loose = std::mem::take(&mut *self.loose.lock().unwrap_or_else(PoisonError::into_inner));
        for block in loose.into_iter().filter_map(|address| NonNull::new(address as *mut c_void)) {
            // SAFETY: live by `give_for_all`, given up by its caller, and no work on it is left.
            let _ = unsafe { self.pool.deallocate_settled(block) };
        }
    }

    /// Gives idle memory back to the driver; returns the bytes.
    pub fn trim(&self) -> Result<usize, Fault> {
        if !self.loose.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
            && self.gpu.synchronize().is_ok()
        {
            self.free_loose();
        }
        Ok(self.pool.trim(0)?)
    }
}

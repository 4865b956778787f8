//! What stands for the CUDA runtime where the devices are simulated (`MEMORY_POOL_GPU_DRIVER=sim`): streams, two
//! kernels and captures, so that a program in any language can use this library without a card, and learn of every
//! mistake in the order of its work.

use core::ffi::{c_int, c_void};
use core::ptr::null_mut;
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use memory_pool::gpu::{Capture, SimMemory, Simulation, Touch};
use memory_pool::{Graph, Stream};

use crate::report::{Fault, guard};
use crate::site::{Site, site, sites};

/// Streams by raw handle, never dropped while they have one.
static STREAMS: Mutex<Option<HashMap<usize, &'static Stream>>> = Mutex::new(None);
static CAPTURES: Mutex<Vec<(usize, Capture<'static>)>> = Mutex::new(Vec::new());
/// Bytes that a kernel found other than it expected.
static SURPRISES: AtomicI64 = AtomicI64::new(0);

fn streams() -> MutexGuard<'static, Option<HashMap<usize, &'static Stream>>> {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn simulated(device: c_int) -> Result<(&'static Site, Simulation), Fault> {
    let site = site(device)?;
    let simulation = site.gpu.simulation().ok_or_else(|| Fault("the device is not simulated".into()))?;
    Ok((site, simulation))
}

fn stream(raw: *mut c_void) -> Result<&'static Stream, Fault> {
    let known = streams().as_ref().and_then(|known| known.get(&(raw as usize)).copied());
    known.ok_or_else(|| Fault(format!("{raw:p} is no simulated stream")))
}

/// A new stream of a simulated device; null on failure.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_sim_stream_create(device: c_int) -> *mut c_void {
    guard("simulated stream", null_mut(), || {
        let (site, _) = simulated(device)?;
        let made: &'static Stream = Box::leak(Box::new(site.gpu.new_stream()?));
        streams().get_or_insert_default().insert(made.as_raw() as usize, made);
        Ok(made.as_raw())
    })
}

/// Destroys a simulated stream. Returns 0, or −1.
///
/// # Safety
/// Nothing uses the stream any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_sim_stream_destroy(raw: *mut c_void) -> c_int {
    guard("end of a simulated stream", -1, || {
        let gone = stream(raw)?;
        streams().get_or_insert_default().remove(&(raw as usize));
        // SAFETY: leaked above, and out of the table now; the caller's contract excludes other users.
        drop(unsafe { Box::from_raw(core::ptr::from_ref(gone).cast_mut()) });
        Ok(0)
    })
}

/// Issues a kernel that says how many mistakes it found. Returns 0, or −1.
fn kernel(
    device: c_int,
    raw: *mut c_void,
    touches: &[Touch],
    work: impl Fn(&SimMemory<'_>) -> usize + Send + Sync + 'static,
) -> c_int {
    guard("simulated kernel", -1, || {
        let (_, simulation) = simulated(device)?;
        simulation.launch(stream(raw)?, 1000, touches, move |memory| {
            SURPRISES.fetch_add(work(memory) as i64, Ordering::Relaxed);
        })?;
        Ok(0)
    })
}

/// Issues a kernel that fills a range with one byte. Returns 0, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_sim_fill(
    device: c_int,
    raw: *mut c_void,
    at: *mut c_void,
    bytes: usize,
    byte: u8,
) -> c_int {
    let at = at as usize;
    kernel(device, raw, &[Touch::write(at, bytes)], move |memory| {
        usize::from(!memory.write(at, &vec![byte; bytes]))
    })
}

/// Issues a kernel that counts the bytes of a range that are other than `byte`. Returns 0, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_sim_expect(
    device: c_int,
    raw: *mut c_void,
    at: *mut c_void,
    bytes: usize,
    byte: u8,
) -> c_int {
    let at = at as usize;
    kernel(device, raw, &[Touch::read(at, bytes)], move |memory| {
        let mut found = vec![!byte; bytes];
        memory.read(at, &mut found);
        found.iter().filter(|&&found| found != byte).count()
    })
}

/// Copies between two addresses, of one simulated device or of two, in the order of a stream. Returns 0, or −1.
///
/// # Safety
/// Both are live blocks of at least `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_sim_copy(
    device: c_int,
    raw: *mut c_void,
    to: *mut c_void,
    from: *mut c_void,
    bytes: usize,
) -> c_int {
    let (to, from) = (to as usize, from as usize);
    kernel(device, raw, &[Touch::read(from, bytes), Touch::write(to, bytes)], move |memory| {
        let mut through = vec![0; bytes];
        usize::from(!memory.read(from, &mut through) || !memory.write(to, &through))
    })
}

/// Begins to record what is issued to a simulated stream. Returns 0, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_sim_begin_capture(raw: *mut c_void) -> c_int {
    guard("simulated capture", -1, || {
        let capture = stream(raw)?.begin_capture()?;
        CAPTURES.lock().unwrap_or_else(PoisonError::into_inner).push((raw as usize, capture));
        Ok(0)
    })
}

/// Ends the capture; the graph is never freed. Null on failure.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_sim_end_capture(raw: *mut c_void) -> *mut c_void {
    guard("simulated capture", null_mut(), || {
        let mut captures = CAPTURES.lock().unwrap_or_else(PoisonError::into_inner);
        let at = captures.iter().position(|(of, _)| *of == raw as usize);
        let at = at.ok_or_else(|| Fault(format!("{raw:p} is not captured")))?;
        let (_, capture) = captures.remove(at);
        Ok(Box::into_raw(Box::new(capture.end()?)).cast())
    })
}

/// Runs a captured graph in the order of a stream. Returns 0, or −1.
///
/// # Safety
/// `graph` came from `memory_pool_sim_end_capture`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_sim_launch(graph: *mut c_void, raw: *mut c_void) -> c_int {
    guard("simulated graph", -1, || {
        // SAFETY: the caller's contract; graphs are never freed.
        unsafe { &*graph.cast::<Graph>() }.launch(stream(raw)?)?;
        Ok(0)
    })
}

/// Waits for all work on a simulated device. Returns 0, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_sim_synchronize(device: c_int) -> c_int {
    guard("simulated device", -1, || {
        simulated(device)?.0.gpu.synchronize()?;
        Ok(0)
    })
}

/// Mistakes found so far: hazards in the order of work, and bytes that were not as expected.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_sim_mistakes() -> i64 {
    let hazards = sites().find_map(|site| site.gpu.simulation()).map_or(0, |found| found.hazards().len());
    hazards as i64 + SURPRISES.load(Ordering::Relaxed)
}

/// How often the simulated driver was called by this name (such as `cuEventRecord`), in all devices.
///
/// # Safety
/// `name` is null or ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_sim_calls(name: *const core::ffi::c_char) -> u64 {
    if name.is_null() {
        return 0;
    }
    // SAFETY: the caller's contract.
    let name = unsafe { core::ffi::CStr::from_ptr(name) }.to_string_lossy();
    sites().find_map(|site| site.gpu.simulation()).map_or(0, |simulation| simulation.count(&name))
}

//! For anybody, through `ctypes` or C: statistics, limits, errors, the end of a stream.

use core::ffi::{c_char, c_int, c_void};
use std::sync::atomic::Ordering;

use memory_pool::GpuDevice;

use crate::report::{Fault, guard, last};
use crate::site::{open_site, site};

/// What a device's pool did and holds, in bytes and counts. Fields are only ever added at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuPoolStats {
    /// Bytes live in blocks.
    pub allocated: u64,
    /// Most bytes ever live since the peaks were last reset.
    pub peak_allocated: u64,
    /// Bytes held from the driver.
    pub reserved: u64,
    /// Most bytes ever held since the peaks were last reset.
    pub peak_reserved: u64,
    /// Blocks handed out.
    pub allocations: u64,
    /// Blocks freed.
    pub frees: u64,
    /// Requests answered with null.
    pub failures: u64,
    /// Times the driver was asked for memory or given some back.
    pub driver_calls: u64,
    /// Bytes of host memory that the books take.
    pub metadata: u64,
    /// The largest free range.
    pub largest_free: u64,
    /// Bytes that the pool may hold; all ones for no limit.
    pub limit: u64,
    /// Bytes of memory on the device.
    pub total_memory: u64,
}

fn gather(device: c_int) -> Result<GpuPoolStats, Fault> {
    let Some(site) = open_site(device) else {
        // Asking must not make a context; a device that is there and was not used has done nothing.
        let known = usize::try_from(device).is_ok_and(|ordinal| ordinal < GpuDevice::count());
        let none = || Fault(format!("device {device} was not used, or is not there"));
        return known.then(GpuPoolStats::default).ok_or_else(none);
    };
    let stats = site.pool.stats();
    Ok(GpuPoolStats {
        allocated: stats.current_allocated as u64,
        peak_allocated: stats.peak_allocated as u64,
        reserved: stats.reserved as u64,
        peak_reserved: stats.peak_reserved as u64,
        allocations: stats.allocation_count,
        frees: stats.deallocation_count,
        failures: site.failures.load(Ordering::Relaxed),
        driver_calls: stats.source_calls,
        metadata: site.pool.metadata_size() as u64,
        largest_free: stats.largest_free as u64,
        limit: site.pool.max_size() as u64,
        total_memory: site.gpu.total_memory() as u64,
    })
}

/// Fills the first `bytes` bytes of the statistics, so that a caller who knows fewer fields gets those. Returns 0, or
/// −1 where the device is not there.
///
/// # Safety
/// `into` is valid for writes of `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_gpu_stats(device: c_int, into: *mut c_void, bytes: usize) -> c_int {
    guard("statistics", -1, || {
        let stats = gather(device)?;
        if into.is_null() {
            return Err(Fault("null instead of a place for the statistics".into()));
        }
        let len = bytes.min(size_of::<GpuPoolStats>());
        // SAFETY: the caller's contract, and no more than the statistics are read.
        unsafe { core::ptr::copy_nonoverlapping((&raw const stats).cast::<u8>(), into.cast(), len) };
        Ok(0)
    })
}

/// Writes the statistics as a JSON object with a closing NUL, as far as `bytes` goes, and returns the length that all of
/// it has without the NUL (as `snprintf` does), or −1.
///
/// # Safety
/// `into` is valid for writes of `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_gpu_stats_json(device: c_int, into: *mut c_char, bytes: usize) -> isize {
    guard("statistics", -1, || {
        let text = json(&gather(device)?);
        if !into.is_null() && bytes != 0 {
            let len = text.len().min(bytes - 1);
            // SAFETY: the caller's contract; `len + 1` bytes are written.
            unsafe {
                core::ptr::copy_nonoverlapping(text.as_ptr(), into.cast::<u8>(), len);
                into.add(len).write(0);
            }
        }
        Ok(text.len() as isize)
    })
}

fn json(stats: &GpuPoolStats) -> String {
    let GpuPoolStats { allocated, peak_allocated, reserved, peak_reserved, allocations, frees, .. } = *stats;
    let GpuPoolStats { failures, driver_calls, metadata, largest_free, limit, total_memory, .. } = *stats;
    format!(
        "{{\"allocated\":{allocated},\"peak_allocated\":{peak_allocated},\"reserved\":{reserved},\
         \"peak_reserved\":{peak_reserved},\"allocations\":{allocations},\"frees\":{frees},\
         \"failures\":{failures},\"driver_calls\":{driver_calls},\"metadata\":{metadata},\
         \"largest_free\":{largest_free},\"limit\":{limit},\"total_memory\":{total_memory}}}"
    )
}

/// Starts the peaks anew from what is current. Returns 0, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_gpu_reset_peak(device: c_int) -> c_int {
    guard("reset of the peaks", -1, || {
        site(device)?.pool.reset_peak();
        Ok(0)
    })
}

/// Gives idle memory of a device back to the driver; returns the bytes, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_gpu_trim(device: c_int) -> isize {
    guard("trim", -1, || Ok(site(device)?.trim()? as isize))
}

/// Walks every invariant of a device's pool. Returns 0, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_gpu_check(device: c_int) -> c_int {
    guard("check", -1, || {
        site(device)?.pool.check()?;
        Ok(0)
    })
}

/// The caller is about to destroy a stream. Without this call a new stream that the driver gives the same handle counts
/// as the old one. Returns 1 where the stream was known, 0 where not, −1 on failure.
///
/// # Safety
/// The stream still exists, and no other call that names it is under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_stream_ends(device: c_int, stream: *mut c_void) -> c_int {
    guard("end of a stream", -1, || {
        // SAFETY: the caller's contract.
        Ok(open_site(device).is_some_and(|site| unsafe { site.streams.end(stream as usize) }).into())
    })
}

/// What failed last on the calling thread; empty where nothing did. Good until its next failure.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_last_error() -> *const c_char {
    last()
}

//! PyTorch's pluggable allocator.
//!
//! PyTorch names the stream that a block is for, at allocation and again at its free. It does not look for null, so all
//! that can be tried is tried before null is returned.

use core::ffi::{c_int, c_void};
use core::ptr::{NonNull, null_mut};

use crate::report::{Fault, guard};
use crate::site::{site, sites};

/// `void* alloc(ssize_t size, int device, cudaStream_t stream)`.
///
/// # Safety
/// `stream` is a stream of `device` or null, and exists until `memory_pool_stream_ends` or the process's end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_torch_alloc(
    bytes: isize,
    device: c_int,
    stream: *mut c_void,
) -> *mut c_void {
    guard("allocation for PyTorch", null_mut(), || site(device)?.take(bytes as usize, stream as usize))
}

/// `void free(void* ptr, ssize_t size, int device, cudaStream_t stream)`.
///
/// # Safety
/// As for the allocation; work on the block was issued to `stream`, to recorded streams, or is complete.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_torch_free(
    block: *mut c_void,
    _bytes: isize,
    device: c_int,
    stream: *mut c_void,
) {
    guard("free for PyTorch", (), || {
        if block.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's contract.
        unsafe { site(device)?.give(block, stream as usize) }
    });
}

/// `void record_stream(void* ptr, cudaStream_t stream)`: work on `stream` uses the block too.
///
/// # Safety
/// `stream` is a stream of the block's device, as for the allocation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_torch_record_stream(block: *mut c_void, stream: *mut c_void) {
    guard("record_stream for PyTorch", (), || {
        let Some(block) = NonNull::new(block) else { return Ok(()) };
        let site = sites().find(|site| site.pool.owns(block.cast()));
        let site = site.ok_or_else(|| Fault(format!("{block:p} is not memory of this library")))?;
        Ok(site.streams.with(stream as usize, |stream| site.pool.record_stream(block, stream))?)
    });
}

/// `void reset()`: gives idle memory back to the driver; what `torch.cuda.empty_cache()` calls.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_torch_empty_cache() {
    guard("empty_cache for PyTorch", (), || sites().try_for_each(|site| site.trim().map(drop)));
}

/// `void memory_fraction(double fraction, int device)`: the pool may hold this part of the device's memory.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_torch_memory_fraction(fraction: f64, device: c_int) {
    guard("memory fraction for PyTorch", (), || {
        if !(0.0..=1.0).contains(&fraction) {
            return Err(Fault(format!("a fraction of {fraction}; allowed: 0.0 to 1.0")));
        }
        let site = site(device)?;
        let bytes = (site.gpu.total_memory() as f64 * fraction) as usize;
        Ok(site.pool.set_max_size(bytes.max(1))?)
    });
}

/// `void init(int device_count)`: PyTorch says how many devices it sees; pools are made when first used.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_torch_init(_devices: c_int) {}

/// `void begin_allocate_to_pool(int device, MempoolId_t pool, std::function<bool(cudaStream_t)> filter)`. The two
/// halves of the pool's number come in registers of their own; whether a stream is captured is asked of the driver, so
/// the filter is not called.
///
/// # Safety
/// None beyond the types.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memory_pool_torch_begin_pool(
    device: c_int,
    first: u64,
    second: u64,
    _filter: *const c_void,
) {
    guard("begin of a graph pool", (), || {
        site(device)?.captures.begin((first, second));
        Ok(())
    });
}

/// `void end_allocate_to_pool(int device, MempoolId_t pool)`.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_torch_end_pool(device: c_int, first: u64, second: u64) {
    guard("end of a graph pool", (), || {
        let site = site(device)?;
        site.captures.end(site, (first, second))
    });
}

/// `void release_pool(int device, MempoolId_t pool)`: its graphs are gone.
#[unsafe(no_mangle)]
pub extern "C" fn memory_pool_torch_release_pool(device: c_int, first: u64, second: u64) {
    guard("release of a graph pool", (), || {
        site(device)?.captures.release((first, second));
        Ok(())
    });
}

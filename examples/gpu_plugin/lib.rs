//! `libgpu_plugin.so`: PyTorch, CuPy and RMM on the GPU pool, one pool a device.
//!
//! ```text
//! cargo build --release --example gpu_plugin        # target/release/examples/libgpu_plugin.so
//! ```
//!
//! | caller | functions |
//! |---|---|
//! | PyTorch, `CUDAPluggableAllocator` | [`torch`]: allocate, free, record a stream, empty the cache, memory fraction, graph pools |
//! | CuPy, `CFunctionAllocator` | [`cupy`]: allocate, free |
//! | RMM, `callback_memory_resource` | [`rmm`]: allocate, deallocate |
//! | anybody, through `ctypes` or C | [`manage`]: statistics, trim, limits, the last error, the end of a stream |
//! | programs without a card | [`simulation`]: streams, kernels and captures of simulated devices |
//!
//! `memory_pool_gpu.py` beside this file binds them. Pools are configured by `MEMORY_POOL_GPU_*`; the variable
//! `MEMORY_POOL_GPU_DRIVER` chooses between `cuda` (the default) and `sim`, simulated devices for tests.
//!
//! What all entry points keep:
//! 1. Nothing unwinds into the caller; null (or −1) stands for failure, `memory_pool_last_error` says why, and the
//!    first few failures are printed on stderr, since most callers do not look.
//! 2. A failed call has no effect, and the pool is usable after it.
//! 3. Streams and contexts are the caller's: nothing here destroys them, and the primary context is used.
//! 4. A size of 0 is served with null, and null is freed without effect.

mod captures;
pub mod cupy;
pub mod manage;
mod report;
pub mod rmm;
pub mod simulation;
mod site;
mod streams;
pub mod torch;

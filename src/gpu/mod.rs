//! Device, pinned and managed memory: pools ordered by stream, and typed memory from them.
//!
//! ```text
//!   DeviceBuffer, DeviceVec, PinnedBuffer …      buffer, vec, host     typed, freed by ticket
//!   Lease, Seat, Handle                          seat, handle          who keeps pool and stream
//!   GpuPool<K>                                   pool                  handles, growth, the memory ladder
//!   Front                                        front                 caches by stream, no books
//!   Core = zones of Ranges + Order               core, ranges, order   under one lock; plain numbers
//!   Driver                                       driver/{cuda, sim}    a card, or a simulated one
//! ```
//! A free range belongs to the stream that freed it; who else wants it waits for one event, recorded when it
//! is wanted. `order` says how, `driver::sim` finds out when it goes wrong.

mod arena;
mod block;
mod buffer;
mod capture;
#[cfg(test)]
mod capture_tests;
mod core;
mod device;
pub(crate) mod driver;
mod front;
#[cfg(all(test, not(loom)))]
mod front_tests;
mod handle;
mod host;
#[cfg(feature = "cuda")]
mod interop;
mod kind;
#[cfg(feature = "cuda")]
mod lent;
mod order;
#[cfg(test)]
mod order_tests;
mod pool;
mod ranges;
mod seat;
#[cfg(all(test, not(loom)))]
mod seat_tests;
mod share;
mod stream;
mod vec;

pub use buffer::{AsDeviceSlice, DeviceBuffer, DeviceSlice, DeviceSliceMut};
pub use capture::{Capture, Graph, GraphMemory};
pub use device::GpuDevice;
pub use driver::sim::{Hazard, HazardKind, SimConfig, SimMemory, Simulation, Touch};
pub use host::{HostBuffer, ManagedBuffer, PinnedBuffer, Transfer};
#[cfg(feature = "cuda")]
pub use interop::{CudaBuffer, copy_from_cuda};
pub use kind::{Device, HostAccessible, Managed, MemoryKind, Pinned};
#[cfg(feature = "cuda")]
pub use lent::LentSlice;
pub use pool::{DevicePool, GpuPool, ManagedPool, PinnedPool};
pub use share::{SharedDeviceMemory, SharedExport};
pub use stream::{GpuEvent, Stream, StreamScope};
pub use vec::{DeviceBox, DeviceVec};

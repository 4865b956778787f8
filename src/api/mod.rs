//! How programs hold pool memory: the allocator traits of the ecosystem and an owning box, for every pool
//! whose memory the CPU may touch.

mod allocator;
mod boxed;
mod global;
mod named;
mod watched;

pub use boxed::PoolBox;
pub use global::GlobalPool;
pub use named::PoolRef;
pub use watched::WatchedHeap;

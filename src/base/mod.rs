//! The lowest floor: what every other floor may use and what uses nothing itself.

pub(crate) mod bits;
pub mod config;
pub mod diagnostics;
pub(crate) mod env;
pub mod error;
pub mod finding;
pub mod heap_config;
pub mod host;
pub(crate) mod latency;
pub(crate) mod lock;
pub mod policy;
pub mod pool;
pub(crate) mod report;
pub mod stack;
pub mod stats;
pub(crate) mod sync;
pub mod text;
pub(crate) mod tracking;
pub mod transfer;
pub(crate) mod turn;

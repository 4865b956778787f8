//! The lowest floor: what every other floor may use and what uses nothing itself.

pub(crate) mod bits;
pub mod config;
pub mod error;
pub mod host;
pub mod policy;
pub mod pool;
pub mod stats;
pub(crate) mod sync;
pub mod text;

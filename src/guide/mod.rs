//! The guide: from the first pool to the choice among them, and from the C++ library to this crate.
//!
//! | chapter | for |
//! |---|---|
//! | [`getting_started`] | the first ten minutes |
//! | [`choosing`] | which pool, which strategy, which synchronisation |
//! | [`debugging`] | finding overflows, leaks and the rest |
//! | [`architecture`] | how it is built, and where to look |
//! | [`performance`] | what costs what, and how to measure |
//! | [`best_practices`] | habits that pay |
//! | [`from_cpp`] | coming from the C++ library: its names and ours |
//!
//! All code in it is compiled and run with the tests.

#[doc = include_str!("getting_started.md")]
pub mod getting_started {}

#[doc = include_str!("choosing.md")]
pub mod choosing {}

#[doc = include_str!("debugging.md")]
pub mod debugging {}

#[doc = include_str!("architecture.md")]
pub mod architecture {}

#[doc = include_str!("performance.md")]
pub mod performance {}

#[doc = include_str!("best_practices.md")]
pub mod best_practices {}

#[doc = include_str!("from_cpp.md")]
pub mod from_cpp {}

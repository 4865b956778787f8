//! What is counted, remembered and checked around a pool.
//!
//! A pool carries its observer as a type. The observer `()` does nothing and costs nothing: every hook is
//! inlined away. Counts and peaks need no observer, since pools derive them from what their engines know
//! anyway; an observer is for what costs more.
//!
//! The pool calls every hook with none of its locks held, so an observer may capture stacks, take its own
//! lock, and write reports. It must not call the pool.

mod bytes;
mod debug;
mod depot;
mod history;
mod inspect;
mod metadata;
mod records;
mod surround;
#[cfg(test)]
mod tests;

use core::alloc::Layout;
use core::fmt;

pub use bytes::{HostReach, Reach};
pub use debug::DebugLayer;
pub(crate) use debug::{HeldBooks, Known};

use crate::base::diagnostics::Diagnostics;
use crate::base::pool::ActiveAllocation;
use crate::base::stats::Latency;
use crate::engine::Block;

/// A layer between a pool and those who use it. It may ask for more than the user did, hand out a part of
/// what it got, and hold freed blocks back.
///
/// Addresses come in two kinds: *inner* ones, which the engine knows, and *outer* ones, which the user knows.
///
/// # Safety
/// - [`on_alloc`](Observer::on_alloc) returns a part of the block it was given that fits the layout asked for.
/// - [`on_free`](Observer::on_free) and [`evict`](Observer::evict) return each inner address at most once for
///   each time it was allocated, and only after the user freed the block.
pub unsafe trait Observer: Send + Sync + fmt::Debug {
    /// Whether the hooks do anything; pools skip what only serves observers where this is false.
    const ACTIVE: bool = true;

    /// The layout to ask the engine for when the user asks for `asked`; `None` where that overflows.
    #[inline]
    fn inflate(&self, asked: Layout) -> Option<Layout> {
        Some(asked)
    }

    /// A block was cut for [`inflate`](Observer::inflate)`(asked)`; returns the part that the user gets.
    ///
    /// # Safety
    /// `block` was just allocated and belongs to the caller alone.
    #[inline]
    unsafe fn on_alloc(&self, asked: Layout, block: Block) -> Block {
        let _ = asked;
        block
    }

    /// The user frees the block at `outer`, with its layout where that is known. Returns the inner address to
    /// free now; `None` where the layer keeps the block for now, or refuses the address.
    ///
    /// # Safety
    /// As far as the caller knows, `outer` is a live block; an observer that checks may find otherwise.
    #[inline]
    unsafe fn on_free(&self, outer: usize, layout: Option<Layout>) -> Option<usize> {
        let _ = layout;
        Some(outer)
    }

    /// A block that the layer held back and lets go now, as an inner address. The pool asks after each free
    /// until there is none; with `all` set (memory is short, or the pool is being emptied) until nothing is
    /// held back any more.
    #[inline]
    fn evict(&self, all: bool) -> Option<usize> {
        let _ = all;
        None
    }

    /// Whether the user may resize a block in place behind the layer's back.
    #[inline]
    fn in_place(&self) -> bool {
        true
    }

    /// The live block that the user knows at `outer`: the engine's address of it, and its usable size where that
    /// is not the engine's.
    #[inline]
    fn find(&self, outer: usize) -> Option<(usize, Option<usize>)> {
        Some((outer, None))
    }

    /// The live blocks as the user sees them, if the layer keeps books of its own.
    #[inline]
    fn live(&self) -> Option<Vec<ActiveAllocation>> {
        None
    }

    /// Blocks that the layer holds back, and their bytes as the engine counts them.
    #[inline]
    fn held(&self) -> (usize, usize) {
        (0, 0)
    }

    /// The pool took `bytes` from its source.
    #[inline]
    fn on_grow(&self, bytes: usize) {
        let _ = bytes;
    }

    /// The pool was emptied, whatever was live.
    #[inline]
    fn on_reset(&self) {}

    /// Quantiles of the time from [`inflate`](Observer::inflate) to [`on_alloc`](Observer::on_alloc), where they
    /// are taken.
    fn latency(&self) -> Option<Latency> {
        None
    }

    /// The debugging side, if this is a layer that has one.
    fn diagnostics(&self) -> Option<&dyn Diagnostics> {
        None
    }

    /// The pool goes away; what is still live is leaked. Called before any memory is given back.
    #[inline]
    fn on_drop(&self) {}
}

// SAFETY: every hook hands on what it was given, unchanged and at once.
unsafe impl Observer for () {
    const ACTIVE: bool = false;
}

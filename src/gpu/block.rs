//! The memory under a device buffer: a block of a pool, or somebody else's memory that was adopted.
//!
//! Invariants
//! 1. A [`Block`] is live in its pool until it is dropped, and keeps pool and stream alive.
//! 2. All work on a block is ordered through its home stream: a copy on another stream first waits for the
//!    home stream, and the home stream then waits for the copy. So a free in the home stream's order comes
//!    after everything. What foreign code does on other streams it must say with `record_stream`.

#![forbid(unsafe_code)]

use std::any::Any;
use std::sync::Arc;

use super::device::GpuDevice;
use super::pool::DevicePool;
use super::seat::{Lease, Seat};
use super::stream::Stream;
use crate::base::error::Result;
use crate::base::sync::Lock;

/// A live block of a pool; freed on its home stream when dropped.
pub(super) struct Block {
    pub(super) lease: Lease,
}

/// Memory of somebody else's under a [`Block`]; in its seat, since that is rare and buffers are moved about.
#[derive(Debug)]
pub(super) struct Foreign {
    /// The stream on which its owner frees it.
    stream: Stream,
    /// Streams that use it beside the home stream.
    pub(super) users: Lock<Vec<Stream>>,
    /// Frees it when dropped.
    _owner: Box<dyn Any + Send + Sync>,
}

impl Foreign {
    #[cfg(feature = "cuda")]
    pub(super) fn new(stream: Stream, owner: Box<dyn Any + Send + Sync>) -> Self {
        Self { stream, users: Lock::default(), _owner: owner }
    }

    /// The owner frees it on its own stream, after all work on it; what cannot be ordered is waited for.
    pub(super) fn end(self, home: &Stream) {
        for user in self.users.lock().iter().chain([home]) {
            if self.stream.wait_for(user).is_err() {
                user.settle();
            }
        }
    }
}

impl Block {
    #[inline]
    pub(super) fn new<T>(pool: &DevicePool, bytes: usize, home: &Stream) -> Result<Self> {
        Self::cached::<T>(pool, bytes, home).or_else(|seat| Self::from_books::<T>(pool, bytes, home, seat))
    }

    /// A block that a cache has; where there is more to do, a seat for it, if there is one.
    #[inline]
    pub(super) fn cached<T>(
        pool: &DevicePool,
        bytes: usize,
        home: &Stream,
    ) -> Result<Self, Option<Arc<Seat>>> {
        Ok(Self { lease: Lease::cached::<T, _>(pool, bytes, Some(home))? })
    }

    /// A block, with what [`cached`](Self::cached) had.
    pub(super) fn from_books<T>(
        pool: &DevicePool,
        bytes: usize,
        home: &Stream,
        seat: Option<Arc<Seat>>,
    ) -> Result<Self> {
        Ok(Self { lease: Lease::from_books::<T, _>(pool, bytes, Some(home), seat)? })
    }

    /// A block of memory that is somebody else's.
    #[cfg(feature = "cuda")]
    pub(super) fn adopted(
        pool: &DevicePool,
        start: usize,
        bytes: usize,
        home: &Stream,
        foreign: Foreign,
    ) -> Self {
        Self { lease: Lease::of_none(pool, start, bytes, Some(home), Some(Box::new(foreign))) }
    }

    pub(super) fn pool(&self) -> &DevicePool {
        self.lease.pool()
    }

    pub(super) fn home(&self) -> &Stream {
        self.lease.home()
    }

    pub(super) fn start(&self) -> usize {
        self.lease.start
    }

    pub(super) fn bytes(&self) -> usize {
        self.lease.bytes
    }

    pub(super) fn device(&self) -> &GpuDevice {
        self.pool().device()
    }

    /// Grows in place; `None` where there is no room behind.
    pub(super) fn grow(&mut self, bytes: usize) -> Option<()> {
        if bytes > self.bytes() {
            let ticket = self.lease.ticket?;
            self.lease.bytes = self.pool().inner.grow_in_place(ticket, bytes, Some(self.home()))?;
        }
        Some(())
    }

    /// Issues work on the block to `stream`, ordered as invariant 2 demands.
    pub(super) fn on(&self, stream: &Stream, issue: impl FnOnce() -> Result<()>) -> Result<()> {
        stream.wait_for(self.home())?;
        issue()?;
        self.joined(stream)
    }

    /// Orders the home stream after what was just issued to `stream`. If that cannot be recorded, it is
    /// waited for: the work is under way and the block must not be reused before it is done.
    pub(super) fn joined(&self, stream: &Stream) -> Result<()> {
        self.home().wait_for(stream).inspect_err(|_| stream.settle())
    }
}

//! What a buffer holds of its pool and its stream: a [`Seat`], one counted handle of both. A pair of allocation and free
//! that a cache serves counts nothing: the seat goes into the cache with the block, and comes out with the next.
//!
//! ```text
//!   buffer ─► Lease ─► Seat ─► pool, stream           (kept handles: see `handle`)
//!                       ▲
//!   cache of the stream ┘ some spare ones, under the turn that the pair takes anyhow
//! ```
//!
//! Invariants
//! 1. A lease's block is live in the pool of its seat until the lease is dropped.
//! 2. A seat in a cache is of that cache's pool and stream. Only caches that are open have any, and caches are shut when
//!    no user has a handle of the pool or of the stream (invariant 2 of `handle`). So no pool or stream is kept by a
//!    cache alone.
//! 3. Who lays a seat down in a cache may have laid down what kept the pool: from the moment that the turn ends it
//!    touches nothing of either. Until then the turn keeps out whoever shuts the cache, and so the seat there.

use core::mem::ManuallyDrop;
use std::sync::Arc;

use super::core::Ticket;
use super::front::{Bins, Cache, Whose};
use super::kind::{Device, MemoryKind};
use super::pool::{DevicePool, GpuPool, Inner, empty};
use super::stream::Stream;
use crate::base::error::Result;
use crate::base::turn::TurnGuard;

/// A pool and a stream, kept. The kind is forgotten here: buffers know theirs. Threads that use different ones share no
/// line of the processor's.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Seat {
    pool: DevicePool,
    /// Where the block is the CPU's, a stream that is not used.
    home: Stream,
    cpu: bool,
}

impl Seat {
    fn new<K: MemoryKind>(pool: &GpuPool<K>, stream: Option<&Stream>) -> Arc<Self> {
        let home = stream.map_or_else(|| pool.device().default_stream(), Stream::keep);
        Arc::new(Self { pool: pool.keep::<Device>(), home, cpu: stream.is_none() })
    }

    #[inline]
    fn stream(&self) -> Option<&Stream> {
        (!self.cpu).then_some(&self.home)
    }

    #[inline]
    fn inner(&self) -> &Arc<Inner> {
        &self.pool.inner
    }

    /// The cache that the seat goes to, whether or not the stream is captured just now.
    #[inline]
    fn cache(&self) -> Option<&Cache> {
        self.inner().front.cache(Whose::of(self.stream(), None)?)
    }

    /// Whether a block can be freed into the cache without another look.
    #[inline]
    fn is_plain(&self) -> bool {
        !self.inner().is_watched() && (self.cpu || !self.home.may_be_captured())
    }
}

/// A live block of a pool, or none where it has no size, and what keeps its pool and stream.
pub(super) struct Lease {
    /// Taken out when the lease is dropped.
    seat: ManuallyDrop<Arc<Seat>>,
    pub(super) ticket: Option<Ticket>,
    pub(super) start: usize,
    pub(super) bytes: usize,
}

impl Lease {
    /// A block of `bytes` that a cache has; `None` where there is more to do.
    #[inline]
    pub(super) fn cached<T, K: MemoryKind>(
        pool: &GpuPool<K>,
        bytes: usize,
        stream: Option<&Stream>,
    ) -> Option<Self> {
        let (record, seat) = pool.inner.take_cached(bytes, align_of::<T>(), stream);
        let record = record?;
        let seat = ManuallyDrop::new(seat.unwrap_or_else(|| Seat::new(pool, stream)));
        Some(Self { seat, ticket: Some(record.ticket()), start: record.start(), bytes: record.len() })
    }

    /// A block of `bytes` for `T`s and for work on `stream`, or for the CPU, that no cache has.
    #[inline(never)]
    pub(super) fn from_books<T, K: MemoryKind>(
        pool: &GpuPool<K>,
        bytes: usize,
        stream: Option<&Stream>,
    ) -> Result<Self> {
        if bytes == 0 {
            stream.map_or(Ok(()), |stream| pool.inner.accept(stream))?;
            return Ok(Self::of_none(pool, empty::<T>(), 0, stream));
        }
        let (placed, seat) = pool.inner.take_uncached(bytes, align_of::<T>(), stream)?;
        let seat = ManuallyDrop::new(seat.unwrap_or_else(|| Seat::new(pool, stream)));
        Ok(Self { seat, ticket: Some(placed.ticket), start: placed.start, bytes: placed.len })
    }

    /// Memory that is not the pool's.
    pub(super) fn of_none<K: MemoryKind>(
        pool: &GpuPool<K>,
        start: usize,
        bytes: usize,
        stream: Option<&Stream>,
    ) -> Self {
        Self { seat: ManuallyDrop::new(Seat::new(pool, stream)), ticket: None, start, bytes }
    }

    pub(super) fn pool(&self) -> &DevicePool {
        &self.seat.pool
    }

    /// The stream of the block, where it is not the CPU's.
    pub(super) fn home(&self) -> &Stream {
        &self.seat.home
    }

    /// Leaves the block live. The lease has no block after.
    pub(super) fn leave_block(&mut self) {
        self.ticket = None;
    }

    /// Frees the block on another stream than its own. The lease has no block after.
    pub(super) fn give_on(&mut self, stream: &Stream) {
        if let Some(ticket) = self.ticket.take() {
            self.seat.inner().give(ticket, self.start, self.bytes, Some(stream));
        }
    }
}

impl Drop for Lease {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the lease is gone after this.
        let seat = unsafe { ManuallyDrop::take(&mut self.seat) };
        if let Some(ticket) = self.ticket {
            give(seat, ticket, self.start, self.bytes);
        }
    }
}

/// Frees a block on its own stream.
#[inline]
fn give(seat: Arc<Seat>, ticket: Ticket, start: usize, bytes: usize) {
    let seat = Arc::into_raw(seat);
    // SAFETY: counted until `lay_down` or the end of `give_slow`.
    let this = unsafe { &*seat };
    if this.is_plain()
        && let Some(cache) = this.cache()
        && let Some(mut bins) = cache.bins.try_lock()
        && this.inner().front.put(cache, &mut bins, start, false)
    {
        // SAFETY: `seat` came from `into_raw`, is of this cache, and nothing is touched after.
        unsafe { lay_down(bins, seat) };
        return;
    }
    // SAFETY: `seat` came from `into_raw` and is used no more.
    unsafe { give_slow(seat, ticket, start, bytes) };
}

/// # Safety
/// `seat` came from `Arc::into_raw`, which this takes back.
#[inline(never)]
unsafe fn give_slow(seat: *const Seat, ticket: Ticket, start: usize, bytes: usize) {
    // SAFETY: counted until `lay_down` or the end.
    let this = unsafe { &*seat };
    this.inner().give(ticket, start, bytes, this.stream());
    if let Some(cache) = this.cache()
        && let Some(bins) = cache.bins.try_lock()
    {
        // SAFETY: `seat` came from `into_raw`, is of this cache, and nothing is touched after.
        unsafe { lay_down(bins, seat) };
        return;
    }
    // SAFETY: from `into_raw`, once.
    drop(unsafe { Arc::from_raw(seat) });
}

/// Keeps a seat for the next buffer, if the cache is open and has room; else lets go of it, without the turn, for it
/// may be the last.
///
/// # Safety
/// `seat` came from `Arc::into_raw`, which this takes back, and is of the cache behind `bins` (invariant 2). The caller
/// touches neither after (invariant 3).
#[inline]
unsafe fn lay_down(mut bins: TurnGuard<'_, Bins>, seat: *const Seat) {
    // SAFETY: from `into_raw`, once.
    let seat = unsafe { Arc::from_raw(seat) };
    let rest = bins.keep_seat(seat);
    drop(bins);
    drop(rest);
}

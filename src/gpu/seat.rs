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
//! 4. `place` is null or the cache of the seat's stream in the seat's pool. Caches stay where they are as long as the
//!    pool, and the stream's slot is its own as long as the stream; the seat keeps both.

use core::mem::ManuallyDrop;
use std::sync::Arc;

use super::block::Foreign;
use super::core::Ticket;
use super::front::{Cache, Guarded, Whose};
use super::kind::{Device, MemoryKind};
use super::pool::{DevicePool, GpuPool, Inner, empty};
use super::stream::Stream;
use crate::base::error::Result;
use crate::base::sync::atomic::{AtomicPtr, Ordering};
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
    /// Where a stream's block goes, once that is known: the way there from the stream's slot is what a pair of
    /// allocation and free would wait for.
    place: AtomicPtr<Cache>,
    /// Set where the memory is not the pool's.
    foreign: Option<Box<Foreign>>,
}

impl Seat {
    fn new<K: MemoryKind>(
        pool: &GpuPool<K>,
        stream: Option<&Stream>,
        foreign: Option<Box<Foreign>>,
    ) -> Arc<Self> {
        let home = stream.map_or_else(|| pool.device().default_stream(), Stream::keep);
        let (pool, cpu) = (pool.keep::<Device>(), stream.is_none());
        Arc::new(Self { pool, home, cpu, place: AtomicPtr::default(), foreign })
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
        if self.cpu {
            return self.inner().front.cache(Whose::Cpu);
        }
        // SAFETY: invariant 4.
        unsafe { self.place.load(Ordering::Acquire).as_ref() }
    }

    /// [`cache`](Self::cache), where it is not known yet.
    fn find_cache(&self) -> Option<&Cache> {
        let cache = self.inner().front.cache(Whose::of(self.stream(), None)?)?;
        self.place.store((&raw const *cache).cast_mut(), Ordering::Release);
        Some(cache)
    }

    /// Whether a block can be freed into the cache without another look.
    #[inline]
    fn is_plain(&self) -> bool {
        !self.inner().is_watched() && (self.cpu || !self.home.may_be_captured())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(foreign) = self.foreign.take() {
            foreign.end(&self.home);
        }
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
    /// A block of `bytes` that a cache has; where there is more to do, a seat for it, if there is one.
    #[inline]
    pub(super) fn cached<T, K: MemoryKind>(
        pool: &GpuPool<K>,
        bytes: usize,
        stream: Option<&Stream>,
    ) -> Result<Self, Option<Arc<Seat>>> {
        let (record, seat) = pool.inner.take_cached(bytes, align_of::<T>(), stream);
        let Some(record) = record else { return Err(seat) };
        let seat = ManuallyDrop::new(seat.unwrap_or_else(|| Seat::new(pool, stream, None)));
        Ok(Self { seat, ticket: Some(record.ticket()), start: record.start(), bytes: record.len() })
    }

    /// A block of `bytes` for `T`s and for work on `stream`, or for the CPU, with what [`cached`](Self::cached) had.
    #[inline(never)]
    pub(super) fn from_books<T, K: MemoryKind>(
        pool: &GpuPool<K>,
        bytes: usize,
        stream: Option<&Stream>,
        seat: Option<Arc<Seat>>,
    ) -> Result<Self> {
        if bytes == 0 {
            stream.map_or(Ok(()), |stream| pool.inner.accept(stream))?;
            return Ok(Self::of_none(pool, empty::<T>(), 0, stream, None));
        }
        let (placed, seat) = pool.inner.take_uncached(bytes, align_of::<T>(), stream, seat)?;
        let seat = ManuallyDrop::new(seat.unwrap_or_else(|| Seat::new(pool, stream, None)));
        Ok(Self { seat, ticket: Some(placed.ticket), start: placed.start, bytes: placed.len })
    }

    /// Memory that is not the pool's.
    pub(super) fn of_none<K: MemoryKind>(
        pool: &GpuPool<K>,
        start: usize,
        bytes: usize,
        stream: Option<&Stream>,
        foreign: Option<Box<Foreign>>,
    ) -> Self {
        Self { seat: ManuallyDrop::new(Seat::new(pool, stream, foreign)), ticket: None, start, bytes }
    }

    /// Whose the memory is where it is not the pool's.
    pub(super) fn foreign(&self) -> Option<&Foreign> {
        self.seat.foreign.as_deref()
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
        // Apart, so that the common way saves no registers for what it rarely comes to.
        if !self.goes_to_cache() {
            self.drop_slow();
        }
    }
}

impl Lease {
    /// Frees the block into the cache of its stream, with the seat, if that takes no more than a look. Then the lease
    /// has neither.
    #[inline(always)]
    fn goes_to_cache(&mut self) -> bool {
        // SAFETY: counted until `lay_down`.
        let seat = unsafe { &*Arc::as_ptr(&self.seat) };
        if self.ticket.is_some()
            && seat.is_plain()
            && let Some(cache) = seat.cache()
            // Most blocks that come here by way of the books have no record, and need no turn to see that.
            && let Some(found) = seat.inner().front.find(self.start)
            && let Some(mut inside) = cache.turn.try_lock()
            && seat.inner().front.put(cache, &mut inside, found, false)
        {
            // SAFETY: the seat is of this cache, and nothing is touched after; nobody takes it out of the lease again.
            unsafe { lay_down(inside, ManuallyDrop::take(&mut self.seat)) };
            return true;
        }
        false
    }

    /// Frees the block, if there is one, and lets go of the seat.
    #[inline(never)]
    fn drop_slow(&mut self) {
        // SAFETY: the lease is dropped, and its seat was not taken.
        let seat = unsafe { ManuallyDrop::take(&mut self.seat) };
        let Some(ticket) = self.ticket else { return };
        // SAFETY: counted until `lay_down` or the end.
        let this = unsafe { &*Arc::as_ptr(&seat) };
        let inner = this.inner();
        if inner.is_watched() {
            inner.give(ticket, self.start, self.bytes, this.stream());
        } else {
            // Of a stream that others may capture the driver is asked once.
            let session = Inner::session(this.stream());
            if !this.is_plain()
                && matches!(session, Ok(None))
                && let Some(cache) = this.cache().or_else(|| this.find_cache())
                && let Some(found) = inner.front.find(self.start)
                && let Some(mut inside) = cache.turn.try_lock()
                && inner.front.put(cache, &mut inside, found, false)
            {
                // SAFETY: the seat is of this cache, and nothing is touched after.
                return unsafe { lay_down(inside, seat) };
            }
            inner.give_to_books(ticket, this.stream(), session);
        }
        if let Some(cache) = this.cache().or_else(|| this.find_cache())
            && let Some(inside) = cache.turn.try_lock()
        {
            // SAFETY: as above.
            unsafe { lay_down(inside, seat) };
        }
    }
}

/// Keeps a seat for the next buffer, if the cache is open and has room; else lets go of it, without the turn, for it
/// may be the last.
///
/// # Safety
/// `seat` is of the cache behind `inside` (invariant 2). The caller touches neither it nor the cache after (invariant 3).
#[inline(always)]
unsafe fn lay_down(mut inside: TurnGuard<'_, Guarded>, seat: Arc<Seat>) {
    let rest = inside.keep_seat(seat);
    drop(inside);
    if let Some(rest) = rest {
        let_go(rest);
    }
}

#[cold]
#[inline(never)]
fn let_go(seat: Arc<Seat>) {
    drop(seat);
}

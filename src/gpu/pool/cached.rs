//! How blocks come out of the cache of their stream at a glance, and typed buffers by theirs, with a seat.

use std::sync::Arc;

use super::super::core::Placed;
use super::super::front::{Cache, Guarded, Place, Record, Whose};
use super::super::seat::Seat;
use super::super::stream::Stream;
use super::inner::Inner;
use super::options;
use crate::base::error::Result;
use crate::base::pool::AllocFlags;

impl Inner {
    /// A cached block, and a seat, if the cache has one; a seat alone where the request takes more than a look into the
    /// cache, which is locked once for both. Both are returned in registers (see
    /// [`Front::pick`](super::super::front::Front::pick)).
    #[inline(never)]
    pub(in crate::gpu) fn take_cached(
        &self,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
    ) -> (Option<&Record>, Option<Arc<Seat>>) {
        let Some(cache) = self.plain_cache(stream) else { return (None, None) };
        let Some(mut inside) = cache.turn.try_lock() else { return (None, None) };
        let place = self.look(cache, bytes);
        (place.and_then(|place| self.pick(cache, &mut inside, place, align)), inside.seat())
    }

    /// A cached block alone.
    #[inline(never)]
    pub(super) fn take_record(&self, bytes: usize, align: usize, stream: Option<&Stream>) -> Option<&Record> {
        let cache = self.plain_cache(stream)?;
        let place = self.look(cache, bytes)?;
        self.pick(cache, &mut *cache.turn.try_lock()?, place, align)
    }

    /// The cache of a stream, or the CPU's, if that can be said at a glance.
    #[inline(always)]
    pub(super) fn plain_cache(&self, stream: Option<&Stream>) -> Option<&Cache> {
        if self.watch.is_some() || !stream.is_none_or(|stream| self.orders_by(stream)) {
            return None;
        }
        self.front.cache(Whose::of(stream, None)?)
    }

    /// Where a block for a request lies, and the bytes that the pool makes of it.
    #[inline(always)]
    fn look(&self, cache: &Cache, bytes: usize) -> Option<(Place, usize)> {
        let rounded = options::rounded(&self.config, bytes)?;
        Some((self.front.look(cache, rounded)?, rounded))
    }

    #[inline(always)]
    fn pick(
        &self,
        cache: &Cache,
        inside: &mut Guarded,
        (place, rounded): (Place, usize),
        align: usize,
    ) -> Option<&Record> {
        self.front.pick(cache, inside, place, rounded, align.max(self.config.alignment))
    }

    /// Whether the stream orders this pool's memory, for this thread, and is in no capture, at a glance: the stream of
    /// another thread is none of which that can be said.
    #[inline(always)]
    fn orders_by(&self, stream: &Stream) -> bool {
        !stream.may_be_captured() && self.device.same(stream.device())
    }

    /// A block that [`take_cached`](Self::take_cached) did not have, with the seat that it had, or one. `bytes` is not 0.
    pub(in crate::gpu) fn take_uncached(
        self: &Arc<Self>,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        seat: Option<Arc<Seat>>,
    ) -> Result<(Placed, Option<Arc<Seat>>)> {
        let flags = AllocFlags::NONE;
        if self.watch.is_some() {
            return Ok((self.take(bytes, align, stream, flags, false)?, seat));
        }
        if let Some(stream) = stream {
            self.accept(stream)?;
        }
        let session = Self::session(stream)?;
        // Now it is known that a stream which others may capture is not captured just now.
        if let Some(stream) = stream.filter(|stream| session.is_none() && stream.may_be_captured())
            && let Some(cache) = self.front.cache(Whose::Stream(stream.slot()))
            && let Some(mut inside) = cache.turn.try_lock()
            && let Some(place) = self.look(cache, bytes)
            && let Some(record) = self.pick(cache, &mut inside, place, align)
        {
            return Ok((record.placed(), inside.seat()));
        }
        let (rounded, align) = (self.rounded(bytes)?, align.max(self.config.alignment));
        Ok((self.take_from_books(rounded, align, stream, session, flags, false)?, seat))
    }
}

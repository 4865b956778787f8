//! How typed buffers come by their blocks: from a cache of their stream, with a seat, or else from the books.

use std::sync::Arc;

use super::super::core::Placed;
use super::super::front::{Record, Whose};
use super::super::seat::Seat;
use super::super::stream::Stream;
use super::inner::Inner;
use super::options;
use crate::base::error::{Error, OomReason, Result};
use crate::base::pool::AllocFlags;

impl Inner {
    /// A cached block and a seat, if the cache has one; nothing where the request takes more than a look into a cache.
    /// Both are returned in registers (see [`Front::pick`](super::super::front::Front::pick)).
    #[inline(never)]
    pub(in crate::gpu) fn take_cached(
        &self,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
    ) -> (Option<&Record>, Option<Arc<Seat>>) {
        let whose = match stream {
            Some(stream) if !self.orders_by(stream) => return (None, None),
            stream => Whose::of(stream, None),
        };
        if let Some(rounded) = options::rounded(&self.config, bytes)
            && self.watch.is_none()
            && bytes != 0
            && let Some(whose) = whose
            && let Some(cache) = self.front.cache(whose)
            && cache.blocks() != 0
            && let Some(mut bins) = cache.bins.try_lock()
            && let Some(record) = self.front.pick(cache, &mut bins, rounded, align.max(self.config.alignment))
        {
            return (Some(record), bins.seat());
        }
        (None, None)
    }

    /// Whether the stream orders this pool's memory, for this thread, and is in no capture, at a glance.
    #[inline]
    fn orders_by(&self, stream: &Stream) -> bool {
        self.device.same(stream.device()) && stream.check_thread().is_ok() && !stream.may_be_captured()
    }

    /// A block that [`take_cached`](Self::take_cached) did not have, and a seat, if the cache has one. `bytes` is not 0.
    pub(in crate::gpu) fn take_uncached(
        self: &Arc<Self>,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
    ) -> Result<(Placed, Option<Arc<Seat>>)> {
        let flags = AllocFlags::NONE;
        if self.watch.is_some() || !stream.is_none_or(|stream| self.orders_by(stream)) {
            return Ok((self.take(bytes, align, stream, flags, false)?, None));
        }
        let overflow = Error::oom(bytes, OomReason::Overflow);
        let rounded = options::rounded(&self.config, bytes).ok_or(overflow)?;
        let placed =
            self.take_from_books(rounded, align.max(self.config.alignment), stream, None, flags, false)?;
        Ok((placed, Whose::of(stream, None).and_then(|whose| self.front.seat(whose))))
    }
}

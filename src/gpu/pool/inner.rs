//! What all handles of a pool share, whatever its kind: blocks taken and given back.
//!
//! Who locks what: `core` guards the books; driver calls that order streams are made under it, those that
//! take or give memory are not. `growth` is held by the one thread that asks the driver for memory; it is
//! taken before `core`, never after.

use core::alloc::Layout;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;

use super::super::arena::Unrest;
use super::super::capture::Session;
use super::super::core::{Ask, Core, Placed, Ticket};
use super::super::device::{GpuDevice, Member};
use super::super::driver::Space;
use super::super::front::{Cache, Front, Whose};
use super::super::handle::Users;
use super::super::ranges::CLEAN;
use super::super::stream::Stream;
use super::options;
use super::source::{Reserved, Source};
use super::watch::Watch;
use crate::base::config::PoolConfig;
use crate::base::error::{Error, OomReason, PointerFault, Refusal, Result};
use crate::base::pool::{AllocFlags, MemoryType};
use crate::base::sync::{Lock, LockGuard};
use crate::base::tracking::Tracking;

/// Asked when memory is short, outside all locks; `true` means that something was freed.
pub(super) type OomCallback = dyn Fn(Layout) -> bool + Send + Sync;

pub(in crate::gpu) struct Inner {
    pub(super) users: Users,
    pub(in crate::gpu) device: GpuDevice,
    pub(super) source: Source,
    pub(super) config: PoolConfig,
    pub(super) name: String,
    /// Asked before the books.
    pub(in crate::gpu) front: Front,
    pub(in crate::gpu) core: Lock<Core>,
    pub(super) growth: Lock<()>,
    /// Whether the pool may hand nothing out any more. Changes under `growth` and `core`.
    pub(super) closed: AtomicBool,
    /// Most bytes that the pool may hold; `max_size` of the configuration until it is set anew.
    pub(super) limit: AtomicUsize,
    pub(super) stream: Lock<Stream>,
    pub(super) callback: Lock<Option<Arc<OomCallback>>>,
    pub(super) tracking: Tracking,
    /// Set where somebody watches the pool's blocks.
    pub(super) watch: Option<Box<Watch>>,
}

impl Inner {
    pub(super) fn new(
        device: &GpuDevice,
        name: &str,
        config: PoolConfig,
        memory_type: MemoryType,
        space: Space,
    ) -> Result<Arc<Self>> {
        options::validate(&config, memory_type)?;
        // The CPU's small values need no 512 bytes each.
        let shift = if memory_type == MemoryType::Gpu { 9 } else { 6 };
        let watch = Watch::new(device, name, &config, memory_type)?;
        let mut core = Core::new(shift, &config);
        let source = Source::new(device, space, config.max_size);
        if let Some(Reserved { start, len, unit }) = source.reserved
            && !core.set_space(start, len, unit)
        {
            // SAFETY: nothing was mapped yet.
            unsafe { source.close(&*device.0.driver) };
            return Err(Error::oom(0, OomReason::Source));
        }
        core.unrest = Unrest::new(device.total_memory());
        let inner = Arc::new(Self {
            users: Users::one(),
            device: device.clone(),
            source,
            name: name.into(),
            front: Front::new(shift, &config.strategy, core.records.clone()),
            core: Lock::new(core),
            growth: Lock::default(),
            closed: AtomicBool::new(false),
            limit: AtomicUsize::new(config.max_size),
            stream: Lock::new(device.default_stream()),
            callback: Lock::default(),
            tracking: Tracking::new(config.track_stats),
            watch,
            config,
        });
        let member: Arc<dyn Member> = inner.clone();
        device.0.join(Arc::downgrade(&member));
        if inner.config.initial_size != 0 {
            inner.reserve(inner.config.initial_size)?;
            inner.reserve_for_small();
        }
        Ok(inner)
    }

    /// A block that is found by its address, for which [`take_record`](Self::take_record) looked before. `bytes` is
    /// not 0.
    #[inline(never)]
    pub(super) fn take_raw(
        self: &Arc<Self>,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        flags: AllocFlags,
    ) -> Result<NonNull<[u8]>> {
        let cache = self.plain_cache(stream);
        let placed = if cache.is_some() {
            let size = (self.rounded(bytes)?, align.max(self.config.alignment));
            self.from_books(size, stream, None, cache, flags, true)?
        } else {
            self.take(bytes, align, stream, flags, true)?
        };
        if placed.published { Self::block(placed.start, placed.len) } else { self.published(placed, stream) }
    }

    pub(super) fn block(start: usize, len: usize) -> Result<NonNull<[u8]>> {
        let base = NonNull::new(start as *mut u8).ok_or(Error::pointer(start, PointerFault::Foreign))?;
        Ok(NonNull::slice_from_raw_parts(base, len))
    }

    /// A block that could not be found by its address so far.
    #[cold]
    pub(super) fn published(
        self: &Arc<Self>,
        placed: Placed,
        stream: Option<&Stream>,
    ) -> Result<NonNull<[u8]>> {
        if !self.core.lock().publish(placed.ticket) {
            self.give(placed.ticket, placed.start, placed.len, stream);
            return Err(Error::oom(placed.len, OomReason::Source));
        }
        Self::block(placed.start, placed.len)
    }

    /// A block for work on `stream`, or for the CPU, and as far as there is room for that `by_address`: to be found by
    /// its address. `bytes` is not 0.
    pub(in crate::gpu) fn take(
        self: &Arc<Self>,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        flags: AllocFlags,
        by_address: bool,
    ) -> Result<Placed> {
        match &self.watch {
            None => self.take_plain(bytes, align, stream, flags, by_address),
            Some(watch) => self.take_watched(watch, bytes, align, stream, flags, by_address),
        }
    }

    /// [`take`](Self::take) in a pool that nobody watches, or for who does.
    #[inline(never)]
    pub(super) fn take_plain(
        self: &Arc<Self>,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        flags: AllocFlags,
        by_address: bool,
    ) -> Result<Placed> {
        let (rounded, align) = (self.rounded(bytes)?, align.max(self.config.alignment));
        if let Some(stream) = stream {
            self.accept(stream)?;
        }
        let session = Self::session(stream)?;
        let cache = Whose::of(stream, session.as_ref()).and_then(|whose| self.front.cache(whose));
        let cache = cache.filter(|cache| cache.blocks() != 0);
        match cache.and_then(|cache| self.front.take(cache, rounded, align)) {
            Some(placed) => Ok(placed),
            None => self.take_from_books(rounded, align, stream, session, flags, by_address),
        }
    }

    #[inline]
    pub(super) fn rounded(&self, bytes: usize) -> Result<usize> {
        options::rounded(&self.config, bytes).ok_or_else(|| Error::oom(bytes, OomReason::Overflow))
    }

    /// A block that no cache has, of a size that was rounded.
    #[inline(never)]
    pub(super) fn take_from_books(
        self: &Arc<Self>,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        session: Option<Arc<Session>>,
        flags: AllocFlags,
        by_address: bool,
    ) -> Result<Placed> {
        let session = session.as_ref();
        let cache = Whose::of(stream, session).and_then(|whose| self.front.cache(whose));
        self.from_books((bytes, align), stream, session, cache, flags, by_address)
    }

    #[inline(always)]
    fn from_books(
        self: &Arc<Self>,
        (bytes, align): (usize, usize),
        stream: Option<&Stream>,
        session: Option<&Arc<Session>>,
        cache: Option<&Cache>,
        flags: AllocFlags,
        by_address: bool,
    ) -> Result<Placed> {
        let mut core = self.core.lock();
        self.open()?;
        let lane = self.lane(&mut core, stream, session)?;
        let ask = Ask { bytes, align, lane, by_address };
        // What this stream freed joins its neighbours, or the best fit would not be seen; small blocks do when nothing
        // fits.
        if let Some(cache) = cache {
            self.front.take_large_back(&mut core, &*self.device.0.driver, cache, bytes);
        }
        let placed = match core.place(ask) {
            Some(placed) => placed,
            None => {
                let placed;
                (core, placed) = self.take_missing(core, cache, ask, flags)?;
                placed
            }
        };
        core.note_peak(|| self.front.low());
        if let Some(cache) = cache {
            self.front.settle_low(cache);
        }
        Ok(placed)
    }

    /// A block that the stream does not find among what is free to it at once.
    #[cold]
    fn take_missing<'a>(
        &'a self,
        mut core: LockGuard<'a, Core>,
        cache: Option<&Cache>,
        ask: Ask,
        flags: AllocFlags,
    ) -> Result<(LockGuard<'a, Core>, Placed)> {
        if let Some(placed) = self.search(&mut core, cache, ask) {
            return Ok((core, placed));
        }
        drop(core);
        let placed = self.take_growing(ask, flags)?;
        Ok((self.core.lock(), placed))
    }

    /// The same without a call to the driver for memory.
    fn search(&self, core: &mut Core, own: Option<&Cache>, ask: Ask) -> Option<Placed> {
        let driver = &*self.device.0.driver;
        core.note_miss();
        // What the stream itself freed takes no call to the driver.
        for &least in self.front.steps(ask.bytes) {
            if own.is_some_and(|own| self.front.empty(core, driver, own, least))
                && let Some(placed) = core.place_again(ask)
            {
                return Some(placed);
            }
        }
        core.place_slow(driver, ask).or_else(|| {
            self.front.take_all_back(core, driver).then(|| core.place_slow(driver, ask)).flatten()
        })
    }

    /// Says no to streams that cannot order this pool's memory.
    #[inline]
    pub(in crate::gpu) fn accept(&self, stream: &Stream) -> Result<()> {
        self.device.must_be(stream.device())?;
        stream.check_thread()
    }

    /// The capture that what is done on `stream` now becomes part of. Asked before the books are locked and kept
    /// until after, since the last handle of a session goes through all pools.
    #[inline]
    pub(in crate::gpu) fn session(stream: Option<&Stream>) -> Result<Option<Arc<Session>>> {
        match stream {
            Some(stream) if stream.may_be_captured() => stream.capture_session(),
            _ => Ok(None),
        }
    }

    #[inline]
    pub(super) fn lane(
        self: &Arc<Self>,
        core: &mut Core,
        stream: Option<&Stream>,
        session: Option<&Arc<Session>>,
    ) -> Result<u16> {
        let Some(stream) = stream else { return Ok(CLEAN) };
        #[cfg(test)]
        let session = session.filter(|_| !core.order.is(super::super::order::Mutant::CaptureInPublic));
        match session {
            None => core.lane_for(stream),
            Some(session) => {
                // The graph will need this memory as long as it lives.
                session.keep(self.clone());
                core.capture_lane(session.id, stream.slot())
            }
        }
    }

    /// Frees a block on `stream`, or for the CPU.
    pub(super) fn give_plain(self: &Arc<Self>, ticket: Ticket, start: usize, stream: Option<&Stream>) {
        let session = Self::session(stream);
        let whose = session.as_ref().ok().and_then(|session| Whose::of(stream, session.as_ref()));
        let cache = whose.and_then(|whose| self.front.cache(whose));
        if !cache.is_some_and(|cache| self.front.give(cache, start, false)) {
            self.give_to_books(ticket, stream, session);
        }
    }

    /// Frees a block of which the address is known, on `stream` or for the CPU.
    #[inline]
    pub(super) fn give_plain_at(self: &Arc<Self>, start: usize, stream: Option<&Stream>) -> Result<()> {
        let whose = Whose::of(stream, None).filter(|_| !stream.is_some_and(Stream::may_be_captured));
        match whose.and_then(|whose| self.front.cache(whose)) {
            Some(cache) if self.front.give(cache, start, true) => Ok(()),
            cache => self.give_at_slow(start, stream, cache),
        }
    }

    /// [`give_plain_at`](Self::give_plain_at) where it takes more than a look.
    #[inline(never)]
    fn give_at_slow(
        self: &Arc<Self>,
        start: usize,
        stream: Option<&Stream>,
        cache: Option<&Cache>,
    ) -> Result<()> {
        if let Some(stream) = stream.filter(|stream| stream.may_be_captured()) {
            return self.give_at_asked(start, stream);
        }
        let mut core = self.core.lock();
        let Some(block) = core.find_live(start) else { return Err(core.fault(start)) };
        let lane = stream.map_or(Some(CLEAN), |stream| core.order.lane(stream.slot()));
        match lane {
            Some(lane) => {
                self.free_on(&mut core, block, stream, Whose::of(stream, None), cache, (lane, None));
            }
            None => self.free_in(&mut core, block.0, stream, &Ok(None)),
        }
        Ok(())
    }

    /// The same where the stream may be captured. The driver is asked about that once, and the books are locked once.
    #[inline(never)]
    fn give_at_asked(self: &Arc<Self>, start: usize, stream: &Stream) -> Result<()> {
        let session = Self::session(Some(stream));
        if matches!(session, Ok(None))
            && let Some(cache) = self.front.cache(Whose::Stream(stream.slot()))
            && self.front.give(cache, start, true)
        {
            return Ok(());
        }
        let mut core = self.core.lock();
        let ticket = core.find(start)?;
        self.free_in(&mut core, ticket, Some(stream), &session);
        // The session is dropped with no lock held.
        drop(core);
        Ok(())
    }

    /// Frees a block that no cache takes. The session is dropped with no lock held.
    #[inline(never)]
    pub(in crate::gpu) fn give_to_books(
        self: &Arc<Self>,
        ticket: Ticket,
        stream: Option<&Stream>,
        session: Result<Option<Arc<Session>>>,
    ) {
        self.free_in(&mut self.core.lock(), ticket, stream, &session);
    }

    fn free_in(
        self: &Arc<Self>,
        core: &mut Core,
        ticket: Ticket,
        stream: Option<&Stream>,
        session: &Result<Option<Arc<Session>>>,
    ) {
        let session = session.as_ref().map(Option::as_ref).map_err(|error| *error);
        let whose = session.ok().and_then(|session| Whose::of(stream, session));
        let lanes = session.and_then(|session| {
            let lane = self.lane(core, stream, session)?;
            let captured = stream.filter(|_| session.is_some());
            Ok((lane, captured.map(|stream| core.lane_for(stream)).transpose()?))
        });
        // No lane is to be had only while 4093 streams are in use: then the device is waited for instead.
        let (lane, before, whose) = match lanes {
            Ok((lane, before)) => (lane, before, whose),
            Err(_) if self.device.0.driver.device_sync().is_ok() => (CLEAN, None, None),
            // The context is lost; the block must not be reused.
            Err(_) => return,
        };
        let block = (ticket, core.len(ticket));
        let cache = whose.and_then(|whose| self.front.cache(whose));
        self.free_on(core, block, stream, whose, cache, (lane, before));
    }

    /// Frees a block of this length on `lane`, to the cache of `whose`, which is `cache` if there is one yet, or to the
    /// books. `before` is that of [`Core::free`].
    #[inline(always)]
    fn free_on(
        &self,
        core: &mut Core,
        block: (Ticket, usize),
        stream: Option<&Stream>,
        whose: Option<Whose>,
        cache: Option<&Cache>,
        (lane, before): (u16, Option<u16>),
    ) {
        let driver = &*self.device.0.driver;
        // What caches handed out since made the peak perhaps.
        core.note_peak(|| self.front.low());
        // What nobody could ask for again is not cached (invariant 2 of `handle`).
        let kept = whose.filter(|_| !self.users.is_none() && !stream.is_some_and(Stream::is_unused));
        let kept = kept.and_then(|whose| cache.or_else(|| self.front.new_cache(whose)));
        if kept.is_some_and(|cache| self.front.keep(core, driver, cache, lane, block)) {
            return;
        }
        core.free(driver, block.0, lane, before);
        if let Some(cache) = cache {
            self.front.settle_low(cache);
        }
    }

    /// Grows a block where it is, into what its stream (or the CPU) may use; returns its size then.
    pub(in crate::gpu) fn grow_in_place(
        self: &Arc<Self>,
        ticket: Ticket,
        bytes: usize,
        stream: Option<&Stream>,
    ) -> Option<usize> {
        let bytes = options::rounded(&self.config, bytes).filter(|_| self.in_place())?;
        let session = Self::session(stream).ok()?;
        let (lane, grown) = {
            let mut core = self.core.lock();
            let lane = self.lane(&mut core, stream, session.as_ref()).ok()?;
            let grown = core.grow(ticket, bytes, lane);
            core.note_peak(|| self.front.low());
            (lane, grown)
        };
        let (start, before, len) = grown.or_else(|| self.grow_by_mapping(ticket, bytes, lane))?;
        self.tell_grown(start, before, len, stream);
        Some(len)
    }

    /// Notes that work on `stream` uses a live block too.
    pub(in crate::gpu) fn share(self: &Arc<Self>, ticket: Ticket, stream: &Stream) -> Result<()> {
        self.accept(stream)?;
        let session = Self::session(Some(stream))?;
        let mut core = self.core.lock();
        let lane = self.lane(&mut core, Some(stream), session.as_ref())?;
        core.share(ticket, lane);
        Ok(())
    }

    /// All work that was noted with [`share`](Self::share) is complete.
    pub(in crate::gpu) fn unshare(&self, ticket: Ticket) {
        self.core.lock().unshare(ticket);
    }

    /// Says no where the pool was closed. Asked with the books locked.
    #[inline]
    pub(super) fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::Relaxed) {
            Err(Error::InvalidOperation(Refusal::Destroyed))
        } else {
            Ok(())
        }
    }
}

//! What all handles of a pool share, whatever its kind: placing, freeing, growing and giving back.
//!
//! Who locks what: `core` guards the books; driver calls that order streams are made under it, those that
//! take or give memory are not. `growth` is held by the one thread that asks the driver for memory; it is
//! taken before `core`, never after.

use core::alloc::Layout;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;

use super::super::capture::Session;
use super::super::core::{Ask, Core, LARGE, Placed, Ticket};
use super::super::device::{GpuDevice, Member};
use super::super::driver::Space;
use super::super::front::{Front, Whose};
use super::super::handle::{Shared, Users};
use super::super::ranges::CLEAN;
use super::super::seat::Seat;
use super::super::stream::Stream;
use super::options;
use super::source::{Reserved, Source};
use super::watch::Watch;
use crate::base::bits::round_up;
use crate::base::config::PoolConfig;
use crate::base::error::{Error, OomReason, Refusal, Result};
use crate::base::pool::{AllocFlags, MemoryType};
use crate::base::sync::Lock;
use crate::base::tracking::Tracking;

/// Asked when memory is short, outside all locks; `true` means that something was freed.
pub(super) type OomCallback = dyn Fn(Layout) -> bool + Send + Sync;

/// Least bytes to take from the driver at once, unless a limit says otherwise.
const MIN_GROWTH: usize = 2 << 20;

pub(in crate::gpu) struct Inner {
    users: Users,
    pub(in crate::gpu) device: GpuDevice,
    source: Source,
    pub(super) config: PoolConfig,
    pub(super) name: String,
    /// Asked before the books.
    pub(in crate::gpu) front: Front,
    pub(in crate::gpu) core: Lock<Core>,
    pub(super) growth: Lock<()>,
    /// Whether the pool may hand nothing out any more. Changes under `growth` and `core`.
    closed: AtomicBool,
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

    /// A block for work on `stream`, or for the CPU, and a seat where one is wanted and the cache has one. `bytes` is
    /// not 0.
    pub(super) fn take_plain(
        self: &Arc<Self>,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        flags: AllocFlags,
        mut seat: Option<&mut Option<Arc<Seat>>>,
    ) -> Result<Placed> {
        let align = align.max(self.config.alignment);
        let Some(rounded) = options::rounded(&self.config, bytes) else {
            return Err(Error::oom(bytes, OomReason::Overflow));
        };
        if let Some(stream) = stream {
            self.accept(stream)?;
        }
        let session = Self::session(stream)?;
        let whose = Whose::of(stream, session.as_ref());
        match whose.and_then(|whose| self.front.take(whose, rounded, align, seat.as_deref_mut())) {
            Some(placed) => Ok(placed),
            None => {
                let placed = self.take_from_books(rounded, align, stream, session, flags)?;
                if let (Some(whose), Some(seat)) = (whose, seat) {
                    *seat = self.front.seat(whose);
                }
                Ok(placed)
            }
        }
    }

    #[inline(never)]
    fn take_from_books(
        self: &Arc<Self>,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        session: Option<Arc<Session>>,
        flags: AllocFlags,
    ) -> Result<Placed> {
        let whose = Whose::of(stream, session.as_ref());
        let driver = &*self.device.0.driver;
        let mut core = self.core.lock();
        self.open()?;
        let lane = self.lane(&mut core, stream, session.as_ref())?;
        let ask = Ask { bytes, align, lane };
        // What this stream freed joins its neighbours, or the best fit would not be seen.
        if let Some(whose) = whose {
            let zone = core.zone_of(bytes);
            self.front.take_back(&mut core, driver, whose, zone);
        }
        let placed = core.place(ask).or_else(|| core.place_slow(driver, ask)).or_else(|| {
            self.front.take_all_back(&mut core, driver).then(|| core.place_slow(driver, ask)).flatten()
        });
        let placed = match placed {
            Some(placed) => placed,
            None => {
                drop(core);
                let placed = self.take_growing(ask, flags)?;
                core = self.core.lock();
                placed
            }
        };
        core.note_peak(|| self.front.low());
        if let Some(whose) = whose {
            self.front.settle_low(whose);
        }
        Ok(placed)
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

    fn lane(
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

    /// A block that the pool has no room for: memory is taken from the driver, and when that has none, out of
    /// hiding, in the order of what it costs.
    #[cold]
    fn take_growing(&self, ask: Ask, flags: AllocFlags) -> Result<Placed> {
        if flags.contains(AllocFlags::NO_GROW) {
            let mut core = self.core.lock();
            let other = core.other_zone(core.zone_of(ask.bytes));
            if let Some(placed) = other.and_then(|zone| core.place_in(&*self.device.0.driver, zone, ask)) {
                return Ok(placed);
            }
            core.failed();
            return Err(Error::oom(ask.bytes, OomReason::NoGrow));
        }
        loop {
            let error = match self.grow(ask) {
                Ok(placed) => return Ok(placed),
                Err(error @ Error::OutOfMemory { .. }) => error,
                Err(error) => {
                    self.core.lock().failed();
                    return Err(error);
                }
            };
            // Deferred frees: what is freed already, once its work is complete.
            self.wait_for_frees();
            if let Some(placed) = self.place_again(ask)? {
                return Ok(placed);
            }
            // Idle memory in the wrong places: here, then in the other pools of the device.
            let mut freed = self.release_idle(0);
            if freed != 0
                && let Ok(placed) = self.grow(ask)
            {
                return Ok(placed);
            }
            self.device.0.each_member(|member| freed += member.give_back());
            if freed != 0
                && let Ok(placed) = self.grow(ask)
            {
                return Ok(placed);
            }
            let callback = self.callback.lock().clone();
            let layout = Layout::from_size_align(ask.bytes, ask.align)?;
            if !callback.is_some_and(|callback| callback(layout)) {
                self.core.lock().failed();
                return Err(error);
            }
            if let Some(placed) = self.place_again(ask)? {
                return Ok(placed);
            }
        }
    }

    /// Looks once more for room, after something was freed.
    fn place_again(&self, ask: Ask) -> Result<Option<Placed>> {
        let driver = &*self.device.0.driver;
        let mut core = self.core.lock();
        self.open()?;
        self.front.take_all_back(&mut core, driver);
        Ok(core.place_slow(driver, ask))
    }

    /// Waits until the work behind every free so far is complete.
    pub(super) fn wait_for_frees(&self) {
        let driver = &*self.device.0.driver;
        let events = {
            let mut core = self.core.lock();
            self.front.take_all_back(&mut core, driver);
            core.seal_all(driver);
            core.order.last_events()
        };
        for event in events {
            // An event that cannot be waited for is asked for again by `settle`.
            let _ = driver.event_sync(event);
        }
        self.core.lock().settle(driver);
    }

    /// Takes memory from the driver and cuts the block from it before anybody else sees it.
    fn grow(&self, ask: Ask) -> Result<Placed> {
        let _ticket = self.growth.lock();
        let driver = &*self.device.0.driver;
        if self.source.reserved.is_some() {
            return self.grow_by_pieces(ask);
        }
        let (need, want) = {
            let mut core = self.core.lock();
            self.open()?;
            // Another thread may have grown the pool, or freed something, meanwhile.
            if let Some(placed) = core.place(ask) {
                return Ok(placed);
            }
            let sizes = self.growth_sizes(core.segment_for(ask), core.reserved, ask)?;
            core.growing = sizes.1;
            sizes
        };
        let taken = self.take_from_driver(need, want);
        let mut core = self.core.lock();
        core.growing = 0;
        let (start, len) = taken.map_err(|error| self.out_of_memory(&core, ask.bytes, error))?;
        if core.add(start, len)
            && let Some(placed) = core.place(ask).or_else(|| core.place_slow(driver, ask))
        {
            return Ok(placed);
        }
        if !core.owns(start) {
            drop(core);
            // SAFETY: just taken, and not noted anywhere.
            let _ = unsafe { self.source.give(driver, start) };
        }
        // The host has no memory for the books.
        Err(Error::oom(ask.bytes, OomReason::Source))
    }

    /// Brings memory to where a request lacks the least of it. The caller holds `growth`.
    fn grow_by_pieces(&self, ask: Ask) -> Result<Placed> {
        let driver = &*self.device.0.driver;
        if let Some(placed) = self.grow_ahead(ask)? {
            return Ok(placed);
        }
        self.wait_for_pieces(ask);
        let plan = {
            let mut core = self.core.lock();
            self.open()?;
            // Another thread may have grown the pool, or freed something, meanwhile.
            if let Some(placed) = core.place(ask) {
                return Ok(placed);
            }
            self.settle_patiently(&mut core);
            if let Some(placed) = core.place_slow(driver, ask) {
                return Ok(placed);
            }
            let zone = core.zone_of(ask.bytes);
            let other = core.other_zone(zone);
            let plan = core.plan(zone, ask, self.limit());
            match (plan, other) {
                (Err(_), Some(other)) => match core.place_in(driver, other, ask) {
                    Some(placed) => return Ok(placed),
                    None => core.plan(other, ask, self.limit())?,
                },
                (plan, _) => plan?,
            }
        };
        // SAFETY: a plan of this pool's books; a piece is taken only from what is known to be complete.
        let done = unsafe { self.source.fill(driver, &plan) };
        let mut core = self.core.lock();
        core.finish(&plan, done, ask).map_err(|error| self.out_of_memory(&core, ask.bytes, error))
    }

    /// Takes more than the request where the growth factor asks for it, so that later ones need no driver. The
    /// caller holds `growth`.
    fn grow_ahead(&self, ask: Ask) -> Result<Option<Placed>> {
        let Some(Reserved { unit, .. }) = self.source.reserved else { return Ok(None) };
        let (zone, share) = {
            let core = self.core.lock();
            let room = self.limit().saturating_sub(core.reserved);
            let share = (core.reserved as f64 * (self.config.growth_factor - 1.0)) as usize;
            (core.zone_of(ask.bytes), share.min(room) & !(unit - 1))
        };
        if share <= ask.bytes {
            return Ok(None);
        }
        // Another thread may have grown the pool, or freed something, meanwhile.
        if let Some(placed) = self.place_again(ask)? {
            return Ok(Some(placed));
        }
        // What cannot be had in one piece of that size is had for this request alone.
        let _ = self.reserve_pieces(zone, Ask { bytes: share, align: ask.align, lane: CLEAN });
        self.place_again(ask)
    }

    /// Least and wanted bytes to grow by.
    fn growth_sizes(&self, segment: usize, reserved: usize, ask: Ask) -> Result<(usize, usize)> {
        let overflow = Error::oom(ask.bytes, OomReason::Overflow);
        // Segments begin at multiples of a page at least.
        let slack = if ask.align > 4096 { ask.align } else { 0 };
        let exact = segment.checked_add(slack).and_then(|sum| round_up(sum, 512)).ok_or(overflow)?;
        let usual = round_up(exact, MIN_GROWTH).ok_or(overflow)?;
        let share = (reserved as f64 * (self.config.growth_factor - 1.0)) as usize;
        let limit = self.limit();
        let room = limit.saturating_sub(reserved) & !511;
        if exact > room {
            return Err(Error::oom(ask.bytes, OomReason::Limit(limit)));
        }
        let want = usual.max(share & !(MIN_GROWTH - 1)).min(room);
        Ok((exact, want.max(exact)))
    }

    fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// At least `need` and if possible `want` bytes, with no lock of the books held.
    fn take_from_driver(&self, need: usize, want: usize) -> Result<(usize, usize)> {
        let driver = &*self.device.0.driver;
        match self.source.take(driver, want) {
            Err(_) if need < want => self.source.take(driver, need).map(|start| (start, need)),
            taken => taken.map(|start| (start, want)),
        }
    }

    /// The driver's refusal, as an error that says who holds what.
    fn out_of_memory(&self, core: &Core, requested: usize, error: Error) -> Error {
        const OUT_OF_MEMORY: i32 = 2;
        match error {
            Error::Cuda { code: OUT_OF_MEMORY, .. } => {
                let free = self.device.memory_info().map_or(0, |(free, _)| free);
                let cached = self.front.bytes();
                let (live, idle) = (core.live - cached, core.free_bytes() + cached);
                let reason = OomReason::Device { live, idle, free };
                Error::oom(requested, reason)
            }
            other => other,
        }
    }

    /// Frees a block on `stream`, or for the CPU.
    pub(super) fn give_plain(self: &Arc<Self>, ticket: Ticket, start: usize, stream: Option<&Stream>) {
        let session = Self::session(stream);
        let whose = session.as_ref().ok().and_then(|session| Whose::of(stream, session.as_ref()));
        if !whose.is_some_and(|whose| self.front.give(whose, start, false)) {
            self.give_to_books(ticket, stream, session.as_ref().map(Option::as_ref).map_err(|error| *error));
        }
    }

    #[inline(never)]
    fn give_to_books(
        self: &Arc<Self>,
        ticket: Ticket,
        stream: Option<&Stream>,
        session: Result<Option<&Arc<Session>>>,
    ) {
        let whose = session.ok().and_then(|session| Whose::of(stream, session));
        let driver = &*self.device.0.driver;
        let mut core = self.core.lock();
        // What caches handed out since made the peak perhaps.
        core.note_peak(|| self.front.low());
        let lanes = session.and_then(|session| {
            let lane = self.lane(&mut core, stream, session)?;
            let captured = stream.filter(|_| session.is_some());
            Ok((lane, captured.map(|stream| core.lane_for(stream)).transpose()?))
        });
        // No lane is to be had only while 4093 streams are in use: then the device is waited for instead.
        let (lane, before, whose) = match lanes {
            Ok((lane, before)) => (lane, before, whose),
            Err(_) if driver.device_sync().is_ok() => (CLEAN, None, None),
            // The context is lost; the block must not be reused.
            Err(_) => return,
        };
        // What nobody could ask for again is not cached (invariant 2 of `handle`).
        let kept = whose.filter(|_| !self.users.is_none() && !stream.is_some_and(Stream::is_unused));
        if !kept.is_some_and(|whose| self.front.keep(&mut core, driver, whose, lane, ticket)) {
            core.free(driver, ticket, lane, before);
        }
        if let Some(whose) = whose {
            self.front.settle_low(whose);
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

    /// Maps memory behind a block, if the addresses there are free; returns its place, and its size before and
    /// after.
    fn grow_by_mapping(&self, ticket: Ticket, bytes: usize, lane: u16) -> Option<(usize, usize, usize)> {
        self.source.reserved?;
        let _ticket = self.growth.lock();
        let mut core = self.core.lock();
        self.settle_patiently(&mut core);
        let before = core.len(ticket);
        let plan = core.plan_growth(ticket, bytes, lane, self.limit())?;
        drop(core);
        // SAFETY: as in `grow_by_pieces`.
        let done = unsafe { self.source.fill(&*self.device.0.driver, &plan) };
        let mut core = self.core.lock();
        core.finish_growth(ticket, &plan, done).ok()?;
        core.note_peak(|| self.front.low());
        Some((core.start(ticket), before, core.len(ticket)))
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

    /// Makes `bytes` available in one piece without a further call to the driver.
    pub(super) fn reserve(&self, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let overflow = Error::oom(bytes, OomReason::Overflow);
        let ask =
            Ask { bytes: options::rounded(&self.config, bytes).ok_or(overflow)?, align: 1, lane: CLEAN };
        let _ticket = self.growth.lock();
        let driver = &*self.device.0.driver;
        if self.source.reserved.is_some() {
            {
                let mut core = self.core.lock();
                self.open()?;
                self.front.take_all_back(&mut core, driver);
                core.settle(driver);
                if core.has_clean(ask.bytes) {
                    return Ok(());
                }
            }
            return self.reserve_pieces(LARGE, ask);
        }
        let (need, want) = {
            let mut core = self.core.lock();
            self.open()?;
            self.front.take_all_back(&mut core, driver);
            core.settle(driver);
            if core.has_clean(ask.bytes) {
                return Ok(());
            }
            self.growth_sizes(ask.bytes, core.reserved, ask)?
        };
        let taken = self.take_from_driver(need, want);
        let mut core = self.core.lock();
        let (start, len) = taken.map_err(|error| self.out_of_memory(&core, bytes, error))?;
        if !core.add(start, len) {
            drop(core);
            // SAFETY: just taken, and not noted anywhere.
            let _ = unsafe { self.source.give(driver, start) };
            return Err(Error::oom(bytes, OomReason::Source));
        }
        Ok(())
    }

    /// Small requests have memory of their own where memory comes in pieces: one piece, if the limit allows it.
    fn reserve_for_small(&self) {
        let Some(Reserved { unit, .. }) = self.source.reserved else { return };
        let _ticket = self.growth.lock();
        let zone = self.core.lock().zone_of(1);
        if zone != LARGE {
            let _ = self.reserve_pieces(zone, Ask { bytes: unit, align: 1, lane: CLEAN });
        }
    }

    /// Maps memory that is free for everybody. The caller holds `growth`.
    fn reserve_pieces(&self, zone: usize, ask: Ask) -> Result<()> {
        let plan = self.core.lock().plan(zone, ask, self.limit())?;
        // SAFETY: a plan of this pool's books; a piece is taken only from what is known to be complete.
        let done = unsafe { self.source.fill(&*self.device.0.driver, &plan) };
        let mut core = self.core.lock();
        core.finish_reserve(&plan, done).map_err(|error| self.out_of_memory(&core, ask.bytes, error))
    }

    /// Gives idle segments back until at most `keep` free bytes are left; returns the bytes given back.
    pub(super) fn release_idle(&self, keep: usize) -> usize {
        let driver = &*self.device.0.driver;
        let mut given = 0;
        {
            let mut core = self.core.lock();
            self.front.take_all_back(&mut core, driver);
            core.seal_all(driver);
            core.settle(driver);
            core.unnest();
            core.clean_done();
        }
        if self.source.reserved.is_some() {
            return self.release_pieces(keep);
        }
        loop {
            let segment = {
                let mut core = self.core.lock();
                let spare = core.free_bytes().saturating_sub(keep);
                core.remove_idle(spare)
            };
            let Some((start, len)) = segment else { return given };
            // SAFETY: a segment from `alloc` in which nothing is live and all work is known to be complete.
            if unsafe { self.source.give(driver, start) }.is_ok() {
                given += len;
            } else {
                // The driver kept it; so do we.
                self.core.lock().add(start, len);
                return given;
            }
        }
    }

    /// Gives idle pieces back until at most `keep` free bytes are left; returns the bytes given back.
    fn release_pieces(&self, keep: usize) -> usize {
        let driver = &*self.device.0.driver;
        let _ticket = self.growth.lock();
        let idle = {
            let mut core = self.core.lock();
            let spare = core.idle_bytes().saturating_sub(keep);
            core.take_idle(spare)
        };
        if idle.is_empty() {
            return 0;
        }
        // SAFETY: pieces of this pool in which nothing is live and all work is known to be complete.
        let done = unsafe { self.source.release(driver, &idle) };
        let mut core = self.core.lock();
        let before = core.reserved;
        core.idle_given(done);
        before - core.reserved
    }

    /// Says no where the pool was closed. Asked with the books locked.
    #[inline]
    fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::Relaxed) {
            Err(Error::InvalidOperation(Refusal::Destroyed))
        } else {
            Ok(())
        }
    }

    /// Gives all memory back for good; an error while anything is live. What the driver keeps, or a graph still
    /// needs, goes with the last handle.
    pub(super) fn close(&self) -> Result<()> {
        // Dropped with no lock held.
        let seats;
        let ticket = self.growth.lock();
        {
            self.empty_quarantine();
            let mut core = self.core.lock();
            seats = self.front.shut(&mut core, &*self.device.0.driver);
            match core.live_blocks() {
                0 => self.closed.store(true, Ordering::Relaxed),
                live => return Err(Error::InvalidOperation(Refusal::StillLive(live))),
            }
        }
        drop(seats);
        self.wait_for_frees();
        drop(ticket);
        self.release_idle(0);
        Ok(())
    }

    /// Empties the pool, whatever is live.
    ///
    /// # Safety
    /// No block is used or freed after.
    pub(super) unsafe fn reset(&self) -> Result<()> {
        self.device.synchronize()?;
        self.forget_all();
        let mut core = self.core.lock();
        self.front.forget();
        core.reset();
        Ok(())
    }
}

impl Member for Inner {
    fn stream_closes(&self, slot: u32) {
        let driver = &*self.device.0.driver;
        let mut core = self.core.lock();
        // No seat is left: each would keep the stream.
        let _none = self.front.shut_of(&mut core, driver, slot);
        core.order.close(driver, slot);
    }

    fn stream_unused(&self, slot: u32) {
        let mut core = self.core.lock();
        let seats = self.front.shut_of(&mut core, &*self.device.0.driver, slot);
        // The last of them closes the stream, which takes the lock.
        drop(core);
        drop(seats);
    }

    fn device_waits(&self) {
        let driver = &*self.device.0.driver;
        let mut core = self.core.lock();
        self.front.take_all_back(&mut core, driver);
        core.seal_all(driver);
    }

    fn capture_ends(&self, id: u64) {
        let mut core = self.core.lock();
        if core.order.end_capture(id) {
            core.clean_done();
        }
    }

    fn give_back(&self) -> usize {
        self.empty_quarantine();
        self.release_idle(0)
    }
}

impl Shared for Inner {
    fn users(&self) -> &Users {
        &self.users
    }

    fn unused(&self) {
        let mut core = self.core.lock();
        let seats = self.front.shut(&mut core, &*self.device.0.driver);
        drop(core);
        drop(seats);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let driver = self.device.0.driver.clone();
        // Work on freed blocks may be in flight still. If not even waiting works, the memory is lost.
        if driver.device_sync().is_err() && driver.device_sync().is_err() {
            return;
        }
        self.on_drop();
        let mut core = self.core.lock();
        for event in core.order.take_events() {
            // SAFETY: the pool's own events, used no more.
            let _ = unsafe { driver.event_destroy(event) };
        }
        if let Some(pieces) = &mut core.pieces {
            let (mapped, spare) = pieces.drain();
            let all: Vec<_> = mapped.into_iter().chain(spare.into_iter().map(|piece| (0, piece))).collect();
            // SAFETY: every block keeps its pool alive, so none is left, and the device was idle after the last
            // use. A refusal is tried once more, then the memory leaks.
            unsafe {
                let left = self.source.release(&*driver, &all);
                let left: Vec<_> =
                    left.mapped.into_iter().chain(left.spare.into_iter().map(|piece| (0, piece))).collect();
                self.source.release(&*driver, &left);
                self.source.close(&*driver);
            }
            return;
        }
        for (start, _) in core.drain_segments() {
            // SAFETY: segments from `alloc`; every block keeps its pool alive, so none is left, and the
            // device was idle after the last use. A refusal is tried once more, then the segment leaks.
            if unsafe { self.source.give(&*driver, start) }.is_err() {
                // SAFETY: as above.
                let _ = unsafe { self.source.give(&*driver, start) };
            }
        }
    }
}

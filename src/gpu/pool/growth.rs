//! More memory for a pool, from the driver or out of hiding.

use core::alloc::Layout;
use core::sync::atomic::Ordering;

use super::super::core::{Ask, Core, LARGE, Placed, Ticket};
use super::super::ranges::CLEAN;
use super::inner::Inner;
use super::options;
use super::source::Reserved;
use crate::base::bits::round_up;
use crate::base::error::{Error, OomReason, Result};
use crate::base::pool::AllocFlags;

/// Least bytes to take from the driver at once, unless a limit says otherwise.
const MIN_GROWTH: usize = 2 << 20;

impl Inner {
    /// A block that the pool has no room for: memory is taken from the driver, and when that has none, out of
    /// hiding, in the order of what it costs.
    #[cold]
    pub(super) fn take_growing(&self, ask: Ask, flags: AllocFlags) -> Result<Placed> {
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
    pub(super) fn place_again(&self, ask: Ask) -> Result<Option<Placed>> {
        let driver = &*self.device.0.driver;
        let mut core = self.core.lock();
        self.open()?;
        self.front.take_all_back(&mut core, driver);
        Ok(core.place_slow(driver, ask))
    }

    /// Takes memory from the driver and cuts the block from it before anybody else sees it.
    pub(super) fn grow(&self, ask: Ask) -> Result<Placed> {
        let _ticket = self.growth.lock();
        let driver = &*self.device.0.driver;
        if self.source.reserved.is_some() {
            return self.grow_by_pieces(ask);
        }
        let (need, want) = {
            let mut core = self.core.lock();
            self.open()?;
            // Another thread may have grown the pool, or freed something, meanwhile.
            if let Some(placed) = core.place_again(ask) {
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
            && let Some(placed) = core.place_again(ask).or_else(|| core.place_slow(driver, ask))
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
    pub(super) fn grow_by_pieces(&self, ask: Ask) -> Result<Placed> {
        let driver = &*self.device.0.driver;
        if let Some(placed) = self.grow_ahead(ask)? {
            return Ok(placed);
        }
        let plan = {
            let mut core = self.settle_for_pieces(ask);
            self.open()?;
            // Another thread may have grown the pool, or freed something, meanwhile.
            if let Some(placed) = core.place_again(ask).or_else(|| core.place_slow(driver, ask)) {
                return Ok(placed);
            }
            let zone = core.zone_of(ask.bytes);
            let other = core.other_zone(zone);
            let now = driver.now_ns();
            let plan = core.plan(zone, ask, self.limit(), now);
            match (plan, other) {
                (Err(_), Some(other)) => match core.place_in(driver, other, ask) {
                    Some(placed) => return Ok(placed),
                    None => core.plan(other, ask, self.limit(), now)?,
                },
                (plan, _) => plan?,
            }
        };
        // SAFETY: a plan of this pool's books; a piece is taken only from what is known to be complete.
        let done = unsafe { self.source.fill(driver, &plan) };
        let mut core = self.core.lock();
        let placed = core.finish(&plan, done, ask);
        if placed.is_err() && plan.for_rest {
            // What is at hand does as well, and is what the next plan takes.
            drop(core);
            return self.grow_by_pieces(ask);
        }
        placed.map_err(|error| self.out_of_memory(&core, ask.bytes, error))
    }

    /// Takes more than the request where the growth factor asks for it, so that later ones need no driver. The
    /// caller holds `growth`.
    pub(super) fn grow_ahead(&self, ask: Ask) -> Result<Option<Placed>> {
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
        let _ = self.reserve_pieces(zone, Ask { bytes: share, lane: CLEAN, by_address: false, ..ask });
        self.place_again(ask)
    }

    /// Least and wanted bytes to grow by.
    pub(super) fn growth_sizes(&self, segment: usize, reserved: usize, ask: Ask) -> Result<(usize, usize)> {
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

    pub(super) fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// At least `need` and if possible `want` bytes, with no lock of the books held.
    pub(super) fn take_from_driver(&self, need: usize, want: usize) -> Result<(usize, usize)> {
        let driver = &*self.device.0.driver;
        match self.source.take(driver, want) {
            Err(_) if need < want => self.source.take(driver, need).map(|start| (start, need)),
            taken => taken.map(|start| (start, want)),
        }
    }

    /// The driver's refusal, as an error that says who holds what.
    pub(super) fn out_of_memory(&self, core: &Core, requested: usize, error: Error) -> Error {
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

    /// Maps memory behind a block, if the addresses there are free; returns its place, and its size before and
    /// after.
    pub(super) fn grow_by_mapping(
        &self,
        ticket: Ticket,
        bytes: usize,
        lane: u16,
    ) -> Option<(usize, usize, usize)> {
        self.source.reserved?;
        let _ticket = self.growth.lock();
        let mut core = self.core.lock();
        self.settle_patiently(&mut core);
        let before = core.len(ticket);
        let plan = core.plan_growth(ticket, bytes, lane, self.limit(), self.device.0.driver.now_ns())?;
        drop(core);
        // SAFETY: as in `grow_by_pieces`.
        let done = unsafe { self.source.fill(&*self.device.0.driver, &plan) };
        let mut core = self.core.lock();
        core.finish_growth(ticket, &plan, done).ok()?;
        core.note_peak(|| self.front.low());
        Some((core.start(ticket), before, core.len(ticket)))
    }

    /// Makes `bytes` available in one piece without a further call to the driver.
    pub(super) fn reserve(&self, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let overflow = Error::oom(bytes, OomReason::Overflow);
        let bytes = options::rounded(&self.config, bytes).ok_or(overflow)?;
        let ask = Ask { bytes, align: 1, lane: CLEAN, by_address: false };
        let _ticket = self.growth.lock();
        let driver = &*self.device.0.driver;
        let sizes = {
            let mut core = self.core.lock();
            self.open()?;
            self.front.take_all_back(&mut core, driver);
            core.settle(driver);
            if core.has_clean(ask.bytes) {
                return Ok(());
            }
            match self.source.reserved {
                Some(_) => None,
                None => Some(self.growth_sizes(ask.bytes, core.reserved, ask)?),
            }
        };
        let Some((need, want)) = sizes else { return self.reserve_pieces(LARGE, ask) };
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
    pub(super) fn reserve_for_small(&self) {
        let Some(Reserved { unit, .. }) = self.source.reserved else { return };
        let _ticket = self.growth.lock();
        let zone = self.core.lock().zone_of(1);
        if zone != LARGE {
            let ask = Ask { bytes: unit, align: 1, lane: CLEAN, by_address: false };
            let _ = self.reserve_pieces(zone, ask);
        }
    }

    /// Maps memory that is free for everybody. The caller holds `growth`.
    pub(super) fn reserve_pieces(&self, zone: usize, ask: Ask) -> Result<()> {
        let plan = self.core.lock().plan(zone, ask, self.limit(), self.device.0.driver.now_ns())?;
        // SAFETY: a plan of this pool's books; a piece is taken only from what is known to be complete.
        let done = unsafe { self.source.fill(&*self.device.0.driver, &plan) };
        let mut core = self.core.lock();
        let reserved = core.finish_reserve(&plan, done);
        if reserved.is_err() && plan.for_rest {
            // As in `grow_by_pieces`.
            drop(core);
            return self.reserve_pieces(zone, ask);
        }
        reserved.map_err(|error| self.out_of_memory(&core, ask.bytes, error))
    }
}

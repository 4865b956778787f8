//! How a request is placed.
//!
//! It is tried in this order; each step costs more than the one before.
//! 1. The best fit among what the lane freed itself and what is free for anybody: no call.
//! 2. What other lanes freed and this one has waited for already: no call.
//! 3. Ask which events are complete, join what has become free, and try again: a query a lane.
//! 4. The best fit of another lane: one record if it is not sealed, one wait.
//! 5. The shortest run of neighbours of several lanes: one record and wait for each.
//!
//! What does not fit even then needs memory from the driver, with the lock released (see `pool`).

#![forbid(unsafe_code)]

use super::{Ask, Core, LARGE, Placed, SEGMENTS, Ticket};
use crate::base::stats::MemoryStats;
use crate::gpu::driver::Driver;
#[cfg(test)]
use crate::gpu::order::Mutant;
use crate::gpu::ranges::{CLEAN, FIRST, MIXED, Tag};

impl Core {
    /// Step 1.
    #[inline(always)]
    pub(in crate::gpu) fn place(&mut self, ask: Ask) -> Option<Placed> {
        let zone = self.zone_of(ask.bytes);
        let node = self.cut(zone, ask)?;
        Some(self.hand_out(zone, node, ask))
    }

    /// The same, for who is in no hurry.
    #[inline(never)]
    pub(in crate::gpu) fn place_again(&mut self, ask: Ask) -> Option<Placed> {
        self.place(ask)
    }

    /// Steps 2 to 5; a small zone then takes another segment from the large one.
    #[cold]
    pub(in crate::gpu) fn place_slow(&mut self, driver: &dyn Driver, ask: Ask) -> Option<Placed> {
        self.renumber(driver);
        let zone = self.zone_of(ask.bytes);
        let node = self.cut_slow(driver, zone, ask).or_else(|| {
            if zone == LARGE || self.pieces.is_some() {
                // What the small zones have no use for joins the large ranges again.
                return self.unnest().then(|| self.cut_slow(driver, zone, ask)).flatten();
            }
            self.nest(driver, zone, ask).then(|| self.cut_own(zone, ask)).flatten()
        })?;
        Some(self.hand_out(zone, node, ask))
    }

    /// A block in a zone that is not its own, where that has no memory left.
    pub(in crate::gpu) fn place_in(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> Option<Placed> {
        let node = self.cut_own(zone, ask).or_else(|| self.cut_slow(driver, zone, ask))?;
        Some(self.hand_out(zone, node, ask))
    }

    #[inline(always)]
    pub(in crate::gpu) fn hand_out(&mut self, zone: usize, node: u32, ask: Ask) -> Placed {
        let ranges = &mut self.zones[zone];
        let (start, len) = (ranges.start(node), ranges.len(node));
        let published = ask.by_address && ranges.publish(node);
        self.live += len;
        let counters = &mut self.counters;
        counters.allocations += 1;
        counters.total += len as u64;
        counters.histogram[MemoryStats::bucket(ask.bytes)] += 1;
        Placed { ticket: Ticket::new(zone, node), start, len, published }
    }

    /// Gives a small zone a segment out of the large one.
    pub(super) fn nest(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> bool {
        let bytes = SEGMENTS[zone];
        let part = Ask { bytes, by_address: false, ..ask };
        let cut = self.cut_own(LARGE, part).or_else(|| self.cut_slow(driver, LARGE, part));
        let Some(node) = cut else { return false };
        let (start, bytes) = (self.zones[LARGE].start(node), self.zones[LARGE].len(node));
        let tag = self.tag_on(ask.lane);
        if self.parents.try_reserve(1).is_err() || !self.zones[zone].add(start, bytes, tag) {
            self.zones[LARGE].free(node, tag);
            return false;
        }
        self.parents.insert(start, node);
        self.nested += bytes;
        true
    }

    /// Takes idle segments of the small zones back into the large one; returns whether there were any.
    pub(in crate::gpu) fn unnest(&mut self) -> bool {
        let mut any = false;
        if self.pieces.is_some() {
            // There the small zone has addresses of its own.
            return any;
        }
        for zone in 0..LARGE {
            let order = &self.order;
            while let Some((start, len, tag)) =
                self.zones[zone].remove_idle(usize::MAX, &|tag| !order.is_private(tag))
            {
                if let Some(parent) = self.parents.remove(&start) {
                    self.zones[LARGE].free(parent, tag);
                    self.nested -= len;
                    any = true;
                }
            }
        }
        any
    }

    /// Cuts the best fit among what the lane freed and what is clean.
    #[inline(always)]
    fn cut(&mut self, zone: usize, ask: Ask) -> Option<u32> {
        let ranges = &mut self.zones[zone];
        let granules = ranges.granules(ask.bytes)?;
        let node = ranges.choose(ask.lane, || self.order.is_capture(ask.lane), granules, ask.align)?;
        ranges.carve(node, granules, ask.align, ask.lane)
    }

    /// The same, for the steps after the first.
    #[inline(never)]
    pub(super) fn cut_own(&mut self, zone: usize, ask: Ask) -> Option<u32> {
        self.cut(zone, ask)
    }

    /// Steps 2 to 5 in one zone.
    pub(super) fn cut_slow(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> Option<u32> {
        if let Some(node) = self.cut_waited(zone, ask) {
            return Some(node);
        }
        if ask.lane == CLEAN {
            // The CPU cannot be ordered behind a stream; it can only learn what is complete.
            self.seal_all(driver);
        }
        if self.settle(driver)
            && let Some(node) = self.cut_own(zone, ask)
        {
            return Some(node);
        }
        if ask.lane < FIRST || self.order.is_capture(ask.lane) {
            return None;
        }
        if self.join_for(zone, ask)
            && let Some(node) = self.cut_own(zone, ask)
        {
            return Some(node);
        }
        self.cut_other(driver, zone, ask).or_else(|| self.cut_run(driver, zone, ask))
    }

    /// Step 2: other lanes that this one has waited for.
    pub(super) fn cut_waited(&mut self, zone: usize, ask: Ask) -> Option<u32> {
        if ask.lane < FIRST {
            return None;
        }
        let granules = self.zones[zone].granules(ask.bytes)?;
        let (ranges, order) = (&self.zones[zone], &self.order);
        let node = ranges.lanes_with(granules).filter(|&lane| lane >= FIRST && lane != ask.lane).find_map(
            |lane| {
                let (node, _) = ranges.best(lane, granules, ask.align)?;
                order.may_use(ask.lane, ranges.tag(node)).then_some(node)
            },
        )?;
        self.zones[zone].carve(node, granules, ask.align, ask.lane)
    }

    /// Joins what the lane freed with neighbours that it may use as well.
    pub(super) fn join_for(&mut self, zone: usize, ask: Ask) -> bool {
        let (order, tag) = (&self.order, self.order.tag_now(ask.lane));
        #[cfg(test)]
        let tag = match order.mutant {
            Some(Mutant::JoinUnderOldBatch) => Tag { lane: tag.lane, batch: 1 },
            _ => tag,
        };
        let usable = |other: Tag| other.lane != MIXED && order.may_use(ask.lane, other);
        self.zones[zone].join_neighbours(tag, usable)
    }

    /// Step 4: the best fit of another lane.
    pub(super) fn cut_other(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> Option<u32> {
        let granules = self.zones[zone].granules(ask.bytes)?;
        let mut refused: Vec<u16> = Vec::new();
        loop {
            let (ranges, order) = (&self.zones[zone], &self.order);
            let others = ranges.lanes_with(granules).filter(|lane| *lane >= MIXED && *lane != ask.lane);
            let fits = others.filter(|lane| !refused.contains(lane)).filter_map(|lane| {
                let (node, size) = ranges.best(lane, granules, ask.align)?;
                (!order.is_private(ranges.tag(node))).then_some((size, node))
            });
            let (_, mut node) = fits.min()?;
            let tag = self.zones[zone].tag(node);
            if self.order.ensure(driver, ask.lane, tag).is_err() {
                refused.push(tag.lane);
                continue;
            }
            if tag.lane == MIXED {
                // Its list belongs to the whole range, so the whole range becomes this lane's.
                node = self.zones[zone].give(node, self.order.tag_now(ask.lane));
                self.order.forget_mixed(tag);
            }
            return self.zones[zone].carve(node, granules, ask.align, ask.lane);
        }
    }

    /// Step 5.
    pub(super) fn cut_run(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> Option<u32> {
        let granules = self.zones[zone].granules(ask.bytes)?;
        let order = &self.order;
        let (first, mut tags) =
            self.zones[zone].best_run(granules, ask.align, ask.lane, |tag| !order.is_private(tag))?;
        // The latest batch of each lane first, so that one wait covers the others.
        tags.sort_unstable_by_key(|tag| std::cmp::Reverse(tag.batch));
        for &tag in &tags {
            self.order.ensure(driver, ask.lane, tag).ok()?;
        }
        let order = &self.order;
        let node =
            self.zones[zone].join_run(first, self.order.tag_now(ask.lane), |tag| !order.is_private(tag));
        tags.into_iter().for_each(|tag| self.order.forget_mixed(tag));
        self.zones[zone].carve(node, granules, ask.align, ask.lane)
    }

    /// Grows a block in place, into what its lane may use; returns its place, and its size before and after.
    pub(in crate::gpu) fn grow(
        &mut self,
        ticket: Ticket,
        bytes: usize,
        lane: u16,
    ) -> Option<(usize, usize, usize)> {
        let (zone, node) = (ticket.zone(), ticket.node());
        let granules = self.zones[zone].granules(bytes)?;
        let before = self.zones[zone].len(node);
        let order = &self.order;
        let usable = |tag: Tag| tag.lane != MIXED && order.may_use(lane, tag);
        self.zones[zone].grow(node, granules, &usable).then(|| {
            self.live += self.zones[zone].len(node) - before;
            self.note_length(ticket);
            (self.zones[zone].start(node), before, self.zones[zone].len(node))
        })
    }

    /// Whether a clean range of `bytes` is there.
    pub(in crate::gpu) fn has_clean(&self, bytes: usize) -> bool {
        let ranges = &self.zones[LARGE];
        ranges.granules(bytes).is_some_and(|granules| ranges.best(CLEAN, granules, 1).is_some())
    }
}

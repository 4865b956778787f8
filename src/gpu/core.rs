//! What a pool keeps under its lock: the ranges of each zone, the lanes, the counters, and how a request is
//! placed among them.
//!
//! A request is tried in this order; each step costs more than the one before.
//! 1. The best fit among what the lane freed itself and what is free for anybody: no call.
//! 2. What other lanes freed and this one has waited for already: no call.
//! 3. Ask which events are complete, join what has become free, and try again: a query a lane.
//! 4. The best fit of another lane: one record if it is not sealed, one wait.
//! 5. The shortest run of neighbours of several lanes: one record and wait for each.
//!
//! Small requests live in zones of their own, whose segments are ranges of the large zone.
//!
//! What does not fit even then needs memory from the driver, with the lock released (see `pool`).

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;

use super::arena::Pieces;
use super::driver::Driver;
use super::front::{self, Records};
use super::order::Order;
use super::ranges::{CLEAN, FIRST, HOLE, MIXED, PUBLISHED, Ranges, SHARED, Tag};
use super::stream::Stream;
use crate::base::config::{AllocatorType, PoolConfig};
use crate::base::error::{Error, PointerFault, Result};
use crate::base::stats::{HISTOGRAM_BUCKETS, MemoryStats};
use crate::engine::Broken;

/// A live block: its zone and node. Owned buffers keep it, so that their free looks nothing up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ticket(u32);

const NODE_BITS: u32 = 30;

impl Ticket {
    fn new(zone: usize, node: u32) -> Self {
        Self((zone as u32) << NODE_BITS | node)
    }
    pub(super) fn zone(self) -> usize {
        (self.0 >> NODE_BITS) as usize
    }
    pub(super) fn node(self) -> u32 {
        self.0 & ((1 << NODE_BITS) - 1)
    }
    pub(super) fn raw(self) -> u32 {
        self.0
    }
    pub(super) fn from_raw(raw: u32) -> Self {
        Self(raw)
    }
}

/// A block as it was placed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub(super) ticket: Ticket,
    pub(super) start: usize,
    pub(super) len: usize,
    /// Whether the block is found by its address.
    pub(super) published: bool,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) bytes: usize,
    pub(super) align: usize,
    /// The lane that will use the block; `CLEAN` for the CPU.
    pub(super) lane: u16,
}

/// Requests below these sizes go to the small and to the medium zone, so that a small block never pins a
/// large range.
pub(super) const ZONE_LIMITS: [usize; 2] = [1 << 20, 4 << 20];
/// The small zones take segments of these sizes from the large one, and give them back when they are idle.
const SEGMENTS: [usize; 2] = [2 << 20, 16 << 20];
/// Pools that may hold less than this are not divided into zones.
const MIN_ZONED: usize = 64 << 20;
/// The zone that takes its memory from the driver.
pub(super) const LARGE: usize = 2;
/// The small zone of pools whose memory comes in pieces: it has pieces of its own.
const SMALL: usize = 0;

/// The part of a pool's address space that is for small requests.
const SMALL_SPACE: usize = 16;

/// Lanes beside its own that used a live block.
type Shared = HashMap<Ticket, Vec<(u16, u32)>>;

/// Counters since the pool was made.
#[derive(Debug, Default)]
struct Counters {
    total: u64,
    allocations: u64,
    frees: u64,
    failed: u64,
    misses: u64,
    source_calls: u64,
    peak: usize,
    peak_reserved: usize,
    histogram: [u64; HISTOGRAM_BUCKETS],
}

/// The state under the lock.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) zones: [Ranges; 3],
    pub(super) order: Order,
    /// The pieces of memory in the pool's address space; `None` where memory comes in segments.
    pub(super) pieces: Option<Pieces>,
    shared: Shared,
    /// Blocks that caches hold or may get back; those that they hold count as live here.
    pub(super) records: Arc<Records>,
    pub(super) live: usize,
    /// Bytes taken from the driver.
    pub(super) reserved: usize,
    /// Bytes that are being taken just now.
    pub(super) growing: usize,
    /// One zone for everything: pools with blocks of one size, and pools too small to be divided.
    single_zone: bool,
    /// The range of the large zone behind each segment of a small one, by address.
    parents: HashMap<usize, u32>,
    nested: usize,
    counters: Counters,
}

impl Core {
    /// Books for memory in multiples of `1 << shift` bytes.
    pub(super) fn new(shift: u32, config: &PoolConfig) -> Self {
        let fixed = config.allocator_type == AllocatorType::FixedSize;
        let min_rest = if fixed { 0 } else { config.min_block_size };
        let zones = [(); 3].map(|()| Ranges::new(shift, config.strategy.clone(), min_rest));
        Self {
            zones,
            order: Order::new(),
            pieces: None,
            shared: HashMap::new(),
            records: Arc::new(Records::for_pool(config.max_size)),
            live: 0,
            reserved: 0,
            growing: 0,
            single_zone: fixed || config.max_size < MIN_ZONED,
            parents: HashMap::new(),
            nested: 0,
            counters: Counters::default(),
        }
    }

    /// Gives the pool address space, in which pieces of memory in multiples of `unit` will lie; false where it
    /// cannot be noted.
    pub(super) fn set_space(&mut self, start: usize, len: usize, unit: usize) -> bool {
        let small = if self.single_zone { 0 } else { (len / SMALL_SPACE) & !(unit - 1) };
        let noted = (small == 0 || self.zones[SMALL].add_space(start, small))
            && self.zones[LARGE].add_space(start + small, len - small);
        self.lanes_changed();
        self.pieces = noted.then(|| Pieces::new(unit));
        noted
    }

    pub(super) fn zone_of(&self, bytes: usize) -> usize {
        if self.single_zone {
            return LARGE;
        }
        if self.pieces.is_some() {
            return if bytes < ZONE_LIMITS[SMALL] { SMALL } else { LARGE };
        }
        ZONE_LIMITS.iter().position(|&limit| bytes < limit).unwrap_or(LARGE)
    }

    /// Prepares bins for lanes that were opened.
    pub(super) fn lanes_changed(&mut self) {
        let last = self.order.lanes() - 1;
        self.zones.iter_mut().for_each(|zone| zone.add_lane(last));
    }

    /// The lane of a stream; opens one at its first use.
    #[inline]
    pub(super) fn lane_for(&mut self, stream: &Stream) -> Result<u16> {
        match self.order.lane(stream.slot()) {
            Some(lane) => Ok(lane),
            None => self.open_lane(stream),
        }
    }

    #[cold]
    fn open_lane(&mut self, stream: &Stream) -> Result<u16> {
        let (zones, shared, lanes) = (&self.zones, &self.shared, self.order.lanes());
        let unused = || Self::unused_lanes(zones, shared, lanes.into());
        let lane = self.order.open_lane(stream.slot(), stream.raw(), stream.thread(), unused)?;
        self.lanes_changed();
        Ok(lane)
    }

    /// The private lane of a capture.
    pub(super) fn capture_lane(&mut self, id: u64, slot: u32) -> Result<u16> {
        let (zones, shared, lanes) = (&self.zones, &self.shared, self.order.lanes());
        let lane = self.order.capture_lane(id, slot, || Self::unused_lanes(zones, shared, lanes.into()))?;
        self.lanes_changed();
        Ok(lane)
    }

    /// Which lane numbers nothing refers to.
    fn unused_lanes(zones: &[Ranges; 3], shared: &Shared, lanes: usize) -> Vec<bool> {
        let mut unused = vec![true; lanes];
        for &(user, _) in shared.values().flatten() {
            unused[user as usize] = false;
        }
        for zone in zones {
            zone.for_each(&mut |range| unused[range.tag.lane as usize] = false);
        }
        // Lists of several lanes are not followed: while there are any, no lane is given on.
        if !unused[MIXED as usize] {
            unused.fill(false);
        }
        unused
    }

    /// Step 1.
    #[inline]
    pub(super) fn place(&mut self, ask: Ask) -> Option<Placed> {
        let zone = self.zone_of(ask.bytes);
        let node = self.cut_own(zone, ask)?;
        Some(self.hand_out(zone, node, ask))
    }

    /// Steps 2 to 5; a small zone then takes another segment from the large one.
    #[cold]
    pub(super) fn place_slow(&mut self, driver: &dyn Driver, ask: Ask) -> Option<Placed> {
        self.counters.misses += 1;
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

    pub(super) fn hand_out(&mut self, zone: usize, node: u32, ask: Ask) -> Placed {
        let (start, len) = (self.zones[zone].start(node), self.zones[zone].len(node));
        self.live += len;
        let counters = &mut self.counters;
        counters.allocations += 1;
        counters.total += len as u64;
        counters.histogram[MemoryStats::bucket(ask.bytes)] += 1;
        Placed { ticket: Ticket::new(zone, node), start, len, published: false }
    }

    /// Gives a small zone a segment out of the large one.
    fn nest(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> bool {
        let bytes = SEGMENTS[zone];
        let part = Ask { bytes, align: ask.align, lane: ask.lane };
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
    pub(super) fn unnest(&mut self) -> bool {
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
    #[inline]
    fn cut_own(&mut self, zone: usize, ask: Ask) -> Option<u32> {
        let ranges = &self.zones[zone];
        let granules = ranges.granules(ask.bytes)?;
        let node = ranges.choose(ask.lane, self.order.is_capture(ask.lane), granules, ask.align)?;
        self.zones[zone].carve(node, granules, ask.align, ask.lane)
    }

    /// Steps 2 to 5 in one zone.
    fn cut_slow(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> Option<u32> {
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
    fn cut_waited(&mut self, zone: usize, ask: Ask) -> Option<u32> {
        if ask.lane < FIRST {
            return None;
        }
        let granules = self.zones[zone].granules(ask.bytes)?;
        for lane in FIRST..self.order.lanes() {
            let Some((node, _)) = self.zones[zone].best(lane, granules, ask.align) else { continue };
            if lane != ask.lane && self.order.may_use(ask.lane, self.zones[zone].tag(node)) {
                return self.zones[zone].carve(node, granules, ask.align, ask.lane);
            }
        }
        None
    }

    /// Renews the batch numbers of lanes that run out of them.
    fn renumber(&mut self, driver: &dyn Driver) {
        let full = self.order.finish_full(driver);
        if !full.is_empty() {
            self.clean_done();
            full.into_iter().for_each(|lane| self.order.renumber(lane));
        }
    }

    /// Step 3: learns what is complete and makes it clean; returns whether anything was.
    pub(super) fn settle(&mut self, driver: &dyn Driver) -> bool {
        self.order.poll(driver) | self.clean_done()
    }

    /// Seals whatever is not, so that the events stand for all frees so far.
    pub(super) fn seal_all(&mut self, driver: &dyn Driver) {
        let zones = &self.zones;
        // A list of several lanes may stand for open batches of any of them.
        let mixed = zones.iter().any(|zone| zone.has_free(MIXED));
        self.order.seal_all(driver, |lane| mixed || zones.iter().any(|zone| zone.has_free(lane)));
    }

    /// Makes clean what the host knows to be complete.
    pub(super) fn clean_done(&mut self) -> bool {
        let mut moved = 0;
        for lane in MIXED..self.order.lanes() {
            if lane == HOLE || self.order.is_capture(lane) {
                continue;
            }
            let lists = if lane == MIXED { self.order.mixed_done() } else { Vec::new() };
            for zone in &mut self.zones {
                let order = &self.order;
                moved += zone.retag(lane, &|tag| order.is_done(tag), Tag::CLEAN);
            }
            for batch in lists {
                self.order.forget_mixed(Tag { lane, batch });
            }
        }
        moved != 0
    }

    /// Joins what the lane freed with neighbours that it may use as well.
    fn join_for(&mut self, zone: usize, ask: Ask) -> bool {
        let (order, tag) = (&self.order, self.order.tag_now(ask.lane));
        #[cfg(test)]
        let tag = match order.mutant {
            Some(super::order::Mutant::JoinUnderOldBatch) => Tag { lane: tag.lane, batch: 1 },
            _ => tag,
        };
        let usable = |other: Tag| other.lane != MIXED && order.may_use(ask.lane, other);
        self.zones[zone].join_neighbours(tag, &usable)
    }

    /// Step 4: the best fit of another lane.
    fn cut_other(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> Option<u32> {
        let granules = self.zones[zone].granules(ask.bytes)?;
        let mut found: Vec<(u32, u32)> = Vec::new();
        for lane in MIXED..self.order.lanes() {
            if let Some((node, size)) = self.zones[zone].best(lane, granules, ask.align)
                && lane != ask.lane
                && !self.order.is_private(self.zones[zone].tag(node))
            {
                found.push((size, node));
            }
        }
        found.sort_unstable();
        for (_, mut node) in found {
            let tag = self.zones[zone].tag(node);
            if self.order.ensure(driver, ask.lane, tag).is_err() {
                continue;
            }
            if tag.lane == MIXED {
                // Its list belongs to the whole range, so the whole range becomes this lane's.
                node = self.zones[zone].give(node, self.order.tag_now(ask.lane));
                self.order.forget_mixed(tag);
            }
            return self.zones[zone].carve(node, granules, ask.align, ask.lane);
        }
        None
    }

    /// Step 5.
    fn cut_run(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> Option<u32> {
        let granules = self.zones[zone].granules(ask.bytes)?;
        let order = &self.order;
        let (first, mut tags) =
            self.zones[zone].best_run(granules, ask.align, &|tag| !order.is_private(tag))?;
        // The latest batch of each lane first, so that one wait covers the others.
        tags.sort_unstable_by_key(|tag| std::cmp::Reverse(tag.batch));
        for &tag in &tags {
            self.order.ensure(driver, ask.lane, tag).ok()?;
        }
        let order = &self.order;
        let node =
            self.zones[zone].join_run(first, self.order.tag_now(ask.lane), &|tag| !order.is_private(tag));
        tags.into_iter().for_each(|tag| self.order.forget_mixed(tag));
        self.zones[zone].carve(node, granules, ask.align, ask.lane)
    }

    /// Frees a block on `lane` (`CLEAN`: the CPU used it, and nobody else does). `before` is the lane of a captured
    /// stream outside of its capture.
    #[inline]
    pub(super) fn free(&mut self, driver: &dyn Driver, ticket: Ticket, lane: u16, before: Option<u16>) {
        self.counters.frees += 1;
        self.release(driver, ticket, lane, before);
    }

    /// [`free`](Self::free), of a block whose free was counted already.
    pub(super) fn release(
        &mut self,
        driver: &dyn Driver,
        ticket: Ticket,
        mut lane: u16,
        before: Option<u16>,
    ) {
        self.records.remove(self.start(ticket));
        let (zone, node) = (ticket.zone(), ticket.node());
        let len = self.zones[zone].len(node);
        let was = self.zones[zone].tag(node);
        let mut users = Vec::new();
        if was.batch & SHARED != 0 {
            users = self.shared.remove(&ticket).unwrap_or_default();
        }
        // A graph runs when and where it is launched, which orders nothing with the rest of the stream's work. So a
        // block that both use, or two graphs, waits for all of them.
        let had = self.order.is_capture(was.lane);
        #[cfg(test)]
        let before = before.filter(|_| !self.order.is(super::order::Mutant::ForgetBefore));
        if (had || self.order.is_capture(lane)) && !self.order.same_capture(was.lane, lane) {
            users.extend(before.map(|before| (before, 0)));
            if had {
                users.push((lane, 0));
                #[cfg(test)]
                users.truncate(users.len() - usize::from(self.order.is(super::order::Mutant::ForgetOutside)));
                lane = was.lane;
            }
            users.retain(|&(user, _)| user != CLEAN);
        }
        let tag = if !users.is_empty() {
            users.retain(|&(user, _)| user != lane);
            if users.is_empty() { self.tag_on(lane) } else { self.order.tag_shared(driver, lane, users) }
        } else {
            self.tag_on(lane)
        };
        // The lane may use what is clean, so both are one range to it; others find out again what is complete.
        let joins = tag.lane >= FIRST && !self.order.is_capture(tag.lane);
        self.zones[zone].free_joining(node, tag, &|other| joins && other.lane == CLEAN);
        self.live -= len;
    }

    fn tag_on(&self, lane: u16) -> Tag {
        if lane == CLEAN { Tag::CLEAN } else { self.order.tag_now(lane) }
    }

    /// Notes that `lane` uses a live block too.
    pub(super) fn share(&mut self, ticket: Ticket, lane: u16) {
        let (zone, node) = (ticket.zone(), ticket.node());
        let users = self.shared.entry(ticket).or_default();
        if !users.iter().any(|&(user, _)| user == lane) {
            // Room for the owner as well, so that the free need not ask for memory.
            users.reserve(2);
            users.push((lane, 0));
        }
        let flags = self.zones[zone].tag(node).batch;
        self.zones[zone].set_flags(node, flags | SHARED);
        self.note_on_record(ticket, front::SHARED, true);
    }

    fn note_on_record(&self, ticket: Ticket, flag: u32, on: bool) {
        if let Some((_, record)) = self.records.find(self.start(ticket)) {
            record.set(flag, on);
        }
    }

    /// All work of other lanes on a live block is complete.
    pub(super) fn unshare(&mut self, ticket: Ticket) {
        let (zone, node) = (ticket.zone(), ticket.node());
        self.shared.remove(&ticket);
        let flags = self.zones[zone].tag(node).batch;
        self.zones[zone].set_flags(node, flags & !SHARED);
        self.note_on_record(ticket, front::SHARED, false);
    }

    /// Whether other lanes than its own used a live block.
    pub(super) fn is_shared(&self, ticket: Ticket) -> bool {
        self.zones[ticket.zone()].tag(ticket.node()).batch & SHARED != 0
    }

    /// Makes a block findable by its address.
    pub(super) fn publish(&mut self, ticket: Ticket) -> bool {
        let published = self.zones[ticket.zone()].publish(ticket.node());
        if published {
            self.note_on_record(ticket, front::PUBLISHED, true);
        }
        published
    }

    pub(super) fn is_published(&self, ticket: Ticket) -> bool {
        self.zones[ticket.zone()].tag(ticket.node()).batch & PUBLISHED != 0
    }

    pub(super) fn is_live(&self, ticket: Ticket) -> bool {
        self.zones.get(ticket.zone()).is_some_and(|zone| zone.is_live(ticket.node()))
    }

    /// Whether a block, or what is freed on `lane`, is the private memory of a capture.
    pub(super) fn is_private(&self, ticket: Ticket, lane: u16) -> bool {
        self.order.is_capture(lane)
            || self.order.is_capture(self.zones[ticket.zone()].tag(ticket.node()).lane)
    }

    /// Whether the block lies in a cache.
    pub(super) fn is_cached(&self, start: usize) -> bool {
        self.records.find(start).is_some_and(|(_, record)| record.flags() & front::CACHED != 0)
    }

    /// The block that begins at an address and was published.
    pub(super) fn find(&self, start: usize) -> Result<Ticket> {
        for (zone, ranges) in self.zones.iter().enumerate() {
            if let Some(node) = ranges.find(start) {
                if self.is_cached(start) {
                    return Err(Error::pointer(start, PointerFault::NotLive));
                }
                return Ok(Ticket::new(zone, node));
            }
            if ranges.owns(start) {
                let fault = match ranges.around(start) {
                    Some(node) if ranges.start(node) == start => PointerFault::WrongOwner,
                    Some(_) => PointerFault::Interior,
                    None => PointerFault::NotLive,
                };
                return Err(Error::pointer(start, fault));
            }
        }
        Err(Error::pointer(start, PointerFault::Foreign))
    }

    /// A block in a zone that is not its own, where that has no memory left.
    pub(super) fn place_in(&mut self, driver: &dyn Driver, zone: usize, ask: Ask) -> Option<Placed> {
        let node = self.cut_own(zone, ask).or_else(|| self.cut_slow(driver, zone, ask))?;
        Some(self.hand_out(zone, node, ask))
    }

    pub(super) fn start(&self, ticket: Ticket) -> usize {
        self.zones[ticket.zone()].start(ticket.node())
    }

    /// Bytes that nobody holds, in ranges and in pieces that lie nowhere.
    pub(super) fn idle_bytes(&self) -> usize {
        self.free_bytes() + self.pieces.as_ref().map_or(0, Pieces::spare_bytes)
    }

    pub(super) fn len(&self, ticket: Ticket) -> usize {
        self.zones[ticket.zone()].len(ticket.node())
    }

    /// Grows a block in place, into what its lane may use; returns its place, and its size before and after.
    pub(super) fn grow(&mut self, ticket: Ticket, bytes: usize, lane: u16) -> Option<(usize, usize, usize)> {
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

    /// A block grew.
    pub(super) fn note_length(&self, ticket: Ticket) {
        if let Some((_, record)) = self.records.find(self.start(ticket)) {
            record.set_len(self.len(ticket));
        }
    }

    /// Notes that as many bytes are live as the books say, less `cached` at least.
    #[inline]
    pub(super) fn note_peak(&mut self, cached: impl FnOnce() -> usize) {
        if self.live > self.counters.peak {
            self.counters.peak = self.counters.peak.max(self.live.saturating_sub(cached()));
        }
    }

    pub(super) fn note_source_call(&mut self) {
        self.counters.source_calls += 1;
    }

    pub(super) fn set_reserved(&mut self, bytes: usize) {
        self.reserved = bytes;
        self.counters.peak_reserved = self.counters.peak_reserved.max(bytes);
    }

    pub(super) fn peak_reserved(&self) -> usize {
        self.counters.peak_reserved
    }

    pub(super) fn owns(&self, address: usize) -> bool {
        if let Some(pieces) = &self.pieces {
            return pieces.covers(address);
        }
        self.zones.iter().any(|zone| zone.owns(address))
    }

    /// Adds memory from the driver; false where it cannot be noted.
    pub(super) fn add(&mut self, start: usize, len: usize) -> bool {
        let added = self.zones[LARGE].add(start, len, Tag::CLEAN);
        if added {
            self.lanes_changed();
            self.reserved += len;
            self.counters.peak_reserved = self.counters.peak_reserved.max(self.reserved);
            self.counters.source_calls += 1;
        }
        added
    }

    /// Takes an idle segment of at most `at_most` bytes out, the one idle for longest.
    pub(super) fn remove_idle(&mut self, at_most: usize) -> Option<(usize, usize)> {
        let (start, len, _) = self.zones[LARGE].remove_idle(at_most, &|tag| tag.lane == CLEAN)?;
        self.reserved -= len;
        self.counters.source_calls += 1;
        Some((start, len))
    }

    /// Bytes that must be added for a request: a segment of its zone, or itself.
    pub(super) fn segment_for(&self, ask: Ask) -> usize {
        SEGMENTS.get(self.zone_of(ask.bytes)).map_or(ask.bytes, |&segment| segment.max(ask.bytes))
    }

    /// Whether a clean range of `bytes` is there.
    pub(super) fn has_clean(&self, bytes: usize) -> bool {
        let ranges = &self.zones[LARGE];
        ranges.granules(bytes).is_some_and(|granules| ranges.best(CLEAN, granules, 1).is_some())
    }

    /// All segments, for the pool's end.
    pub(super) fn drain_segments(&mut self) -> Vec<(usize, usize)> {
        let segments = self.zones[LARGE].segments();
        self.zones.iter_mut().for_each(Ranges::clear);
        segments
    }

    /// Calls `visit` with place, size and lane of every live block.
    pub(super) fn for_each_live(&self, visit: &mut dyn FnMut(usize, usize, u16)) {
        self.for_each_held(&mut |start, len, lane| {
            if !self.is_cached(start) {
                visit(start, len, lane);
            }
        });
    }

    /// The same, with those that caches hold.
    fn for_each_held(&self, visit: &mut dyn FnMut(usize, usize, u16)) {
        for (zone, ranges) in self.zones.iter().enumerate() {
            ranges.for_each(&mut |range| {
                if range.live
                    && range.tag.lane != HOLE
                    && !(zone == LARGE && self.parents.contains_key(&range.start))
                {
                    visit(range.start, range.len, range.tag.lane);
                }
            });
        }
    }

    /// Bytes that are free for everybody.
    pub(super) fn clean_bytes(&self) -> usize {
        let mut clean = 0;
        for zone in &self.zones {
            zone.for_each(&mut |range| {
                if !range.live && range.tag.lane == CLEAN {
                    clean += range.len;
                }
            });
        }
        clean
    }

    /// Free bytes in all zones.
    pub(super) fn free_bytes(&self) -> usize {
        self.zones.iter().map(|zone| zone.free_bytes).sum()
    }

    /// Live blocks.
    pub(super) fn live_blocks(&self) -> usize {
        self.zones.iter().map(|zone| zone.live_blocks).sum::<usize>() - self.parents.len()
    }

    /// Bytes of host memory that the books take.
    pub(super) fn metadata_bytes(&self) -> usize {
        self.zones.iter().map(Ranges::metadata_bytes).sum::<usize>()
            + self.pieces.as_ref().map_or(0, Pieces::metadata_bytes)
    }

    pub(super) fn failed(&mut self) {
        self.counters.failed += 1;
    }

    pub(super) fn reset_peak(&mut self, cached: usize) {
        (self.counters.peak, self.counters.peak_reserved) = (self.live - cached, self.reserved);
    }

    pub(super) fn stats(&self) -> MemoryStats {
        let Counters { total, allocations, frees, failed, misses, source_calls, .. } = self.counters;
        MemoryStats {
            total_allocated: total,
            current_allocated: self.live,
            peak_allocated: self.counters.peak,
            allocation_count: allocations,
            deallocation_count: frees,
            failed_count: failed,
            reserved: self.reserved,
            peak_reserved: self.counters.peak_reserved,
            committed: self.reserved,
            peak_committed: self.counters.peak_reserved,
            free: self.free_bytes(),
            largest_free: self.zones.iter().map(Ranges::largest_free).max().unwrap_or(0),
            cache_hits: allocations.saturating_sub(misses),
            cache_misses: misses,
            source_calls,
            size_histogram: self.counters.histogram,
            latency: None,
        }
    }

    /// Forgets all blocks; the caller vouches that all work is complete.
    pub(super) fn reset(&mut self) {
        self.shared.clear();
        self.records.clear();
        if self.pieces.is_some() {
            self.reset_space();
        } else {
            self.zones[..LARGE].iter_mut().for_each(Ranges::clear);
            self.zones[LARGE].reset();
        }
        self.parents.clear();
        self.nested = 0;
        self.lanes_changed();
        self.counters.frees = self.counters.allocations;
        self.live = 0;
    }

    /// Walks every invariant.
    pub(super) fn check(&self) -> Result<(), Broken> {
        self.zones.iter().try_for_each(Ranges::check)?;
        self.check_pieces()?;
        let mut live = 0;
        self.for_each_held(&mut |_, len, _| live += len);
        let spare = self.pieces.as_ref().map_or(0, Pieces::spare_bytes);
        if live != self.live || live + self.free_bytes() + spare != self.reserved {
            return Err(Broken { invariant: "live and free bytes add up to what is reserved", at: live });
        }
        let nested: usize = self.parents.values().map(|&parent| self.zones[LARGE].len(parent)).sum();
        if nested != self.nested {
            return Err(Broken {
                invariant: "nested segments are live ranges of the large zone",
                at: nested,
            });
        }
        Ok(())
    }
}

//! What a pool keeps under its lock: the ranges of each zone, the lanes, the counters.
//!
//! | file | what |
//! |---|---|
//! | `place` | how a request is placed, step by step |
//! | `release` | frees, and streams that share a block |
//! | `settle` | what the driver says is complete |
//! | `lookup` | from an address to its block |
//! | `counts` | statistics and invariants |
//!
//! Small requests live in zones of their own. Where memory comes in segments, those of the small zones are ranges
//! of the large one; where it comes in pieces, the small zone has a part of the address space to itself.

#![forbid(unsafe_code)]

mod counts;
mod lookup;
mod place;
mod release;
mod settle;

use std::collections::HashMap;
use std::sync::Arc;

use counts::Counters;

use super::arena::{Pieces, Unrest};
use super::front::Records;
use super::order::Order;
use super::ranges::{CLEAN, MIXED, Ranges, Tag};
use super::stream::Stream;
use crate::base::config::{AllocatorType, PoolConfig};
use crate::base::error::Result;

/// A live block: its zone and node. Owned buffers keep it, so that their free looks nothing up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ticket(u32);

const NODE_BITS: u32 = 30;

impl Ticket {
    #[inline]
    fn new(zone: usize, node: u32) -> Self {
        Self((zone as u32) << NODE_BITS | node)
    }
    #[inline]
    pub(super) fn zone(self) -> usize {
        (self.0 >> NODE_BITS) as usize
    }
    #[inline]
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
    /// To be found by its address, as far as there is room for that.
    pub(super) by_address: bool,
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

/// The state under the lock.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) zones: [Ranges; 3],
    pub(super) order: Order,
    /// The pieces of memory in the pool's address space; `None` where memory comes in segments.
    pub(super) pieces: Option<Pieces>,
    pub(super) unrest: Unrest,
    /// The tags of what the plan under way claimed: they are in no range until it ends.
    pub(super) claimed: Vec<Tag>,
    /// Where the address space of the large zone begins then.
    large_from: usize,
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
    /// Requests of so many bytes go to the large zone.
    large_least: usize,
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
        let single_zone = fixed || config.max_size < MIN_ZONED;
        let zones = [(); 3].map(|()| Ranges::new(shift, config.strategy.clone(), min_rest));
        Self {
            zones,
            order: Order::new(),
            pieces: None,
            unrest: Unrest::new(0),
            claimed: Vec::new(),
            large_from: 0,
            shared: HashMap::new(),
            records: Arc::new(Records::for_pool(config.max_size)),
            live: 0,
            reserved: 0,
            growing: 0,
            single_zone,
            large_least: if single_zone { 0 } else { ZONE_LIMITS[LARGE - 1] },
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
        (self.pieces, self.large_from) = (noted.then(|| Pieces::new(unit)), start + small);
        self.large_least = if self.single_zone { 0 } else { ZONE_LIMITS[SMALL] };
        noted
    }

    #[inline]
    pub(super) fn zone_of(&self, bytes: usize) -> usize {
        if bytes >= self.large_least {
            LARGE
        } else if self.pieces.is_some() {
            SMALL
        } else {
            ZONE_LIMITS.iter().position(|&limit| bytes < limit).unwrap_or(LARGE)
        }
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
        if self.order.is_full() {
            // What closed lanes freed is clean then, and no longer theirs.
            self.settle(&*stream.device().0.driver);
        }
        let (zones, shared, claimed, lanes) = (&self.zones, &self.shared, &self.claimed, self.order.lanes());
        let unused = || Self::unused_lanes(zones, shared, claimed, lanes.into());
        let lane = self.order.open_lane(stream.slot(), stream.raw(), stream.thread(), unused)?;
        self.lanes_changed();
        Ok(lane)
    }

    /// The private lane of a capture.
    pub(super) fn capture_lane(&mut self, id: u64, slot: u32) -> Result<u16> {
        let (zones, shared, claimed, lanes) = (&self.zones, &self.shared, &self.claimed, self.order.lanes());
        let unused = || Self::unused_lanes(zones, shared, claimed, lanes.into());
        let lane = self.order.capture_lane(id, slot, unused)?;
        self.lanes_changed();
        Ok(lane)
    }

    /// Which lane numbers nothing refers to.
    fn unused_lanes(zones: &[Ranges; 3], shared: &Shared, claimed: &[Tag], lanes: usize) -> Vec<bool> {
        let mut unused = vec![true; lanes];
        claimed.iter().for_each(|tag| unused[tag.lane as usize] = false);
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

    #[inline]
    pub(super) fn start(&self, ticket: Ticket) -> usize {
        self.zones[ticket.zone()].start(ticket.node())
    }

    #[inline]
    pub(super) fn len(&self, ticket: Ticket) -> usize {
        self.zones[ticket.zone()].len(ticket.node())
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

    /// All segments, for the pool's end.
    pub(super) fn drain_segments(&mut self) -> Vec<(usize, usize)> {
        let segments = self.zones[LARGE].segments();
        self.zones.iter_mut().for_each(Ranges::clear);
        segments
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
}

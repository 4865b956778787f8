//! Address ranges ordered by stream: which are live, which are free, and for whom.
//!
//! ```text
//!  segment ─┬─ node ─ node ─ node ─┐      every node: place, size, neighbours by address,
//!           │  live   free   live  │      and for a free one the tag (lane, batch): it is free
//!           │        (L2, 17)      │      for lane L2 now, for others once batch 17 of L2 is done
//! ```
//! A free range is free *for a lane* (a stream, as a pool numbers them). Lane [`CLEAN`] means free for
//! anybody, lane [`HOLE`] that there is no memory behind the addresses. Ranges of one lane merge at once,
//! whatever their batches: the later batch covers the earlier.
//! Ranges of different lanes stay apart until somebody who may use both joins them.
//!
//! Invariants
//! 1. Neighbours by address touch; the first node of a segment has no `prev`, the last no `next`.
//! 2. Every free node is in exactly one bin: its lane's, its size's. No other node is.
//! 3. No two free neighbours have the same lane, unless that lane is [`MIXED`].
//! 4. A published live node is in the look-up chain of its address; a chain holds nothing else.
//! 5. Freeing allocates nothing.
//!
//! The caller holds the pool's lock. Places are plain numbers; nothing here touches memory.

#![forbid(unsafe_code)]

mod fit;
mod lookup;
mod node;
mod space;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::BTreeMap;

use node::{FREE, LIVE, NIL, Node};

use crate::base::bits::round_up;
use crate::base::policy::Strategy;

/// Free for anybody: all work on it is known to be complete.
pub(super) const CLEAN: u16 = 0;
/// Free once a list of batches is done; the batch of the tag is the list's index.
pub(super) const MIXED: u16 = 1;
/// Free addresses without memory behind them: nobody may use them before memory is mapped there. A live node of
/// this lane is a claim: it is being made into a block.
pub(super) const HOLE: u16 = 2;
/// The first lane that is a stream's or a capture's.
pub(super) const FIRST: u16 = 3;
/// Most lanes, those three included; few under test, so that lanes are given on.
pub(super) const MAX_LANES: usize = if cfg!(test) { 13 } else { 1 << LANE_BITS };

const LANE_BITS: u32 = 12;
/// Batches count in the rest of the tag; few under test, so that their numbers run out.
pub(super) const MAX_BATCH: u32 = if cfg!(test) { 40 } else { (1 << (32 - LANE_BITS)) - 1 };

/// Whom a free range waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) lane: u16,
    pub(super) batch: u32,
}

impl Tag {
    pub(super) const CLEAN: Self = Self { lane: CLEAN, batch: 0 };
    pub(super) const HOLE: Self = Self { lane: HOLE, batch: 0 };
}

/// The flags of a live node, kept where a free one keeps its batch.
pub(super) const PUBLISHED: u32 = 1;
/// Other lanes than its own used the block.
pub(super) const SHARED: u32 = 2;

/// Subdivisions of each power of two.
const SUB_LOG2: u32 = 4;
const CLASSES: usize = (30 - SUB_LOG2 as usize + 1) << SUB_LOG2;

fn class_of(granules: u32) -> usize {
    if granules < 1 << SUB_LOG2 {
        return granules as usize;
    }
    let log = granules.ilog2();
    let sub = (granules >> (log - SUB_LOG2)) & ((1 << SUB_LOG2) - 1);
    (((log - SUB_LOG2 + 1) << SUB_LOG2) + sub) as usize
}

/// The free ranges of one lane by size.
#[derive(Debug)]
struct Bins {
    heads: Box<[u32]>,
    filled: [u64; CLASSES.div_ceil(64)],
}

impl Bins {
    fn new() -> Self {
        Self { heads: vec![NIL; CLASSES].into(), filled: [0; CLASSES.div_ceil(64)] }
    }

    /// The first filled class from `from` on.
    fn next_filled(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        let mut bits = self.filled.get(word)? & (!0 << (from % 64));
        loop {
            if bits != 0 {
                return Some(word * 64 + bits.trailing_zeros() as usize);
            }
            word += 1;
            bits = *self.filled.get(word)?;
        }
    }
}

/// A stretch of memory from the driver.
#[derive(Clone, Copy, Debug)]
struct Segment {
    len: usize,
    first: u32,
    last_used: u64,
}

/// A live or free range, as it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) node: u32,
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) live: bool,
    pub(super) tag: Tag,
}

/// The ranges of one zone of a pool.
#[derive(Debug)]
pub(super) struct Ranges {
    shift: u32,
    strategy: Strategy,
    /// Granules that a split leaves at least; a shorter rest goes with the block.
    min_rest: u32,
    nodes: Vec<Node>,
    vacant: u32,
    bins: Vec<Bins>,
    segments: BTreeMap<usize, Segment>,
    chains: Vec<u32>,
    published: usize,
    clock: u64,
    pub(super) free_bytes: usize,
    pub(super) live_blocks: usize,
}

impl Ranges {
    /// Ranges in multiples of `1 << shift` bytes; splits leave `min_rest` bytes at least.
    pub(super) fn new(shift: u32, strategy: Strategy, min_rest: usize) -> Self {
        let min_rest = u32::try_from(min_rest.div_ceil(1 << shift)).unwrap_or(u32::MAX);
        Self {
            shift,
            strategy,
            min_rest,
            nodes: Vec::new(),
            vacant: NIL,
            bins: Vec::new(),
            segments: BTreeMap::new(),
            chains: Vec::new(),
            published: 0,
            clock: 0,
            free_bytes: 0,
            live_blocks: 0,
        }
    }

    /// Granules for `bytes`; `None` past what a node can count.
    pub(super) fn granules(&self, bytes: usize) -> Option<u32> {
        let granules = round_up(bytes, 1 << self.shift)? >> self.shift;
        u32::try_from(granules).ok().filter(|&granules| granules < 1 << 30)
    }

    pub(super) fn bytes(&self, granules: u32) -> usize {
        (granules as usize) << self.shift
    }

    pub(super) fn start(&self, node: u32) -> usize {
        self.place(&self.nodes[node as usize])
    }

    #[inline]
    fn place(&self, node: &Node) -> usize {
        node.at() << self.shift
    }

    pub(super) fn len(&self, node: u32) -> usize {
        self.bytes(self.nodes[node as usize].granules())
    }

    /// The tag of a free node; lane and flags of a live one.
    pub(super) fn tag(&self, node: u32) -> Tag {
        self.nodes[node as usize].tag()
    }

    pub(super) fn set_flags(&mut self, node: u32, flags: u32) {
        let lane = self.tag(node).lane;
        self.nodes[node as usize].set_tag(Tag { lane, batch: flags });
    }

    pub(super) fn metadata_bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>() + self.chains.capacity() * 4 + self.bins.len() * CLASSES * 4
    }

    /// A vacant node; `None` where the host has no memory for one.
    fn new_node(&mut self, node: Node) -> Option<u32> {
        let index = self.vacant;
        if index != NIL {
            self.vacant = self.nodes[index as usize].link_next();
            self.nodes[index as usize] = node;
            return Some(index);
        }
        if self.nodes.len() == self.nodes.capacity() {
            // A thirty-second of slack keeps a block below 30 bytes.
            self.nodes.try_reserve_exact((self.nodes.len() / 32).max(64)).ok()?;
        }
        let index = u32::try_from(self.nodes.len()).ok().filter(|&index| index < NIL)?;
        self.nodes.push(node);
        Some(index)
    }

    fn drop_node(&mut self, index: u32) {
        let vacant = self.vacant;
        let node = &mut self.nodes[index as usize];
        node.set(0, node::VACANT);
        node.set_link_next(vacant);
        self.vacant = index;
    }

    /// Makes room for lane numbers up to `lane`.
    pub(super) fn add_lane(&mut self, lane: u16) {
        while self.bins.len() <= lane as usize {
            self.bins.push(Bins::new());
        }
    }

    fn link(&mut self, index: u32) {
        let node = self.nodes[index as usize];
        let class = class_of(node.granules());
        let bins = &mut self.bins[node.tag().lane as usize];
        let head = std::mem::replace(&mut bins.heads[class], index);
        bins.filled[class / 64] |= 1 << (class % 64);
        if head != NIL {
            self.nodes[head as usize].set_link_prev(index);
        }
        let node = &mut self.nodes[index as usize];
        node.set_link_prev(NIL);
        node.set_link_next(head);
        if node.tag().lane != HOLE {
            self.free_bytes += (node.granules() as usize) << self.shift;
        }
    }

    fn unlink(&mut self, index: u32) {
        let node = self.nodes[index as usize];
        if node.link_next() != NIL {
            self.nodes[node.link_next() as usize].set_link_prev(node.link_prev());
        }
        if node.link_prev() != NIL {
            self.nodes[node.link_prev() as usize].set_link_next(node.link_next());
        } else {
            let class = class_of(node.granules());
            let bins = &mut self.bins[node.tag().lane as usize];
            bins.heads[class] = node.link_next();
            if node.link_next() == NIL {
                bins.filled[class / 64] &= !(1 << (class % 64));
            }
        }
        if node.tag().lane != HOLE {
            self.free_bytes -= (node.granules() as usize) << self.shift;
        }
    }

    /// Adds a segment, all of it free for `tag`; false where there is no room to note it.
    pub(super) fn add(&mut self, start: usize, len: usize, tag: Tag) -> bool {
        self.add_lane(tag.lane.max(MIXED));
        let granules = (len >> self.shift) as u32;
        let node = Node::new(start >> self.shift, granules, FREE, tag);
        let Some(first) = self.new_node(node) else { return false };
        self.link(first);
        self.clock += 1;
        self.segments.insert(start, Segment { len, first, last_used: self.clock });
        true
    }

    fn fits(&self, node: &Node, granules: u32, align: usize) -> bool {
        let skip = (self.place(node).wrapping_neg() & (align - 1)) >> self.shift;
        node.granules() as usize >= skip + granules as usize
    }

    /// Cuts a live block out of a free node; what is left stays free with the node's tag. `None` where there
    /// is no room to note the rest.
    pub(super) fn carve(&mut self, index: u32, granules: u32, align: usize, lane: u16) -> Option<u32> {
        let node = self.nodes[index as usize];
        let skip = ((self.place(&node).wrapping_neg() & (align - 1)) >> self.shift) as u32;
        let rest = node.granules() - skip - granules;
        let granules = if rest < self.min_rest { granules + rest } else { granules };
        self.carve_at(index, skip, granules, lane)
    }

    /// Cuts `granules` out of a free node, `skip` granules behind its start.
    fn carve_at(&mut self, index: u32, skip: u32, granules: u32, lane: u16) -> Option<u32> {
        let node = self.nodes[index as usize];
        let rest = node.granules() - skip - granules;
        let mut block = index;
        if skip != 0 || rest != 0 {
            // Both nodes first, so that a failure changes nothing.
            let head = if skip != 0 { Some(self.new_node(node)?) } else { None };
            let tail = if rest != 0 {
                let Some(tail) = self.new_node(node) else {
                    if let Some(head) = head {
                        self.drop_node(head);
                    }
                    return None;
                };
                Some(tail)
            } else {
                None
            };
            self.unlink(index);
            if let Some(new) = head {
                // The old node stays in front, so that the segment's first node keeps its number.
                self.nodes[index as usize].set(skip, FREE);
                let fresh = &mut self.nodes[new as usize];
                fresh.set_at(node.at() + skip as usize);
                fresh.set_prev(index);
                self.nodes[index as usize].set_next(new);
                self.link(index);
                block = new;
            }
            if let Some(new) = tail {
                let at = self.nodes[block as usize].at() + granules as usize;
                let after = &mut self.nodes[new as usize];
                after.set_at(at);
                after.set_prev(block);
                after.set(rest, FREE);
                self.nodes[block as usize].set_next(new);
                if node.next() != NIL {
                    self.nodes[node.next() as usize].set_prev(new);
                }
                self.link(new);
            } else if node.next() != NIL {
                self.nodes[node.next() as usize].set_prev(block);
            }
        } else {
            self.unlink(index);
        }
        let live = &mut self.nodes[block as usize];
        live.set(granules, LIVE);
        live.set_tag(Tag { lane, batch: 0 });
        self.live_blocks += 1;
        Some(block)
    }

    /// Whether `node` is a live block.
    pub(super) fn is_live(&self, node: u32) -> bool {
        self.nodes.get(node as usize).is_some_and(|node| node.state() == LIVE)
    }

    /// Frees a live block for `tag`.
    pub(super) fn free(&mut self, index: u32, tag: Tag) {
        self.free_joining(index, tag, &|_| false);
    }

    /// [`free`](Self::free), and joins the neighbours that `also` accepts under `tag`.
    pub(super) fn free_joining(&mut self, index: u32, tag: Tag, also: &dyn Fn(Tag) -> bool) {
        debug_assert!(self.is_live(index));
        if self.tag(index).batch & PUBLISHED != 0 {
            self.unpublish(index);
        }
        self.live_blocks -= 1;
        let granules = self.nodes[index as usize].granules();
        self.nodes[index as usize].set(granules, FREE);
        self.nodes[index as usize].set_tag(tag);
        let merged = self.merge(index, also);
        self.link(merged);
        self.note_idle(merged);
    }

    /// A free range grew: if it is a whole segment now, that one is idle from this moment on.
    fn note_idle(&mut self, index: u32) {
        let node = self.nodes[index as usize];
        if node.prev() == NIL && node.next() == NIL {
            self.clock += 1;
            if let Some(segment) = self.segments.get_mut(&(node.at() << self.shift)) {
                segment.last_used = self.clock;
            }
        }
    }

    /// Joins an unlinked free node with its free neighbours of the same lane, and with those whose tag
    /// `also` accepts; returns the node that stands for all.
    fn merge(&mut self, mut index: u32, also: &dyn Fn(Tag) -> bool) -> u32 {
        loop {
            let node = self.nodes[index as usize];
            let joins = |other: u32| {
                other != NIL && {
                    let other = &self.nodes[other as usize];
                    let (mine, theirs) = (node.tag(), other.tag());
                    other.state() == FREE && (mine.lane == theirs.lane && mine.lane != MIXED || also(theirs))
                }
            };
            let (front, back) = if joins(node.prev()) {
                self.unlink(node.prev());
                (node.prev(), index)
            } else if joins(node.next()) {
                self.unlink(node.next());
                (index, node.next())
            } else {
                return index;
            };
            let gone = self.nodes[back as usize];
            let other = if front == index { gone.tag() } else { self.nodes[front as usize].tag() };
            let mine = node.tag();
            let batch = if other.lane == mine.lane { mine.batch.max(other.batch) } else { mine.batch };
            let kept = &mut self.nodes[front as usize];
            let granules = kept.granules() + gone.granules();
            kept.set(granules, FREE);
            kept.set_next(gone.next());
            kept.set_tag(Tag { lane: mine.lane, batch });
            if gone.next() != NIL {
                self.nodes[gone.next() as usize].set_prev(front);
            }
            self.drop_node(back);
            index = front;
        }
    }

    /// Gives every free range whose tag `from` accepts the tag `to`; returns how many.
    pub(super) fn retag(&mut self, lane: u16, from: &dyn Fn(Tag) -> bool, to: Tag) -> usize {
        let found = self.in_lane(lane);
        let mut moved = 0;
        for (index, place) in found {
            // An earlier step may have merged it away.
            let node = &self.nodes[index as usize];
            if node.state() != FREE || node.at() != place || node.tag().lane != lane || !from(node.tag()) {
                continue;
            }
            let before = node.granules();
            self.unlink(index);
            self.nodes[index as usize].set_tag(to);
            let merged = self.merge(index, &|_| false);
            self.link(merged);
            if self.nodes[merged as usize].granules() != before {
                self.note_idle(merged);
            }
            moved += 1;
        }
        moved
    }

    fn in_lane(&self, lane: u16) -> Vec<(u32, usize)> {
        let mut found = Vec::new();
        let Some(bins) = self.bins.get(lane as usize) else { return found };
        let mut class = 0;
        while let Some(filled) = bins.next_filled(class) {
            let mut at = bins.heads[filled];
            while at != NIL {
                found.push((at, self.nodes[at as usize].at()));
                at = self.nodes[at as usize].link_next();
            }
            class = filled + 1;
        }
        found
    }

    /// Calls `visit` with place and size of every free range of a lane.
    pub(super) fn free_in_lane(&self, lane: u16, visit: &mut dyn FnMut(usize, usize)) {
        self.in_lane(lane).into_iter().for_each(|(node, _)| visit(self.start(node), self.len(node)));
    }

    /// Whether the lane has free ranges here.
    pub(super) fn has_free(&self, lane: u16) -> bool {
        self.bins.get(lane as usize).is_some_and(|bins| bins.next_filled(0).is_some())
    }

    /// Joins the free ranges of a lane with neighbours that it may use as well, under the tag of what it frees
    /// now; returns whether any joined.
    pub(super) fn join_neighbours(&mut self, tag: Tag, usable: &dyn Fn(Tag) -> bool) -> bool {
        let mut joined = false;
        for (index, place) in self.in_lane(tag.lane) {
            let node = self.nodes[index as usize];
            if node.state() != FREE || node.at() != place || node.tag().lane != tag.lane {
                continue;
            }
            self.unlink(index);
            let merged = self.merge(index, usable);
            if self.nodes[merged as usize].granules() != node.granules() {
                // The lane waited for what joined at some moment up to now; only its open batch covers that.
                self.nodes[merged as usize].set_tag(tag);
                joined = true;
            }
            self.link(merged);
        }
        joined
    }

    /// The shortest run of free neighbours, whatever their lanes, that holds the request: its first node and
    /// the tags in it.
    pub(super) fn best_run(
        &self,
        granules: u32,
        align: usize,
        usable: &dyn Fn(Tag) -> bool,
    ) -> Option<(u32, Vec<Tag>)> {
        let usable = |node: &Node| node.state() == FREE && usable(node.tag());
        let mut best: Option<(u32, u32)> = None;
        for segment in self.segments.values() {
            let (mut at, mut first, mut sum) = (segment.first, NIL, 0);
            loop {
                let node = (at != NIL).then(|| self.nodes[at as usize]);
                if let Some(free) = node.filter(usable) {
                    if first == NIL {
                        (first, sum) = (at, 0);
                    }
                    sum += free.granules();
                } else if first != NIL {
                    let mut whole = self.nodes[first as usize];
                    whole.set(sum, FREE);
                    if self.fits(&whole, granules, align) && best.is_none_or(|(size, _)| sum < size) {
                        best = Some((sum, first));
                    }
                    first = NIL;
                }
                match node {
                    Some(node) => at = node.next(),
                    None => break,
                }
            }
        }
        let (_, first) = best?;
        let mut tags = Vec::new();
        let mut at = first;
        while at != NIL && usable(&self.nodes[at as usize]) {
            tags.push(self.tag(at));
            at = self.nodes[at as usize].next();
        }
        Some((first, tags))
    }

    /// Makes one free range of the run that begins at `first`, for `tag`.
    pub(super) fn join_run(&mut self, first: u32, tag: Tag, usable: &dyn Fn(Tag) -> bool) -> u32 {
        self.unlink(first);
        self.nodes[first as usize].set_tag(tag);
        let merged = self.merge(first, usable);
        self.link(merged);
        merged
    }

    /// Gives one free range the tag `tag` and joins it with the neighbours of that lane.
    pub(super) fn give(&mut self, node: u32, tag: Tag) -> u32 {
        self.unlink(node);
        self.nodes[node as usize].set_tag(tag);
        let merged = self.merge(node, &|_| false);
        self.link(merged);
        merged
    }

    /// Takes out a segment in which nothing is live, the one idle for longest among those of at most
    /// `at_most` bytes whose tag `usable` accepts: its place, length and tag.
    pub(super) fn remove_idle(
        &mut self,
        at_most: usize,
        usable: &dyn Fn(Tag) -> bool,
    ) -> Option<(usize, usize, Tag)> {
        let idle = |segment: &&Segment| {
            let node = &self.nodes[segment.first as usize];
            let whole = node.state() == FREE && node.next() == NIL;
            whole && segment.len <= at_most && usable(node.tag())
        };
        let segment = *self.segments.values().filter(idle).min_by_key(|segment| segment.last_used)?;
        let start = self.start(segment.first);
        let tag = self.tag(segment.first);
        self.unlink(segment.first);
        self.drop_node(segment.first);
        self.segments.remove(&start);
        Some((start, segment.len, tag))
    }

    /// Place and length of every segment.
    pub(super) fn segments(&self) -> Vec<(usize, usize)> {
        self.segments.iter().map(|(&start, segment)| (start, segment.len)).collect()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        let bytes = self.bytes(self.min_rest);
        *self = Self::new(self.shift, self.strategy.clone(), bytes);
    }

    /// Makes everything free and clean.
    pub(super) fn reset(&mut self) {
        let segments = self.segments();
        self.clear();
        for (start, len) in segments {
            // There were more nodes than segments a moment ago, so there is room.
            self.add(start, len, Tag::CLEAN);
        }
    }

    /// Whether an address lies in a segment.
    pub(super) fn owns(&self, address: usize) -> bool {
        let at = self.segments.range(..=address).next_back();
        at.is_some_and(|(start, segment)| address < start + segment.len)
    }

    /// Grows a live block into a free neighbour behind it that `usable` accepts; true if that worked.
    pub(super) fn grow(&mut self, index: u32, granules: u32, usable: &dyn Fn(Tag) -> bool) -> bool {
        let node = self.nodes[index as usize];
        if node.granules() >= granules {
            return true;
        }
        if node.next() == NIL {
            return false;
        }
        let next = self.nodes[node.next() as usize];
        let more = granules - node.granules();
        if next.state() != FREE || next.granules() < more || !usable(next.tag()) {
            return false;
        }
        self.unlink(node.next());
        self.nodes[index as usize].set(granules, LIVE);
        if next.granules() == more {
            self.nodes[index as usize].set_next(next.next());
            if next.next() != NIL {
                self.nodes[next.next() as usize].set_prev(index);
            }
            self.drop_node(node.next());
        } else {
            let rest = &mut self.nodes[node.next() as usize];
            rest.set_at(rest.at() + more as usize);
            rest.set(next.granules() - more, FREE);
            self.link(node.next());
        }
        true
    }
}

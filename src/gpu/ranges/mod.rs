//! Address ranges ordered by stream: which are live, which are free, and for whom.
//!
//! ```text
//!  segment ─┬─ node ─ node ─ node ─┐      every node: place, size, neighbours by address,
//!           │  live   free   live  │      and for a free one the tag (lane, batch): it is free
//!           │        (L2, 17)      │      for lane L2 now, for others once batch 17 of L2 is done
//! ```
//! A free range is free *for a lane* (a stream, as a pool numbers them). Lane [`CLEAN`] means free for
//! anybody, lane [`HOLE`] that there is no memory behind the addresses. Ranges of one lane merge
//! at once, whatever their batches: the later batch covers the earlier.
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

mod bins;
mod cut;
mod fit;
mod join;
mod lookup;
mod node;
mod segments;
mod space;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::BTreeMap;

use bins::Bins;
use node::{LIVE, NIL, Node};
use segments::Segment;

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
/// A cache holds the block, or may get it back: it has a record.
pub(super) const RECORDED: u32 = 4;

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
    /// More blocks than this are published only after there are more chains.
    most_published: usize,
    /// What the hash of an address is shifted by to give its chain.
    chain_shift: u32,
    clock: u64,
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
            most_published: 0,
            chain_shift: 0,
            clock: 0,
            live_blocks: 0,
        }
    }

    /// Granules for `bytes`; `None` past what a node can count.
    #[inline]
    pub(super) fn granules(&self, bytes: usize) -> Option<u32> {
        let granules = bytes.checked_add((1 << self.shift) - 1)? >> self.shift;
        u32::try_from(granules).ok().filter(|&granules| granules < 1 << 30)
    }

    #[inline]
    pub(super) fn bytes(&self, granules: u32) -> usize {
        (granules as usize) << self.shift
    }

    #[inline]
    pub(super) fn start(&self, node: u32) -> usize {
        self.place(&self.nodes[node as usize])
    }

    #[inline]
    fn place(&self, node: &Node) -> usize {
        node.at() << self.shift
    }

    #[inline]
    pub(super) fn len(&self, node: u32) -> usize {
        self.bytes(self.nodes[node as usize].granules())
    }

    /// The tag of a free node; lane and flags of a live one.
    #[inline]
    pub(super) fn tag(&self, node: u32) -> Tag {
        self.nodes[node as usize].tag()
    }

    #[inline]
    pub(super) fn set_flags(&mut self, node: u32, flags: u32) {
        let lane = self.tag(node).lane;
        self.nodes[node as usize].set_tag(Tag { lane, batch: flags });
    }

    pub(super) fn metadata_bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>()
            + self.chains.capacity() * 4
            + self.bins.capacity() * size_of::<Bins>()
    }

    /// A vacant node made this one; `None` where the host has no memory for one.
    #[inline(always)]
    fn new_node(&mut self, node: Node) -> Option<u32> {
        if self.vacant == NIL {
            self.one_more_node()?;
        }
        let index = self.vacant;
        let vacant = &mut self.nodes[index as usize];
        self.vacant = vacant.link_next();
        *vacant = node;
        Some(index)
    }

    /// Makes a vacant node, where there is none.
    #[cold]
    fn one_more_node(&mut self) -> Option<()> {
        if self.nodes.len() == self.nodes.capacity() {
            // A thirty-second of slack keeps a block below 30 bytes.
            self.nodes.try_reserve_exact((self.nodes.len() / 32).max(64)).ok()?;
        }
        self.vacant = u32::try_from(self.nodes.len()).ok().filter(|&index| index < NIL)?;
        self.nodes.push(Node::new(0, 0, node::VACANT, Tag::CLEAN));
        Some(())
    }

    /// Makes two nodes neighbours; `NIL` is the end of a segment.
    #[inline]
    fn join_chain(&mut self, front: u32, back: u32) {
        if front != NIL {
            self.nodes[front as usize].set_next(back);
        }
        if back != NIL {
            self.nodes[back as usize].set_prev(front);
        }
    }

    fn drop_node(&mut self, index: u32) {
        let vacant = self.vacant;
        let node = &mut self.nodes[index as usize];
        node.set(0, node::VACANT);
        node.set_link_next(vacant);
        self.vacant = index;
    }

    /// Whether `node` is a live block.
    pub(super) fn is_live(&self, node: u32) -> bool {
        self.nodes.get(node as usize).is_some_and(|node| node.state() == LIVE)
    }
}

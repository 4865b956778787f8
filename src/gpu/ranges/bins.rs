//! The free ranges of each lane by size.

#![forbid(unsafe_code)]

use super::node::{FREE, NIL, Node};
use super::{HOLE, Ranges};

/// Subdivisions of each power of two.
const SUB_LOG2: u32 = 4;
const CLASSES: usize = (30 - SUB_LOG2 as usize + 1) << SUB_LOG2;

const WORDS: usize = CLASSES.div_ceil(64);

/// The class of a size: the sizes below `1 << SUB_LOG2` have one each.
#[inline]
pub(super) fn class_of(granules: u32) -> usize {
    let shift = (granules | 1 << SUB_LOG2).ilog2() - SUB_LOG2;
    ((shift << SUB_LOG2) + (granules >> shift)) as usize
}

/// The free ranges of one lane.
#[derive(Debug)]
pub(super) struct Bins {
    /// Which heads are no `NIL`, and which of these words are not 0.
    filled: [u64; WORDS],
    any: u32,
    /// In all of them.
    pub(super) granules: u64,
    pub(super) heads: [u32; CLASSES],
}

impl Bins {
    fn new() -> Self {
        Self { filled: [0; WORDS], any: 0, granules: 0, heads: [NIL; CLASSES] }
    }

    /// The first filled class from `from` on.
    #[inline]
    pub(super) fn next_filled(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        let here = self.filled.get(word)? & (!0 << (from % 64));
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        let behind = self.any & (!1 << word);
        let word = behind.trailing_zeros() as usize;
        Some(word * 64 + self.filled.get(word)?.trailing_zeros() as usize)
    }

    /// Puts a node in front of its class. The first of a class has no use for a link to the one before.
    #[inline(always)]
    fn put_in(&mut self, nodes: &mut [Node], index: u32, class: usize) {
        let head = std::mem::replace(&mut self.heads[class], index);
        nodes[index as usize].set_link_next(head);
        if head != NIL {
            nodes[head as usize].set_link_prev(index);
            return;
        }
        self.filled[class / 64] |= 1 << (class % 64);
        self.any |= 1 << (class / 64);
    }

    /// Takes a node out of its class.
    #[inline(always)]
    fn take_out(&mut self, nodes: &mut [Node], index: u32, class: usize) {
        let node = &nodes[index as usize];
        let after = node.link_next();
        if self.heads[class] != index {
            let before = node.link_prev();
            nodes[before as usize].set_link_next(after);
            if after != NIL {
                nodes[after as usize].set_link_prev(before);
            }
            return;
        }
        self.heads[class] = after;
        if after == NIL {
            let word = &mut self.filled[class / 64];
            *word &= !(1 << (class % 64));
            if *word == 0 {
                self.any &= !(1 << (class / 64));
            }
        }
    }
}

/// Gives a node in a bin another size; it changes bins only where that is of another class.
#[inline(always)]
pub(super) fn resize(nodes: &mut [Node], bins: &mut [Bins], index: u32, granules: u32) {
    let node = &mut nodes[index as usize];
    let before = node.granules();
    node.set(granules, FREE);
    let bins = &mut bins[node.tag().lane as usize];
    bins.granules = bins.granules - u64::from(before) + u64::from(granules);
    let (from, to) = (class_of(before), class_of(granules));
    if from != to {
        bins.take_out(nodes, index, from);
        bins.put_in(nodes, index, to);
    }
}

impl Ranges {
    /// Makes room for lane numbers up to `lane`.
    pub(in crate::gpu) fn add_lane(&mut self, lane: u16) {
        while self.bins.len() <= lane as usize {
            self.bins.push(Bins::new());
        }
    }

    /// Puts a free node into its bin.
    #[inline]
    pub(super) fn link(&mut self, index: u32) {
        let node = &self.nodes[index as usize];
        let (granules, lane) = (node.granules(), node.tag().lane);
        let bins = &mut self.bins[lane as usize];
        bins.granules += u64::from(granules);
        bins.put_in(&mut self.nodes, index, class_of(granules));
    }

    /// Takes a node out of its bin.
    #[inline]
    pub(super) fn unlink(&mut self, index: u32) {
        let node = &self.nodes[index as usize];
        let (granules, lane) = (node.granules(), node.tag().lane);
        let bins = &mut self.bins[lane as usize];
        bins.granules -= u64::from(granules);
        bins.take_out(&mut self.nodes, index, class_of(granules));
    }

    /// The free ranges of a lane, from the class of `granules` on.
    pub(super) fn in_lane(&self, lane: u16, granules: u32) -> impl Iterator<Item = u32> + '_ {
        let bins = self.bins.get(lane as usize).filter(|bins| bins.any != 0);
        let (mut class, mut at) = (class_of(granules), NIL);
        std::iter::from_fn(move || {
            if at == NIL {
                let filled = bins?.next_filled(class)?;
                (class, at) = (filled + 1, bins?.heads[filled]);
            }
            let found = at;
            at = self.nodes[at as usize].link_next();
            Some(found)
        })
    }

    /// Number and place of those free ranges of a lane that `wanted` accepts, for a walk that joins some of them.
    pub(super) fn collect(&self, lane: u16, wanted: impl Fn(&Node) -> bool) -> Vec<(u32, usize)> {
        let places = self.in_lane(lane, 0).map(|index| (index, &self.nodes[index as usize]));
        places.filter(|(_, node)| wanted(node)).map(|(index, node)| (index, node.at())).collect()
    }

    /// Whether what was collected is still there: an earlier step may have joined it.
    pub(super) fn is_still(&self, (index, place): (u32, usize), lane: u16) -> bool {
        let node = &self.nodes[index as usize];
        node.state() == FREE && node.at() == place && node.tag().lane == lane
    }

    /// Calls `visit` with place and size of every free range of a lane of `least` bytes or more.
    pub(in crate::gpu) fn free_in_lane(&self, lane: u16, least: usize, visit: &mut dyn FnMut(usize, usize)) {
        let Some(granules) = self.granules(least) else { return };
        for index in self.in_lane(lane, granules) {
            visit(self.start(index), self.len(index));
        }
    }

    /// The lanes that have so many free granules or more.
    pub(in crate::gpu) fn lanes_with(&self, granules: u32) -> impl Iterator<Item = u16> + '_ {
        let lanes = self.bins.iter().enumerate();
        lanes.filter(move |(_, bins)| bins.granules >= u64::from(granules)).map(|(lane, _)| lane as u16)
    }

    /// Free bytes of a lane.
    pub(in crate::gpu) fn free_in(&self, lane: u16) -> usize {
        self.bins.get(lane as usize).map_or(0, |bins| (bins.granules << self.shift) as usize)
    }

    /// Free bytes of all lanes.
    pub(in crate::gpu) fn free_bytes(&self) -> usize {
        let lanes = 0..self.bins.len() as u16;
        lanes.filter(|&lane| lane != HOLE).map(|lane| self.free_in(lane)).sum()
    }

    /// Whether the lane has free ranges here.
    #[inline]
    pub(in crate::gpu) fn has_free(&self, lane: u16) -> bool {
        self.bins.get(lane as usize).is_some_and(|bins| bins.any != 0)
    }
}

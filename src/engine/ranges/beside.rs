//! Books beside the memory, in a table of the host's: for memory that the CPU cannot touch, or had better
//! not.
//!
//! A node is 24 bytes: where its block starts, its neighbours, and two links. Its size is the distance to
//! its right neighbour, so splitting and merging change one start. Addresses that come back raw are looked
//! up in a hash table of 4 to 5 bytes a live block, chained through the links that a live block does not need;
//! blocks that are held by a ticket never enter it.
//!
//! 1. `nodes` holds, for each span, its blocks from left to right linked by `prev` and `next`, closed by an
//!    end mark (`LIVE`) whose `next` is `NONE`; and the unused nodes, chained by `next` from `unused`.
//!    `len` of them are in use.
//! 2. A live block with `NOTED` is in the chain of its start's hash, and nothing else is in any chain.
//! 3. `spans` is sorted by start.
//!
//! The table grows by a sixteenth at a time; where no memory is to be had, allocation fails and nothing is lost.
//! Frees need no memory.

use super::bins::MAX_SIZE;
use super::store::{Extent, Nodes, Store};
use super::treap::scatter;
use crate::base::bits::{round_down, round_up};
use crate::engine::Span;

const LIVE: usize = 1;
const NOTED: usize = 2;
const FRESH: usize = 4;
const FLAGS: usize = 15;

/// The name of a block in a [`Beside`] store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Index(u32);

#[derive(Clone, Copy, Debug)]
struct Node {
    /// Start of the block, a multiple of 16, and flags in its low bits.
    start: usize,
    prev: Index,
    next: Index,
    /// Free: links of lists and trees. Noted: the next of its chain, and nothing.
    link: [Index; 2],
}

/// A store whose books lie in a table of the host's, at most 32 bytes a block. For any memory.
#[derive(Debug)]
pub struct Beside {
    granule: usize,
    nodes: Vec<Node>,
    unused: Index,
    len: usize,
    chains: Vec<Index>,
    noted: usize,
    spans: Vec<Extent<Index>>,
}

const NONE: Index = Index(u32::MAX);

impl Store for Beside {}

impl Beside {
    #[inline(always)]
    fn node(&self, id: Index) -> &Node {
        &self.nodes[id.0 as usize]
    }

    #[inline(always)]
    fn node_mut(&mut self, id: Index) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    /// Room for `more` nodes without asking for memory when they are taken.
    #[inline]
    fn room_for(&mut self, more: usize) -> bool {
        self.nodes.capacity() - self.len >= more || self.grow_slow(more)
    }

    #[cold]
    fn grow_slow(&mut self, more: usize) -> bool {
        let step = (self.nodes.len() / 16).max(64).max(more);
        let fits = self.nodes.len() + step < NONE.0 as usize;
        fits && (self.nodes.try_reserve_exact(step).is_ok() || self.nodes.try_reserve_exact(more).is_ok())
    }

    /// A node; `room_for` promised one.
    #[inline]
    fn new_node(&mut self, node: Node) -> Index {
        self.len += 1;
        let id = self.unused;
        if id == NONE {
            debug_assert!(self.nodes.len() < self.nodes.capacity());
            self.nodes.push(node);
            Index(self.nodes.len() as u32 - 1)
        } else {
            self.unused = self.node(id).next;
            *self.node_mut(id) = node;
            id
        }
    }

    #[inline]
    fn put_back(&mut self, id: Index) {
        let unused = self.unused;
        *self.node_mut(id) = Node { start: 0, prev: NONE, next: unused, link: [NONE; 2] };
        self.unused = id;
        self.len -= 1;
    }

    #[inline]
    fn chain(&self, start: usize) -> usize {
        // The high half of a 64-bit product scales the hash to the table's length, whatever that is.
        ((u128::from(scatter(start)) * self.chains.len() as u128) >> 64) as usize
    }

    /// One chain for every live block that is noted, roughly. Without memory the chains just get longer.
    #[cold]
    fn rehash_slow(&mut self) {
        let wanted = (self.noted + self.noted / 4).max(64);
        let mut chains = Vec::new();
        if chains.try_reserve_exact(wanted).is_err() {
            if !self.chains.is_empty() || chains.try_reserve_exact(1).is_err() {
                return;
            }
            chains.push(NONE);
        } else {
            chains.resize(wanted, NONE);
        }
        let old = core::mem::replace(&mut self.chains, chains);
        for mut id in old {
            while id != NONE {
                let next = self.node(id).link[0];
                self.push_chain(id);
                id = next;
            }
        }
    }

    #[cold]
    fn first_chains_slow(&mut self) -> bool {
        self.rehash_slow();
        !self.chains.is_empty()
    }

    #[inline]
    fn push_chain(&mut self, id: Index) {
        let chain = self.chain(self.start(id));
        self.node_mut(id).link[0] = self.chains[chain];
        self.chains[chain] = id;
    }

    /// Cuts a block down to `size`; the rest has the same flags.
    #[inline]
    fn put_right(&mut self, id: Index, size: usize) -> Index {
        let Node { start, next, .. } = *self.node(id);
        let rest = self.new_node(Node { start: start + size, prev: id, next, link: [NONE; 2] });
        self.node_mut(id).next = rest;
        self.node_mut(next).prev = rest;
        rest
    }

    /// Joins `right` to its left neighbour; fresh is only what was fresh in both.
    #[inline]
    fn join(&mut self, id: Index, right: Index) {
        let Node { start, next, .. } = *self.node(right);
        let node = self.node_mut(id);
        node.start &= start | !FRESH;
        node.next = next;
        self.node_mut(next).prev = id;
        self.put_back(right);
    }

    /// Nodes for one free block from `first` to `end` and its end mark; `room_for` promised them.
    fn lay(&mut self, first: usize, end: usize, zeroed: bool) -> (Index, Index) {
        let flags = if zeroed { FRESH } else { 0 };
        let block = self.new_node(Node { start: first | flags, prev: NONE, next: NONE, link: [NONE; 2] });
        let mark = self.new_node(Node { start: end | LIVE, prev: block, next: NONE, link: [NONE; 2] });
        self.node_mut(block).next = mark;
        (block, mark)
    }

    /// Index in `spans` of the first span that starts behind `address`.
    fn spans_behind(&self, address: usize) -> usize {
        self.spans.partition_point(|extent| extent.span.start <= address)
    }

    /// Bytes of the host's memory that the books take.
    pub(super) fn footprint(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>()
            + self.chains.capacity() * size_of::<Index>()
            + self.spans.capacity() * size_of::<Extent<Index>>()
    }
}

impl Nodes for Beside {
    type Id = Index;
    const NONE: Index = NONE;
    const HEAD: usize = 0;
    const MIN: usize = 16;
    const LARGE: usize = usize::MAX;

    fn new(granule: usize) -> Self {
        Self {
            granule,
            nodes: Vec::new(),
            unused: NONE,
            len: 0,
            chains: Vec::new(),
            noted: 0,
            spans: Vec::new(),
        }
    }

    fn span_books(_: usize) -> usize {
        0
    }

    unsafe fn add_span(&mut self, span: Span) -> Result<Index, Span> {
        let first = round_up(span.start, self.granule).ok_or(span)?;
        let end = round_down(span.start.checked_add(span.len).ok_or(span)?, self.granule);
        if first >= end || end - first > MAX_SIZE || !self.room_for(2) || self.spans.try_reserve(1).is_err() {
            return Err(span);
        }
        let (block, mark) = self.lay(first, end, span.zeroed);
        let place = self.spans_behind(span.start);
        self.spans.insert(place, Extent { span, first: block, end: mark });
        Ok(block)
    }

    fn remove_span(&mut self, extent: &Extent<Index>) {
        self.put_back(extent.first);
        self.put_back(extent.end);
        self.spans.retain(|other| other.span.start != extent.span.start);
    }

    fn reset(&mut self, mut visit: impl FnMut(&mut Self, Index)) {
        self.nodes.clear();
        self.chains.fill(NONE);
        (self.unused, self.len, self.noted) = (NONE, 0, 0);
        for place in 0..self.spans.len() {
            let span = self.spans[place].span;
            let first = span.start.next_multiple_of(self.granule);
            let end = round_down(span.start + span.len, self.granule);
            // There were at least these two nodes before, so there is room.
            let (block, mark) = self.lay(first, end, false);
            self.spans[place] = Extent { span, first: block, end: mark };
            visit(self, block);
        }
    }

    fn span_of(&self, address: usize) -> Option<Extent<Index>> {
        let extent = &self.spans[self.spans_behind(address).checked_sub(1)?];
        (address - extent.span.start < extent.span.len).then_some(*extent)
    }

    fn span_from(&self, address: usize) -> Option<Extent<Index>> {
        let place = address.checked_sub(1).map_or(0, |below| self.spans_behind(below));
        self.spans.get(place).copied()
    }

    #[inline(always)]
    fn prepare(&mut self) -> bool {
        self.room_for(2) && (!self.chains.is_empty() || self.first_chains_slow())
    }

    fn find(&self, start: usize) -> Option<Index> {
        if self.chains.is_empty() {
            return None;
        }
        let mut id = self.chains[self.chain(start)];
        while id != NONE {
            let node = self.node(id);
            if node.start & !FLAGS == start {
                return Some(id);
            }
            id = node.link[0];
        }
        None
    }

    #[inline]
    unsafe fn at(&self, start: usize) -> Index {
        match self.find(start) {
            Some(id) => id,
            None => not_live(start),
        }
    }

    #[inline]
    fn note(&mut self, id: Index) {
        self.noted += 1;
        // Between 4/5 and 1 chain a block.
        if self.noted > self.chains.len() + self.chains.len() / 4 {
            self.rehash_slow();
        }
        self.node_mut(id).start |= NOTED;
        self.push_chain(id);
    }

    #[inline]
    fn forget(&mut self, id: Index) {
        if self.node(id).start & NOTED == 0 {
            return;
        }
        self.noted -= 1;
        self.node_mut(id).start &= !NOTED;
        let (chain, after) = (self.chain(self.start(id)), self.node(id).link[0]);
        let mut at = self.chains[chain];
        if at == id {
            self.chains[chain] = after;
            return;
        }
        while self.node(at).link[0] != id {
            at = self.node(at).link[0];
        }
        self.node_mut(at).link[0] = after;
    }

    #[inline(always)]
    fn start(&self, id: Index) -> usize {
        self.node(id).start & !FLAGS
    }

    #[inline(always)]
    fn size(&self, id: Index) -> usize {
        let next = self.node(id).next;
        if next == NONE { 0 } else { self.start(next) - self.start(id) }
    }

    #[inline(always)]
    fn is_free(&self, id: Index) -> bool {
        self.node(id).start & LIVE == 0
    }

    #[inline(always)]
    fn next(&self, id: Index) -> Index {
        self.node(id).next
    }

    #[inline(always)]
    fn prev_free(&self, id: Index) -> Option<(Index, usize)> {
        let prev = self.node(id).prev;
        (prev != NONE && self.is_free(prev)).then(|| (prev, self.start(id) - self.start(prev)))
    }

    #[inline]
    fn take(&mut self, id: Index, whole: usize) -> usize {
        let node = self.node_mut(id);
        let fresh = node.start & FRESH != 0;
        node.start = (node.start & !FRESH) | LIVE;
        if fresh { 0 } else { whole }
    }

    #[inline]
    fn take_low(&mut self, id: Index, _: usize, size: usize) -> (Index, usize) {
        let rest = self.put_right(id, size);
        (rest, self.take(id, size))
    }

    #[inline]
    fn part(&mut self, id: Index, _: usize, low: usize) -> Index {
        self.put_right(id, low)
    }

    #[inline]
    fn give(
        &mut self,
        id: Index,
        mut whole: usize,
        mut unlink: impl FnMut(&mut Self, Index, usize),
    ) -> (Index, usize) {
        self.node_mut(id).start &= !LIVE;
        let Node { prev, next, .. } = *self.node(id);
        if self.is_free(next) {
            let size = self.size(next);
            unlink(self, next, size);
            self.join(id, next);
            whole += size;
        }
        if prev != NONE && self.is_free(prev) {
            let size = self.start(id) - self.start(prev);
            unlink(self, prev, size);
            self.join(prev, id);
            return (prev, whole + size);
        }
        (id, whole)
    }

    fn split(&mut self, id: Index, size: usize) -> Index {
        let rest = self.put_right(id, size);
        self.node_mut(rest).start &= !NOTED;
        rest
    }

    fn absorb(&mut self, id: Index, right: Index) {
        self.join(id, right);
    }

    fn push_border(&mut self, _: Index, right: Index, by: usize) -> Index {
        self.node_mut(right).start += by;
        right
    }

    #[inline(always)]
    fn link(&self, id: Index, side: usize) -> Index {
        self.node(id).link[side]
    }

    #[inline(always)]
    fn set_link(&mut self, id: Index, side: usize, to: Index) {
        self.node_mut(id).link[side] = to;
    }

    fn check(&self, id: Index) -> Result<(), &'static str> {
        let node = self.node(id);
        if node.next == NONE || self.node(node.next).prev != id {
            return Err("beside 1: neighbours name each other");
        }
        if self.start(node.next) <= self.start(id) {
            return Err("beside 1: blocks ascend");
        }
        if node.start & NOTED != 0 && self.find(self.start(id)) != Some(id) {
            return Err("beside 2: a noted block is found");
        }
        if node.start & LIVE == 0 && node.start & NOTED != 0 {
            return Err("beside 2: only live blocks are noted");
        }
        if self.spans.windows(2).any(|two| two[0].span.start >= two[1].span.start) {
            return Err("beside 3: spans are sorted");
        }
        Ok(())
    }
}

#[cold]
fn not_live(start: usize) -> ! {
    panic!("no live block at {start:#x}")
}

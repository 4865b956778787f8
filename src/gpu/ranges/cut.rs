//! Cutting live blocks out of free ranges.

#![forbid(unsafe_code)]

use super::bins::resize;
use super::node::{FREE, LIVE, NIL, Node};
use super::{Ranges, Tag};

impl Ranges {
    /// Granules in front of the first address in a node that is a multiple of `align`.
    #[inline]
    fn skip(&self, node: &Node, align: usize) -> u32 {
        if align <= 1 << self.shift {
            return 0;
        }
        ((self.place(node).wrapping_neg() & (align - 1)) >> self.shift) as u32
    }

    #[inline]
    pub(super) fn fits(&self, node: &Node, granules: u32, align: usize) -> bool {
        node.granules() >= granules && node.granules() - granules >= self.skip(node, align)
    }

    /// Cuts a live block out of a free node; what is left stays free with the node's tag. `None` where there
    /// is no room to note the rest.
    #[inline(always)]
    pub(in crate::gpu) fn carve(
        &mut self,
        index: u32,
        granules: u32,
        align: usize,
        lane: u16,
    ) -> Option<u32> {
        let node = &self.nodes[index as usize];
        let skip = self.skip(node, align);
        let rest = node.granules() - skip - granules;
        let granules = if rest < self.min_rest { granules + rest } else { granules };
        self.carve_at(index, skip, granules, lane)
    }

    /// Cuts `granules` out of a free node, `skip` granules behind its start.
    #[inline]
    pub(super) fn carve_at(&mut self, index: u32, skip: u32, granules: u32, lane: u16) -> Option<u32> {
        let block = if skip == 0 {
            self.carve_front(index, granules, lane)
        } else {
            self.carve_inside(index, skip, granules, lane)
        }?;
        self.live_blocks += 1;
        Some(block)
    }

    /// The free node keeps what is behind the block, and with it mostly its place in its bin.
    #[inline]
    fn carve_front(&mut self, index: u32, granules: u32, lane: u16) -> Option<u32> {
        let node = &self.nodes[index as usize];
        let (rest, before) = (node.granules() - granules, node.prev());
        if rest == 0 {
            self.carve_whole(index, lane);
            return Some(index);
        }
        let live = node.live_before(index, granules, lane);
        let block = self.new_node(live)?;
        let nodes = &mut self.nodes[..];
        resize(nodes, &mut self.bins, index, rest);
        let node = &mut nodes[index as usize];
        node.advance(granules);
        node.set_prev(block);
        if before == NIL {
            self.begin_with(live.at(), block);
        } else {
            nodes[before as usize].set_next(block);
        }
        Some(block)
    }

    #[inline]
    fn carve_whole(&mut self, index: u32, lane: u16) {
        self.unlink(index);
        let node = &mut self.nodes[index as usize];
        node.set(node.granules(), LIVE);
        node.set_tag(Tag { lane, batch: 0 });
    }

    #[cold]
    fn carve_inside(&mut self, index: u32, skip: u32, granules: u32, lane: u16) -> Option<u32> {
        let node = self.nodes[index as usize];
        let at = node.at() + skip as usize;
        let rest = node.granules() - skip - granules;
        let block = self.new_node(Node::new(at, granules, LIVE, Tag { lane, batch: 0 }))?;
        let mut last = block;
        if rest != 0 {
            let tail = Node::new(at + granules as usize, rest, FREE, node.tag());
            let Some(tail) = self.new_node(tail) else {
                // A failure changes nothing.
                self.drop_node(block);
                return None;
            };
            self.link(tail);
            self.join_chain(block, tail);
            last = tail;
        }
        resize(&mut self.nodes, &mut self.bins, index, skip);
        self.join_chain(index, block);
        self.join_chain(last, node.next());
        Some(block)
    }

    /// Grows a live block into a free neighbour behind it that `usable` accepts; true if that worked.
    pub(in crate::gpu) fn grow(&mut self, index: u32, granules: u32, usable: &dyn Fn(Tag) -> bool) -> bool {
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
        self.nodes[index as usize].set(granules, LIVE);
        if next.granules() == more {
            self.unlink(node.next());
            self.join_chain(index, next.next());
            self.drop_node(node.next());
        } else {
            resize(&mut self.nodes, &mut self.bins, node.next(), next.granules() - more);
            self.nodes[node.next() as usize].advance(more);
        }
        true
    }
}

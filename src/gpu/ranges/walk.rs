//! Walking all ranges by address: to report them, and to check every invariant.

#![forbid(unsafe_code)]

use super::node::{FREE, LIVE, NIL};
use super::{HOLE, MIXED, PUBLISHED, Range, Ranges};
use crate::engine::Broken;

impl Ranges {
    /// The live block around an address, published or not; walks the segment.
    pub(in crate::gpu) fn around(&self, address: usize) -> Option<u32> {
        let (_, segment) = self.segments.range(..=address).next_back()?;
        let mut at = segment.first;
        while at != NIL {
            let node = &self.nodes[at as usize];
            if address < self.place(node) + self.bytes(node.granules()) {
                return (node.state() == LIVE).then_some(at);
            }
            at = node.next();
        }
        None
    }

    pub(in crate::gpu) fn for_each(&self, visit: &mut dyn FnMut(Range)) {
        for segment in self.segments.values() {
            let mut at = segment.first;
            while at != NIL {
                let node = &self.nodes[at as usize];
                let len = self.bytes(node.granules());
                let live = node.state() == LIVE;
                visit(Range { node: at, start: self.place(node), len, live, tag: node.tag() });
                at = node.next();
            }
        }
    }

    /// The largest free range.
    pub(in crate::gpu) fn largest_free(&self) -> usize {
        let mut largest = 0;
        self.for_each(&mut |range| {
            if !range.live && range.tag.lane != HOLE {
                largest = largest.max(range.len);
            }
        });
        largest
    }

    /// Walks every invariant.
    pub(in crate::gpu) fn check(&self) -> Result<(), Broken> {
        let broken = |invariant, at| Err(Broken { invariant, at });
        let (mut live, mut free, mut free_nodes, mut published) = (0, 0, 0, 0);
        for (&start, segment) in &self.segments {
            let (mut at, mut before, mut expected) = (segment.first, NIL, start);
            while at != NIL {
                let node = &self.nodes[at as usize];
                if self.place(node) != expected || node.prev() != before || node.granules() == 0 {
                    return broken("1: neighbours touch", self.place(node));
                }
                let last = (before != NIL).then(|| self.nodes[before as usize]);
                match node.state() {
                    LIVE => {
                        live += 1;
                        published += usize::from(node.tag().batch & PUBLISHED != 0);
                        if node.tag().batch & PUBLISHED != 0
                            && self.find(self.place(node)).is_none_or(|(found, _)| found != at)
                        {
                            return broken("4: published blocks are found", self.place(node));
                        }
                    }
                    FREE => {
                        if node.tag().lane != HOLE {
                            free += self.bytes(node.granules());
                        }
                        free_nodes += 1;
                        let lane = node.tag().lane;
                        if last.is_some_and(|last| last.state() == FREE && last.tag().lane == lane)
                            && lane != MIXED
                        {
                            return broken("3: free neighbours of a lane merge", self.place(node));
                        }
                    }
                    _ => return broken("1: a vacant node lies in no segment", self.place(node)),
                }
                expected += self.bytes(node.granules());
                before = at;
                at = node.next();
            }
            if expected != start + segment.len {
                return broken("1: nodes cover the segment", start);
            }
        }
        for (lane, bins) in self.bins.iter().enumerate() {
            let mut granules = 0;
            for index in self.in_lane(lane as u16, 0) {
                let node = &self.nodes[index as usize];
                if node.state() != FREE || node.tag().lane as usize != lane {
                    return broken("2: bins hold free ranges of their lane", self.place(node));
                }
                granules += u64::from(node.granules());
                let next = node.link_next();
                if next != NIL && self.nodes[next as usize].link_prev() != index {
                    return broken("2: a bin leads back as it leads on", self.start(index));
                }
                free_nodes -= 1;
            }
            if granules != bins.granules {
                return broken("2: bins know how much they hold", lane);
            }
        }
        if free_nodes != 0 {
            return broken("2: every free range is in a bin", 0);
        }
        if (live, free, published) != (self.live_blocks, self.free_bytes(), self.published) {
            return broken("counts agree", 0);
        }
        Ok(())
    }
}

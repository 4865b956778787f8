//! Stretches of memory or address space: where they begin, and which are idle.

#![forbid(unsafe_code)]

use super::node::{FREE, NIL, Node};
use super::{MIXED, Ranges, Tag};

/// A stretch of memory from the driver, or of address space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) len: usize,
    pub(super) first: u32,
    last_used: u64,
}

impl Ranges {
    /// Adds a segment, all of it free for `tag`; false where there is no room to note it.
    pub(in crate::gpu) fn add(&mut self, start: usize, len: usize, tag: Tag) -> bool {
        self.add_lane(tag.lane.max(MIXED));
        let granules = (len >> self.shift) as u32;
        let node = Node::new(start >> self.shift, granules, FREE, tag);
        let Some(first) = self.new_node(node) else { return false };
        self.link(first);
        self.clock += 1;
        self.segments.insert(start, Segment { len, first, last_used: self.clock });
        true
    }

    /// Another node begins the segment whose first granule has the number `at`.
    #[cold]
    pub(super) fn begin_with(&mut self, at: usize, first: u32) {
        if let Some(segment) = self.segments.get_mut(&(at << self.shift)) {
            segment.first = first;
        }
    }

    /// A free range grew: if it is a whole segment now, that one is idle from this moment on.
    #[inline]
    pub(super) fn note_idle(&mut self, index: u32) {
        let node = &self.nodes[index as usize];
        if node.prev() == NIL && node.next() == NIL {
            self.clock += 1;
            if let Some(segment) = self.segments.get_mut(&(node.at() << self.shift)) {
                segment.last_used = self.clock;
            }
        }
    }

    /// Takes out a segment in which nothing is live, the one idle for longest among those of at most
    /// `at_most` bytes whose tag `usable` accepts: its place, length and tag.
    pub(in crate::gpu) fn remove_idle(
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
    pub(in crate::gpu) fn segments(&self) -> Vec<(usize, usize)> {
        self.segments.iter().map(|(&start, segment)| (start, segment.len)).collect()
    }

    /// Forgets everything.
    pub(in crate::gpu) fn clear(&mut self) {
        let bytes = self.bytes(self.min_rest);
        *self = Self::new(self.shift, self.strategy.clone(), bytes);
    }

    /// Makes everything free and clean.
    pub(in crate::gpu) fn reset(&mut self) {
        let segments = self.segments();
        self.clear();
        for (start, len) in segments {
            // There were more nodes than segments a moment ago, so there is room.
            self.add(start, len, Tag::CLEAN);
        }
    }

    /// Whether an address lies in a segment.
    pub(in crate::gpu) fn owns(&self, address: usize) -> bool {
        let at = self.segments.range(..=address).next_back();
        at.is_some_and(|(start, segment)| address < start + segment.len)
    }
}

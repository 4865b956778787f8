//! One range's entry in the books: 28 bytes, the price of a block.
//!
//! ```text
//!   low, high  48 bits   the range's number: its first address in granules
//!   before     16 bits   of the neighbour in front in a list, which is asked for least
//!   size       30 bits   granules, and two bits of state
//!   links  3 × 28 bits   neighbours by address, the next in a list; four bits each carry the rest of the one before
//!   tag        32 bits   lane, and batch or flags
//! ```
//! With granules of 64 bytes or more 48 bits are more than any address.

#![forbid(unsafe_code)]

use super::{LANE_BITS, Tag};

pub(super) const VACANT: u32 = 0;
pub(super) const LIVE: u32 = 1;
pub(super) const FREE: u32 = 2;

const LINK_BITS: u32 = 28;
/// No node.
pub(super) const NIL: u32 = (1 << LINK_BITS) - 1;

const PREV: usize = 0;
const NEXT: usize = 1;
const LINK_NEXT: usize = 2;

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    links: [u32; 3],
    low: u32,
    high: u16,
    before: u16,
    size_state: u32,
    tag: u32,
}

/// A getter and a setter per link.
macro_rules! links {
    ($($get:ident, $set:ident: $at:ident, $doc:literal;)*) => {$(
        #[doc = $doc]
        #[inline]
        pub(super) fn $get(&self) -> u32 {
            self.links[$at] & NIL
        }
        #[inline]
        pub(super) fn $set(&mut self, to: u32) {
            self.links[$at] = self.links[$at] & !NIL | to;
        }
    )*};
}

impl Node {
    /// A node of this number and size, with no neighbours.
    #[inline]
    pub(super) fn new(at: usize, granules: u32, state: u32, tag: Tag) -> Self {
        let mut node = Self { links: [NIL; 3], low: 0, high: 0, before: 0, size_state: 0, tag: 0 };
        node.set_at(at);
        node.set(granules, state);
        node.set_tag(tag);
        node
    }

    links! {
        prev, set_prev: PREV, "The neighbour in front by address.";
        next, set_next: NEXT, "The neighbour behind by address.";
        link_next, set_link_next: LINK_NEXT,
            "Free: the next in its bin. Live and published: in its look-up chain. Vacant: among the vacant.";
    }

    /// Free: the one before in its bin.
    #[inline]
    pub(super) fn link_prev(&self) -> u32 {
        let [a, b, c] = self.links.map(|link| link >> LINK_BITS);
        u32::from(self.before) | (a | b << 4 | c << 8) << 16
    }

    #[inline]
    pub(super) fn set_link_prev(&mut self, to: u32) {
        self.before = to as u16;
        for (index, link) in self.links.iter_mut().enumerate() {
            *link = *link & NIL | to >> (16 + 4 * index) << LINK_BITS;
        }
    }

    /// The first address in granules.
    #[inline]
    pub(super) fn at(&self) -> usize {
        self.low as usize | (self.high as usize) << 32
    }

    /// The low bits of that.
    #[inline]
    pub(super) fn low(&self) -> u32 {
        self.low
    }

    #[inline]
    pub(super) fn set_at(&mut self, at: usize) {
        (self.low, self.high) = (at as u32, (at >> 32) as u16);
    }

    /// Begins so many granules later.
    #[inline]
    pub(super) fn advance(&mut self, granules: u32) {
        self.set_at(self.at() + granules as usize);
    }

    /// Begins where another node does.
    #[inline]
    pub(super) fn begin_as(&mut self, other: &Self) {
        (self.low, self.high) = (other.low, other.high);
    }

    /// A live node of `lane` that begins where this one does and lies in front of it, which has the number `this`.
    #[inline]
    pub(super) fn live_before(&self, this: u32, granules: u32, lane: u16) -> Self {
        let links = [self.links[PREV], this, NIL];
        Self { links, size_state: granules << 2 | LIVE, tag: u32::from(lane), ..*self }
    }

    #[inline]
    pub(super) fn state(&self) -> u32 {
        self.size_state & 3
    }

    #[inline]
    pub(super) fn granules(&self) -> u32 {
        self.size_state >> 2
    }

    #[inline]
    pub(super) fn set(&mut self, granules: u32, state: u32) {
        self.size_state = granules << 2 | state;
    }

    #[inline]
    pub(super) fn tag(&self) -> Tag {
        Tag { lane: (self.tag & ((1 << LANE_BITS) - 1)) as u16, batch: self.tag >> LANE_BITS }
    }

    #[inline]
    pub(super) fn set_tag(&mut self, tag: Tag) {
        self.tag = tag.batch << LANE_BITS | u32::from(tag.lane);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_keeps_each_part_whatever_the_others_are() {
        assert_eq!(size_of::<Node>(), 28);
        for at in [0, 1, 0xffff_ffff, 0x1_0000_0000, 0xf0f0_1234_5678, (1 << 48) - 1] {
            let mut node = Node::new(at, (1 << 30) - 1, FREE, Tag { lane: 7, batch: 39 });
            node.set_prev(5);
            node.set_next(NIL);
            node.set_link_prev(NIL - 1);
            node.set_link_next(0);
            assert_eq!((node.at(), node.granules(), node.state()), (at, (1 << 30) - 1, FREE));
            assert_eq!((node.prev(), node.next(), node.link_prev(), node.link_next()), (5, NIL, NIL - 1, 0));
            node.set_at(at ^ 0x8000_0000_0001);
            assert_eq!((node.at(), node.prev(), node.next()), (at ^ 0x8000_0000_0001, 5, NIL));
            assert_eq!(node.tag(), Tag { lane: 7, batch: 39 });
        }
    }
}

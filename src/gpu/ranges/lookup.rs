//! From an address back to its block, for those who know the address alone: hash chains through the live nodes
//! themselves, so that only published blocks cost anything.

#![forbid(unsafe_code)]

use super::node::NIL;
use super::{PUBLISHED, Ranges, Tag};

/// While there are fewer chains than this, a chain holds one block on average.
const SHORT: usize = 8192;

impl Ranges {
    /// The chain of an address of which these are the low bits, in granules.
    #[inline]
    fn chain(&self, low: u32) -> usize {
        (low.wrapping_mul(0x9E37_79B1) >> self.chain_shift) as usize
    }

    /// Makes a live block findable by its address; false where the host has no memory for that.
    #[inline(always)]
    pub(in crate::gpu) fn publish(&mut self, index: u32) -> bool {
        let room = self.published < self.most_published || self.grow_chains();
        let chain = self.chain(self.nodes[index as usize].low());
        let node = &mut self.nodes[index as usize];
        let tag = node.tag();
        if tag.batch & PUBLISHED != 0 || !room {
            return tag.batch & PUBLISHED != 0;
        }
        node.set_tag(Tag { lane: tag.lane, batch: tag.batch | PUBLISHED });
        node.set_link_next(std::mem::replace(&mut self.chains[chain], index));
        self.published += 1;
        true
    }

    #[cold]
    fn grow_chains(&mut self) -> bool {
        let mut chains = Vec::new();
        let len = (self.chains.len() * 2).max(16);
        if chains.try_reserve_exact(len).is_err() {
            return false;
        }
        chains.resize(len, NIL);
        // Short chains while they cost little; a block in many must stay below 32 bytes.
        self.most_published = len * if len < SHORT { 1 } else { 4 };
        self.chain_shift = u32::BITS - len.ilog2();
        let old = std::mem::replace(&mut self.chains, chains);
        for mut at in old {
            while at != NIL {
                let next = self.nodes[at as usize].link_next();
                let chain = self.chain(self.nodes[at as usize].low());
                self.nodes[at as usize].set_link_next(std::mem::replace(&mut self.chains[chain], at));
                at = next;
            }
        }
        true
    }

    #[inline]
    pub(super) fn unpublish(&mut self, index: u32) {
        let node = &self.nodes[index as usize];
        let (chain, next) = (self.chain(node.low()), node.link_next());
        self.published -= 1;
        let first = &mut self.chains[chain];
        if *first == index {
            *first = next;
            return;
        }
        let mut at = *first;
        while at != NIL {
            let follow = self.nodes[at as usize].link_next();
            if follow == index {
                self.nodes[at as usize].set_link_next(next);
                return;
            }
            at = follow;
        }
    }

    /// The published live block that begins at an address, and its flags.
    #[inline]
    pub(in crate::gpu) fn find(&self, start: usize) -> Option<(u32, u32)> {
        let at = start >> self.shift;
        let mut index = *self.chains.get(self.chain(at as u32))?;
        while index != NIL {
            let node = &self.nodes[index as usize];
            if node.at() == at {
                return (at << self.shift == start).then(|| (index, node.tag().batch));
            }
            index = node.link_next();
        }
        None
    }
}

//! Which free range a request is cut from: the pool's [`Strategy`].
//!
//! | strategy | takes |
//! |---|---|
//! | `Segregated` | the tightest of the first few in the nearest bin that has one |
//! | `BestFit` | the tightest of all, the lowest address among equals |
//! | `FirstFit` | the lowest address |
//! | `Custom` | what the policy says, and the tightest where its answer is none of the ranges shown |
//!
//! Whatever the strategy, ranges that need no waiting are looked at before others.

#![forbid(unsafe_code)]

use super::bins::class_of;
use super::node::NIL;
use super::{CLEAN, FIRST, Ranges};
use crate::base::policy::{FreeRange, Policy, Request, Strategy};

/// How many ranges of a bin `Segregated` looks at.
const LOOK: usize = 24;

/// An alignment that every granule has.
const ANY: usize = 1;

/// What is looked for.
#[derive(Clone, Copy, Debug)]
struct Need {
    granules: u32,
    align: usize,
}

impl Ranges {
    /// The free range to cut a request of `lane` from, among what it freed and what is free for anybody. With
    /// `own_first` what it freed is taken wherever it fits at all.
    #[inline(always)]
    pub(in crate::gpu) fn choose(
        &self,
        lane: u16,
        own_first: impl Fn() -> bool,
        granules: u32,
        align: usize,
    ) -> Option<u32> {
        match self.strategy {
            Strategy::Segregated if align <= 1 << self.shift => {
                self.choose_tightest(lane, own_first, Need { granules, align: ANY }, LOOK)
            }
            _ => self.choose_slow(lane, own_first(), Need { granules, align }),
        }
    }

    /// [`choose`](Self::choose) the tightest.
    #[inline(always)]
    fn choose_tightest(
        &self,
        lane: u16,
        own_first: impl Fn() -> bool,
        need: Need,
        look: usize,
    ) -> Option<u32> {
        let own = if lane >= FIRST { self.tightest(lane, need, look, usize::MAX) } else { None };
        let Some((own, size)) = own else {
            return self.tightest(CLEAN, need, look, usize::MAX).map(|(node, _)| node);
        };
        if size == need.granules || !self.has_free(CLEAN) || own_first() {
            return Some(own);
        }
        // What is free for anybody is taken only where it is tighter: nothing of a larger class is.
        match self.tightest(CLEAN, need, look, class_of(size)) {
            Some((clean, other)) if other < size => Some(clean),
            _ => Some(own),
        }
    }

    /// [`choose`](Self::choose) for strategies that look at all ranges, and for large alignments.
    #[cold]
    fn choose_slow(&self, lane: u16, own_first: bool, need: Need) -> Option<u32> {
        if let Some(look) = self.look() {
            return self.choose_tightest(lane, || own_first, need, look);
        }
        let pick = |lanes: &[u16]| match &self.strategy {
            Strategy::Custom(policy) => self.by_policy(&**policy, lanes, need),
            _ => self.lowest(lanes, need),
        };
        match (lane >= FIRST, own_first) {
            (false, _) => pick(&[CLEAN]),
            (true, false) => pick(&[lane, CLEAN]),
            (true, true) => pick(&[lane]).or_else(|| pick(&[CLEAN])),
        }
    }

    /// The free range of `lane` that the strategy prefers, and its size in granules.
    pub(in crate::gpu) fn best(&self, lane: u16, granules: u32, align: usize) -> Option<(u32, u32)> {
        let need = Need { granules, align };
        if let Some(look) = self.look() {
            return self.tightest(lane, need, look, usize::MAX);
        }
        let node = match &self.strategy {
            Strategy::Custom(policy) => self.by_policy(&**policy, &[lane], need),
            _ => self.lowest(&[lane], need),
        }?;
        Some((node, self.nodes[node as usize].granules()))
    }

    /// How many ranges of a bin a strategy looks at that takes the tightest of one.
    fn look(&self) -> Option<usize> {
        match self.strategy {
            Strategy::Segregated => Some(LOOK),
            Strategy::BestFit => Some(usize::MAX),
            _ => None,
        }
    }

    /// The smallest that fits and its size, the lowest among equals, looking at no more than `look` ranges of a bin and
    /// at no class behind `last`.
    #[inline(always)]
    fn tightest(&self, lane: u16, need: Need, look: usize, last: usize) -> Option<(u32, u32)> {
        let bins = self.bins.get(lane as usize)?;
        let anywhere = need.align == ANY;
        let mut class = class_of(need.granules);
        while let Some(filled) = bins.next_filled(class).filter(|&filled| filled <= last) {
            let (mut best, mut size) = (NIL, u32::MAX);
            let mut at = bins.heads[filled];
            for _ in 0..look {
                let node = &self.nodes[at as usize];
                let here = node.granules();
                if here >= need.granules && (anywhere || self.fits(node, need.granules, need.align)) {
                    let lower = || node.at() < self.nodes[best as usize].at();
                    if here < size || here == size && lower() {
                        (best, size) = (at, here);
                    }
                    if here == need.granules && look == LOOK {
                        break;
                    }
                }
                at = node.link_next();
                if at == NIL {
                    break;
                }
            }
            if best != NIL {
                return Some((best, size));
            }
            class = filled + 1;
        }
        None
    }

    /// Calls `visit` with every range of `lane` that is large enough.
    fn for_each_large_enough(&self, lane: u16, need: Need, visit: &mut dyn FnMut(u32)) {
        let Some(bins) = self.bins.get(lane as usize) else { return };
        let mut class = class_of(need.granules);
        while let Some(filled) = bins.next_filled(class) {
            let mut at = bins.heads[filled];
            while at != NIL {
                let node = &self.nodes[at as usize];
                if self.fits(node, need.granules, need.align) {
                    visit(at);
                }
                at = node.link_next();
            }
            class = filled + 1;
        }
    }

    /// The lowest address that fits, in any of `lanes`.
    fn lowest(&self, lanes: &[u16], need: Need) -> Option<u32> {
        let mut found: Option<(usize, u32)> = None;
        for &lane in lanes {
            self.for_each_large_enough(lane, need, &mut |at| {
                let place = self.nodes[at as usize].at();
                if found.is_none_or(|(lowest, _)| place < lowest) {
                    found = Some((place, at));
                }
            });
        }
        found.map(|(_, at)| at)
    }

    /// What a user's policy says, held against what it was shown.
    fn by_policy(&self, policy: &dyn Policy, lanes: &[u16], need: Need) -> Option<u32> {
        let mut shown = Vec::new();
        for &lane in lanes {
            self.for_each_large_enough(lane, need, &mut |at| {
                shown.push((FreeRange { start: self.start(at), len: self.len(at) }, at));
            });
        }
        let request = Request { size: self.bytes(need.granules), align: need.align };
        let answer = policy.choose(request, &mut shown.iter().map(|&(range, _)| range));
        let known = shown.iter().find(|&&(range, _)| Some(range) == answer).map(|&(_, at)| at);
        let tightest = || shown.iter().min_by_key(|(range, _)| (range.len, range.start)).map(|&(_, at)| at);
        known.or_else(tightest)
    }
}

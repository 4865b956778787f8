//! Ranges over address space in which memory comes and goes: the place where the least is missing, claims on it,
//! and the cuts that turn a claim into a block.

#![forbid(unsafe_code)]

use super::node::{FREE, LIVE, Node};
use super::{CLEAN, HOLE, Range, Ranges, Tag};

impl Ranges {
    /// Adds address space without memory; false where there is no room to note it.
    pub(in crate::gpu) fn add_space(&mut self, start: usize, len: usize) -> bool {
        self.add_lane(HOLE);
        self.add(start, len, Tag::HOLE)
    }

    fn range(&self, index: u32) -> Range {
        let node = &self.nodes[index as usize];
        let len = self.bytes(node.granules());
        Range { node: index, start: self.place(node), len, live: node.state() == LIVE, tag: node.tag() }
    }

    /// Where a block lacks the least memory: the first free range that it takes part of, and its start. It may
    /// lie in ranges that `usable` accepts and in holes, whose memory comes in multiples of `unit`. Among places
    /// that lack as much, the one in the shortest run of free ranges, then the lowest.
    pub(in crate::gpu) fn best_place(
        &self,
        granules: u32,
        align: usize,
        unit: usize,
        usable: &dyn Fn(Tag) -> bool,
    ) -> Option<(u32, usize)> {
        let takes = |node: &Node| node.state() == FREE && (node.tag().lane == HOLE || usable(node.tag()));
        // What is clean is joined: such a range is large enough alone, or another lane's lies beside it.
        let other = |lane: u16| lane != CLEAN;
        let bytes = self.bytes(granules);
        let mut best: Option<((usize, usize, usize), u32)> = None;
        let mut run: Vec<Range> = Vec::new();
        for lane in self.lanes_with(1) {
            for seed in self.in_lane(lane, if other(lane) { 0 } else { granules }) {
                let Some(first) = self.first_of_run(seed, takes, other) else { continue };
                let (mut room, mut backed) = (0, 0);
                for node in self.run(first, &takes).map(|at| &self.nodes[at as usize]) {
                    room += node.granules();
                    backed += if node.tag().lane == HOLE { 0 } else { node.granules() };
                }
                // It lacks this much at least.
                let lacks = self.bytes(granules.saturating_sub(backed));
                if room < granules || best.is_some_and(|((known, ..), _)| known < lacks) {
                    continue;
                }
                run.clear();
                run.extend(self.run(first, &takes).map(|at| self.range(at)));
                if let Some(found) = place_in(&run, bytes, align, unit)
                    && best.is_none_or(|(key, _)| found.0 < key)
                {
                    best = Some(found);
                }
            }
        }
        best.map(|((_, _, start), first)| (first, start))
    }

    /// The free ranges that `[start, end)` touches, `first` being the first of them; `None` where one of them is
    /// live or `usable` refuses it.
    pub(in crate::gpu) fn covering(
        &self,
        first: u32,
        end: usize,
        usable: &dyn Fn(Tag) -> bool,
    ) -> Option<Vec<Range>> {
        let mut found = Vec::new();
        let mut at = first;
        loop {
            let node = self.nodes.get(at as usize)?;
            if node.state() != FREE || (node.tag().lane != HOLE && !usable(node.tag())) {
                return None;
            }
            let range = self.range(at);
            found.push(range);
            if range.start + range.len >= end {
                return Some(found);
            }
            at = node.next();
        }
    }

    /// The node behind another.
    pub(in crate::gpu) fn after(&self, node: u32) -> u32 {
        self.nodes[node as usize].next()
    }

    /// Makes sure that `nodes` more nodes can be had without asking for memory.
    pub(in crate::gpu) fn prepare(&mut self, nodes: usize) -> bool {
        let spare = self.nodes.capacity() - self.nodes.len();
        spare >= nodes || self.nodes.try_reserve_exact(nodes.max(self.nodes.len() / 8)).is_ok()
    }

    /// Claims `[start, end)` of a free range: nobody else finds it from now on.
    pub(in crate::gpu) fn claim(&mut self, node: u32, start: usize, end: usize) -> Option<u32> {
        let skip = (start - self.start(node)) >> self.shift;
        self.carve_at(node, skip as u32, ((end - start) >> self.shift) as u32, HOLE)
    }

    /// The free range of `lane` that holds `[start, start + len)`.
    fn holder(&self, lane: u16, start: usize, len: usize) -> Option<u32> {
        let granules = self.granules(len)?;
        self.in_lane(lane, granules).find(|&node| {
            let at = self.start(node);
            at <= start && start + len <= at + self.len(node)
        })
    }

    /// Turns `[start, start + len)` from a part of a free range of lane `from` into a free range of tag `to`.
    pub(in crate::gpu) fn convert(&mut self, from: u16, start: usize, len: usize, to: Tag) -> bool {
        let part = self.holder(from, start, len).and_then(|node| self.claim(node, start, start + len));
        part.map(|part| self.free(part, to)).is_some()
    }

    /// Makes one block of claims that touch, for `lane`: `[start, start + granules)` of them. What lies outside
    /// becomes free for everybody. Room for two nodes was prepared.
    pub(in crate::gpu) fn join_claims(
        &mut self,
        claims: &[u32],
        start: usize,
        granules: u32,
        lane: u16,
    ) -> u32 {
        let mut block = claims[0];
        for &next in &claims[1..] {
            self.fuse(block, next);
        }
        let skip = ((start - self.start(block)) >> self.shift) as u32;
        if skip != 0
            && let Some(rest) = self.cut(block, skip)
        {
            self.free(block, Tag::CLEAN);
            block = rest;
        }
        if self.nodes[block as usize].granules() > granules
            && let Some(rest) = self.cut(block, granules)
        {
            self.free(rest, Tag::CLEAN);
        }
        self.nodes[block as usize].set_tag(Tag { lane, batch: 0 });
        block
    }

    /// Adds a claim to the live block in front of it; what lies past `granules` becomes free for everybody.
    pub(in crate::gpu) fn join_behind(&mut self, block: u32, claims: &[u32], granules: u32) {
        for &next in claims {
            self.fuse(block, next);
        }
        if self.nodes[block as usize].granules() > granules
            && let Some(rest) = self.cut(block, granules)
        {
            self.free(rest, Tag::CLEAN);
        }
    }

    /// Joins the live node `back` to the live node `front` before it.
    fn fuse(&mut self, front: u32, back: u32) {
        let gone = self.nodes[back as usize];
        let kept = &mut self.nodes[front as usize];
        debug_assert!(kept.next() == back && kept.state() == LIVE && gone.state() == LIVE);
        kept.set(kept.granules() + gone.granules(), LIVE);
        self.join_chain(front, gone.next());
        self.drop_node(back);
        self.live_blocks -= 1;
    }

    /// Cuts a live node in two, the first of `granules`; returns the second.
    fn cut(&mut self, index: u32, granules: u32) -> Option<u32> {
        let node = self.nodes[index as usize];
        let tag = Tag { lane: node.tag().lane, batch: 0 };
        let rest = Node::new(node.at() + granules as usize, node.granules() - granules, LIVE, tag);
        let new = self.new_node(rest)?;
        self.nodes[index as usize].set(granules, LIVE);
        self.join_chain(index, new);
        self.join_chain(new, node.next());
        self.live_blocks += 1;
        Some(new)
    }
}

/// The best place in one run of neighbours: what it lacks, the run's length, its start; and the range there.
fn place_in(run: &[Range], bytes: usize, align: usize, unit: usize) -> Option<((usize, usize, usize), u32)> {
    let (from, to) = (run.first()?.start, run.last().map(|range| range.start + range.len)?);
    let mut best: Option<((usize, usize, usize), u32)> = None;
    let mut consider = |index: usize, start: usize| {
        if start < from || start.checked_add(bytes).is_none_or(|end| end > to) {
            return;
        }
        let missing: usize = run[index..].iter().map_while(|range| missing(range, start, bytes, unit)).sum();
        let key = (missing, to - from, start);
        if best.is_none_or(|(known, _)| key < known) {
            best = Some((key, run[index].node));
        }
    };
    for (index, range) in run.iter().enumerate() {
        // Begin where memory begins, or where the run does: further inside a hole, nothing is gained.
        if range.tag.lane != HOLE || index == 0 {
            let start = (range.start + align - 1) & !(align - 1);
            if start < range.start + range.len {
                consider(index, start);
            }
        }
        // End where memory ends.
        if range.tag.lane != HOLE
            && let Some(start) =
                (range.start + range.len).checked_sub(bytes).map(|start| start & !(align - 1))
            && start >= from
        {
            let first = run[..=index].partition_point(|range| range.start + range.len <= start);
            consider(first, start);
        }
    }
    best
}

/// Bytes that a block at `start` lacks in one range; `None` where the range lies behind the block.
fn missing(range: &Range, start: usize, bytes: usize, unit: usize) -> Option<usize> {
    if range.start >= start + bytes {
        return None;
    }
    if range.tag.lane != HOLE {
        return Some(0);
    }
    let from = start.max(range.start) & !(unit - 1);
    let to = ((start + bytes).min(range.start + range.len) + unit - 1) & !(unit - 1);
    Some(to - from)
}

//! Freeing blocks and joining free neighbours.

#![forbid(unsafe_code)]

use super::bins::class_of;
use super::node::{FREE, NIL, Node};
use super::{HOLE, MIXED, PUBLISHED, Ranges, Tag};

/// After so many loose frees a lane's ranges are joined, which then takes no more than some hundred microseconds.
const MOST_LOOSE: u32 = if cfg!(test) { 20 } else { 8192 };
/// Where fewer ranges were taken whole meanwhile than were freed loose, this many times as many are joined at once before
/// it is tried anew.
const AT_ONCE: u32 = if cfg!(test) { 1 } else { 16 };

impl Ranges {
    /// Frees a live block for `tag`.
    pub(in crate::gpu) fn free(&mut self, index: u32, tag: Tag) {
        self.free_joining(index, tag, |_| false);
    }

    /// [`free`](Self::free), and joins the neighbours that `also` accepts under `tag`.
    #[inline]
    pub(in crate::gpu) fn free_joining(&mut self, index: u32, tag: Tag, also: impl Fn(Tag) -> bool) {
        debug_assert!(self.is_live(index));
        self.make_free(index, tag);
        let merged = self.join(index, also);
        self.note_idle(merged);
    }

    /// Makes a live node a free one that is in no bin yet.
    #[inline]
    fn make_free(&mut self, index: u32, tag: Tag) {
        if self.tag(index).batch & PUBLISHED != 0 {
            self.unpublish(index);
        }
        self.live_blocks -= 1;
        let node = &mut self.nodes[index as usize];
        node.set(node.granules(), FREE);
        node.set_tag(tag);
    }

    /// Frees a live block for `tag`, which is no list, and leaves its neighbours as they are, so that the next request of
    /// its size finds it whole; where hardly any request does, [`free_joining`](Self::free_joining). Returns whether the
    /// lane has so many loose ranges now that they should be joined.
    #[inline]
    pub(in crate::gpu) fn free_loose(&mut self, index: u32, tag: Tag, also: impl Fn(Tag) -> bool) -> bool {
        debug_assert!(self.is_live(index) && tag.lane != MIXED);
        let bins = &mut self.bins[tag.lane as usize];
        if bins.at_once != 0 {
            bins.at_once -= 1;
            self.free_joining(index, tag, also);
            return false;
        }
        bins.loose += 1;
        let many = bins.loose > MOST_LOOSE;
        self.make_free(index, tag);
        self.link(index);
        many
    }

    /// Joins what was freed loose on a lane with neighbours of that lane, and with those that `also` accepts; returns
    /// whether there was anything.
    #[cold]
    pub(in crate::gpu) fn join_loose(&mut self, lane: u16, also: impl Fn(Tag) -> bool) -> bool {
        let Some(bins) = self.bins.get_mut(lane as usize) else { return false };
        let loose = std::mem::take(&mut bins.loose);
        if loose == 0 {
            return false;
        }
        if std::mem::take(&mut bins.taken_whole) < loose {
            bins.at_once = loose.saturating_mul(AT_ONCE);
        }
        for (index, place) in self.in_lane(lane) {
            // An earlier step may have joined it.
            let node = &self.nodes[index as usize];
            if node.state() == FREE && node.at() == place && node.tag().lane == lane {
                self.unlink(index);
                let whole = self.join(index, &also);
                self.note_idle(whole);
            }
        }
        true
    }

    /// Joins a free node that is in no bin with its free neighbours of the same lane, and with those whose tag
    /// `also` accepts, and puts the whole into its bin; returns the node that stands for it.
    #[inline]
    pub(super) fn join(&mut self, index: u32, also: impl Fn(Tag) -> bool) -> u32 {
        let node = self.nodes[index as usize];
        let mine = node.tag();
        let joins = |other: &Node| {
            let theirs = other.tag();
            other.state() == FREE && (mine.lane == theirs.lane && mine.lane != MIXED || also(theirs))
        };
        let in_front = node.prev() != NIL && joins(&self.nodes[node.prev() as usize]);
        let behind = node.next() != NIL && joins(&self.nodes[node.next() as usize]);
        if !in_front && !behind {
            self.link(index);
            return index;
        }
        if in_front != behind {
            let other = if in_front { node.prev() } else { node.next() };
            let theirs = &self.nodes[other as usize];
            let beyond = if in_front { theirs.prev() } else { theirs.next() };
            if theirs.tag().lane == mine.lane && (beyond == NIL || !joins(&self.nodes[beyond as usize])) {
                self.join_one(index, other);
                return other;
            }
        }
        self.join_many(index, joins)
    }

    /// Joins a free node that is in no bin with one neighbour of its lane.
    #[inline]
    fn join_one(&mut self, index: u32, other: u32) {
        let (node, theirs) = (self.nodes[index as usize], self.nodes[other as usize]);
        self.resize(other, theirs.granules() + node.granules());
        let whole = &mut self.nodes[other as usize];
        whole.set_tag(Tag { lane: node.tag().lane, batch: node.tag().batch.max(theirs.tag().batch) });
        if node.prev() == other {
            self.join_chain(other, node.next());
        } else {
            whole.begin_as(&node);
            self.join_chain(node.prev(), other);
            if node.prev() == NIL {
                self.begin_with(node.at(), other);
            }
        }
        self.drop_node(index);
    }

    /// Joins a free node that is in no bin with all neighbours that `joins` accepts.
    fn join_many(&mut self, index: u32, joins: impl Fn(&Node) -> bool) -> u32 {
        let node = &self.nodes[index as usize];
        let mine = node.tag();
        let (mut first, mut last, mut largest) = (index, index, NIL);
        let (mut granules, mut batch) = (node.granules(), mine.batch);
        let (mut before, mut after) = (node.prev(), node.next());
        let mut most = 0;
        let mut take = |at: u32, other: &Node| {
            granules += other.granules();
            if other.tag().lane == mine.lane {
                batch = batch.max(other.tag().batch);
                if other.granules() > most {
                    (largest, most) = (at, other.granules());
                }
            }
        };
        while before != NIL && joins(&self.nodes[before as usize]) {
            let other = &self.nodes[before as usize];
            take(before, other);
            (first, before) = (before, other.prev());
        }
        while after != NIL && joins(&self.nodes[after as usize]) {
            let other = &self.nodes[after as usize];
            take(after, other);
            (last, after) = (after, other.next());
        }
        // A large neighbour mostly stays in its bin.
        let stays = largest != NIL && class_of(most) == class_of(granules);
        let kept = if stays { largest } else { index };
        let begin = self.nodes[first as usize];
        let mut at = first;
        loop {
            let next = self.nodes[at as usize].next();
            if at != kept {
                if at != index {
                    self.unlink(at);
                }
                self.drop_node(at);
            }
            if at == last {
                break;
            }
            at = next;
        }
        let whole = &mut self.nodes[kept as usize];
        whole.begin_as(&begin);
        whole.set(granules, FREE);
        whole.set_tag(Tag { lane: mine.lane, batch });
        if !stays {
            self.link(kept);
        } else if mine.lane != HOLE {
            self.free_bytes += self.bytes(granules - most);
        }
        self.join_chain(before, kept);
        self.join_chain(kept, after);
        if before == NIL && first != kept {
            self.begin_with(begin.at(), kept);
        }
        kept
    }

    /// Gives every free range whose tag `from` accepts the tag `to`; returns how many.
    pub(in crate::gpu) fn retag(&mut self, lane: u16, from: &dyn Fn(Tag) -> bool, to: Tag) -> usize {
        let mut moved = 0;
        for (index, place) in self.in_lane(lane) {
            // An earlier step may have merged it away.
            let node = &self.nodes[index as usize];
            if node.state() != FREE || node.at() != place || node.tag().lane != lane || !from(node.tag()) {
                continue;
            }
            let before = node.granules();
            let merged = self.give(index, to);
            if self.nodes[merged as usize].granules() != before {
                self.note_idle(merged);
            }
            moved += 1;
        }
        moved
    }

    /// Joins the free ranges of a lane with neighbours that it may use as well, under the tag of what it frees
    /// now; returns whether any joined.
    pub(in crate::gpu) fn join_neighbours(&mut self, tag: Tag, usable: &dyn Fn(Tag) -> bool) -> bool {
        let mut joined = false;
        for (index, place) in self.in_lane(tag.lane) {
            let node = self.nodes[index as usize];
            if node.state() != FREE || node.at() != place || node.tag().lane != tag.lane {
                continue;
            }
            self.unlink(index);
            let merged = self.join(index, usable);
            if self.nodes[merged as usize].granules() != node.granules() {
                // The lane waited for what joined at some moment up to now; only its open batch covers that.
                self.nodes[merged as usize].set_tag(tag);
                joined = true;
            }
        }
        joined
    }

    /// The shortest run of free neighbours, whatever their lanes, that holds the request: its first node and
    /// the tags in it.
    pub(in crate::gpu) fn best_run(
        &self,
        granules: u32,
        align: usize,
        usable: &dyn Fn(Tag) -> bool,
    ) -> Option<(u32, Vec<Tag>)> {
        let usable = |node: &Node| node.state() == FREE && usable(node.tag());
        let mut best: Option<(u32, u32)> = None;
        for segment in self.segments.values() {
            let (mut at, mut first, mut sum) = (segment.first, NIL, 0);
            loop {
                let node = (at != NIL).then(|| self.nodes[at as usize]);
                if let Some(free) = node.filter(usable) {
                    if first == NIL {
                        (first, sum) = (at, 0);
                    }
                    sum += free.granules();
                } else if first != NIL {
                    let mut whole = self.nodes[first as usize];
                    whole.set(sum, FREE);
                    if self.fits(&whole, granules, align) && best.is_none_or(|(size, _)| sum < size) {
                        best = Some((sum, first));
                    }
                    first = NIL;
                }
                match node {
                    Some(node) => at = node.next(),
                    None => break,
                }
            }
        }
        let (_, first) = best?;
        let mut tags = Vec::new();
        let mut at = first;
        while at != NIL && usable(&self.nodes[at as usize]) {
            tags.push(self.tag(at));
            at = self.nodes[at as usize].next();
        }
        Some((first, tags))
    }

    /// Makes one free range of the run that begins at `first`, for `tag`.
    pub(in crate::gpu) fn join_run(&mut self, first: u32, tag: Tag, usable: &dyn Fn(Tag) -> bool) -> u32 {
        self.unlink(first);
        self.nodes[first as usize].set_tag(tag);
        self.join(first, usable)
    }

    /// Gives one free range the tag `tag` and joins it with the neighbours of that lane.
    pub(in crate::gpu) fn give(&mut self, node: u32, tag: Tag) -> u32 {
        self.join_run(node, tag, &|_| false)
    }
}

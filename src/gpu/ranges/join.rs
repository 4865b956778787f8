//! Freeing blocks and joining free neighbours.

#![forbid(unsafe_code)]

use super::bins::{class_of, resize};
use super::node::{FREE, NIL, Node};
use super::{CLEAN, HOLE, MIXED, PUBLISHED, Ranges, Tag};

impl Ranges {
    /// Frees a live block for `tag`.
    pub(in crate::gpu) fn free(&mut self, index: u32, tag: Tag) {
        self.free_joining(index, tag, |_| false);
    }

    /// [`free`](Self::free), and joins the neighbours that `also` accepts under `tag`.
    #[inline]
    pub(in crate::gpu) fn free_joining(&mut self, index: u32, tag: Tag, also: impl Fn(Tag) -> bool) {
        debug_assert!(self.is_live(index));
        if self.tag(index).batch & PUBLISHED != 0 {
            self.unpublish(index);
        }
        self.live_blocks -= 1;
        let merged = self.join(index, tag, also);
        self.note_idle(merged);
    }

    /// Whether [`join`](Self::join) would join a node with a neighbour.
    fn has_mate(&self, node: &Node, also: impl Fn(Tag) -> bool) -> bool {
        let neighbours = [node.prev(), node.next()].into_iter().filter(|&other| other != NIL);
        neighbours.map(|other| &self.nodes[other as usize]).any(|other| joins(node.tag().lane, other, &also))
    }

    /// Joins a node that is in no bin, to be free for `tag`, with its free neighbours of that lane, and with those whose
    /// tag `also` accepts, and puts the whole into its bin; returns the node that stands for it.
    #[inline]
    pub(super) fn join(&mut self, index: u32, tag: Tag, also: impl Fn(Tag) -> bool) -> u32 {
        let nodes = &self.nodes[..];
        let node = &nodes[index as usize];
        let joins = |other: u32| other != NIL && joins(tag.lane, &nodes[other as usize], &also);
        let (prev, next) = (node.prev(), node.next());
        let (in_front, behind) = (joins(prev), joins(next));
        if in_front != behind {
            let other = if in_front { prev } else { next };
            let theirs = &nodes[other as usize];
            let beyond = if in_front { theirs.prev() } else { theirs.next() };
            if theirs.tag().lane == tag.lane && !joins(beyond) {
                self.join_one(index, tag, other, in_front);
                return other;
            }
        } else if !in_front {
            let node = &mut self.nodes[index as usize];
            node.set(node.granules(), FREE);
            node.set_tag(tag);
            self.link(index);
            return index;
        }
        self.join_many(index, tag, also)
    }

    /// Joins a node that is in no bin with one neighbour of the tag's lane.
    #[inline]
    fn join_one(&mut self, index: u32, tag: Tag, other: u32, in_front: bool) {
        let nodes = &mut self.nodes[..];
        let (node, theirs) = (nodes[index as usize], nodes[other as usize]);
        resize(nodes, &mut self.bins, other, theirs.granules() + node.granules());
        let whole = &mut nodes[other as usize];
        whole.set_tag(Tag { lane: tag.lane, batch: tag.batch.max(theirs.tag().batch) });
        if in_front {
            whole.set_next(node.next());
            if node.next() != NIL {
                nodes[node.next() as usize].set_prev(other);
            }
        } else {
            whole.begin_as(&node);
            whole.set_prev(node.prev());
            if node.prev() != NIL {
                nodes[node.prev() as usize].set_next(other);
            } else {
                self.begin_with(node.at(), other);
            }
        }
        self.drop_node(index);
    }

    /// [`join`](Self::join), whatever there is.
    fn join_many(&mut self, index: u32, mine: Tag, also: impl Fn(Tag) -> bool) -> u32 {
        let joins = |other: &Node| joins(mine.lane, other, &also);
        let node = &self.nodes[index as usize];
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
        } else {
            self.bins[mine.lane as usize].granules += u64::from(granules - most);
        }
        self.join_chain(before, kept);
        self.join_chain(kept, after);
        if before == NIL && first != kept {
            self.begin_with(begin.at(), kept);
        }
        kept
    }

    /// Gives every free range of a lane whose tag `from` accepts the tag `to`, of another lane; returns how many.
    pub(in crate::gpu) fn retag(&mut self, lane: u16, from: impl Fn(Tag) -> bool, to: Tag) -> usize {
        debug_assert!(lane != to.lane);
        let (mut moved, mut class) = (0, 0);
        while let Some(filled) = self.bins.get(lane as usize).and_then(|bins| bins.next_filled(class)) {
            let mut at = self.bins[lane as usize].heads[filled];
            while at != NIL {
                let node = &self.nodes[at as usize];
                // It joins neighbours of the other lane alone, so that the rest of this list stays as it is.
                let (next, before) = (node.link_next(), node.granules());
                if from(node.tag()) {
                    let merged = self.give(at, to);
                    if self.nodes[merged as usize].granules() != before {
                        self.note_idle(merged);
                    }
                    moved += 1;
                }
                at = next;
            }
            class = filled + 1;
        }
        moved
    }

    /// Joins the free ranges of a lane with neighbours that it may use as well, under the tag of what it frees
    /// now; returns whether any joined.
    pub(in crate::gpu) fn join_neighbours(&mut self, tag: Tag, usable: impl Fn(Tag) -> bool) -> bool {
        let mut joined = false;
        for found in self.collect(tag.lane, |node| self.has_mate(node, &usable)) {
            if self.is_still(found, tag.lane) {
                self.unlink(found.0);
                let merged = self.join(found.0, self.tag(found.0), &usable);
                // The lane waited for what joined at some moment up to now; only its open batch covers that.
                self.nodes[merged as usize].set_tag(tag);
                joined = true;
            }
        }
        joined
    }

    /// The shortest run of free neighbours, whatever their lanes, that holds a request of lane `own`: its first node
    /// and the tags in it. What that lane freed is joined with what it may use.
    pub(in crate::gpu) fn best_run(
        &self,
        granules: u32,
        align: usize,
        own: u16,
        usable: impl Fn(Tag) -> bool,
    ) -> Option<(u32, Vec<Tag>)> {
        let usable = |node: &Node| node.state() == FREE && usable(node.tag());
        // So what is to be found has other lanes' ranges in it, or is large enough alone.
        let other = |lane: u16| lane != CLEAN && lane != own;
        let mut best: Option<((u32, usize), u32)> = None;
        for lane in self.lanes_with(1).filter(|&lane| lane != HOLE) {
            for seed in self.in_lane(lane, if other(lane) { 0 } else { granules }) {
                let Some(first) = self.first_of_run(seed, usable, other) else { continue };
                let mut whole = self.nodes[first as usize];
                let sum = self.run(first, &usable).map(|at| self.nodes[at as usize].granules()).sum();
                whole.set(sum, FREE);
                let key = (sum, whole.at());
                if best.is_none_or(|(known, _)| key < known) && self.fits(&whole, granules, align) {
                    best = Some((key, first));
                }
            }
        }
        let (_, first) = best?;
        Some((first, self.run(first, &usable).map(|at| self.tag(at)).collect()))
    }

    /// The free neighbours from `first` on that `usable` accepts.
    pub(super) fn run<'a>(
        &'a self,
        first: u32,
        usable: impl Fn(&Node) -> bool + 'a,
    ) -> impl Iterator<Item = u32> + 'a {
        let next = move |at: u32| (at != NIL && usable(&self.nodes[at as usize])).then_some(at);
        std::iter::successors(next(first), move |&at| next(self.nodes[at as usize].next()))
    }

    /// The first of the run around a node; `None` where the node is not usable, or one of a lane that `other` names
    /// is in front of it, which leads there as well.
    pub(super) fn first_of_run(
        &self,
        node: u32,
        usable: impl Fn(&Node) -> bool,
        other: impl Fn(u16) -> bool,
    ) -> Option<u32> {
        let mut first = node;
        if !usable(&self.nodes[first as usize]) {
            return None;
        }
        loop {
            let before = self.nodes[first as usize].prev();
            if before == NIL || !usable(&self.nodes[before as usize]) {
                return Some(first);
            }
            if other(self.tag(before).lane) {
                return None;
            }
            first = before;
        }
    }

    /// Makes one free range of the run that begins at `first`, for `tag`.
    pub(in crate::gpu) fn join_run(&mut self, first: u32, tag: Tag, usable: impl Fn(Tag) -> bool) -> u32 {
        self.unlink(first);
        self.join(first, tag, usable)
    }

    /// Gives one free range the tag `tag` and joins it with the neighbours of that lane.
    pub(in crate::gpu) fn give(&mut self, node: u32, tag: Tag) -> u32 {
        self.join_run(node, tag, |_| false)
    }
}

/// Whether a node of `lane` is joined with a neighbour: a free one of that lane, or of a tag that `also` accepts.
#[inline]
fn joins(lane: u16, other: &Node, also: impl Fn(Tag) -> bool) -> bool {
    let theirs = other.tag();
    other.state() == FREE && (lane == theirs.lane && lane != MIXED || also(theirs))
}

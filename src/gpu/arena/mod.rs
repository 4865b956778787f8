//! A pool's memory as one stretch of address space in which physical pieces move.
//!
//! ```text
//!   address space  | A  | free |  B  |   hole    |  C |      hole               …
//!   pieces         [ p0 ][ p1 ][ p2 ]            [ p3 ]
//! ```
//! A request takes the best fit among free ranges that have memory. On a miss it goes where the least memory is
//! missing; what is missing comes from pieces that lie wholly free elsewhere (unmapped there, mapped here), and
//! from the driver only when there are none, or when pieces would move all the time (`unrest`). So what a pool
//! reserves follows what is live, whatever the order in which blocks come and go, and nothing waits for the
//! device: a piece moves only when all work on it is known to be complete. It stays mapped where it was as well, until
//! something else is to lie there (`shadows`).
//!
//! A miss has three steps. [`Core::plan`] claims the place and takes the pieces out, under the pool's lock; the
//! driver is called with no lock held (see `pool::source`); [`Core::finish`] makes the block, or puts everything
//! back where it failed.
//!
//! Invariants
//! 1. Every range that is no hole is covered by mapped pieces, and a hole by none; claims may be either.
//! 2. A piece is taken from where it lies only out of a range of lane `CLEAN`.
//! 3. One plan is under way at a time (the pool's growth lock).
//! 4. `reserved` is the bytes of all pieces while no plan is under way.
//! 5. A shadow lies in a hole, overlaps no other, and shows a piece of the pool that lies elsewhere or nowhere.

#![forbid(unsafe_code)]

mod pieces;
mod shadows;
#[cfg(test)]
mod tests;
mod unrest;

pub(super) use pieces::{From, Leaving, Piece, Pieces, Step};
pub(super) use unrest::{Moment, Unrest};

use pieces::{Gap, new_bytes};

use super::core::{Ask, Core, LARGE, Placed, Ticket};
use super::ranges::{CLEAN, HOLE, MIXED, Range, Tag};
use crate::base::bits::round_up;
use crate::base::error::{Error, OomReason, Result};
use crate::engine::Broken;

/// What the driver has to do for a request, and what was claimed for it meanwhile.
#[derive(Debug)]
pub(super) struct Plan {
    /// The filling of each gap, from low to high addresses.
    pub(super) gaps: Vec<Vec<Step>>,
    /// Shadows to be unmapped first, by address: they lie in the way, or are too many.
    pub(super) in_the_way: Vec<(usize, Piece)>,
    /// Pieces to be given back first.
    pub(super) releases: Vec<Leaving>,
    zone: usize,
    claims: Vec<(u32, Tag)>,
    start: usize,
    granules: u32,
    lane: u16,
    /// It takes new memory although there is idle memory that could be moved (`unrest`).
    pub(super) for_rest: bool,
    /// When it was made, if pieces move.
    moves: Option<Moment>,
}

/// What the driver did.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// Pieces that lie at addresses, accessible.
    pub(super) mapped: Vec<(usize, Piece)>,
    /// Pieces that lie nowhere.
    pub(super) spare: Vec<Piece>,
    /// Where pieces are mapped beside that, ...
    pub(super) shadows: Vec<(usize, Piece)>,
    /// ... and where they are because the driver did not unmap them: the device may not reach them there.
    pub(super) stuck: Vec<(usize, Piece)>,
    /// When that was done, on the driver's clock.
    pub(super) at_ns: u64,
    pub(super) error: Option<Error>,
}

impl Core {
    /// Claims a place for `ask` and the pieces that fill it, so that the pool holds `max_size` bytes at most. It is
    /// `now_ns` on the driver's clock.
    pub(super) fn plan(&mut self, zone: usize, ask: Ask, max_size: usize, now_ns: u64) -> Result<Plan> {
        let full = Error::oom(ask.bytes, OomReason::Limit(max_size));
        let Some(pieces) = &self.pieces else { return Err(full) };
        let granules = self.zones[zone].granules(ask.bytes).ok_or(full)?;
        let order = &self.order;
        let usable = |tag: Tag| tag.lane != MIXED && order.may_use(ask.lane, tag);
        let place = self.zones[zone].best_place(granules, ask.align, pieces.unit, &usable);
        let (first, start) = place.ok_or(full)?;
        let end = start + self.zones[zone].bytes(granules);
        let parts = self.zones[zone].covering(first, end, &usable).ok_or(full)?;
        let plan = Plan {
            gaps: Vec::new(),
            in_the_way: Vec::new(),
            releases: Vec::new(),
            zone,
            claims: Vec::new(),
            start,
            granules,
            lane: ask.lane,
            for_rest: false,
            moves: None,
        };
        self.fill(plan, &parts, max_size, now_ns).ok_or(full)
    }

    /// Claims what a live block lacks to grow to `bytes` where it is.
    pub(super) fn plan_growth(
        &mut self,
        ticket: Ticket,
        bytes: usize,
        lane: u16,
        max_size: usize,
        now_ns: u64,
    ) -> Option<Plan> {
        let (zone, node) = (ticket.zone(), ticket.node());
        self.pieces.as_ref()?;
        let granules = self.zones[zone].granules(bytes)?;
        let (start, len) = (self.zones[zone].start(node), self.zones[zone].len(node));
        let order = &self.order;
        let usable = |tag: Tag| tag.lane != MIXED && order.may_use(lane, tag);
        let end = start + self.zones[zone].bytes(granules);
        let parts = self.zones[zone].covering(self.zones[zone].after(node), end, &usable)?;
        let plan = Plan {
            gaps: Vec::new(),
            in_the_way: Vec::new(),
            releases: Vec::new(),
            zone,
            claims: Vec::new(),
            start: start + len,
            granules: granules - (len / self.zones[zone].bytes(1)) as u32,
            lane,
            for_rest: false,
            moves: None,
        };
        self.fill(plan, &parts, max_size, now_ns)
    }

    /// Chooses pieces for the gaps among `parts` and claims everything; `None` where that would take more than
    /// the pool may hold, or the host has no memory for the books.
    fn fill(&mut self, mut plan: Plan, parts: &[Range], max_size: usize, now_ns: u64) -> Option<Plan> {
        let end = plan.start + self.zones[plan.zone].bytes(plan.granules);
        let pieces = self.pieces.as_ref()?;
        let gaps: Vec<Gap> = parts
            .iter()
            .filter(|part| part.tag.lane == HOLE)
            .map(|part| Gap {
                start: plan.start.max(part.start) & !(pieces.unit - 1),
                end: round_up(end.min(part.start + part.len), pieces.unit).unwrap_or(end),
                low: part.start,
                high: part.start + part.len,
            })
            .collect();
        let choose = |at_hand: &mut Vec<(usize, From)>, usual| -> Vec<Vec<Step>> {
            gaps.iter().map(|gap| pieces.fill(gap, at_hand, usual)).collect()
        };
        let lacking: usize = gaps.iter().map(|gap| gap.end - gap.start).sum();
        let usual = Some(pieces.usual(lacking, self.order.streams()));
        let mut at_hand = self.at_hand(plan.start, end);
        let before = at_hand.clone();
        let mut chosen = choose(&mut at_hand, usual);
        let moves =
            chosen.iter().flatten().any(|step| matches!(step.from, From::Mapped(..)) && !step.shadowed);
        let now = Moment { served: self.served(), ns: now_ns };
        if moves && let Some(most) = self.unrest.allows(now, self.live + lacking, self.reserved) {
            let is_spare = |(_, from): &&(usize, From)| matches!(from, From::Spare(_));
            let mut spares = before.iter().filter(is_spare).copied().collect();
            let instead = choose(&mut spares, usual);
            if self.reserved + new_bytes(instead.iter().flatten()) <= most.min(max_size) {
                (chosen, at_hand) = (instead, Vec::new());
                plan.for_rest = true;
            }
        }
        plan.moves = (moves && !plan.for_rest).then_some(now);
        if self.reserved + new_bytes(chosen.iter().flatten()) > max_size {
            at_hand = before;
            chosen = choose(&mut at_hand, None);
        }
        // What is at hand and fits nowhere goes back, rather than that the pool takes more than ever.
        let (new, most) = (new_bytes(chosen.iter().flatten()), max_size.min(self.peak_reserved()));
        let mut reserved = self.reserved;
        let mut leaving = Vec::new();
        while new != 0 && reserved + new > most {
            let Some((len, from)) = at_hand.pop() else { break };
            reserved -= len;
            match from {
                From::Mapped(at, handle) => leaving.push((Some(at), Piece { len, handle })),
                From::Spare(handle) => leaving.push((None, Piece { len, handle })),
                From::New => {}
            }
        }
        if reserved + new > max_size {
            return None;
        }
        for mut steps in chosen {
            steps.sort_unstable_by_key(|step| step.to);
            plan.gaps.push(steps);
        }
        plan.in_the_way = pieces.in_the_way(&plan.gaps);
        self.claim(plan, parts, leaving)
    }

    /// What lies wholly free outside of `[start, end)`, and what lies nowhere, by length.
    fn at_hand(&self, start: usize, end: usize) -> Vec<(usize, From)> {
        let Some(pieces) = &self.pieces else { return Vec::new() };
        let mut found: Vec<(usize, From)> =
            pieces.spare.iter().map(|piece| (piece.len, From::Spare(piece.handle))).collect();
        for zone in &self.zones {
            for lane in self.movable_lanes() {
                zone.free_in_lane(lane, pieces.unit, &mut |from, len| {
                    for (at, piece) in pieces.within(from, from + len) {
                        let behind = at + piece.len;
                        if behind <= from + len && (behind <= start || at >= end) {
                            found.push((piece.len, From::Mapped(at, piece.handle)));
                        }
                    }
                });
            }
        }
        // Among equals the highest goes first, so that what stays is compact.
        found.sort_unstable_by_key(|&(len, from)| {
            let at = if let From::Mapped(at, _) = from { at } else { usize::MAX };
            (len, at)
        });
        found
    }

    /// The lanes out of whose ranges pieces may be taken (invariant 2).
    fn movable_lanes(&self) -> Vec<u16> {
        #[cfg(test)]
        if self.order.mutant == Some(super::order::Mutant::MoveBusy) {
            return std::iter::once(CLEAN).chain(super::ranges::FIRST..self.order.lanes()).collect();
        }
        vec![CLEAN]
    }

    fn make_hole(&mut self, at: usize, len: usize) {
        for lane in self.movable_lanes() {
            if self.zones.iter_mut().any(|zone| zone.convert(lane, at, len, Tag::HOLE)) {
                return;
            }
        }
    }

    fn claim(
        &mut self,
        mut plan: Plan,
        parts: &[Range],
        leaving: Vec<(Option<usize>, Piece)>,
    ) -> Option<Plan> {
        let taken: Vec<usize> = plan
            .gaps
            .iter()
            .flatten()
            .filter_map(|step| if let From::Mapped(at, _) = step.from { Some(at) } else { None })
            .chain(leaving.iter().filter_map(|(at, _)| *at))
            .collect();
        // Each cut makes two nodes at most; with them at hand nothing below fails.
        let nodes = 2 * (parts.len() + taken.len()) + 4;
        if !self.zones.iter_mut().all(|zone| zone.prepare(nodes)) {
            return None;
        }
        let zone = &mut self.zones[plan.zone];
        let end = plan.start + zone.bytes(plan.granules);
        let mut gaps = plan.gaps.iter();
        for part in parts {
            let (from, to) = if part.tag.lane == HOLE {
                let steps = gaps.next()?;
                (steps.first()?.to, steps.last().map(|step| step.to + step.len)?)
            } else {
                (plan.start.max(part.start), end.min(part.start + part.len))
            };
            plan.claims.push((zone.claim(part.node, from, to)?, part.tag));
        }
        for at in taken {
            let piece = self.pieces.as_mut()?.remove(at)?;
            self.make_hole(at, piece.len);
        }
        let pieces = self.pieces.as_mut()?;
        for step in plan.gaps.iter().flatten() {
            if let From::Spare(handle) = step.from {
                pieces.take_spare(handle);
            }
            if step.shadowed {
                pieces.take_shadow(step.to);
            }
        }
        for (at, _) in &plan.in_the_way {
            pieces.take_shadow(*at);
        }
        for (_, piece) in leaving.iter().filter(|(at, _)| at.is_none()) {
            pieces.take_spare(piece.handle);
        }
        plan.releases = pieces.leave(leaving);
        self.claimed = plan.claims.iter().map(|&(_, tag)| tag).collect();
        Some(plan)
    }

    /// Makes the block of a plan that succeeded; puts things back where it failed.
    pub(super) fn finish(&mut self, plan: &Plan, done: Done, ask: Ask) -> Result<Placed> {
        let node = self.joined(plan, done)?;
        Ok(self.hand_out(plan.zone, node, ask))
    }

    /// Makes the memory of a plan free for everybody.
    pub(super) fn finish_reserve(&mut self, plan: &Plan, done: Done) -> Result<()> {
        let node = self.joined(plan, done)?;
        self.zones[plan.zone].free(node, Tag::CLEAN);
        Ok(())
    }

    fn joined(&mut self, plan: &Plan, done: Done) -> Result<u32> {
        self.settle_plan(plan, done)?;
        let nodes: Vec<u32> = plan.claims.iter().map(|&(node, _)| node).collect();
        Ok(self.zones[plan.zone].join_claims(&nodes, plan.start, plan.granules, plan.lane))
    }

    /// Adds the memory of a plan that succeeded to the block that grows; puts things back where it failed.
    pub(super) fn finish_growth(&mut self, ticket: Ticket, plan: &Plan, done: Done) -> Result<()> {
        self.settle_plan(plan, done)?;
        let nodes: Vec<u32> = plan.claims.iter().map(|&(node, _)| node).collect();
        let zone = &mut self.zones[plan.zone];
        let before = zone.len(ticket.node());
        let granules = (before / zone.bytes(1)) as u32 + plan.granules;
        zone.join_behind(ticket.node(), &nodes, granules);
        self.live += self.zones[plan.zone].len(ticket.node()) - before;
        self.note_length(ticket);
        Ok(())
    }

    fn settle_plan(&mut self, plan: &Plan, done: Done) -> Result<()> {
        self.note_source_call();
        if let Some(began) = plan.moves {
            self.unrest.moved(began, Moment { served: self.served(), ns: done.at_ns });
        }
        self.pieces.iter_mut().for_each(|pieces| pieces.keep(&done));
        self.claimed.clear();
        if done.error.is_some() {
            if plan.for_rest {
                self.unrest.refused(self.reserved);
            }
            for &(node, tag) in &plan.claims {
                // Its lane may have been looked through for what is done meanwhile.
                let tag = if self.order.is_done(tag) { Tag::CLEAN } else { tag };
                self.zones[plan.zone].free(node, tag);
            }
        }
        for &(at, piece) in &done.mapped {
            let planned = plan.gaps.iter().flatten().any(|step| step.to == at);
            // What could not be moved, or was moved in vain.
            if done.error.is_some() || !planned {
                self.zones.iter_mut().any(|zone| zone.convert(HOLE, at, piece.len, Tag::CLEAN));
            }
        }
        self.set_reserved(self.pieces.as_ref().map_or(0, Pieces::bytes));
        done.error.map_or(Ok(()), Err)
    }

    /// Takes idle pieces of at most `at_most` bytes together out of use, to be given back.
    pub(super) fn take_idle(&mut self, at_most: usize) -> Vec<Leaving> {
        let mut room = at_most;
        let mut idle = Vec::new();
        // The largest first: the fewest calls.
        for (len, from) in self.at_hand(0, 0).into_iter().rev() {
            if len > room || !self.zones.iter_mut().all(|zone| zone.prepare(2)) {
                continue;
            }
            let Some(pieces) = &mut self.pieces else { break };
            match from {
                From::Mapped(at, _) => {
                    let Some(piece) = pieces.remove(at) else { continue };
                    self.make_hole(at, len);
                    idle.push((Some(at), piece));
                }
                From::Spare(handle) => idle.extend(pieces.take_spare(handle).map(|piece| (None, piece))),
                From::New => continue,
            }
            room -= len;
        }
        self.pieces.as_mut().map_or_else(Vec::new, |pieces| pieces.leave(idle))
    }

    /// Takes back what the driver did not want; notes what is gone.
    pub(super) fn idle_given(&mut self, done: Done) {
        self.note_source_call();
        self.pieces.iter_mut().for_each(|pieces| pieces.keep(&done));
        for (at, piece) in done.mapped {
            self.zones.iter_mut().any(|zone| zone.convert(HOLE, at, piece.len, Tag::CLEAN));
        }
        self.set_reserved(self.pieces.as_ref().map_or(0, Pieces::bytes));
    }

    /// Forgets all blocks; the memory stays where it lies.
    pub(super) fn reset_space(&mut self) {
        let Some(pieces) = &self.pieces else { return };
        for zone in &mut self.zones {
            let spaces = zone.segments();
            zone.clear();
            for (start, len) in spaces {
                // There were as many nodes a moment ago, so there is room.
                zone.add_space(start, len);
                for (at, piece) in pieces.within(start, start + len) {
                    zone.convert(HOLE, at, piece.len, Tag::CLEAN);
                }
            }
        }
    }

    /// The zone that a request may go to when its own has no memory left.
    pub(super) fn other_zone(&self, zone: usize) -> Option<usize> {
        (self.pieces.is_some() && zone != LARGE).then_some(LARGE)
    }

    /// Walks the invariants of the pieces.
    pub(super) fn check_pieces(&self) -> Result<(), Broken> {
        let Some(pieces) = &self.pieces else { return Ok(()) };
        if let Some(at) = pieces.misplaced() {
            return Err(Broken { invariant: "pieces are kept by address", at });
        }
        let (mut backed, mut broken) = (0, None);
        for zone in &self.zones {
            zone.for_each(&mut |range| {
                if range.tag.lane == HOLE {
                    let inside = pieces.within(range.start, range.start + range.len).next();
                    if !range.live && (inside.is_some() || pieces.covers(range.start)) {
                        broken = Some(range.start);
                    }
                } else {
                    backed += range.len;
                    if !pieces.cover_all(range.start, range.start + range.len) {
                        broken = Some(range.start);
                    }
                }
            });
        }
        if let Some(at) = broken {
            return Err(Broken { invariant: "what is no hole has memory behind it", at });
        }
        if let Some(at) = pieces.misplaced_shadow() {
            return Err(Broken { invariant: "a shadow of a piece lies in a hole", at });
        }
        if backed != pieces.mapped_bytes() {
            return Err(Broken { invariant: "memory lies where ranges are", at: backed });
        }
        if pieces.bytes() != self.reserved {
            return Err(Broken { invariant: "reserved is the sum of the pieces", at: pieces.bytes() });
        }
        Ok(())
    }
}

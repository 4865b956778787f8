//! Frees, and streams that share a block.

#![forbid(unsafe_code)]

use super::{Core, Ticket};
use crate::gpu::driver::Driver;
use crate::gpu::front;
#[cfg(test)]
use crate::gpu::order::Mutant;
use crate::gpu::ranges::{CLEAN, FIRST, RECORDED, SHARED, Tag};

impl Core {
    /// Frees a block on `lane` (`CLEAN`: the CPU used it, and nobody else does). `before` is the lane of a captured
    /// stream outside of its capture.
    #[inline(always)]
    pub(in crate::gpu) fn free(
        &mut self,
        driver: &dyn Driver,
        ticket: Ticket,
        lane: u16,
        before: Option<u16>,
    ) {
        self.counters.frees += 1;
        self.release(driver, ticket, lane, before);
    }

    /// [`free`](Self::free), of a block whose free was counted already.
    #[inline(always)]
    pub(in crate::gpu) fn release(
        &mut self,
        driver: &dyn Driver,
        ticket: Ticket,
        lane: u16,
        before: Option<u16>,
    ) {
        let (zone, node) = (ticket.zone(), ticket.node());
        let (len, was) = (self.zones[zone].len(node), self.zones[zone].tag(node));
        if was.batch & RECORDED != 0 {
            self.records.remove(self.start(ticket));
        }
        let public = !self.order.is_capture(lane) && (was.lane == lane || !self.order.is_capture(was.lane));
        let (tag, public) = if public && was.batch & SHARED == 0 {
            (self.tag_on(lane), public)
        } else {
            let tag = self.tag_of_many(driver, ticket, lane, before);
            (tag, !self.order.is_capture(tag.lane))
        };
        // The lane may use what is clean, so both are one range to it; others find out again what is complete.
        let joins = tag.lane >= FIRST && public;
        self.live -= len;
        self.zones[zone].free_joining(node, tag, |other| joins && other.lane == CLEAN);
    }

    /// The tag of a block that is freed on `lane` and that other lanes used, or graphs.
    #[cold]
    fn tag_of_many(
        &mut self,
        driver: &dyn Driver,
        ticket: Ticket,
        mut lane: u16,
        before: Option<u16>,
    ) -> Tag {
        let was = self.zones[ticket.zone()].tag(ticket.node());
        let mut users = Vec::new();
        if was.batch & SHARED != 0 {
            users = self.shared.remove(&ticket).unwrap_or_default();
        }
        // A graph runs when and where it is launched, which orders nothing with the rest of the stream's work. So a
        // block that both use, or two graphs, waits for all of them.
        let had = self.order.is_capture(was.lane);
        #[cfg(test)]
        let before = before.filter(|_| !self.order.is(Mutant::ForgetBefore));
        if (had || self.order.is_capture(lane)) && !self.order.same_capture(was.lane, lane) {
            users.extend(before.map(|before| (before, 0)));
            if had {
                users.push((lane, 0));
                #[cfg(test)]
                users.truncate(users.len() - usize::from(self.order.is(Mutant::ForgetOutside)));
                lane = was.lane;
            }
            users.retain(|&(user, _)| user != CLEAN);
        }
        users.retain(|&(user, _)| user != lane);
        if users.is_empty() { self.tag_on(lane) } else { self.order.tag_shared(driver, lane, users) }
    }

    #[inline]
    pub(super) fn tag_on(&self, lane: u16) -> Tag {
        if lane == CLEAN { Tag::CLEAN } else { self.order.tag_now(lane) }
    }

    /// Notes that `lane` uses a live block too.
    pub(in crate::gpu) fn share(&mut self, ticket: Ticket, lane: u16) {
        let (zone, node) = (ticket.zone(), ticket.node());
        let users = self.shared.entry(ticket).or_default();
        if !users.iter().any(|&(user, _)| user == lane) {
            // Room for the owner as well, so that the free need not ask for memory.
            users.reserve(2);
            users.push((lane, 0));
        }
        let flags = self.zones[zone].tag(node).batch;
        self.zones[zone].set_flags(node, flags | SHARED);
        self.note_on_record(ticket, front::SHARED, true);
    }

    /// All work of other lanes on a live block is complete.
    pub(in crate::gpu) fn unshare(&mut self, ticket: Ticket) {
        let (zone, node) = (ticket.zone(), ticket.node());
        self.shared.remove(&ticket);
        let flags = self.zones[zone].tag(node).batch;
        self.zones[zone].set_flags(node, flags & !SHARED);
        self.note_on_record(ticket, front::SHARED, false);
    }

    /// Whether other lanes than its own used a live block.
    #[inline]
    pub(in crate::gpu) fn is_shared(&self, ticket: Ticket) -> bool {
        self.zones[ticket.zone()].tag(ticket.node()).batch & SHARED != 0
    }

    /// Whether a block, or what is freed on `lane`, is the private memory of a capture.
    #[inline]
    pub(in crate::gpu) fn is_private(&self, ticket: Ticket, lane: u16) -> bool {
        self.order.is_capture(lane)
            || self.order.is_capture(self.zones[ticket.zone()].tag(ticket.node()).lane)
    }
}

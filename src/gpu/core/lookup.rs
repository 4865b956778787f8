//! From an address to its block, and what is noted beside a block.

#![forbid(unsafe_code)]

use super::{Core, LARGE, SMALL, Ticket};
use crate::base::error::{Error, PointerFault, Result};
use crate::gpu::front::{self, Record};
use crate::gpu::ranges::{PUBLISHED, RECORDED};

impl Core {
    /// The record of a block that a cache holds or may get back.
    #[inline]
    fn record(&self, ticket: Ticket) -> Option<&Record> {
        let known = self.zones[ticket.zone()].tag(ticket.node()).batch & RECORDED != 0;
        if known { self.known_record(ticket) } else { None }
    }

    #[inline(never)]
    fn known_record(&self, ticket: Ticket) -> Option<&Record> {
        self.records.find(self.start(ticket)).map(|(_, record)| record)
    }

    #[inline]
    pub(super) fn note_on_record(&self, ticket: Ticket, flag: u32, on: bool) {
        if let Some(record) = self.record(ticket) {
            record.set(flag, on);
        }
    }

    /// The number of the record of a live block; makes one if there is none and there is room.
    pub(in crate::gpu) fn make_record(&mut self, ticket: Ticket) -> Option<u32> {
        let (zone, node, start) = (ticket.zone(), ticket.node(), self.start(ticket));
        let flags = self.zones[zone].tag(node).batch;
        if flags & RECORDED != 0 {
            return self.records.find(start).map(|(number, _)| number);
        }
        let known = if flags & PUBLISHED != 0 { front::PUBLISHED } else { 0 };
        let number = self.records.add(start, self.zones[zone].len(node), ticket, known)?;
        self.zones[zone].set_flags(node, flags | RECORDED);
        Some(number)
    }

    /// Makes a block findable by its address.
    pub(in crate::gpu) fn publish(&mut self, ticket: Ticket) -> bool {
        let published = self.zones[ticket.zone()].publish(ticket.node());
        if published {
            self.note_on_record(ticket, front::PUBLISHED, true);
        }
        published
    }

    pub(in crate::gpu) fn is_live(&self, ticket: Ticket) -> bool {
        self.zones.get(ticket.zone()).is_some_and(|zone| zone.is_live(ticket.node()))
    }

    /// Whether a live block lies in a cache.
    #[inline]
    pub(in crate::gpu) fn is_cached(&self, ticket: Ticket) -> bool {
        self.record(ticket).is_some_and(|record| record.flags() & front::CACHED != 0)
    }

    /// The block that begins at an address and was published.
    pub(in crate::gpu) fn find(&self, start: usize) -> Result<Ticket> {
        self.find_live(start).map(|(ticket, _)| ticket).ok_or_else(|| self.fault(start))
    }

    /// [`find`](Self::find), and its length; what the [`fault`](Self::fault) is where there is none is another question.
    #[inline]
    pub(in crate::gpu) fn find_live(&self, start: usize) -> Option<(Ticket, usize)> {
        if self.pieces.is_some() {
            return self.find_in(if start < self.large_from { SMALL } else { LARGE }, start);
        }
        (0..=LARGE).find_map(|zone| self.find_in(zone, start))
    }

    #[inline(always)]
    fn find_in(&self, zone: usize, start: usize) -> Option<(Ticket, usize)> {
        let ranges = &self.zones[zone];
        let (node, flags) = ranges.find(start)?;
        let ticket = Ticket::new(zone, node);
        (flags & RECORDED == 0 || !self.is_cached(ticket)).then(|| (ticket, ranges.len(node)))
    }

    /// Why no block is found at an address.
    #[cold]
    pub(in crate::gpu) fn fault(&self, start: usize) -> Error {
        let Some(zone) = self.zones.iter().find(|zone| zone.owns(start)) else {
            return Error::pointer(start, PointerFault::Foreign);
        };
        let fault = match zone.around(start) {
            // One that lies in a cache is free to everybody.
            _ if zone.find(start).is_some() => PointerFault::NotLive,
            Some(node) if zone.start(node) == start => PointerFault::WrongOwner,
            Some(_) => PointerFault::Interior,
            None => PointerFault::NotLive,
        };
        Error::pointer(start, fault)
    }

    /// A block grew.
    pub(in crate::gpu) fn note_length(&self, ticket: Ticket) {
        if let Some(record) = self.record(ticket) {
            record.set_len(self.len(ticket));
        }
    }
}

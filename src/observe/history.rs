//! The last operations of a pool, in a ring.

use super::depot::Depot;
use super::metadata::{Metadata, Table, make_room};
use super::records::Mark;
use crate::base::diagnostics::{Operation, OperationKind};
use crate::base::error::{Error, OomReason, Result};

#[derive(Clone, Copy, Debug)]
struct Entry {
    mark: Mark,
    kind: OperationKind,
    address: usize,
    size: usize,
}

#[derive(Debug)]
pub(super) struct History {
    /// The oldest entry is at `next`. Operations have numbers from 1 on; an entry of number 0 is none.
    ring: Table<Entry>,
    next: usize,
}

impl History {
    /// A history of `limit` operations, all memory for it taken now.
    pub(super) fn new(limit: usize) -> Result<Self> {
        let mut ring = Table::new_in(Metadata);
        let bytes = limit.saturating_mul(size_of::<Entry>());
        if !make_room(&mut ring, limit) {
            return Err(Error::oom(bytes, OomReason::Source));
        }
        let none = Entry { mark: Mark::default(), kind: OperationKind::Reset, address: 0, size: 0 };
        ring.resize(limit, none);
        Ok(Self { ring, next: 0 })
    }

    #[inline]
    pub(super) fn push(&mut self, mark: Mark, kind: OperationKind, address: usize, size: usize) {
        let Some(entry) = self.ring.get_mut(self.next) else { return };
        *entry = Entry { mark, kind, address, size };
        self.next += 1;
        if self.next == self.ring.len() {
            self.next = 0;
        }
    }

    /// The entries, oldest first.
    pub(super) fn list(&self, depot: &Depot) -> Vec<Operation> {
        let (newer, older) = self.ring.split_at(self.next);
        let entries = older.iter().chain(newer).filter(|entry| entry.mark.operation > 0);
        entries
            .map(|&Entry { mark, kind, address, size }| Operation {
                number: mark.operation,
                kind,
                address,
                size,
                thread: mark.thread,
                stack: depot.get(mark.stack),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_in_order() {
        let depot = Depot::new();
        for (limit, pushed) in [(0, 5), (4, 3), (4, 4), (4, 11)] {
            let mut history = History::new(limit).unwrap();
            for operation in 1..=pushed as u64 {
                let mark = Mark { operation, ..Mark::default() };
                history.push(mark, OperationKind::Allocate, 16, 8);
            }
            let numbers: Vec<u64> = history.list(&depot).iter().map(|entry| entry.number).collect();
            let first = pushed - pushed.min(limit) + 1;
            assert_eq!(numbers, (first as u64..=pushed as u64).collect::<Vec<_>>());
        }
        assert!(History::new(usize::MAX / 2).is_err());
    }
}

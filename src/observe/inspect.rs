//! The debug layer's slow side: what exactly is wrong, told as [`Finding`]s.

use core::alloc::Layout;
use core::ops::Range;

use super::bytes::{CANARY, FREED, Reach, damage};
use super::debug::{Books, DebugLayer};
use super::records::{Id, Mark, Record, State};
use crate::base::config::MAX_ALIGNMENT;
use crate::base::finding::{Finding, FindingKind, Site, WINDOW};

impl Books {
    fn site(&self, mark: Mark) -> Option<Site> {
        let Mark { operation, thread, stack } = mark;
        (operation != 0).then(|| Site { operation, thread, stack: self.depot.get(stack) })
    }

    /// A finding about a block that was allocated, with all that is known of it.
    fn about(&self, kind: FindingKind, record: &Record, found: Option<Mark>) -> Finding {
        let mut finding = Finding::new(kind, record.outer);
        (finding.size, finding.align) = (record.size, record.align);
        finding.allocated = self.site(record.allocated);
        finding.freed = self.site(record.freed);
        finding.found = found.and_then(|mark| self.site(mark));
        finding
    }
}

impl<R: Reach> DebugLayer<R> {
    /// Looks at `part`, of or around the block of `record`, all of which should be `expected`; notes and
    /// repairs damage.
    fn look(
        &self,
        books: &Books,
        record: &Record,
        kind: FindingKind,
        part: Range<usize>,
        expected: u8,
        found: Option<Mark>,
    ) -> Option<Finding> {
        // SAFETY: parts of an inner block that is ours (invariant 1 of the layer).
        let (first, damaged) = unsafe { damage(&self.reach, part.start, part.len(), expected) };
        if damaged == 0 {
            return None;
        }
        let mut finding = books.about(kind, record, found);
        (finding.damaged, finding.expected) = (damaged, expected);
        finding.offset = first.wrapping_sub(record.outer) as isize;
        // Two lines from the damage on and one before it, as far as the block's memory goes.
        let start = (first & !15).saturating_sub(16).max(self.open_from(record));
        finding.bytes_at = start;
        finding.bytes = vec![0; WINDOW.min(self.open_to(record) - start)];
        // SAFETY: within the part of the inner block that is accessible; repairing writes only bytes that are
        // ours.
        unsafe {
            self.reach.read(start, &mut finding.bytes);
            self.reach.fill(part.start, part.len(), expected);
        }
        Some(finding)
    }

    /// The accessible part of a block: between its canaries and including them.
    fn open_from(&self, record: &Record) -> usize {
        self.surround.front(record).start
    }

    fn open_to(&self, record: &Record) -> usize {
        self.surround.back(record).end
    }

    fn canaries(&self, books: &Books, record: &Record, mark: Option<Mark>, found: &mut Vec<Finding>) {
        let (front, back) = (self.surround.front(record), self.surround.back(record));
        found.extend(self.look(books, record, FindingKind::Underflow, front, CANARY, mark));
        found.extend(self.look(books, record, FindingKind::Overflow, back, CANARY, mark));
    }

    /// A Live block whose canaries or layout are not as they should be.
    #[cold]
    pub(super) fn inspect(
        &self,
        books: &mut Books,
        id: Id,
        layout: Option<Layout>,
        mark: Option<Mark>,
        found: &mut Vec<Finding>,
    ) {
        let record = books.records[id];
        self.canaries(books, &record, mark, found);
        if let Some(given) = layout.map(|layout| (layout.size(), layout.align()))
            && given != (record.size, record.align)
        {
            let mut finding = books.about(FindingKind::WrongLayout, &record, mark);
            finding.given = Some(given);
            found.push(finding);
        }
    }

    /// A Held block that does not look freed.
    #[cold]
    pub(super) fn write_after_free(&self, books: &mut Books, id: Id, found: &mut Vec<Finding>) {
        let record = books.records[id];
        let bytes = record.outer..record.outer + record.size;
        found.extend(self.look(books, &record, FindingKind::WriteAfterFree, bytes, FREED, None));
    }

    /// A free of what is not live.
    #[cold]
    pub(super) fn refuse(
        &self,
        books: &mut Books,
        known: Option<Id>,
        outer: usize,
        mark: Mark,
        found: &mut Vec<Finding>,
    ) {
        // Blocks of size 0 are addresses that equal their alignment, and nobody's.
        if known.is_none() && outer.is_power_of_two() && outer <= MAX_ALIGNMENT {
            return;
        }
        let finding = match known {
            Some(id) => books.about(FindingKind::DoubleFree, &books.records[id], Some(mark)),
            None => {
                let holds = |record: &Record| (record.outer..record.outer + record.size).contains(&outer);
                match books.records.iter(State::Live).find(|record| holds(record)) {
                    Some(record) => {
                        let mut finding = books.about(FindingKind::InteriorFree, record, Some(mark));
                        finding.offset = (outer - record.outer) as isize;
                        finding
                    }
                    None => {
                        let mut finding = Finding::new(FindingKind::ForeignFree, outer);
                        finding.found = books.site(mark);
                        finding
                    }
                }
            }
        };
        found.push(finding);
    }

    /// Checks all blocks that are live or held.
    pub(super) fn find_damage(&self, mark: Option<Mark>) -> Vec<Finding> {
        let mut found = Vec::new();
        let books = self.books.lock();
        for record in books.records.iter(State::Live) {
            self.canaries(&books, record, mark, &mut found);
        }
        if self.config.fill {
            for record in books.records.iter(State::Held).filter(|record| !record.fenced) {
                let bytes = record.outer..record.outer + record.size;
                found.extend(self.look(&books, record, FindingKind::WriteAfterFree, bytes, FREED, mark));
            }
        }
        found
    }

    /// Every live block, as a leak, in the order of allocation.
    pub(super) fn list_live(&self) -> Vec<Finding> {
        let books = self.books.lock();
        let mut live: Vec<_> = books.records.iter(State::Live).collect();
        live.sort_unstable_by_key(|record| record.allocated.operation);
        live.into_iter().map(|record| books.about(FindingKind::Leak, record, None)).collect()
    }

    /// Makes all pages accessible again: the memory goes elsewhere.
    pub(super) fn open_all(&self, books: &Books) {
        if self.surround.has_pages() {
            for state in [State::Live, State::Held] {
                for record in books.records.iter(state).filter(|record| record.fenced) {
                    // SAFETY: the engine still counts the block as live, so it is nobody else's.
                    unsafe { self.surround.unfence(record) };
                }
            }
        }
    }
}

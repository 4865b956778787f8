//! The hazard detector: which work is ordered before which, and who touched what.
//!
//! Every stream carries a vector clock: entry `q` is the last operation of stream `q` that is known to come
//! before whatever is issued next. Events copy a clock, waits join one, and the host has one for what it has
//! seen complete. Two accesses are ordered if the later one's clock covers the earlier one. The check does
//! not depend on the order in which operations happen to run, so one schedule finds what any schedule could.

use std::collections::BTreeMap;
use std::fmt;

/// A vector clock; missing entries are 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Clock(Vec<u64>);

impl Clock {
    pub(super) fn join(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = (*mine).max(*theirs);
        }
    }

    pub(super) fn advance(&mut self, stream: usize, seq: u64) {
        if self.0.len() <= stream {
            self.0.resize(stream + 1, 0);
        }
        self.0[stream] = self.0[stream].max(seq);
    }

    fn covers(&self, stream: usize, seq: u64) -> bool {
        self.0.get(stream).is_some_and(|&known| known >= seq)
    }
}

/// What the detector found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HazardKind {
    /// A block was handed out while work on another stream may still use it.
    ReusedInUse,
    /// Memory was unmapped or given back while work may still use it.
    GivenBackInUse,
    /// Work touches a block that was freed before the work was issued.
    UseAfterFree,
    /// Two pieces of work on one block, at least one of them writing, are not ordered.
    Race,
    /// Memory that a captured graph uses was handed out to others.
    GraphMemoryReused,
    /// Work touches addresses with no memory behind them.
    Unmapped,
}

/// A mistake in the ordering of work, as the simulated device saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hazard {
    /// What it is.
    pub kind: HazardKind,
    /// First address concerned.
    pub address: usize,
    /// Number of the stream whose work came first.
    pub earlier: usize,
    /// Number of the stream that comes later; `usize::MAX` for the CPU.
    pub later: usize,
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, address, earlier, later } = self;
        write!(f, "{kind:?} at {address:#x}: work of stream {earlier} is not ordered before ")?;
        if *later == HOST { f.write_str("the CPU") } else { write!(f, "stream {later}") }
    }
}

/// The CPU, as a party to a hazard.
pub(super) const HOST: usize = usize::MAX;

#[derive(Clone, Copy, Debug)]
struct Touch {
    stream: usize,
    seq: u64,
    write: bool,
}

#[derive(Clone, Debug)]
struct Piece {
    end: usize,
    touches: Vec<Touch>,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    end: usize,
    live: bool,
    taken_at: u64,
    capture: Option<usize>,
}

/// Who touches what, and when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access<'a> {
    pub(super) stream: usize,
    pub(super) seq: u64,
    pub(super) clock: &'a Clock,
    pub(super) write: bool,
    /// The graph this work belongs to, with the tick at which its capture began.
    pub(super) graph: Option<(usize, u64)>,
}

#[derive(Debug, Default)]
pub(super) struct Detector {
    pieces: BTreeMap<usize, Piece>,
    blocks: BTreeMap<usize, Block>,
    tick: u64,
    /// Whether nothing is looked at.
    off: bool,
    pub(super) found: Vec<Hazard>,
}

impl Detector {
    pub(super) fn new(on: bool) -> Self {
        Self { off: !on, ..Self::default() }
    }

    pub(super) fn tick(&self) -> u64 {
        self.tick
    }

    fn report(&mut self, kind: HazardKind, address: usize, earlier: usize, later: usize) {
        // Enough to understand a mistake; a loop of mistakes must not eat the machine.
        if self.found.len() < 1000 {
            self.found.push(Hazard { kind, address, earlier, later });
        }
    }

    /// Cuts pieces at `at`.
    fn cut(&mut self, at: usize) {
        if let Some((_, piece)) = self.pieces.range_mut(..at).next_back()
            && piece.end > at
        {
            let tail = Piece { end: piece.end, touches: piece.touches.clone() };
            piece.end = at;
            self.pieces.insert(at, tail);
        }
    }

    /// Work touches `[addr, addr + len)`.
    pub(super) fn access(&mut self, addr: usize, len: usize, by: Access<'_>) {
        if len == 0 || self.off {
            return;
        }
        let end = addr + len;
        let blocks = self.overlapping(addr, end);
        for block in blocks {
            match by.graph {
                Some((graph, began)) if block.capture != Some(graph) && block.taken_at > began => {
                    self.report(HazardKind::GraphMemoryReused, addr, by.stream, by.stream);
                }
                None if !block.live => self.report(HazardKind::UseAfterFree, addr, by.stream, by.stream),
                _ => {}
            }
        }
        self.cut(addr);
        self.cut(end);
        let mut at = addr;
        let mut fresh = Vec::new();
        let mut races = Vec::new();
        let touch = Touch { stream: by.stream, seq: by.seq, write: by.write };
        for (&start, piece) in self.pieces.range_mut(addr..end) {
            if start > at {
                fresh.push((at, start));
            }
            at = piece.end;
            for old in &piece.touches {
                let ordered = old.stream == by.stream || by.clock.covers(old.stream, old.seq);
                if (old.write || by.write) && !ordered {
                    races.push((start, old.stream));
                }
            }
            if by.write {
                piece.touches.clear();
            } else {
                piece.touches.retain(|old| old.write || old.stream != by.stream);
            }
            piece.touches.push(touch);
        }
        if at < end {
            fresh.push((at, end));
        }
        for (start, end) in fresh {
            self.pieces.insert(start, Piece { end, touches: vec![touch] });
        }
        for (start, stream) in races {
            self.report(HazardKind::Race, start, stream, by.stream);
        }
    }

    /// A block is handed out for work ordered after `clock` on `stream`.
    pub(super) fn taken(
        &mut self,
        addr: usize,
        len: usize,
        stream: usize,
        clock: &Clock,
        cap: Option<usize>,
    ) {
        self.forget(addr, addr + len, stream, clock, HazardKind::ReusedInUse);
        self.drop_blocks(addr, addr + len);
        self.tick += 1;
        let block = Block { end: addr + len, live: true, taken_at: self.tick, capture: cap };
        self.blocks.insert(addr, block);
    }

    /// The memory behind a range is handed out at another address, for work ordered after `clock` on `stream`.
    pub(super) fn reused(&mut self, addr: usize, len: usize, stream: usize, clock: &Clock) {
        self.forget(addr, addr + len, stream, clock, HazardKind::ReusedInUse);
    }

    /// The block is free; who touches it from now on is late.
    pub(super) fn freed(&mut self, addr: usize) {
        if let Some(block) = self.blocks.get_mut(&addr) {
            block.live = false;
        }
    }

    /// The memory goes away; everything in it must be known to be complete.
    pub(super) fn given_back(&mut self, addr: usize, len: usize, host: &Clock) {
        self.forget(addr, addr + len, HOST, host, HazardKind::GivenBackInUse);
        self.drop_blocks(addr, addr + len);
    }

    /// Checks that all touches of a range are covered by `clock`, then forgets them.
    fn forget(&mut self, addr: usize, end: usize, stream: usize, clock: &Clock, kind: HazardKind) {
        self.cut(addr);
        self.cut(end);
        let starts: Vec<usize> = self.pieces.range(addr..end).map(|(&start, _)| start).collect();
        for start in starts {
            let Some(piece) = self.pieces.remove(&start) else { continue };
            for touch in piece.touches {
                if touch.stream != stream && !clock.covers(touch.stream, touch.seq) {
                    self.report(kind, start, touch.stream, stream);
                }
            }
        }
    }

    fn overlapping(&self, addr: usize, end: usize) -> Vec<Block> {
        let first = self.blocks.range(..=addr).next_back().filter(|(_, b)| b.end > addr);
        let from = first.map_or(addr, |(&start, _)| start);
        self.blocks.range(from..end).map(|(_, &block)| block).collect()
    }

    fn drop_blocks(&mut self, addr: usize, end: usize) {
        let first = self.blocks.range(..addr).next_back().filter(|(_, b)| b.end > addr);
        let from = first.map_or(addr, |(&start, _)| start);
        let starts: Vec<usize> = self.blocks.range(from..end).map(|(&start, _)| start).collect();
        for start in starts {
            self.blocks.remove(&start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(entries: &[(usize, u64)]) -> Clock {
        let mut clock = Clock::default();
        entries.iter().for_each(|&(stream, seq)| clock.advance(stream, seq));
        clock
    }

    #[test]
    fn reuse_needs_an_order() {
        let mut detector = Detector::default();
        detector.taken(0x1000, 64, 0, &clock(&[]), None);
        let by = Access { stream: 0, seq: 5, clock: &clock(&[]), write: true, graph: None };
        detector.access(0x1000, 64, by);
        detector.freed(0x1000);
        detector.taken(0x1020, 16, 1, &clock(&[(0, 5)]), None);
        assert!(detector.found.is_empty());
        detector.taken(0x1000, 16, 0, &clock(&[]), None);
        assert!(detector.found.is_empty(), "the same stream needs nothing");
        detector.taken(0x1010, 16, 1, &clock(&[(0, 4)]), None);
        assert_eq!(detector.found[0].kind, HazardKind::ReusedInUse);
    }

    #[test]
    fn unordered_writes_race_and_reads_do_not() {
        let mut detector = Detector::default();
        let none = clock(&[]);
        let read = |stream, seq| Access { stream, seq, clock: &none, write: false, graph: None };
        detector.access(0, 100, read(0, 1));
        detector.access(50, 100, read(1, 1));
        assert!(detector.found.is_empty());
        detector.access(90, 5, Access { write: true, ..read(1, 2) });
        assert_eq!(detector.found.len(), 1);
        assert_eq!(detector.found[0].kind, HazardKind::Race);
    }
}

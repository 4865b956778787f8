//! The debug layer: canaries, fill patterns, a quarantine, guard pages, layouts, leaks, history, latency.
//!
//! What [`Records`] knows of a block goes through three states:
//!
//! ```text
//!   on_alloc → Live —on_free→ Held —checked, given to the engine→ Gone → forgotten
//! ```
//!
//! Invariants:
//! 1. A record is Live or Held exactly as long as the engine counts its inner block as live. What the
//!    engine may reuse is Gone or forgotten.
//! 2. The bytes around Live blocks hold `CANARY`, those of Held ones `FREED` (with `fill`), or cannot be
//!    accessed (`fenced`). Whoever finds them otherwise reports that and restores them.
//! 3. `books` guards all of it, patterns in memory included. It is never held while a stack is captured, a
//!    report written, or a panic raised; and before a panic is raised every block is where another call finds
//!    it.
//! 4. Findings made where memory is short, that is inside an allocation, are acted upon in the next free,
//!    check or drop.

use core::alloc::Layout;
use core::cell::Cell;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::Observer;
use super::bytes::{CANARY, FREED, FRESH, HostReach, Reach};
use super::depot::{Depot, NO_STACK};
use super::history::History;
use super::records::{Id, Mark, Record, Records, State};
use super::surround::Surround;
use crate::base::config::{DebugConfig, OnFinding, PoolConfig};
use crate::base::diagnostics::{Diagnostics, FindingLog, Operation, OperationKind};
use crate::base::error::Result;
use crate::base::finding::{Finding, FindingKind, LeakReport};
use crate::base::latency::LatencyRecorder;
use crate::base::pool::ActiveAllocation;
use crate::base::report;
use crate::base::stack::{Stack, thread_number};
use crate::base::stats::Latency;
use crate::base::sync::{ForkGuard, Lock, LockGuard};
use crate::engine::Block;

/// Records for which room is made ahead: as many threads may be between [`Observer::inflate`], which can
/// refuse, and [`Observer::on_alloc`], which cannot.
const ROOM_AHEAD: usize = 512;

/// An observer that checks what [`DebugConfig`] asks for. `R` says how the pool's bytes are reached.
///
/// Pools whose configuration has debugging on carry it; nobody else pays for it.
pub struct DebugLayer<R: Reach = HostReach> {
    pub(super) config: DebugConfig,
    name: String,
    pub(super) reach: R,
    pub(super) surround: Surround,
    /// Whether blocks are recorded; otherwise only latencies are taken.
    tracks: bool,
    latency: Option<Box<LatencyRecorder>>,
    pub(super) books: Lock<Books>,
    /// Whether `evict(false)` has anything to do.
    overdue: AtomicBool,
    /// Whether records could not be made ahead.
    full: AtomicBool,
    log: FindingLog,
    /// Whether to panic when the layer itself is dropped, after its pool gave everything back.
    panic_at_drop: AtomicBool,
}

/// What the layer knows, behind its lock.
#[derive(Debug)]
pub(super) struct Books {
    pub(super) records: Records,
    pub(super) depot: Depot,
    history: History,
    operation: u64,
    /// Inner bytes of Held blocks.
    held_bytes: usize,
    /// Findings to act upon later (invariant 4).
    deferred: Vec<Finding>,
}

impl Books {
    #[inline]
    fn mark(&mut self, stack: Option<&Stack>) -> Mark {
        self.operation += 1;
        let stack = stack.map_or(NO_STACK, |stack| self.depot.intern(stack));
        Mark { operation: self.operation, thread: thread_number(), stack }
    }

    fn known(&self, outer: usize) -> Known {
        match self.records.find(outer).map(|id| &self.records[id]) {
            None => Known::Nothing,
            Some(record) if record.state == State::Live => Known::Live(record.size),
            Some(_) => Known::Freed,
        }
    }

    /// The engine may reuse the block from now on; returns its inner address.
    #[inline]
    fn let_go(&mut self, id: Id) -> usize {
        let &Record { inner, inner_size, .. } = &self.records[id];
        self.held_bytes -= inner_size;
        self.records.let_go(id);
        inner
    }
}

impl DebugLayer {
    /// A layer for host memory, as `config.debug` says; reports give the pool's `name`.
    pub fn new(name: &str, config: &PoolConfig) -> Result<Self> {
        Self::with_reach(name, config, HostReach)
    }
}

impl<R: Reach> DebugLayer<R> {
    /// A layer for memory that is reached by `reach`.
    pub fn with_reach(name: &str, pool: &PoolConfig, reach: R) -> Result<Self> {
        let config = pool.debug;
        let tracks = DebugConfig { latency: false, ..config }.is_on();
        let books = Books {
            records: Records::new(),
            depot: Depot::new(),
            history: History::new(config.history)?,
            operation: 0,
            held_bytes: 0,
            deferred: Vec::new(),
        };
        let layer = Self {
            config,
            name: name.into(),
            reach,
            surround: Surround::new(pool, R::PAGES),
            tracks,
            latency: config.latency.then(|| Box::new(LatencyRecorder::new())),
            books: Lock::new(books),
            overdue: AtomicBool::new(false),
            full: AtomicBool::new(false),
            log: FindingLog::default(),
            panic_at_drop: AtomicBool::new(false),
        };
        layer.make_room(&mut layer.books.lock());
        Ok(layer)
    }

    fn make_room(&self, books: &mut Books) {
        let full = !books.records.make_room(ROOM_AHEAD);
        if full != self.full.load(Ordering::Relaxed) {
            self.full.store(full, Ordering::Relaxed);
        }
    }

    /// Where the program is, if that is to be remembered. Before any lock is taken.
    #[inline]
    fn here(&self) -> Option<Stack> {
        if self.config.stacks { Some(Stack::capture()) } else { None }
    }

    /// What the layer knows of the address `outer`.
    pub(crate) fn known(&self, outer: usize) -> Known {
        self.books.lock().known(outer)
    }

    /// Locks the books for as long as the answer lives: around a `fork`.
    pub(crate) fn hold_books(&self) -> HeldBooks<'_> {
        HeldBooks(self.books.lock_around_fork())
    }

    #[inline]
    fn intact(&self, record: &Record) -> bool {
        let (front, back) = (self.surround.front(record), self.surround.back(record));
        // SAFETY: parts of the inner block, which is ours (invariant 1).
        unsafe {
            self.reach.holds(front.start, front.len(), CANARY)
                && self.reach.holds(back.start, back.len(), CANARY)
        }
    }

    /// Whether nobody wrote to a Held block.
    #[inline]
    fn untouched(&self, record: &Record) -> bool {
        // SAFETY: the block is ours until let go (invariant 1).
        !self.config.fill || record.fenced || unsafe { self.reach.holds(record.outer, record.size, FREED) }
    }

    /// From Live to Held.
    #[inline]
    fn hold(&self, books: &mut Books, id: Id, mark: Mark) {
        let record = &mut books.records[id];
        record.freed = mark;
        books.held_bytes += record.inner_size;
        // SAFETY: the user freed the block, so it is ours (invariant 1).
        unsafe {
            // Closing the whole block needs the quarantine: the engine may write to what it has.
            record.fenced = record.fenced && self.config.quarantine > 0 && self.surround.fence(record, true);
            if self.surround.has_pages() && !record.fenced {
                self.surround.unfence(record);
            }
            if self.config.fill && !record.fenced {
                self.reach.fill(record.outer, record.size, FREED);
            }
        }
        books.records.hold(id);
    }

    /// The user freed the block at `outer`, which goes back at once: its bytes may not be looked at now. Returns
    /// its inner address; `None` where no live block begins there, which is a finding.
    #[cold]
    pub(crate) fn let_through(&self, outer: usize) -> Option<usize> {
        let stack = self.here();
        let mut books = self.books.lock();
        let mark = books.mark(stack.as_ref());
        match books.records.find(outer) {
            Some(id) if books.records[id].state == State::Live => {
                let Record { size, inner_size, .. } = books.records[id];
                books.records[id].freed = mark;
                books.history.push(mark, OperationKind::Free, outer, size);
                books.held_bytes += inner_size;
                Some(books.let_go(id))
            }
            other => {
                let mut found = Vec::new();
                self.refuse(&mut books, other, outer, mark, &mut found);
                self.act(books, found);
                None
            }
        }
    }

    /// Whether the block that is held longest should go. A quarantine holds one block at least, so that a
    /// write to a block larger than the quarantine is found as well.
    #[inline]
    fn is_overdue(&self, books: &Books) -> bool {
        books.held_bytes > self.config.quarantine
            && books.records.held() > usize::from(self.config.quarantine > 0)
    }

    /// Takes one block out of the quarantine: its inner address, unless it was found damaged. Then it comes with
    /// the next call.
    #[inline]
    fn release(&self, books: &mut Books, all: bool, found: &mut Vec<Finding>) -> Option<usize> {
        let id = books.records.first_held()?;
        if books.records[id].checked {
            return Some(books.let_go(id));
        }
        if !all && !self.is_overdue(books) {
            return None;
        }
        if !self.untouched(&books.records[id]) {
            self.write_after_free(books, id, found);
        }
        if books.records[id].fenced {
            // SAFETY: the block is ours (invariant 1).
            unsafe { self.surround.unfence(&books.records[id]) };
        }
        if found.is_empty() {
            return Some(books.let_go(id));
        }
        books.records[id].checked = true;
        None
    }

    #[inline]
    fn note_overdue(&self, books: &Books) {
        let checked = books.records.first_held().is_some_and(|id| books.records[id].checked);
        let overdue = checked || self.is_overdue(books);
        if overdue != self.overdue.load(Ordering::Relaxed) {
            self.overdue.store(overdue, Ordering::Relaxed);
        }
    }

    #[cold]
    fn evict_slow(&self, all: bool) -> Option<usize> {
        loop {
            let mut found = Vec::new();
            let mut books = self.books.lock();
            let released = self.release(&mut books, all, &mut found);
            self.note_overdue(&books);
            if found.is_empty() {
                return released;
            }
            if all {
                books.deferred.append(&mut found);
            } else {
                self.act(books, found);
            }
        }
    }

    /// Keeps and reports findings. The books are not locked (invariant 3).
    #[cold]
    pub(super) fn tell(&self, findings: &[Finding]) {
        for finding in findings {
            self.log.push(finding);
            // Leaks are reported together.
            if self.config.on_finding != OnFinding::Collect && finding.kind != FindingKind::Leak {
                report::alarm(format_args!("{}{finding}", Prefix(&self.name)));
            }
        }
        let leaks: Vec<_> = findings.iter().filter(|finding| finding.kind == FindingKind::Leak).collect();
        if self.config.on_finding != OnFinding::Collect && !leaks.is_empty() {
            let leaks = LeakReport::new(leaks.into_iter().cloned());
            report::alarm(format_args!("{}{leaks}", Prefix(&self.name)));
        }
        if self.config.on_finding == OnFinding::Abort && !findings.is_empty() {
            std::process::abort();
        }
    }

    /// Acts upon findings, deferred ones as well.
    #[cold]
    pub(super) fn act(&self, mut books: LockGuard<'_, Books>, mut findings: Vec<Finding>) {
        findings.append(&mut books.deferred);
        drop(books);
        self.tell(&findings);
        if let (OnFinding::Panic, Some(finding)) = (self.config.on_finding, findings.first()) {
            panic_or_abort(finding);
        }
    }
}

/// What a layer knows of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// No block of the layer's begins there.
    Nothing,
    /// A live block of as many bytes does.
    Live(usize),
    /// A freed one did.
    Freed,
}

/// The books of a layer, locked.
pub(crate) struct HeldBooks<'a>(ForkGuard<'a, Books>);

impl HeldBooks<'_> {
    /// [`DebugLayer::known`], by who holds the books.
    pub(crate) fn known(&self, outer: usize) -> Known {
        self.0.known(outer)
    }
}

/// The pool's name in front of a report, if it has one.
struct Prefix<'a>(&'a str);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "pool \"{}\": ", self.0) }
    }
}

/// Panics, but aborts where a panic is under way already.
#[cold]
fn panic_or_abort(finding: &Finding) {
    if std::thread::panicking() {
        std::process::abort();
    }
    panic!("memory-pool: {finding}");
}

thread_local! {
    /// When the allocation that this thread is in began.
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

// SAFETY: `Surround` places the user's bytes inside the inner block, aligned as asked (its test). An inner
// address is returned by `let_go` alone, which makes its record Gone; only `on_alloc` makes a Live one.
unsafe impl<R: Reach> Observer for DebugLayer<R> {
    fn inflate(&self, asked: Layout) -> Option<Layout> {
        if self.latency.is_some() {
            BEGAN.set(Some(Instant::now()));
        }
        if !self.tracks {
            return Some(asked);
        }
        if self.full.load(Ordering::Relaxed) {
            self.make_room(&mut self.books.lock());
            if self.full.load(Ordering::Relaxed) {
                return None;
            }
        }
        self.surround.inflate(asked)
    }

    unsafe fn on_alloc(&self, asked: Layout, block: Block) -> Block {
        if let (Some(latency), Some(began)) = (&self.latency, BEGAN.take()) {
            latency.record(began.elapsed().as_nanos() as u64);
        }
        if !self.tracks {
            return block;
        }
        let stack = self.here();
        let outer = self.surround.outer(block.start, asked);
        let mut record = Record::new(outer, asked.size(), asked.align(), block.start, block.size);
        let mut books = self.books.lock();
        record.allocated = books.mark(stack.as_ref());
        let (front, back) = (self.surround.front(&record), self.surround.back(&record));
        // SAFETY: parts of the inner block, which belongs to the caller alone.
        unsafe {
            self.reach.fill(front.start, front.len(), CANARY);
            self.reach.fill(back.start, back.len(), CANARY);
            if self.config.fill {
                self.reach.fill(outer, record.size, FRESH);
            }
            record.fenced = self.surround.has_pages() && self.surround.fence(&record, false);
        }
        if !books.records.make_room(1) {
            // More threads than `ROOM_AHEAD` allocate at once and the system has no memory at all.
            std::alloc::handle_alloc_error(Layout::new::<Record>());
        }
        books.records.insert(record);
        self.make_room(&mut books);
        books.history.push(record.allocated, OperationKind::Allocate, outer, record.size);
        let dirty = block.dirty.saturating_sub(outer - block.start).min(asked.size());
        Block { start: outer, size: asked.size(), dirty: if self.config.fill { asked.size() } else { dirty } }
    }

    unsafe fn on_free(&self, outer: usize, layout: Option<Layout>) -> Option<usize> {
        if !self.tracks {
            return Some(outer);
        }
        let stack = self.here();
        let mut found = Vec::new();
        let mut books = self.books.lock();
        let mark = books.mark(stack.as_ref());
        let mut released = None;
        match books.records.find(outer) {
            Some(id) if books.records[id].state == State::Live => {
                let record = &books.records[id];
                let size = record.size;
                let fits = layout.is_none_or(|given| (given.size(), given.align()) == (size, record.align));
                if !fits || !self.intact(record) {
                    self.inspect(&mut books, id, layout, Some(mark), &mut found);
                }
                self.hold(&mut books, id, mark);
                books.history.push(mark, OperationKind::Free, outer, size);
                if found.is_empty() {
                    released = self.release(&mut books, false, &mut found);
                }
            }
            other => self.refuse(&mut books, other, outer, mark, &mut found),
        }
        self.note_overdue(&books);
        if !found.is_empty() || !books.deferred.is_empty() {
            self.act(books, found);
        }
        released
    }

    #[inline]
    fn evict(&self, all: bool) -> Option<usize> {
        if all || self.overdue.load(Ordering::Relaxed) { self.evict_slow(all) } else { None }
    }

    fn in_place(&self) -> bool {
        !self.tracks
    }

    fn find(&self, outer: usize) -> Option<(usize, Option<usize>)> {
        if !self.tracks {
            return Some((outer, None));
        }
        let books = self.books.lock();
        let record = books.records[books.records.find(outer)?];
        (record.state == State::Live).then_some((record.inner, Some(record.size)))
    }

    fn live(&self) -> Option<Vec<ActiveAllocation>> {
        self.tracks.then(|| {
            let books = self.books.lock();
            let live = books.records.iter(State::Live);
            live.map(|record| ActiveAllocation::new(record.outer, record.size)).collect()
        })
    }

    fn held(&self) -> (usize, usize) {
        let books = self.books.lock();
        (books.records.held(), books.held_bytes)
    }

    fn on_grow(&self, bytes: usize) {
        if self.config.history > 0 {
            let stack = self.here();
            let mut books = self.books.lock();
            let mark = books.mark(stack.as_ref());
            books.history.push(mark, OperationKind::Grow, 0, bytes);
        }
    }

    fn on_reset(&self) {
        if !self.tracks {
            return;
        }
        let stack = self.here();
        let mut books = self.books.lock();
        self.open_all(&books);
        books.records.clear();
        books.held_bytes = 0;
        let mark = books.mark(stack.as_ref());
        books.history.push(mark, OperationKind::Reset, 0, 0);
    }

    fn on_drop(&self) {
        let mut found = self.find_damage(None);
        if self.config.leaks {
            found.append(&mut self.leaks());
        }
        let mut books = self.books.lock();
        self.open_all(&books);
        found.append(&mut books.deferred);
        drop(books);
        self.tell(&found);
        // The pool has still to give its memory back.
        self.panic_at_drop.store(!found.is_empty(), Ordering::Relaxed);
    }

    fn latency(&self) -> Option<Latency> {
        self.latency.as_ref()?.quantiles()
    }

    fn diagnostics(&self) -> Option<&dyn Diagnostics> {
        Some(self)
    }
}

impl<R: Reach> Diagnostics for DebugLayer<R> {
    fn check(&self) -> usize {
        let stack = self.here();
        let mark = self.books.lock().mark(stack.as_ref());
        let found = self.find_damage(Some(mark));
        let count = found.len();
        self.act(self.books.lock(), found);
        count
    }

    fn log(&self) -> FindingLog {
        self.log.clone()
    }

    fn leaks(&self) -> Vec<Finding> {
        self.list_live()
    }

    fn history(&self) -> Vec<Operation> {
        let books = self.books.lock();
        books.history.list(&books.depot)
    }
}

impl<R: Reach> Drop for DebugLayer<R> {
    fn drop(&mut self) {
        if self.config.on_finding == OnFinding::Panic
            && *self.panic_at_drop.get_mut()
            && !std::thread::panicking()
        {
            panic!("memory-pool: {}findings when the pool was dropped, reported above", Prefix(&self.name));
        }
    }
}

impl<R: Reach> fmt::Debug for DebugLayer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let books = self.books.lock();
        f.debug_struct("DebugLayer")
            .field("config", &self.config)
            .field("live", &books.records.live())
            .field("held", &books.records.held())
            .field("findings", &self.log.total())
            .finish_non_exhaustive()
    }
}

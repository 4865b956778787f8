//! How memory goes back to the system: at free time, in proportion, without a timer.
//!
//! A heap keeps idle memory up to half of what is live in it (and a little in any case), so that programs
//! whose need swings by less fault nothing in again. Beyond that it gives back, cheapest first: whole
//! segments, then idle slices, then free pages inside of spans. Spans are looked at only after a sixteenth of
//! them was freed since the last look, so that the cost of looking stays a small part of the frees.

use core::ptr;
use core::sync::atomic::Ordering;

use super::class;
use super::segment::Segment;
use super::span::{Place, Span};
use super::thread::{ThreadHeap, bump, lower};
use crate::source::os;

/// A heap that was larger than this and shrank to a quarter empties its caches, whose blocks would hold
/// scattered pages; and again with each quartering, as long as it shrinks, down to `SHRUNK_TO`. Meanwhile its
/// caches hold `SHORTER` times less.
const SHRUNK_FROM: usize = 8 << 20;
const SHORTER: usize = 16;
const SHRUNK_TO: usize = 256 << 10;

/// A change of idle bytes that a thread tells the others.
const TOLD: usize = 256 << 10;

impl ThreadHeap {
    #[inline]
    pub(super) fn purge_if_due(&self) {
        let settings = &self.hub().settings;
        let high = self.high_water.get();
        let least = if self.shrinking.get() { SHRUNK_TO } else { SHRUNK_FROM };
        if self.live.get() < high / 4 && high > least && settings.purges() {
            self.high_water.set(self.live.get());
            self.flush_all();
            self.set_shrinking(true);
        }
        let (pending, regret) = (self.pending.get(), &self.hub().regret);
        if pending.abs_diff(self.told.get()) > TOLD {
            regret.moved(self.told.replace(pending), pending);
        }
        let threads = self.hub().threads();
        let keep = settings.keep(self.live.get(), regret.extra_for(self.told.get(), threads), threads);
        if self.pending.get() > keep {
            let scattered = if self.shrinking.get() { keep } else { settings.keep_scattered(keep) };
            self.purge_to(keep - keep / 4, scattered);
        }
    }

    /// A heap that shrinks has short caches, each of whose blocks would hold a page; once it allocates again
    /// they are as long as before.
    #[cold]
    #[inline(never)]
    pub(super) fn set_shrinking(&self, shrinking: bool) {
        self.shrinking.set(shrinking);
        for class in 0..class::COUNT {
            let full = class::cache_capacity(class);
            self.set_capacity(class, if shrinking { (full / SHORTER).max(4).min(full) } else { full });
        }
    }

    /// Gives idle memory back until no more than `keep` bytes of it are left; returns the bytes given.
    pub(crate) fn purge(&self, keep: usize) -> usize {
        self.purge_to(keep, keep)
    }

    /// Gives whole slices back until no more than `keep` bytes are idle, and pages within spans, of which each
    /// takes a call of its own, until no more than `scattered` are.
    #[cold]
    #[inline(never)]
    fn purge_to(&self, keep: usize, scattered: usize) -> usize {
        let before = self.tally.discarded.load(Ordering::Relaxed);
        while self.pending.get() > keep {
            if let Some(segment) = self.idle_segments.front() {
                if segment.is_empty() {
                    let idle = segment.idle_bytes();
                    self.leave(segment);
                    self.hub().put_segment(segment);
                    bump(&self.tally.discarded, idle as u64);
                } else if !self.discard_idle(segment) {
                    break;
                }
            } else if self.pending.get() > scattered
                && let Some(span) = self.queue.front()
            {
                self.settle(span);
            } else {
                break;
            }
        }
        (self.tally.discarded.load(Ordering::Relaxed) - before) as usize
    }

    /// Gives back everything that can be, also of spans that are not worth it at other times.
    pub(crate) fn purge_all(&self) -> usize {
        self.flush_all();
        self.collect_all();
        for segment in self.segments.iter() {
            for span in segment.spans() {
                if span.free_count.get() > span.settled.get() && !span.queued.replace(true) {
                    self.queue.push_back(span);
                }
            }
        }
        self.purge(0) + self.hub().drop_spares()
    }

    /// Gives back the idle slices of a segment.
    fn discard_idle(&self, segment: &Segment) -> bool {
        let done = self.hub().discard_idle(segment);
        self.pending.set(self.pending.get() - done);
        bump(&self.tally.discarded, done as u64);
        self.relist(segment);
        done > 0
    }

    /// Gives back the free pages of a span.
    fn settle(&self, span: &Span) {
        let segment = self.segment_of_span(span);
        if span.free_count.get() == span.carved.get() && span.place.get() != Place::Full {
            self.retire(segment, span);
            return;
        }
        self.queue.remove(span);
        span.queued.set(false);
        let given = segment.discard_free(span, os::page_size(), |start, len| {
            // SAFETY: whole pages of free blocks of this heap.
            unsafe { self.hub().discard(start, len) }
        });
        self.pending.set(self.pending.get() - span.unsettled());
        span.settled.set(span.free_count.get());
        span.rearm();
        lower(&self.tally.committed, given as u64);
        bump(&self.tally.discarded, given as u64);
    }

    /// Lets go of everything: the thread ends. Segments with live blocks are left to be adopted.
    pub(crate) fn end(&self) {
        self.flush_all();
        self.collect_all();
        let hub = self.hub();
        for class in 0..class::COUNT {
            self.retire_current(class);
        }
        while let Some(segment) = self.segments.front() {
            self.leave(segment);
            if segment.is_empty() {
                hub.put_segment(segment);
                continue;
            }
            if !hub.keeps(segment.idle_bytes()) {
                hub.discard_idle(segment);
            }
            for span in segment.spans() {
                hub.counters.orphaned.fetch_add(span.held() as usize, Ordering::Relaxed);
            }
            hub.abandon(segment);
        }
        // The spans keep stale links; who adopts them links them anew.
        self.queue.clear();
        for bin in &self.bins {
            bin.partial.clear();
            bin.current.set(ptr::null());
            bin.taken.set(0);
            bin.seen.set(0);
        }
        hub.regret.moved(self.told.replace(0), 0);
        self.live.set(0);
        self.pending.set(0);
        self.high_water.set(0);
        self.set_shrinking(false);
        self.tally.committed.store(0, Ordering::Relaxed);
    }
}

//! What a thread's heap owns: its segments, the slices of them that are vacant, and where more come from.

use core::ptr;
use core::sync::atomic::Ordering;

use super::class;
use super::fence;
use super::segment::{Segment, segment_of};
use super::settings::Part;
use super::span::{Place, Span};
use super::thread::{ThreadHeap, bump};

/// Segments in which a run of slices is looked for.
const TRIED: usize = 32;
/// Blocks of a class that a thread took in all from which on its spans are long.
const MANY: u32 = 64;

impl ThreadHeap {
    pub(super) fn segment_of_span(&self, span: &Span) -> &Segment {
        // SAFETY: the books of a span lie in those of its segment.
        unsafe { &*segment_of(ptr::from_ref(span).cast_mut().cast()) }
    }

    /// How many slices a span of `class` takes, and from which on it may begin: the first is cut short by the
    /// books, and serves small blocks, whose alignment it keeps.
    fn shape(&self, class: usize) -> (usize, usize) {
        let count = class::slices(class, self.bins[class].taken.get() >= MANY);
        (count, usize::from(count > 1 || self.hub().settings.has(Part::GuardPages)))
    }

    /// A span of idle slices of this heap.
    pub(super) fn idle_span(&self, class: usize) -> Option<&Span> {
        let (count, from) = self.shape(class);
        let (segment, first) = self.find_idle(count, from)?;
        Some(self.make_span_at(segment, first, count, class as u8, class::size(class)))
    }

    pub(super) fn new_span(&self, class: usize) -> Option<&Span> {
        let (count, from) = self.shape(class);
        let (segment, first) = self.find_vacant(count, from)?;
        Some(self.make_span_at(segment, first, count, class as u8, class::size(class)))
    }

    /// Takes a segment that nobody owns for the sake of `class`.
    pub(super) fn reuse_for(&self, class: usize) -> bool {
        let (count, from) = self.shape(class);
        self.reuse(count, from)
    }

    pub(super) fn find_idle(&self, count: usize, from: usize) -> Option<(&Segment, usize)> {
        let mut tried = self.idle_segments.iter().take(TRIED);
        tried.find_map(|segment| segment.find_idle_run(count, from).map(|first| (segment, first)))
    }

    /// Vacant slices, in a new segment if must be.
    pub(super) fn find_vacant(&self, count: usize, from: usize) -> Option<(&Segment, usize)> {
        let mut tried = self.roomy.iter().take(TRIED);
        let found = tried.find_map(|segment| segment.find_run(count, from).map(|first| (segment, first)));
        found.or_else(|| self.grow(count, from))
    }

    /// Takes a segment that nobody owns and that holds memory, if there is one: best with an idle run.
    pub(super) fn reuse(&self, count: usize, from: usize) -> bool {
        let hub = self.hub();
        let fits = |segment: &Segment| segment.find_idle_run(count, from).is_some();
        if let Some(segment) = hub.adopt_any(self, fits, true) {
            self.welcome(segment);
            return true;
        }
        match hub.take_warm(hub.settings.huge_segment(self.live.get())) {
            Some(segment) => {
                self.own(segment);
                true
            }
            None => false,
        }
    }

    pub(super) fn make_span_at<'a>(
        &self,
        segment: &'a Segment,
        first: usize,
        count: usize,
        class: u8,
        size: usize,
    ) -> &'a Span {
        let idle = segment.idle_bytes();
        let span = segment.make_span(first, count, class, size, fence::spare(segment, first, count));
        if self.hub().settings.has(Part::GuardPages) {
            self.guard_span(segment, span);
        }
        self.pending.set(self.pending.get() - (idle - segment.idle_bytes()));
        self.relist(segment);
        span
    }

    /// A run in another segment: one abandoned by a thread that ended, or a new one.
    fn grow(&self, count: usize, from: usize) -> Option<(&Segment, usize)> {
        let hub = self.hub();
        let fits = |segment: &Segment| segment.find_run(count, from).is_some();
        if let Some(segment) = hub.adopt_any(self, fits, false) {
            self.welcome(segment);
            return Some((segment, segment.find_run(count, from)?));
        }
        let segment = hub.take_segment(hub.settings.huge_segment(self.live.get()))?;
        self.own(segment);
        Some((segment, segment.find_run(count, from)?))
    }

    /// Makes an unused segment this heap's.
    fn own(&self, segment: &Segment) {
        segment.head.owner.store(ptr::from_ref(self).cast_mut(), Ordering::Release);
        self.enter(segment);
    }

    /// Puts a segment that is now this heap's on its lists.
    fn enter(&self, segment: &Segment) {
        self.segments.push_back(segment);
        self.segment_count.set(self.segment_count.get() + 1);
        self.pending.set(self.pending.get() + segment.idle_bytes());
        self.relist(segment);
    }

    /// Takes a segment off all lists.
    pub(super) fn leave(&self, segment: &Segment) {
        self.segments.remove(segment);
        self.segment_count.set(self.segment_count.get() - 1);
        self.pending.set(self.pending.get() - segment.idle_bytes());
        if segment.roomy.replace(false) {
            self.roomy.remove(segment);
        }
        if segment.queued.replace(false) {
            self.idle_segments.remove(segment);
        }
        if ptr::eq(self.cursor.get(), segment) {
            self.cursor.set(ptr::null());
        }
    }

    /// Brings the lists in line with a segment's slices.
    pub(super) fn relist(&self, segment: &Segment) {
        let roomy = segment.vacant.get() != 0;
        if segment.roomy.replace(roomy) != roomy {
            if roomy { self.roomy.push_front(segment) } else { self.roomy.remove(segment) }
        }
        let idle = segment.idle() != 0;
        if segment.queued.replace(idle) != idle {
            if idle { self.idle_segments.push_back(segment) } else { self.idle_segments.remove(segment) }
        }
        if idle && segment.is_empty() {
            // Whole segments are the cheapest to give back: first in the queue.
            self.idle_segments.remove(segment);
            self.idle_segments.push_front(segment);
        }
    }

    pub(super) fn adopt(&self, segment: &Segment) -> bool {
        match self.hub().adopt(self, segment) {
            Some(segment) => {
                self.welcome(segment);
                true
            }
            None => false,
        }
    }

    /// Takes over a segment that was adopted: its spans join the lists of this heap.
    pub(super) fn welcome(&self, segment: &Segment) {
        bump(&self.tally.adopted, 1);
        self.enter(segment);
        for span in segment.spans() {
            self.live.set(self.live.get() + span.live() as usize * span.size.get() as usize);
            self.pending.set(self.pending.get() + span.unsettled());
            bump(&self.tally.committed, span.held());
            self.hub().counters.orphaned.fetch_sub(span.held() as usize, Ordering::Relaxed);
            span.place.set(Place::Full);
            span.queued.set(false);
            if !span.is_single() {
                let bin = &self.bins[span.class.get() as usize];
                if span.carved.get() < span.capacity.get() && bin.current.get().is_null() {
                    span.place.set(Place::Current);
                    bin.current.set(span);
                } else if span.free_count.get() > 0 {
                    span.place.set(Place::Partial);
                    bin.partial.push_back(span);
                }
            }
            span.rearm();
        }
        self.collect(segment);
    }
}

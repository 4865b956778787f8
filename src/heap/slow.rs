//! The slow paths of a thread's heap: blocks move between its stacks and the spans, many at a time.

use core::ptr;
use core::sync::atomic::Ordering;

use super::class;
use super::fault;
use super::remote;
use super::segment::{HEADER, NO_CLASS, Place, SEGMENT, SINGLE, SLICE, SLICES, Segment, Span, segment_of};
use super::settings::Part;
use super::thread::{Slot, ThreadHeap, bump, lower};
use crate::source::os;

/// Segments whose posted blocks are looked for when a class runs out.
const POLLED: usize = 8;
/// Segments in which a run of slices is looked for.
const TRIED: usize = 32;
/// Refills after which the outboxes are posted, however little is in them.
const OUTBOX_AGE: u32 = 64;

impl ThreadHeap {
    /// Fills the empty cache of `class` and returns one block; null when there is no memory.
    #[cold]
    #[inline(never)]
    pub(crate) fn refill(&self, class: usize) -> *mut u8 {
        self.housekeeping();
        let bin = &self.bins[class];
        let most = (self.capacity(class) / 2) as u32;
        let guard = self.guard();
        let want = if guard.is_none() { bin.batch.get().clamp(most.min(4), most) } else { most };
        bin.batch.set(want * 2);
        let bottom = self.bottom(class);
        debug_assert_eq!(self.top(class), bottom);
        let mut at = bottom;
        let gathered = self.gather(class, want as usize, &mut |block| {
            // SAFETY: at most `want` blocks, which the stack has room for.
            unsafe {
                (*at).store(block, Ordering::Relaxed);
                at = at.add(1);
            }
        });
        if gathered == 0 {
            return ptr::null_mut();
        }
        // Lowest addresses are popped first.
        // SAFETY: the slots just written.
        let slots = unsafe { core::slice::from_raw_parts(bottom, gathered) };
        for low in 0..gathered / 2 {
            let high = gathered - 1 - low;
            let (a, b) = (slots[low].load(Ordering::Relaxed), slots[high].load(Ordering::Relaxed));
            slots[low].store(b, Ordering::Relaxed);
            slots[high].store(a, Ordering::Relaxed);
        }
        if let Some(guard) = guard {
            guard.shuffle(slots);
        }
        self.set_top(class, bottom.wrapping_add(gathered - 1));
        self.high_water.set(self.high_water.get().max(self.live.get()));
        bump(&self.tally.refills, 1);
        slots[gathered - 1].load(Ordering::Relaxed)
    }

    /// What is done once in a while, whatever the thread does.
    fn housekeeping(&self) {
        let trims = self.hub().trims();
        if self.trims_seen.get() != trims {
            self.trims_seen.set(trims);
            self.purge(0);
        }
        match self.refills_left.get() {
            0 => {
                self.refills_left.set(OUTBOX_AGE);
                self.post_all();
                if self.shrinking.get() {
                    self.set_shrinking(false);
                }
            }
            left => self.refills_left.set(left - 1),
        }
    }

    /// Takes up to `want` blocks of `class` out of spans, at least one unless memory is short.
    fn gather(&self, class: usize, want: usize, sink: &mut dyn FnMut(*mut u8)) -> usize {
        let mut taken = self.take_free(class, want, sink);
        if taken > 0 {
            return taken;
        }
        if self.collect_some() {
            taken = self.take_free(class, want, sink);
            if taken > 0 {
                return taken;
            }
        }
        // SAFETY: the current span is this heap's, or null.
        let current = unsafe { self.bins[class].current.get().as_ref() };
        if let Some(span) = current {
            taken = self.carve(span, want, sink);
            if taken > 0 {
                return taken;
            }
        }
        // Memory that is there before memory that must be had from the system.
        let mut span = self.idle_span(class);
        if span.is_none() && self.reuse() {
            taken = self.take_free(class, want, sink);
            if taken > 0 {
                return taken;
            }
            span = self.idle_span(class);
        }
        if let Some(span) = span.or_else(|| self.new_span(class)) {
            self.replace_current(class, span);
            taken = self.carve(span, want, sink);
        }
        if taken == 0 {
            // A last effort: what is idle elsewhere may bring us below the limit.
            self.flush_all();
            self.collect_all();
            self.purge(0);
            taken = self.take_free(class, want, sink);
        }
        taken
    }

    /// Takes free blocks of the current span, then of partial ones.
    fn take_free(&self, class: usize, want: usize, sink: &mut dyn FnMut(*mut u8)) -> usize {
        let bin = &self.bins[class];
        let mut taken = 0;
        // SAFETY: as in `gather`.
        if let Some(span) = unsafe { bin.current.get().as_ref() }
            && span.free_count.get() > 0
        {
            taken += self.take_from(span, want, sink);
        }
        while taken < want
            && let Some(span) = bin.partial.front()
        {
            taken += self.take_from(span, want - taken, sink);
            if span.free_count.get() == 0 {
                bin.partial.remove(span);
                span.place.set(Place::Full);
                span.rearm();
            }
        }
        taken
    }

    /// Makes a fresh span the one its class is carved from.
    fn replace_current(&self, class: usize, span: &Span) {
        let bin = &self.bins[class];
        // SAFETY: as in `gather`.
        if let Some(old) = unsafe { bin.current.get().as_ref() } {
            old.place.set(Place::Full);
            if old.free_count.get() > 0 {
                old.place.set(Place::Partial);
                bin.partial.push_back(old);
            }
            old.rearm();
        }
        span.place.set(Place::Current);
        bin.current.set(span);
        span.rearm();
    }

    fn take_from(&self, span: &Span, want: usize, sink: &mut dyn FnMut(*mut u8)) -> usize {
        let unsettled = span.unsettled();
        let guard = self.guard().filter(|_| span.wiped.get());
        let taken = if span.discarded.get() == 0 && guard.is_none() {
            span.take(want, sink)
        } else {
            let (page, mut back) = (os::page_size(), 0);
            let segment = self.segment_of_span(span);
            let taken = span.take(want, |block| {
                back += segment.revive(span, block as usize, page);
                if let Some(guard) = guard {
                    guard.on_take(block, span.size.get() as usize);
                }
                sink(block);
            });
            bump(&self.tally.committed, back as u64);
            self.hub().took(back);
            taken
        };
        span.settled.set(span.settled.get().min(span.free_count.get()));
        span.rearm();
        self.pending.set(self.pending.get() - (unsettled - span.unsettled()));
        self.live.set(self.live.get() + taken * span.size.get() as usize);
        bump(&self.tally.out[span.class.get() as usize], taken as u64);
        taken
    }

    pub(super) fn segment_of_span(&self, span: &Span) -> &Segment {
        // SAFETY: the books of a span lie in those of its segment.
        unsafe { &*segment_of(ptr::from_ref(span).cast_mut().cast()) }
    }

    /// Hands out blocks that were never used.
    fn carve(&self, span: &Span, want: usize, sink: &mut dyn FnMut(*mut u8)) -> usize {
        let carved = span.carved.get() as usize;
        let mut count = want.min(span.capacity.get() as usize - carved);
        if count > 0 && !self.commit(span, carved + count) {
            count = usize::from(self.commit(span, carved + 1));
        }
        if let Some(guard) = self.guard() {
            (carved..carved + count)
                .for_each(|index| guard.on_carve(span.block(index), span.size.get() as usize));
        }
        for index in carved..carved + count {
            sink(span.block(index));
        }
        if count > 0 {
            span.carved.set((carved + count) as u32);
            span.rearm();
            self.live.set(self.live.get() + count * span.size.get() as usize);
            bump(&self.tally.out[span.class.get() as usize], count as u64);
        }
        count
    }

    /// Counts the memory that a span holds once `carved` blocks are carved; false past the limit.
    fn commit(&self, span: &Span, carved: usize) -> bool {
        let first = span.first.get() as usize;
        let start =
            self.segment_of_span(span).base() as usize + if first == 0 { HEADER } else { first * SLICE };
        let end = (span.block(carved) as usize).next_multiple_of(os::page_size());
        let most = span.slices.get() as usize * SLICE;
        let committed = (end - start).min(most);
        let more = committed - (span.committed.get() as usize).min(committed);
        if more > 0 {
            if !self.may_hold(more) || !self.hub().charge(more) {
                return false;
            }
            span.committed.set(committed as u32);
            bump(&self.tally.committed, more as u64);
        }
        true
    }

    /// Whether `more` bytes may be held: always, unless the request must be served from what is there.
    pub(super) fn may_hold(&self, more: usize) -> bool {
        !self.frugal.get() || self.hub().snapshot().committed + more <= self.hub().booked()
    }

    /// How many slices a span of `class` takes, and from which on it may begin: the first is cut short by the
    /// books, and serves small blocks, whose alignment it keeps.
    fn shape(&self, class: usize) -> (usize, usize) {
        let count = class::slices(class);
        (count, usize::from(count > 1 || self.hub().settings.has(Part::GuardPages)))
    }

    /// A span of idle slices of this heap.
    fn idle_span(&self, class: usize) -> Option<&Span> {
        let (count, from) = self.shape(class);
        let (segment, first) = self.find_idle(count, from)?;
        Some(self.make_span_at(segment, first, count, class as u8, class::size(class)))
    }

    fn new_span(&self, class: usize) -> Option<&Span> {
        let (count, from) = self.shape(class);
        let (segment, first) = self.find_vacant(count, from)?;
        Some(self.make_span_at(segment, first, count, class as u8, class::size(class)))
    }

    fn find_idle(&self, count: usize, from: usize) -> Option<(&Segment, usize)> {
        let mut tried = self.idle_segments.iter().take(TRIED);
        tried.find_map(|segment| segment.find_idle_run(count, from).map(|first| (segment, first)))
    }

    /// Vacant slices, in a new segment if must be.
    fn find_vacant(&self, count: usize, from: usize) -> Option<(&Segment, usize)> {
        let mut tried = self.roomy.iter().take(TRIED);
        let found = tried.find_map(|segment| segment.find_run(count, from).map(|first| (segment, first)));
        found.or_else(|| self.grow(count, from))
    }

    /// Takes a segment that nobody owns and that holds memory, if there is one.
    fn reuse(&self) -> bool {
        let hub = self.hub();
        if let Some(segment) = hub.adopt(self, None) {
            self.welcome(segment);
            return true;
        }
        match hub.take_warm(hub.settings.huge_segment(self.segment_count.get())) {
            Some(segment) => {
                self.own(segment);
                true
            }
            None => false,
        }
    }

    fn make_span_at<'a>(
        &self,
        segment: &'a Segment,
        first: usize,
        count: usize,
        class: u8,
        size: usize,
    ) -> &'a Span {
        let idle = segment.idle_bytes();
        let guard_page = self.hub().settings.guard_page();
        let span = segment.make_span(first, count, class, size, guard_page);
        if guard_page > 0 {
            self.guard_span(segment, span);
        }
        let again = idle - segment.idle_bytes();
        self.pending.set(self.pending.get() - again);
        self.hub().took(count * SLICE - again);
        self.relist(segment);
        span
    }

    /// A run in another segment: one abandoned by a thread that ended, or a new one.
    fn grow(&self, count: usize, from: usize) -> Option<(&Segment, usize)> {
        let hub = self.hub();
        while let Some(segment) = hub.adopt(self, None) {
            self.welcome(segment);
            if let Some(first) = segment.find_run(count, from) {
                return Some((segment, first));
            }
        }
        let segment = hub.take_segment(hub.settings.huge_segment(self.segment_count.get()))?;
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

    /// The cache of `class` is full: gives its older half back to the spans, then takes `block`.
    #[cold]
    #[inline(never)]
    pub(crate) fn flush(&self, class: usize, block: *mut u8) {
        if let Some(guard) = self.guard() {
            return self.guarded_free(guard, block);
        }
        let half = (self.capacity(class) / 2).max(1);
        self.flush_oldest(class, half);
        // SAFETY: this thread's heap, and there is room now.
        let pushed = unsafe { self.front.push(class, block) };
        debug_assert!(pushed);
        bump(&self.tally.flushes, 1);
        self.purge_if_due();
    }

    pub(super) fn flush_oldest(&self, class: usize, count: usize) {
        let blocks = self.cached(class);
        let count = count.min(blocks.len());
        for slot in &blocks[..count] {
            let block = slot.load(Ordering::Relaxed);
            self.give_back(block);
        }
        let bytes = count * class::size(class);
        lower(&self.tally.out[class], count as u64);
        self.live.set(self.live.get() - bytes);
        self.pending.set(self.pending.get().wrapping_add(bytes));
        // The rest moves down.
        for at in count..blocks.len() {
            blocks[at - count].store(blocks[at].load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.set_top(class, self.bottom(class).wrapping_add(blocks.len() - count));
    }

    /// Marks a block of this heap free in its span; the caller adjusts `live` and `pending`, which a span
    /// that goes whole turns into idle slices.
    #[inline(always)]
    fn give_back(&self, block: *mut u8) {
        // SAFETY: the block lies in a segment of this heap.
        let segment = unsafe { &*segment_of(block) };
        let span = segment.span_at(block);
        if !span.give(span.index_of(block)) {
            fault::double_free(block);
        }
        if span.free_count.get() >= span.notify_at.get() {
            self.notice(segment, span);
        }
    }

    /// A span reached the count of free blocks it was told to report.
    #[cold]
    #[inline(never)]
    fn notice(&self, segment: &Segment, span: &Span) {
        if span.place.get() == Place::Full {
            if span.is_single() {
                self.retire(segment, span);
                return;
            }
            span.place.set(Place::Partial);
            self.bins[span.class.get() as usize].partial.push_back(span);
        }
        if span.free_count.get() == span.carved.get() && span.place.get() == Place::Partial {
            self.retire(segment, span);
            return;
        }
        if !span.queued.get() && span.free_count.get() - span.settled.get() >= span.purge_step() {
            span.queued.set(true);
            self.queue.push_back(span);
        }
        span.rearm();
    }

    /// Takes a span apart that has no live block; its slices become idle.
    pub(super) fn retire(&self, segment: &Segment, span: &Span) {
        match span.place.get() {
            Place::Partial => self.bins[span.class.get() as usize].partial.remove(span),
            Place::Current => self.bins[span.class.get() as usize].current.set(ptr::null()),
            Place::Full => {}
        }
        if span.queued.replace(false) {
            self.queue.remove(span);
        }
        // What the frees of this span added, or still will add, to `pending`.
        let unsettled = span.unsettled();
        lower(&self.tally.committed, span.held());
        self.hub().refund(span.committed.get() as usize);
        let slices = segment.unmake_span(span).count_ones() as usize;
        self.pending.set(self.pending.get().wrapping_add(slices * SLICE).wrapping_sub(unsettled));
        self.relist(segment);
    }

    /// Takes in what other threads posted to a few segments, in turn; whether there was anything.
    fn collect_some(&self) -> bool {
        let mut any = false;
        for _ in 0..POLLED.min(self.segment_count.get()) {
            // SAFETY: the cursor is null or on the list (`leave` sees to that).
            let next = unsafe { self.cursor.get().as_ref() }.and_then(|at| self.segments.after(at));
            let Some(segment) = next.or_else(|| self.segments.front()) else { break };
            self.cursor.set(segment);
            any |= self.collect(segment);
        }
        any
    }

    pub(super) fn collect_all(&self) {
        self.segments.iter().for_each(|segment| _ = self.collect(segment));
    }

    /// Takes in what other threads posted to `segment`.
    pub(super) fn collect(&self, segment: &Segment) -> bool {
        let mut any = false;
        remote::collect(&segment.remote_mask.0, |slice| {
            any = true;
            let slice = slice as usize % SLICES;
            if segment.class_of[slice].get() == NO_CLASS {
                // Announced after it was collected, and the span is gone by now (invariant 7).
                return;
            }
            let span = segment.span_at(segment.base().wrapping_add(slice * SLICE));
            let mut count = 0;
            for at in 0..span.words() {
                let bits = remote::Word::take(span.remote_word(at));
                if bits != 0 {
                    count += bits.count_ones() as usize;
                    if !span.give_word(at, bits) {
                        fault::double_free(span.block(at * 64));
                    }
                }
            }
            if count > 0 {
                bump(&self.tally.collected, count as u64);
                self.count_back(span, count);
                let bytes = count * span.size.get() as usize;
                self.live.set(self.live.get() - bytes);
                self.pending.set(self.pending.get() + bytes);
                if span.free_count.get() >= span.notify_at.get() {
                    self.notice(segment, span);
                }
            }
        });
        any
    }

    /// Counts blocks that are back in their span.
    fn count_back(&self, span: &Span, blocks: usize) {
        if !span.is_single() {
            lower(&self.tally.out[span.class.get() as usize], blocks as u64);
        }
    }

    /// Frees a block that belongs to another thread, or to none.
    #[cold]
    #[inline(never)]
    pub(crate) fn free_remote(&self, class: usize, block: *mut u8) {
        let top = self.out_tops[class].get();
        // SAFETY: below the limit there is a slot.
        unsafe { (*top).store(block, Ordering::Relaxed) };
        let top = top.wrapping_add(1);
        self.out_tops[class].set(top);
        if top == self.out_limit(class) {
            self.post(class);
        }
    }

    /// Posts the outbox of `class` to the owners of its blocks.
    #[cold]
    #[inline(never)]
    fn post(&self, class: usize) {
        let blocks = self.outgoing(class);
        let mut at = 0;
        while at < blocks.len() {
            at += self.post_run(&blocks[at..]);
        }
        self.out_tops[class].set(self.out_bottom(class));
        bump(&self.tally.posted, blocks.len() as u64);
        self.purge_if_due();
    }

    /// Posts the first block, and those after it that share its bitmap word; returns how many.
    fn post_run(&self, blocks: &[Slot]) -> usize {
        let block = blocks[0].load(Ordering::Relaxed);
        // SAFETY: the block is live, so its segment is there.
        let segment = unsafe { &*segment_of(block) };
        let owner = segment.head.owner.load(Ordering::Acquire);
        if self.is(owner) || (owner.is_null() && self.adopt(segment)) {
            self.give_back_counted(block);
            return 1;
        }
        let span = segment.span_at(block);
        let index = span.index_of(block);
        let (word, mut bits) = (index / 64, 1u64 << (index % 64));
        let first_of_word = span.block(word as usize * 64) as usize;
        let mut count = 1;
        while let Some(next) = blocks.get(count) {
            // In the same word, and so in the same span, if it lies within 64 blocks of its first.
            let next = next.load(Ordering::Relaxed);
            let offset = (next as usize).wrapping_sub(first_of_word);
            if offset >= 64 * span.size.get() as usize {
                break;
            }
            let index = span.index_of(next);
            if index / 64 != word || index >= span.capacity.get() || bits >> (index % 64) & 1 == 1 {
                break;
            }
            bits |= 1 << (index % 64);
            count += 1;
        }
        if remote::post(
            span.remote_word(word as usize),
            bits,
            &segment.remote_mask.0,
            span.first.get() as u32,
        ) != 0
        {
            fault::double_free(block);
        }
        count
    }

    fn adopt(&self, segment: &Segment) -> bool {
        match self.hub().adopt(self, Some(segment)) {
            Some(segment) => {
                self.welcome(segment);
                true
            }
            None => false,
        }
    }

    fn give_back_counted(&self, block: *mut u8) {
        // SAFETY: the block is live, so its segment is there.
        let span = unsafe { (*segment_of(block)).span_at(block) };
        self.count_back(span, 1);
        let bytes = span.size.get() as usize;
        self.live.set(self.live.get() - bytes);
        self.pending.set(self.pending.get() + bytes);
        self.give_back(block);
    }

    /// Posts every outbox.
    pub(super) fn post_all(&self) {
        for class in 0..class::COUNT {
            if !self.outgoing(class).is_empty() {
                self.post(class);
            }
        }
    }

    /// Gives every cached block back to its span.
    pub(super) fn flush_all(&self) {
        if let Some(guard) = self.guard() {
            self.end_quarantine(guard);
        }
        for class in 0..class::COUNT {
            self.flush_oldest(class, usize::MAX);
        }
        self.post_all();
    }

    /// A block of its own slices, larger than any class; null when there is no memory.
    pub(crate) fn alloc_single(&self, size: usize) -> (*mut u8, bool) {
        debug_assert!(size > class::MAX && size <= super::SINGLE_MAX);
        self.housekeeping();
        self.collect_some();
        let size = size.next_multiple_of(os::page_size().min(SLICE));
        let count = (size + self.hub().settings.guard_page()).div_ceil(SLICE);
        let mut found = self.find_idle(count, 1);
        if found.is_none() && self.reuse() {
            found = self.find_idle(count, 1);
        }
        let Some((segment, first)) = found.or_else(|| self.find_vacant(count, 1)) else {
            return (ptr::null_mut(), false);
        };
        let span = self.make_span_at(segment, first, count, SINGLE, size);
        if !self.commit(span, 1) {
            self.retire(segment, span);
            self.purge_if_due();
            return (ptr::null_mut(), false);
        }
        span.carved.set(1);
        self.live.set(self.live.get() + size);
        (span.block(0), span.zeroed.get())
    }

    /// Frees a block of its own slices; `segment` may be another thread's.
    pub(crate) fn free_single(&self, segment: &Segment, block: *mut u8) {
        let owner = segment.head.owner.load(Ordering::Acquire);
        if self.is(owner) || (owner.is_null() && self.adopt(segment)) {
            self.give_back_counted(block);
            self.purge_if_due();
        } else {
            post_one(segment, block);
        }
    }
}

/// Posts one block, for who has no heap or no outbox for it.
pub(crate) fn post_one(segment: &Segment, block: *mut u8) {
    let span = segment.span_at(block);
    let index = span.index_of(block);
    let word = span.remote_word(index as usize / 64);
    if remote::post(word, 1 << (index % 64), &segment.remote_mask.0, span.first.get() as u32) != 0 {
        fault::double_free(block);
    }
}

const _: () = assert!(super::SINGLE_MAX < SEGMENT / 2);

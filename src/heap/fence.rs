//! Guard pages: an access past the blocks of a span, or into the books of a segment, ends the program.
//!
//! | segment | what cannot be accessed |
//! |---|---|
//! | usual | the last page of each span; what follows the books, which no span gets |
//! | with huge pages | the last page of each span that ends in the second half, which is never the huge one; the last page of all, before the books of what may come next |
//!
//! (Large blocks have theirs from `large`.) Where the system cannot fence pages in without a mapping for each, spans past
//! `MOST_GUARDS` have none: its table of mappings is finite, and the program needs it too. A page once closed stays so
//! while other spans of the same shape come and go.

use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use super::fault;
use super::hub::Hub;
use super::segment::{HEADER, SEGMENT, SLICE, SLICES, Segment};
use super::settings::Part;
use super::span::Span;
use super::thread::ThreadHeap;
use crate::source::os;

/// Spans of a process that have a guard page with a mapping of its own.
const MOST_GUARDS: usize = 16 << 10;

/// Bytes at the end of a span of `count` slices from `first` on that are for its guard page.
pub(super) fn spare(segment: &Segment, first: usize, count: usize) -> usize {
    let in_huge_page = segment.huge.get() && first + count <= SLICES / 2;
    if in_huge_page { 0 } else { segment.hub().settings.guard_page() }
}

impl ThreadHeap {
    /// Makes the last page of a fresh span inaccessible, if it has one to spare, and the others accessible.
    pub(super) fn guard_span(&self, segment: &Segment, span: &Span) {
        let page = os::page_size();
        let (first, count) = (span.first.get() as usize, span.slices.get() as usize);
        let is_guarded = spare(segment, first, count) > 0;
        for slice in first..first + count {
            let bit = 1 << slice;
            let has = segment.guarded.get() & bit != 0;
            let wanted = is_guarded && slice == first + count - 1;
            let last = segment.base().wrapping_add((slice + 1) * SLICE - page);
            let Some(last) = NonNull::new(last).filter(|_| has != wanted) else { continue };
            if wanted {
                // SAFETY: a page of a span that holds no block yet.
                if unsafe { close(self.hub(), last, page) } {
                    segment.guarded.set(segment.guarded.get() | bit);
                }
                continue;
            }
            // SAFETY: the guard page of a span that is gone.
            if !unsafe { os::open(last, page) } {
                fault::die("no mapping left to open a guard page", last.as_ptr());
            }
            segment.guarded.set(segment.guarded.get() & !bit);
            self.hub().guards.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Makes pages inaccessible, counted as one guard; false where the system refuses, or would need one mapping too many.
///
/// # Safety
/// The pages are the hub's, and nobody uses them.
unsafe fn close(hub: &Hub, base: NonNull<u8>, len: usize) -> bool {
    let before = hub.guards.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the caller's contract.
    let closed = unsafe { os::fence(base, len) || (before < MOST_GUARDS && os::protect(base, len)) };
    if !closed {
        hub.guards.fetch_sub(1, Ordering::Relaxed);
    }
    closed
}

/// Fences the books of a fresh segment off from its spans, or those of the next one.
pub(super) fn guard_segment(segment: &Segment) {
    let page = os::page_size();
    let books = HEADER.next_multiple_of(page);
    let (at, len) =
        if segment.huge.get() { (SEGMENT - page, page) } else { (books, SLICE.saturating_sub(books)) };
    let Some(fence) = NonNull::new(segment.base().wrapping_add(at)).filter(|_| len > 0) else { return };
    // SAFETY: pages of a segment that holds no span; no span will get them, or it will guard itself by them.
    if unsafe { close(segment.hub(), fence, len) } {
        segment.guarded.set(if segment.huge.get() { 1 << (SLICES - 1) } else { 1 });
    }
}

/// Makes all of a segment accessible that holds no span and is about to lose its books; false where the system
/// refuses.
pub(super) fn open_segment(segment: &Segment) -> bool {
    let hub = segment.hub();
    if !hub.settings.has(Part::GuardPages) {
        return true;
    }
    // SAFETY: nobody has a block of it.
    let opened = NonNull::new(segment.base()).is_some_and(|base| unsafe { os::open(base, SEGMENT) });
    if opened {
        hub.guards.fetch_sub(segment.guarded.take().count_ones() as usize, Ordering::Relaxed);
    }
    opened
}

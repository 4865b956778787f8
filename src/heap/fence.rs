//! Guard pages: an access past the blocks of a span, or into the books of a segment, ends the program.
//!
//! The last page of a span cannot be accessed, nor what follows the books of a segment, which no span gets. (Large
//! blocks have theirs from `large`.) Past `MOST_GUARDS` spans have none: the kernel's table of mappings is finite, and
//! the program needs it too. A page once closed stays so while other spans of the same shape come and go.

use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use super::fault;
use super::segment::{HEADER, SEGMENT, SLICE, Segment};
use super::settings::Part;
use super::span::Span;
use super::thread::ThreadHeap;
use crate::source::os;

/// Spans of a process that have a guard page.
const MOST_GUARDS: usize = 16 << 10;

impl ThreadHeap {
    /// Makes the last page of a fresh span inaccessible and the others accessible.
    pub(super) fn guard_span(&self, segment: &Segment, span: &Span) {
        let page = os::page_size();
        let (first, count) = (span.first.get() as usize, span.slices.get() as usize);
        for slice in first..first + count {
            let bit = 1 << slice;
            let has = segment.guarded.get() & bit != 0;
            let wanted = slice == first + count - 1;
            let last = segment.base().wrapping_add((slice + 1) * SLICE - page);
            let Some(last) = NonNull::new(last).filter(|_| has != wanted) else { continue };
            // SAFETY: a page of a span that holds no block yet, or the guard page of one that is gone.
            unsafe {
                if !wanted {
                    if os::commit(last, page).is_ok() {
                        segment.guarded.set(segment.guarded.get() & !bit);
                        self.hub().guards.fetch_sub(1, Ordering::Relaxed);
                    } else {
                        fault::die("no mapping left to open a guard page", last.as_ptr());
                    }
                } else if self.hub().guards.fetch_add(1, Ordering::Relaxed) < MOST_GUARDS
                    && os::protect(last, page)
                {
                    segment.guarded.set(segment.guarded.get() | bit);
                } else {
                    self.hub().guards.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Fences a fresh segment's books off from its spans.
pub(super) fn guard_segment(segment: &Segment) {
    let fence = HEADER.next_multiple_of(os::page_size());
    if let Some(behind) = NonNull::new(segment.base().wrapping_add(fence)).filter(|_| fence < SLICE) {
        // SAFETY: pages of a segment that holds no span, which no span will get.
        unsafe { os::protect(behind, SLICE - fence) };
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
    let opened =
        NonNull::new(segment.base()).is_some_and(|base| unsafe { os::commit(base, SEGMENT).is_ok() });
    if opened {
        hub.guards.fetch_sub(segment.guarded.take().count_ones() as usize, Ordering::Relaxed);
    }
    opened
}

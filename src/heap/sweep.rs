//! How caches that are not used give up what they hold.
//!
//! A few blocks in the cache of a size that the program has left keep their spans from being used for other sizes,
//! or, if they are another thread's, that thread from having them back. So each slow operation looks at some of the
//! classes, in turn: what has not moved since the last look goes back. A stack that is in use and happens to be as full
//! as at the last look is taken for one that is not, at the price of one more slow operation.

use super::class;
use super::thread::ThreadHeap;

/// Classes that each slow operation looks at.
const SWEPT: usize = 4;

impl ThreadHeap {
    pub(super) fn sweep(&self) {
        for _ in 0..SWEPT {
            let class = self.swept.get();
            self.swept.set((class + 1) % class::COUNT);
            let bin = &self.bins[class];
            let cached = bin.seen.get();
            if cached > 0 && cached as usize == self.cached_count(class) {
                self.flush_oldest(class, usize::MAX);
            }
            if cached == 0 && self.cached_count(class) == 0 {
                self.retire_current(class);
            }
            bin.seen.set(self.cached_count(class) as u16);
        }
    }

    /// Takes the current span of a class apart if no block of it is live.
    pub(super) fn retire_current(&self, class: usize) {
        // SAFETY: the current span is this heap's, or null.
        if let Some(span) = unsafe { self.bins[class].current.get().as_ref() }
            && span.free_count.get() == span.carved.get()
        {
            self.retire(self.segment_of_span(span), span);
        }
    }
}

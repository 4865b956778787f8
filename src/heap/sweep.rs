//! How caches that are not used give up what they hold.
//!
//! A few blocks in the cache of a size that the program has left keep their spans from being used for other sizes,
//! or, if they are another thread's, that thread from having them back. So each slow operation looks at some of the
//! classes, in turn: what has not moved since the last look goes back. A stack that is in use and happens to be as full
//! as at the last look is taken for one that is not, at the price of one more slow operation.

use super::class::COUNT;
use super::thread::ThreadHeap;

/// Classes that each slow operation looks at.
const SWEPT: usize = 4;

impl ThreadHeap {
    #[inline]
    pub(super) fn sweep(&self) {
        let mut class = self.swept.get();
        for _ in 0..SWEPT {
            let count = self.cached_count(class) as u16;
            if self.bins[class].seen.replace(count) == count {
                self.sweep_unmoved(class, count > 0);
            }
            class += 1;
            if class == COUNT {
                class = 0;
            }
        }
        self.swept.set(class);
    }

    fn sweep_unmoved(&self, class: usize, any: bool) {
        if any {
            self.flush_oldest(class, usize::MAX);
            self.bins[class].seen.set(0);
        } else {
            self.retire_current(class);
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

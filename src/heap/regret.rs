//! How much more than the least is worth keeping: learned from what was given back in vain.
//!
//! Memory that goes back to the system and is needed again costs two calls of the kernel and a page cleared, for
//! nothing. Each byte that a heap needs anew after one was given back is such a byte: as much more is kept from
//! then on, up to a bound, and an eighth of what is given back is taken off that again. So a program that grows
//! and shrinks by a few megabytes all the time comes to rest; one whose need swings by far more gains nothing from
//! a little more memory, and keeps none; and one that shrinks once never had anything to regret.
//!
//! The figures are for one thread, learned from all together and at once: threads that come and go need not learn
//! anew. What some threads do not keep of theirs, others may, since idle memory is where threads ended or adopted,
//! not where it will be wanted. They are estimates: updates that meet may lose one, which costs nothing but a little
//! memory or a few faults.

use core::sync::atomic::{AtomicUsize, Ordering};

pub(super) struct Regret {
    /// Bytes that were given back and not needed again yet.
    given: AtomicUsize,
    /// Bytes that each thread keeps beyond the least.
    extra: AtomicUsize,
    /// Idle bytes of all threads, as they last said.
    idle: AtomicUsize,
}

impl Regret {
    pub(super) const fn new() -> Self {
        Self { given: AtomicUsize::new(0), extra: AtomicUsize::new(0), idle: AtomicUsize::new(0) }
    }

    /// Bytes that each thread keeps beyond the least.
    pub(super) fn extra(&self) -> usize {
        self.extra.load(Ordering::Relaxed)
    }

    /// The same for one of `threads` that has `own` idle bytes: with what the others do not keep of theirs.
    pub(super) fn extra_for(&self, own: usize, threads: usize) -> usize {
        let each = self.extra();
        let others = self.idle.load(Ordering::Relaxed).wrapping_sub(own);
        each.saturating_mul(threads).saturating_sub(others).max(each)
    }

    /// The idle bytes of a thread are `now` and were `before`.
    pub(super) fn moved(&self, before: usize, now: usize) {
        self.idle.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
    }

    /// One of `threads` gave `bytes` back, in a heap where each may keep `most` more.
    pub(super) fn gave(&self, bytes: usize, threads: usize, most: usize) {
        // Of a heap that shrank by far more than it may keep, only a part is remembered.
        let remembered = most.saturating_mul(threads);
        self.given.store(
            self.given.load(Ordering::Relaxed).saturating_add(bytes).min(remembered),
            Ordering::Relaxed,
        );
        self.extra.store(self.extra().saturating_sub(bytes / 8), Ordering::Relaxed);
    }

    /// A thread needs `bytes` that hold no memory yet.
    pub(super) fn took(&self, bytes: usize, most: usize) {
        let given = self.given.load(Ordering::Relaxed);
        let again = bytes.min(given);
        if again > 0 {
            self.given.store(given - again, Ordering::Relaxed);
            self.extra.store((self.extra() + again).min(most), Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const MOST: usize = 14 << 20;

    #[test]
    fn small_swings_come_to_rest_and_large_ones_keep_nothing() {
        for (swing, rests) in [(1 << 20, true), (10 << 20, true), (500 << 20, false)] {
            let regret = Regret::new();
            assert_eq!(regret.extra(), 0);
            let mut given = 0;
            for _ in 0..20 {
                // All beyond what is kept goes back, a megabyte at a time, and is needed again.
                given = 0;
                while given + regret.extra() < swing {
                    regret.gave(1 << 20, 1, MOST);
                    given += 1 << 20;
                }
                if !rests {
                    assert_eq!(regret.extra(), 0);
                }
                regret.took(given, MOST);
            }
            assert_eq!(given == 0, rests, "{swing}");
            assert!(regret.extra() <= MOST);
        }
    }

    #[test]
    fn who_only_grows_or_only_shrinks_regrets_nothing() {
        let regret = Regret::new();
        regret.took(1 << 30, MOST);
        regret.gave(1 << 30, 4, MOST);
        assert_eq!(regret.extra(), 0);
    }

    #[test]
    fn what_others_do_not_keep_may_be_kept() {
        let regret = Regret::new();
        regret.gave(3 << 20, 4, MOST);
        regret.took(3 << 20, MOST);
        let each = regret.extra();
        assert!(each > 2 << 20);
        regret.moved(0, 5 << 20);
        regret.moved(0, 1 << 20);
        assert_eq!(regret.extra_for(5 << 20, 4), 4 * each - (1 << 20));
        assert_eq!(regret.extra_for(1 << 20, 4), 4 * each - (5 << 20));
        regret.moved(5 << 20, 0);
        regret.moved(1 << 20, 500 << 20);
        assert_eq!((regret.extra_for(500 << 20, 4), regret.extra_for(0, 4)), (4 * each, each));
    }
}

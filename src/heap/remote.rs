//! Frees that come from other threads.
//!
//! Every span has a second bitmap, `words`, in which any thread sets the bits of blocks it frees, and every
//! segment a `mask` with one bit for each slice whose span may have such bits. The state lies in the segment
//! and not with a thread, so nothing is lost or misdirected when the owner ends or changes.
//!
//! 1. A freer sets bits of a word in `words` first; then, if it found the word clear, the slice's bit in `mask`. Who
//!    finds it not clear leaves that to who made it so, and whose announcement is still to come or to be taken.
//! 2. The owner takes `mask` first, then the `words` of each slice it names. With 1, every bit is found by
//!    this collection or announced for the next.
//! 3. A bit is set once for each free and taken once: set and taken by atomic read-modify-writes.
//!
//! The model below checks this under every interleaving.

use core::sync::atomic::Ordering;

/// The two operations the protocol needs, so that the model checker's atomics fit as well.
pub(crate) trait Word {
    /// Sets bits and returns the previous value.
    fn set(&self, bits: u64) -> u64;
    /// Takes all bits, leaving none.
    fn take(&self) -> u64;
    /// Whether no bit is set; a hint.
    fn is_clear(&self) -> bool;
}

macro_rules! word {
    ($atomic:ty) => {
        impl Word for $atomic {
            #[inline]
            fn set(&self, bits: u64) -> u64 {
                self.fetch_or(bits, Ordering::AcqRel)
            }
            #[inline]
            fn take(&self) -> u64 {
                self.swap(0, Ordering::AcqRel)
            }
            #[inline]
            fn is_clear(&self) -> bool {
                self.load(Ordering::Relaxed) == 0
            }
        }
    };
}

word!(core::sync::atomic::AtomicU64);
#[cfg(loom)]
word!(loom::sync::atomic::AtomicU64);

/// Frees the blocks `bits` of one word of a span in slice `slice`; returns those of them that were posted
/// already: blocks freed twice.
#[inline]
pub(crate) fn post<W: Word>(word: &W, bits: u64, mask: &W, slice: u32) -> u64 {
    let before = word.set(bits);
    if before == 0 {
        mask.set(1 << slice);
    }
    before & bits
}

/// Hands the slices that may have posted blocks to `visit`; owner only.
#[inline]
pub(crate) fn collect<W: Word>(mask: &W, mut visit: impl FnMut(u32)) {
    if mask.is_clear() {
        return;
    }
    let mut slices = mask.take();
    while slices != 0 {
        visit(slices.trailing_zeros());
        slices &= slices - 1;
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicPtr, AtomicU64};
    use loom::thread;

    #[derive(Default)]
    struct Model {
        mask: AtomicU64,
        words: [AtomicU64; 2],
    }

    impl Model {
        fn drain(&self) -> u64 {
            let mut found = 0;
            collect(&self.mask, |slice| {
                let taken = self.words[slice as usize].take();
                assert_eq!(found & (taken << (8 * slice)), 0, "a block taken twice");
                found |= taken << (8 * slice);
            });
            found
        }
    }

    #[test]
    fn loom_remote_frees_are_found_exactly_once() {
        loom::model(|| {
            let model = Arc::new(Model::default());
            let freers: Vec<_> = (0..2u32)
                .map(|i| {
                    let model = model.clone();
                    thread::spawn(move || {
                        post(&model.words[0], 1 << i, &model.mask, 0);
                        post(&model.words[1], 1 << i, &model.mask, 1);
                    })
                })
                .collect();
            let early = model.drain();
            freers.into_iter().for_each(|freer| freer.join().unwrap());
            let late = model.drain();
            assert_eq!(early & late, 0);
            assert_eq!(early | late, 0x0303);
        });
    }

    /// The owner ends (stores null), another thread adopts, a third frees all the while.
    #[test]
    fn loom_adoption_finds_what_was_posted_before_and_after() {
        loom::model(|| {
            let model = Arc::new((Model::default(), AtomicPtr::new(16 as *mut u8)));
            let freer = {
                let model = model.clone();
                thread::spawn(move || {
                    post(&model.0.words[0], 1, &model.0.mask, 0);
                })
            };
            let adopter = {
                let model = model.clone();
                thread::spawn(move || {
                    let adopted = model
                        .1
                        .compare_exchange(
                            core::ptr::null_mut(),
                            32 as *mut u8,
                            Ordering::AcqRel,
                            Ordering::Acquire,
                        )
                        .is_ok();
                    if adopted { model.0.drain() } else { 0 }
                })
            };
            let first = model.0.drain();
            model.1.store(core::ptr::null_mut(), Ordering::Release);
            freer.join().unwrap();
            let second = adopter.join().unwrap();
            let rest = model.0.drain();
            assert_eq!(first + second + rest, 1);
        });
    }
}

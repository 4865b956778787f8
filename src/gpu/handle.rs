//! Handles of streams and pools, which know whether a user is left.
//!
//! What caches keep for the next buffer must not keep a stream or a pool that nobody can name any more. So beside the
//! count of all handles there is one of those that users hold; when it falls to 0 the object is told, and caches give
//! up what they keep.
//!
//! ```text
//!   user's Stream, GpuPool ──┐ counted as users
//!                            ├──► Arc ──► stream, pool
//!   Seat ◄── buffers,        │ kept
//!            caches ─────────┘
//! ```
//!
//! Invariants
//! 1. `users` counts the handles that are not `kept`. A clone is a user's, also the clone of a kept handle, so it may
//!    rise again from 0.
//! 2. After every fall to 0, and before the handle that fell lets go of the object, [`Shared::unused`] takes the locks
//!    under which caches are opened. Who opens one looks at `users` under them: either it sees 0, or what it put there
//!    is found.

#![cfg_attr(not(loom), forbid(unsafe_code))]

use core::ops::Deref;
use std::sync::Arc;

use crate::base::sync::atomic::{AtomicUsize, Ordering};

/// What handles share.
pub(super) trait Shared {
    /// The handles that users hold.
    fn users(&self) -> &Users;

    /// No user has a handle any more; what is kept for the next buffer goes.
    fn unused(&self);
}

/// A count of the handles that users hold.
#[derive(Debug)]
pub(super) struct Users(AtomicUsize);

impl Users {
    /// For the one handle that [`Handle::new`] makes.
    pub(super) fn one() -> Self {
        Self(AtomicUsize::new(1))
    }

    /// Whether there is none, asked under the locks of invariant 2.
    pub(super) fn is_none(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

/// A counted handle of a `T`: a user's, or one that is kept for buffers.
pub(super) struct Handle<T: Shared> {
    shared: Arc<T>,
    kept: bool,
}

impl<T: Shared> Handle<T> {
    /// The first handle, a user's.
    pub(super) fn new(shared: Arc<T>) -> Self {
        Self { shared, kept: false }
    }

    /// A handle that no user holds.
    pub(super) fn keep(&self) -> Self {
        Self { shared: self.shared.clone(), kept: true }
    }
}

impl<T: Shared> Clone for Handle<T> {
    fn clone(&self) -> Self {
        self.shared.users().0.fetch_add(1, Ordering::Relaxed);
        Self { shared: self.shared.clone(), kept: false }
    }
}

impl<T: Shared> Drop for Handle<T> {
    fn drop(&mut self) {
        // The locks order what comes after.
        if !self.kept && self.shared.users().0.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.shared.unused();
        }
    }
}

impl<T: Shared> Deref for Handle<T> {
    type Target = Arc<T>;
    #[inline(always)]
    fn deref(&self) -> &Arc<T> {
        &self.shared
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use crate::base::sync::{Lock, atomic::AtomicBool};
    use crate::base::turn::Turn;

    /// A pool of one cache: the books, the turn, and what the cache keeps.
    struct Toy {
        users: Users,
        books: Lock<()>,
        cache: Turn<(bool, Vec<Handle<Toy>>)>,
        gone: Arc<AtomicBool>,
    }

    impl Shared for Toy {
        fn users(&self) -> &Users {
            &self.users
        }

        fn unused(&self) {
            let books = self.books.lock();
            let mut cache = self.cache.lock();
            cache.0 = false;
            let kept = core::mem::take(&mut cache.1);
            drop(cache);
            drop(books);
            drop(kept);
        }
    }

    impl Drop for Toy {
        fn drop(&mut self) {
            assert!(!self.gone.swap(true, Ordering::Relaxed), "dropped twice");
        }
    }

    fn toy(open: bool) -> (Handle<Toy>, Arc<AtomicBool>) {
        let gone = Arc::new(AtomicBool::new(false));
        let toy = Toy {
            users: Users::one(),
            books: Lock::new(()),
            cache: Turn::new((open, Vec::new())),
            gone: gone.clone(),
        };
        (Handle::new(Arc::new(toy)), gone)
    }

    /// What a buffer does with the handle that it kept: it goes into the cache, which is opened before where there is
    /// a user.
    fn free(kept: Handle<Toy>) {
        let toy = Arc::as_ptr(&kept);
        // SAFETY: kept until the cache has the handle, and then until the turn ends.
        let this = unsafe { &*toy };
        if !this.cache.try_lock().is_some_and(|cache| cache.0) {
            let books = this.books.lock();
            if !this.users.is_none() {
                this.cache.lock().0 = true;
            }
            drop(books);
        }
        if let Some(mut cache) = this.cache.try_lock()
            && cache.0
        {
            cache.1.push(kept);
        }
    }

    /// The last user goes while buffers are freed: nothing is left, and nothing goes twice.
    #[test]
    fn loom_no_cache_keeps_what_nobody_uses() {
        for open in [false, true] {
            loom::model(move || {
                let (user, gone) = toy(open);
                let kept = user.keep();
                let other = loom::thread::spawn(move || free(kept));
                drop(user);
                other.join().unwrap();
                assert!(gone.load(Ordering::Relaxed));
            });
        }
    }

    /// A user comes back from a kept handle while the last one goes.
    #[test]
    fn loom_users_may_come_back() {
        loom::model(|| {
            let (user, gone) = toy(true);
            let kept = user.keep();
            let other = loom::thread::spawn(move || {
                let again = kept.clone();
                free(kept);
                let kept = again.keep();
                drop(again);
                free(kept);
            });
            drop(user);
            other.join().unwrap();
            assert!(gone.load(Ordering::Relaxed));
        });
    }
}

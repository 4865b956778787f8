//! What each thread remembers of the pools it looked up.
//!
//! A remembered pool is a handle that belongs to the thread: handing it out counts there, in memory that no other
//! thread touches unless a handle is sent to it. The manager owns it and the thread's cache refers to it weakly,
//! so that a pool that is destroyed goes at once, however long a thread that used it sleeps. The cache of a
//! manager is good as long as the manager's generation is the one it was begun under; destroying a pool changes
//! that, and every thread begins anew at its next look-up.

use core::any::Any;
use core::cell::RefCell;
use core::hash::{BuildHasherDefault, Hasher};
use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::{Managed, PoolManager};

/// The last manager that was asked is the first.
type Caches = Vec<Cache>;

struct Cache {
    manager: u64,
    generation: u64,
    pools: HashMap<Box<str>, Weak<dyn Any + Send + Sync>, BuildHasherDefault<NameHasher>>,
}

thread_local! {
    static CACHES: RefCell<Caches> = const { RefCell::new(Vec::new()) };
}

/// Managers remembered by one thread.
const MANAGERS: usize = 16;

/// Multiplies words; names are few and not chosen by an adversary.
#[derive(Default)]
struct NameHasher(u64);

impl Hasher for NameHasher {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.word(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            self.word(rest.iter().fold(rest.len() as u64, |all, &byte| all << 8 | u64::from(byte)));
        }
    }
    #[inline]
    fn write_u8(&mut self, _: u8) {
        // What `str` appends to separate itself from what follows; nothing does.
    }
    #[inline]
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

impl NameHasher {
    #[inline]
    fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// The pool, if this thread looked it up before and it was not destroyed since. Not at the end of a thread,
/// whose cache may be gone, nor where an allocator looks up a pool while the cache itself allocates.
#[inline]
pub(super) fn cached<P: Managed>(manager: &PoolManager, name: &str) -> Option<Arc<P>> {
    let found = CACHES.try_with(|caches| {
        let caches = caches.try_borrow().ok()?;
        let cache = caches.first().filter(|cache| cache.manager == manager.id)?;
        if cache.generation != manager.generation() {
            return None;
        }
        cache.pools.get(name)?.upgrade()?.downcast::<P>().ok()
    });
    found.ok().flatten()
}

/// Keeps a thread's handle for the next look-up. `generation` was read before the pool was found.
#[cold]
pub(super) fn remember<P: Managed>(manager: &PoolManager, generation: u64, name: &str, handle: &Arc<P>) {
    let handle: Weak<P> = Arc::downgrade(handle);
    // Not at the end of a thread.
    let _ = CACHES.try_with(|caches| {
        let Ok(mut caches) = caches.try_borrow_mut() else { return };
        match caches.iter().position(|cache| cache.manager == manager.id) {
            Some(at) => caches[..=at].rotate_right(1),
            None => {
                caches.truncate(MANAGERS - 1);
                caches.insert(0, Cache { manager: manager.id, generation, pools: HashMap::default() });
            }
        }
        let cache = &mut caches[0];
        if cache.generation != generation {
            cache.generation = generation;
            cache.pools.clear();
        }
        cache.pools.insert(name.into(), handle);
    });
}

/// Lets go of everything that this thread remembers of `manager`.
#[cold]
pub(super) fn forget(manager: &PoolManager) {
    let _ = CACHES.try_with(|caches| {
        if let Ok(mut caches) = caches.try_borrow_mut() {
            caches.retain(|cache| cache.manager != manager.id);
        }
    });
}

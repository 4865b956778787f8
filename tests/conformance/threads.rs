//! Several threads on one pool.

use std::alloc::Layout;
use std::sync::mpsc;
use std::thread;

use memory_pool::{Error, MemoryPool};

use super::{Held, Make, Pool, Random, Subject};

const THREADS: usize = 4;

/// Every thread allocates, checks, passes some of its blocks to its neighbour, and frees its own and what it
/// was passed.
pub fn blocks_cross_threads<P: Pool + MemoryPool>(subject: &Subject, make: Make<'_, P>) {
    if !subject.config.thread_safe {
        return;
    }
    let pool = make(subject.config.clone()).unwrap();
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| mpsc::channel::<Held>()).unzip();
    thread::scope(|scope| {
        for (index, inbox) in receivers.into_iter().enumerate() {
            let outbox = senders[(index + 1) % THREADS].clone();
            let pool = &pool;
            scope.spawn(move || {
                let mut random = Random::new(index as u64 + 1);
                let mut own: Vec<Held> = Vec::new();
                let free = |held: Held| {
                    if subject.touchable {
                        held.verify();
                    }
                    // SAFETY: each block is passed to one owner, who frees it once.
                    unsafe { Pool::deallocate(pool, held.ptr) };
                };
                for _ in 0..2000 {
                    match random.below(5) {
                        0..=2 => {
                            let size = random.size(subject.largest.min(8 << 10));
                            let layout = Layout::from_size_align(size, 16).unwrap();
                            let held = Held::new(Pool::allocate(pool, layout).unwrap(), layout);
                            if subject.touchable {
                                held.fill();
                            }
                            own.push(held);
                        }
                        3 if !own.is_empty() => {
                            let held = own.swap_remove(random.below(own.len()));
                            // A neighbour that is done leaves the block to us.
                            if let Err(back) = outbox.send(held) {
                                free(back.0);
                            }
                        }
                        _ if !own.is_empty() => free(own.swap_remove(random.below(own.len()))),
                        _ => {}
                    }
                    inbox.try_iter().for_each(&free);
                }
                own.into_iter().for_each(&free);
                drop(outbox);
                inbox.iter().for_each(&free);
            });
        }
        drop(senders);
    });
    pool.check();
    assert!(!Pool::has_leaks(&pool), "{}: blocks were lost between threads", subject.name);
    let stats = Pool::stats(&pool);
    assert_eq!(stats.active_count(), 0);
    assert_eq!(stats.current_allocated, 0);
}

/// Threads that hit the limit together get errors, not deadlocks, and together hold no more than the limit.
pub fn growth_is_shared<P: Pool + MemoryPool>(subject: &Subject, make: Make<'_, P>) {
    if !subject.config.thread_safe {
        return;
    }
    let limit = 8 << 20;
    let pool = make(subject.config.clone().initial_size(0).max_size(limit)).unwrap();
    let layout = Layout::from_size_align(subject.largest.min(4000), 8).unwrap();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut own = Vec::new();
                let error = loop {
                    match Pool::allocate(&pool, layout) {
                        Ok(block) => own.push(Held::new(block, layout)),
                        Err(error) => break error,
                    }
                    assert!(Pool::stats(&pool).reserved <= limit);
                };
                assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
                for held in own {
                    // SAFETY: live, freed once.
                    unsafe { Pool::deallocate(&pool, held.ptr) };
                }
            });
        }
    });
    pool.check();
    assert!(!Pool::has_leaks(&pool));
}

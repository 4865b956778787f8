//! `CpuPool` under the suite that every pool passes, and what is its own: threads that come and go.

#[allow(dead_code, reason = "other pools use the rest of the suite")]
mod conformance;

use std::alloc::Layout;
use std::sync::mpsc;

use conformance::{Subject, all_rules, containers, shared_rules};
use memory_pool::{CpuPool, Error, PoolConfig};

subject!(shared CpuPool);

fn subjects() -> [Subject; 2] {
    [
        Subject::host("size classes", PoolConfig::default_cpu()),
        Subject::host("size classes, 256 B aligned", PoolConfig::default_cpu().alignment(256)),
    ]
}

#[test]
fn size_class_pools_pass_the_suite() {
    for subject in subjects() {
        all_rules(&subject, &CpuPool::new);
        shared_rules(&subject, &CpuPool::new);
    }
}

#[test]
fn containers_live_in_size_class_pools() {
    let pool = CpuPool::new(PoolConfig::default_cpu()).unwrap();
    containers::v04::all(&pool, 1 << 30);
    containers::v02::all(&pool, 1 << 30);
    containers::maps(&pool);
    assert!(!pool.has_leaks());
    pool.check().unwrap();
}

#[test]
fn many_pools_live_side_by_side() {
    let pools: Vec<_> = (0..20).map(|_| CpuPool::new(PoolConfig::default_cpu()).unwrap()).collect();
    let layout = Layout::new::<[u64; 12]>();
    let blocks: Vec<_> = pools.iter().map(|pool| pool.allocate(layout).unwrap()).collect();
    for (at, block) in blocks.iter().enumerate() {
        for (other, pool) in pools.iter().enumerate() {
            assert_eq!(pool.owns(block.cast()), at == other);
        }
        assert_eq!(pools[at].stats().active_count(), 1);
    }
    for (pool, block) in pools.iter().zip(blocks) {
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(block.cast()) };
        assert!(!pool.has_leaks());
    }
}

/// The memory of a pool goes with its last handle, although a thread that used it lives on.
#[test]
fn the_last_handle_gives_back_what_living_threads_used() {
    let (work, jobs) = mpsc::channel::<Option<CpuPool>>();
    let (done, reports) = mpsc::channel();
    let worker = std::thread::spawn(move || {
        while let Ok(Some(pool)) = jobs.recv() {
            let blocks: Vec<_> = (0..1000)
                .map(|n| pool.allocate(Layout::from_size_align(16 + n, 8).unwrap()).unwrap())
                .collect();
            done.send(blocks[0].cast::<u8>().as_ptr() as usize).unwrap();
        }
    });
    for _ in 0..200 {
        let pool = CpuPool::new(PoolConfig::default_cpu()).unwrap();
        work.send(Some(pool.clone())).unwrap();
        let block = reports.recv().unwrap() as *mut u8;
        let block = std::ptr::NonNull::new(block).unwrap();
        assert!(pool.owns(block) && pool.has_leaks());
        drop(pool);
    }
    let mapped = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    assert!(mapped < 1000, "{mapped} mappings are left");
    work.send(None).unwrap();
    worker.join().unwrap();
}

#[test]
fn what_a_thread_leaves_stays_valid_and_is_found_again() {
    let pool = CpuPool::new(PoolConfig::default_cpu()).unwrap();
    let layout = Layout::from_size_align(100, 8).unwrap();
    for round in 0..50u8 {
        let left: Vec<usize> = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                (0..500)
                    .map(|_| {
                        let block = pool.allocate(layout).unwrap().cast::<u8>();
                        // SAFETY: a live block.
                        unsafe { block.write(round) };
                        block.as_ptr() as usize
                    })
                    .collect()
            });
            worker.join().unwrap()
        });
        assert_eq!(pool.stats().active_count(), 500);
        for block in left {
            let block = std::ptr::NonNull::new(block as *mut u8).unwrap();
            // SAFETY: live, freed once.
            unsafe {
                assert_eq!(block.read(), round);
                pool.deallocate(block);
            }
        }
        assert!(!pool.has_leaks());
        pool.check().unwrap();
    }
    assert!(pool.stats().committed < 8 << 20, "{} bytes committed", pool.stats().committed);
}

/// Threads end while the last handle goes.
#[test]
fn thread_ends_race_with_the_last_handle() {
    for round in 0..300 {
        let pool = CpuPool::new(PoolConfig::default_cpu()).unwrap();
        let workers: Vec<_> = (0..3)
            .map(|n| {
                let pool = pool.clone();
                std::thread::spawn(move || {
                    let layout = Layout::from_size_align(32 << n, 8).unwrap();
                    let block = pool.allocate(layout).unwrap();
                    if round % 2 == 0 {
                        // SAFETY: live, freed once.
                        unsafe { pool.deallocate(block.cast()) };
                    }
                })
            })
            .collect();
        drop(pool);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    }
}

#[test]
fn a_pool_for_one_thread_refuses_others() {
    let pool = CpuPool::new(PoolConfig::default_cpu().thread_safe(false)).unwrap();
    let layout = Layout::new::<u64>();
    let block = pool.allocate(layout).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let refused = pool.allocate(layout).unwrap_err();
            assert!(matches!(refused, Error::InvalidOperation { .. }), "{refused}");
        });
    });
    // SAFETY: live, freed once.
    unsafe { pool.deallocate(block.cast()) };
}

/// However many threads ask at the same moment, each gets memory: who asks the system takes his own part first.
#[test]
fn threads_that_start_at_once_all_get_memory() {
    const THREADS: usize = 48;
    for _ in 0..60 {
        let pool = CpuPool::new(PoolConfig::default_cpu()).unwrap();
        let start = std::sync::Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (pool, start) = (&pool, &start);
                scope.spawn(move || {
                    start.wait();
                    for size in [100, 30_000, 900_000] {
                        let layout = std::alloc::Layout::from_size_align(size + thread, 8).unwrap();
                        assert!(pool.allocate(layout).is_ok(), "{size} bytes refused");
                    }
                });
            }
        });
        assert_eq!(pool.stats().active_count() as usize, 3 * THREADS);
    }
}

#[test]
fn the_peaks_of_what_is_held_are_exact_and_start_anew() {
    let pool = CpuPool::new(PoolConfig::default_cpu().initial_size(1 << 20)).unwrap();
    let held = || {
        let stats = pool.stats();
        assert!(stats.peak_reserved >= stats.reserved && stats.peak_committed >= stats.committed);
        (stats.reserved, stats.committed)
    };
    assert_eq!((held().0, pool.stats().peak_reserved), (1 << 20, 1 << 20));
    let layout = Layout::from_size_align(3000, 8).unwrap();
    let blocks: Vec<_> = (0..3000).map(|_| pool.allocate(layout).unwrap().cast()).collect();
    let large = pool.allocate(Layout::from_size_align(40 << 20, 8).unwrap()).unwrap();
    let (reserved, committed) = held();
    assert!(committed > 48 << 20 && reserved >= committed);
    let stats = pool.stats();
    assert_eq!((stats.peak_reserved, stats.peak_committed), (reserved, committed));
    // SAFETY: all live, each freed once.
    unsafe {
        pool.deallocate(large.cast());
        blocks.into_iter().for_each(|block| pool.deallocate(block));
    }
    pool.trim(0).unwrap();
    assert!(held().1 < 8 << 20);
    let stats = pool.stats();
    assert_eq!((stats.peak_reserved, stats.peak_committed), (reserved, committed));
    pool.reset_peak();
    let stats = pool.stats();
    assert_eq!(stats.peak_reserved, stats.reserved);
    assert!(stats.peak_committed < 8 << 20);
}

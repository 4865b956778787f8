//! Fixed pools: a pair of allocation and free, beside the same by hand; statistics on and off; through the
//! trait object; batches; and throughput with several threads.
//!
//! The binary runs without cargo, too: `pools --bench`, `pools --bench threads`.

use std::alloc::Layout;
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use memory_pool::{
    FixedPool, LocalFixedPool, LocalVariablePool, LockFreeFixedPool, MemoryPool, PoolConfig, SyncType,
    VariablePool,
};

const BLOCK: usize = 64;

fn config() -> PoolConfig {
    PoolConfig::fixed_size_cpu(BLOCK).initial_size(4 << 20)
}

fn layout() -> Layout {
    black_box(Layout::from_size_align(BLOCK, 16).unwrap())
}

/// A free list through the blocks behind std's mutex: what a program would write by hand.
struct HandLocked(Mutex<*mut *mut u8>);

// SAFETY: the list is only touched under the lock.
unsafe impl Sync for HandLocked {}

impl HandLocked {
    fn new(memory: &mut [[u64; BLOCK / 8]]) -> Self {
        let mut head: *mut *mut u8 = std::ptr::null_mut();
        for block in memory {
            let block: *mut *mut u8 = std::ptr::from_mut(block).cast();
            // SAFETY: the block is large enough for a pointer.
            unsafe { block.write(head.cast()) };
            head = block;
        }
        Self(Mutex::new(head))
    }

    fn allocate(&self) -> NonNull<u8> {
        let mut head = self.0.lock().unwrap();
        let block = *head;
        // SAFETY: the benchmark never empties the list.
        unsafe {
            *head = (*block).cast();
            NonNull::new_unchecked(block.cast())
        }
    }

    fn deallocate(&self, block: NonNull<u8>) {
        let mut head = self.0.lock().unwrap();
        let block: *mut *mut u8 = block.as_ptr().cast();
        // SAFETY: came from `allocate`.
        unsafe { block.write((*head).cast()) };
        *head = block;
    }
}

/// Treiber's stack, with a tag of 16 bits against ABA: what a program would write by hand.
struct HandLockFree(AtomicU64);

const ADDRESS: u64 = (1 << 48) - 1;

impl HandLockFree {
    fn new(memory: &mut [[u64; BLOCK / 8]]) -> Self {
        let stack = Self(AtomicU64::new(0));
        for block in memory {
            stack.deallocate(NonNull::from(block).cast());
        }
        stack
    }

    fn allocate(&self) -> NonNull<u8> {
        let mut head = self.0.load(Ordering::Acquire);
        loop {
            let block = (head & ADDRESS) as *const AtomicU64;
            // SAFETY: the benchmark never empties the stack nor unmaps it; the read may race, as Treiber's does.
            let next = unsafe { (*block).load(Ordering::Relaxed) };
            let new = (next & ADDRESS) | ((head & !ADDRESS).wrapping_add(1 << 48));
            match self.0.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: not null.
                Ok(_) => return unsafe { NonNull::new_unchecked(block as *mut u8) },
                Err(now) => head = now,
            }
        }
    }

    fn deallocate(&self, block: NonNull<u8>) {
        let mut head = self.0.load(Ordering::Relaxed);
        loop {
            // SAFETY: the block is ours, and large enough for a word.
            unsafe { block.cast::<AtomicU64>().as_ref() }.store(head & ADDRESS, Ordering::Relaxed);
            let new = block.as_ptr() as u64 | (head & !ADDRESS);
            match self.0.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

fn pairs(c: &mut Criterion) {
    let mut group = c.benchmark_group("fixed pool, alloc + free");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(900));
    let layout = layout();
    let mut memory = vec![[0u64; BLOCK / 8]; 1 << 12];

    macro_rules! pool {
        ($name:literal, $pool:expr) => {{
            let pool = $pool.unwrap();
            group.bench_function($name, |b| {
                b.iter(|| {
                    let block = pool.allocate(layout).unwrap();
                    // SAFETY: live, freed once.
                    unsafe { pool.deallocate(black_box(block.cast())) };
                })
            });
        }};
    }
    pool!("local", LocalFixedPool::new(config()));
    pool!("local, statistics off", LocalFixedPool::new(config().track_stats(false)));
    let hand = HandLocked::new(&mut memory);
    group.bench_function("locked, by hand", |b| b.iter(|| hand.deallocate(black_box(hand.allocate()))));
    pool!("locked", FixedPool::new(config()));
    let hand = HandLockFree::new(&mut memory);
    group.bench_function("lock-free, by hand", |b| b.iter(|| hand.deallocate(black_box(hand.allocate()))));
    pool!("lock-free, by type", LockFreeFixedPool::new(config()));
    pool!("lock-free, by configuration", FixedPool::new(config().sync_type(SyncType::LockFree)));
    let pool = FixedPool::new(config()).unwrap();
    let dynamic = black_box(&pool as &dyn MemoryPool);
    group.bench_function("locked, through dyn", |b| {
        b.iter(|| {
            let block = dynamic.allocate(layout).unwrap();
            // SAFETY: live, freed once.
            unsafe { dynamic.deallocate(black_box(block.cast())) };
        })
    });
    pool!("variable, local", LocalVariablePool::new(PoolConfig::default_cpu().initial_size(4 << 20)));
    pool!("variable, locked", VariablePool::new(PoolConfig::default_cpu().initial_size(4 << 20)));
    group.finish();
}

/// 64 blocks at once, and one by one.
fn batches(c: &mut Criterion) {
    let mut group = c.benchmark_group("fixed pool, 64 blocks");
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(700));
    let layout = layout();
    for (name, sync) in [("locked", SyncType::Mutex), ("lock-free", SyncType::LockFree)] {
        let pool = FixedPool::new(config().sync_type(sync)).unwrap();
        let mut blocks = [MaybeUninit::uninit(); 64];
        group.bench_function(format!("{name}, one by one"), |b| {
            b.iter(|| {
                blocks.fill_with(|| MaybeUninit::new(pool.allocate(layout).unwrap().cast::<u8>()));
                for block in black_box(&blocks) {
                    // SAFETY: written just now; live, freed once.
                    unsafe { pool.deallocate(block.assume_init()) };
                }
            })
        });
        group.bench_function(format!("{name}, as a batch"), |b| {
            b.iter(|| {
                pool.allocate_batch_into(layout, &mut blocks).unwrap();
                // SAFETY: written just now; live, each freed once.
                unsafe { pool.deallocate_batch(black_box(&blocks).assume_init_ref()) };
            })
        });
    }
    group.finish();
}

/// Time of `rounds` rounds of eight blocks on each of `threads` threads, by wall clock.
fn together(threads: usize, rounds: u64, pool: &FixedPool) -> Duration {
    let layout = layout();
    let start = Barrier::new(threads + 1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..rounds {
                        let blocks: [NonNull<u8>; 8] =
                            std::array::from_fn(|_| pool.allocate(layout).unwrap().cast());
                        for block in black_box(blocks) {
                            // SAFETY: live, freed once.
                            unsafe { pool.deallocate(block) };
                        }
                    }
                })
            })
            .collect();
        start.wait();
        let began = Instant::now();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        began.elapsed()
    })
}

fn threads(c: &mut Criterion) {
    let mut group = c.benchmark_group("fixed pool, threads with 8 pairs each");
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(900));
    group.sample_size(20);
    let most = std::thread::available_parallelism().map_or(1, usize::from);
    for threads in [1, 2, 4, 8, 16].into_iter().filter(|&threads| threads <= most) {
        for (name, sync) in [("locked", SyncType::Mutex), ("lock-free", SyncType::LockFree)] {
            let pool = FixedPool::new(config().sync_type(sync)).unwrap();
            group.bench_function(format!("{name}, {threads} threads"), |b| {
                b.iter_custom(|rounds| together(threads, rounds, &pool))
            });
        }
    }
    group.finish();
}

criterion_group!(benches, pairs, batches, threads);
criterion_main!(benches);

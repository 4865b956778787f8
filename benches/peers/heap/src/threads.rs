//! Blocks that cross threads.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::{Mutex, mpsc};
use std::time::Instant;

use crate::{Random, cores, per_operation};

/// One thread allocates, another frees, in batches of 100 so that the hand-over itself costs little.
pub(crate) fn producer_and_consumer() -> Vec<f64> {
    const BATCHES: usize = 20_000;
    const BATCH: usize = 100;
    let (sender, receiver) = mpsc::sync_channel::<Vec<Box<[u8; 48]>>>(64);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for batch in 0..BATCHES {
                let items = (0..BATCH).map(|n| Box::new([(n + batch) as u8; 48])).collect();
                sender.send(items).unwrap();
            }
        });
        scope.spawn(move || receiver.iter().for_each(|items| drop(black_box(items))));
    });
    vec![per_operation(start, BATCHES * BATCH)]
}

/// Every thread allocates batches of random sizes, throws them onto a shared heap of batches, and frees what it
/// takes from there: nearly every free is another thread's block.
pub(crate) fn exchange() -> Vec<f64> {
    const ROUNDS: usize = 3_000;
    const BATCH: usize = 256;
    let threads = cores().max(2);
    let shared: Mutex<VecDeque<Vec<Vec<u8>>>> = Mutex::default();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for seed in 0..threads {
            let shared = &shared;
            scope.spawn(move || {
                let mut random = Random::new(seed as u64 + 1);
                for _ in 0..ROUNDS {
                    let batch = (0..BATCH).map(|_| Vec::with_capacity(random.log_uniform(16, 512))).collect();
                    let taken = {
                        let mut queue = shared.lock().unwrap();
                        queue.push_back(batch);
                        if queue.len() > 2 * threads { queue.pop_front() } else { None }
                    };
                    drop(black_box(taken));
                }
            });
        }
    });
    vec![per_operation(start, threads * ROUNDS * BATCH)]
}

/// Servers in the manner of larson: each thread replaces objects of a table at random, then hands the table to
/// a new thread and ends.
pub(crate) fn larson() -> Vec<f64> {
    const GENERATIONS: usize = 20;
    const TABLE: usize = 5_000;
    const STEPS: usize = 50_000;
    let threads = cores();
    let start = Instant::now();
    let chains: Vec<_> = (0..threads)
        .map(|chain| {
            std::thread::spawn(move || {
                let mut table: Vec<Vec<u8>> = Vec::new();
                for generation in 0..GENERATIONS {
                    let seed = (chain * GENERATIONS + generation) as u64 + 1;
                    table = std::thread::spawn(move || serve(table, seed)).join().unwrap();
                }
            })
        })
        .collect();
    chains.into_iter().for_each(|chain| chain.join().unwrap());
    return vec![per_operation(start, threads * GENERATIONS * STEPS)];

    fn serve(mut table: Vec<Vec<u8>>, seed: u64) -> Vec<Vec<u8>> {
        let mut random = Random::new(seed);
        table.resize_with(TABLE, || vec![1; 8 + random.below(993)]);
        for _ in 0..STEPS {
            let at = random.below(TABLE);
            table[at] = Vec::with_capacity(8 + random.below(993));
            table[at].push(2);
        }
        table
    }
}

/// In the manner of mstress: threads build lists of objects of very different sizes, swap parts of them through
/// shared slots, keep some and free some, and end and start anew.
pub(crate) fn mstress() -> Vec<f64> {
    const ITERATIONS: usize = 12;
    const OBJECTS: usize = 20_000;
    const SLOTS: usize = 1_000;
    let threads = cores();
    let slots: Vec<Mutex<Option<Vec<u64>>>> = (0..SLOTS).map(|_| Mutex::default()).collect();
    let start = Instant::now();
    for iteration in 0..ITERATIONS {
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let slots = &slots;
                scope.spawn(move || {
                    let mut random = Random::new((iteration * threads + thread) as u64 + 1);
                    let mut kept: Vec<Vec<u64>> = Vec::new();
                    for _ in 0..OBJECTS {
                        let words = match random.below(1000) {
                            0 => random.log_uniform(4 << 10, 64 << 10),
                            1..=19 => random.log_uniform(256, 4 << 10),
                            _ => random.log_uniform(2, 64),
                        };
                        kept.push(vec![1; words]);
                        if random.below(4) == 0 && !kept.is_empty() {
                            let at = random.below(kept.len());
                            let mut slot = slots[random.below(SLOTS)].lock().unwrap();
                            let swapped = slot.replace(kept.swap_remove(at));
                            drop(slot);
                            kept.extend(swapped);
                        }
                        if random.below(2) == 0 && !kept.is_empty() {
                            let at = random.below(kept.len());
                            drop(kept.swap_remove(at));
                        }
                    }
                });
            }
        });
    }
    vec![start.elapsed().as_secs_f64() * 1e3]
}

/// In the manner of rpmalloc's benchmark: each thread fills and empties the places of a table at random, sizes up
/// to a few KiB and small ones more often, and now and then hands a handful of blocks to its neighbour, who frees
/// them.
pub(crate) fn rptest() -> Vec<f64> {
    const LOOPS: usize = 60;
    const PLACES: usize = 3_000;
    const TURNS: usize = 4_000;
    const HANDED: usize = 250;
    let threads = cores();
    let mail: Vec<Mutex<Vec<Vec<Vec<u8>>>>> = (0..threads).map(|_| Mutex::default()).collect();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let mail = &mail;
            scope.spawn(move || {
                let mut random = Random::new(thread as u64 + 1);
                let mut places: Vec<Vec<u8>> = vec![Vec::new(); PLACES];
                for _ in 0..LOOPS {
                    for _ in 0..TURNS {
                        let at = random.below(PLACES);
                        // The lesser of two draws: small sizes are more common, as in programs.
                        let size = random.below(8000).min(random.below(8000)) + 16;
                        places[at] = Vec::with_capacity(size);
                        places[at].push(3);
                    }
                    let gift = (0..HANDED).map(|_| Vec::with_capacity(16 + random.below(1000))).collect();
                    mail[(thread + 1) % threads].lock().unwrap().push(gift);
                    let received = std::mem::take(&mut *mail[thread].lock().unwrap());
                    drop(black_box(received));
                }
            });
        }
    });
    vec![per_operation(start, threads * LOOPS * (TURNS + HANDED))]
}

//! Allocating and freeing at once, and lifetimes that end at random.

use std::alloc::{Layout, alloc, dealloc};
use std::hint::black_box;
use std::time::Instant;

use crate::{Random, cores, per_operation};

const PAIRS: usize = 4_000_000;

/// Pairs of one size that the compiler does not know.
pub(crate) fn unknown_sizes() -> Vec<f64> {
    [16, 64, 256, 1 << 10, 8 << 10, 64 << 10].into_iter().map(pair).collect()
}

fn pair(size: usize) -> f64 {
    run(size, PAIRS / 20);
    let start = Instant::now();
    run(size, PAIRS);
    per_operation(start, PAIRS)
}

pub(crate) fn run(size: usize, count: usize) {
    let layout = Layout::from_size_align(black_box(size), 8).unwrap();
    for _ in 0..count {
        // SAFETY: the size is not 0; the block is written within bounds and freed once.
        unsafe {
            let block = alloc(black_box(layout));
            block.write(1);
            dealloc(black_box(block), black_box(layout));
        }
    }
}

/// A box whose size is a constant.
pub(crate) fn constant_size() -> Vec<f64> {
    let run = |count: usize| {
        for _ in 0..count {
            drop(black_box(Box::new(black_box([1u64; 8]))));
        }
    };
    run(PAIRS / 20);
    let start = Instant::now();
    run(PAIRS);
    vec![per_operation(start, PAIRS)]
}

/// A thousand objects of 8 to 512 bytes; each step frees one at random and allocates another. An operation is
/// one such pair.
pub(crate) fn random_lifetimes() -> Vec<f64> {
    vec![lifetimes(1)]
}

pub(crate) fn random_lifetimes_on_two() -> Vec<f64> {
    vec![on_threads(2)]
}

pub(crate) fn random_lifetimes_on_all() -> Vec<f64> {
    vec![on_threads(cores())]
}

fn on_threads(count: usize) -> f64 {
    let times: Vec<f64> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..count).map(|n| scope.spawn(move || lifetimes(n as u64 + 1))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    times.iter().sum::<f64>() / count as f64
}

fn lifetimes(seed: u64) -> f64 {
    const LIVE: usize = 1000;
    let mut random = Random::new(seed);
    let fresh = |random: &mut Random| {
        let layout = Layout::from_size_align(8 + random.below(505), 8).unwrap();
        // SAFETY: the size is not 0; the first byte is within it.
        let block = unsafe {
            let block = alloc(layout);
            block.write(7);
            block
        };
        (block, layout)
    };
    let mut live: Vec<_> = (0..LIVE).map(|_| fresh(&mut random)).collect();
    let mut run = |steps: usize| {
        for _ in 0..steps {
            let at = random.below(LIVE);
            let (block, layout) = live[at];
            // SAFETY: live, and replaced at once.
            unsafe { dealloc(block, layout) };
            live[at] = fresh(&mut random);
        }
    };
    run(PAIRS / 20);
    let start = Instant::now();
    run(PAIRS);
    let time = per_operation(start, PAIRS);
    for (block, layout) in live {
        // SAFETY: live, freed once.
        unsafe { dealloc(block, layout) };
    }
    time
}

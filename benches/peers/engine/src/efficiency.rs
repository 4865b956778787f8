//! Heap efficiency: a 16 MiB arena is filled with sizes log-uniform from 16 B to 64 KiB until the first request
//! fails; then a random 20 % of the blocks is freed and it is filled again. Bytes served over arena bytes at
//! each failure, on average.

mod peers;
use memory_pool::engine::ranges::{Beside, InBlocks};
use peers::*;
use std::alloc::Layout;

const REFILLS: usize = 100;
const SEEDS: u64 = 10;

/// Efficiency of the first filling and the mean of all after it.
fn efficiency(mut peer: impl Peer, arena: Arena, seed: u64) -> (f64, f64) {
    let mut random = Random(0x9e37_79b9 * (seed + 1));
    let mut live: Vec<(*mut u8, Layout)> = Vec::new();
    let (mut served, mut first, mut sum) = (0, 0.0, 0.0);
    for refill in 0..=REFILLS {
        loop {
            let layout = Layout::from_size_align(random.size(), 8).unwrap();
            let at = peer.alloc(layout);
            if at.is_null() {
                break;
            }
            served += layout.size();
            live.push((at, layout));
        }
        let share = served as f64 / arena.len as f64;
        if refill == 0 {
            first = share;
        } else {
            sum += share;
        }
        for _ in 0..live.len() / 5 {
            let nth = random.below(live.len());
            let (at, layout) = live.swap_remove(nth);
            served -= layout.size();
            // SAFETY: it came from `alloc` with this layout.
            unsafe { peer.free(at, layout) };
        }
    }
    (first, sum / REFILLS as f64)
}

fn main() {
    let arena = Arena::new(16 << 20);
    let mut results: Vec<(&str, f64, f64)> = Vec::new();
    for seed in 0..SEEDS {
        let mut nth = 0;
        each_peer!(arena, |name, peer| {
            let (first, after) = efficiency(peer, arena, seed);
            if results.len() == nth {
                results.push((name, 0.0, 0.0));
            }
            results[nth].1 += first / SEEDS as f64;
            results[nth].2 += after / SEEDS as f64;
            nth += 1;
        });
    }
    for (name, first, after) in results {
        println!("{name:26} first filling {:.2} %, refills {:.2} %", first * 100.0, after * 100.0);
    }
}

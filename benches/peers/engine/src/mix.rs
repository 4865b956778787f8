//! Random mix of 16 B to 64 KiB, log-uniform, in a 64 MiB arena: nanoseconds an operation.
//!
//! `mix [slots] [touch]`: a random slot of so many is freed if it holds a block, else filled; half of them are
//! live on average. With `touch` the first and last word of each block is written.

mod peers;
use memory_pool::engine::ranges::{Beside, InBlocks};
use peers::*;
use std::alloc::Layout;
use std::time::Instant;

const OPS: usize = 300_000;
const ROUNDS: usize = 15;

fn mix(mut peer: impl Peer, slots: usize, seed: u64, touch: bool) -> (f64, usize) {
    let mut random = Random(seed);
    let mut live: Vec<(*mut u8, u32)> = vec![(std::ptr::null_mut(), 0); slots];
    let mut failed = 0;
    let mut time = 0.0;
    for timed in [false, true] {
        let work: Vec<(u32, u32)> =
            (0..OPS).map(|_| (random.below(slots) as u32, random.size() as u32)).collect();
        let began = Instant::now();
        for (slot, size) in work {
            let (at, old) = live[slot as usize];
            if at.is_null() {
                let at = peer.alloc(Layout::from_size_align(size as usize, 8).unwrap());
                failed += usize::from(at.is_null() && timed);
                if touch && !at.is_null() {
                    // SAFETY: the block has at least 16 bytes.
                    unsafe {
                        at.cast::<u64>().write(1);
                        at.add(size as usize - 8).cast::<u64>().write_unaligned(1);
                    }
                }
                live[slot as usize] = (at, size);
            } else {
                // SAFETY: it came from `alloc` with this layout.
                unsafe { peer.free(at, Layout::from_size_align(old as usize, 8).unwrap()) };
                live[slot as usize].0 = std::ptr::null_mut();
            }
        }
        time = began.elapsed().as_nanos() as f64 / OPS as f64;
    }
    (time, failed)
}

fn main() {
    let mut args = std::env::args().skip(1);
    let slots = args.next().map_or(8192, |slots| slots.parse().expect("a number of slots"));
    let touch = args.next().is_some();
    let arena = Arena::new(64 << 20);
    let mut results: Vec<(&str, Vec<f64>, usize)> = Vec::new();
    let rounds = std::env::var("ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().expect("a number"));
    for round in 0..rounds {
        let mut nth = 0;
        each_peer!(arena, |name, peer| {
            let (time, failed) = mix(peer, slots, 0x1234_5678 + round as u64, touch);
            if results.len() == nth {
                results.push((name, Vec::new(), 0));
            }
            results[nth].1.push(time);
            results[nth].2 += failed;
            nth += 1;
        });
    }
    println!("{slots} slots, touch: {touch}");
    for (name, mut times, failed) in results {
        times.sort_by(f64::total_cmp);
        println!(
            "{name:26} {:7.1} ns/op   ({:.1} to {:.1}), {failed} failed",
            times[times.len() / 2],
            times[0],
            times[times.len() - 1]
        );
    }
}

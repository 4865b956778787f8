//! The variable engine: a random mix of sizes by strategy and store, and the cost of its single steps.

use std::alloc::Layout;
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use memory_pool::Strategy;
use memory_pool::engine::ranges::{Beside, Division, InBlocks, Ranges, Store};
use memory_pool::engine::{Engine, Span};

const ARENA: usize = 64 << 20;

fn engine<S: Store>(arena: &mut [u8], strategy: Strategy) -> Ranges<S> {
    let mut ranges = Ranges::new(Division { strategy, ..Division::default() }).unwrap();
    let span = Span { start: arena.as_mut_ptr().expose_provenance(), len: arena.len(), zeroed: false };
    // SAFETY: the arena outlives the engine, and nothing else uses it meanwhile.
    unsafe { ranges.add(span) }.unwrap();
    ranges
}

/// Slots to fill and empty in turn, and sizes from 16 B to 64 KiB, each power of two as likely.
fn work(slots: usize) -> Vec<(usize, usize)> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let step = |random: u64| 16 << (random % 12);
    (0..1 << 18)
        .map(|_| {
            let size = step(random() >> 32);
            ((random() >> 32) as usize % slots, size + (random() >> 32) as usize % size)
        })
        .collect()
}

fn mix<S: Store>(criterion: &mut Criterion, arena: &mut [u8], name: &str, strategy: Strategy) {
    const SLOTS: usize = 8192;
    let work = work(SLOTS);
    let mut live = vec![0_usize; SLOTS];
    let mut ranges = engine::<S>(arena, strategy);
    let mut steps = work.iter().cycle();
    criterion.bench_function(&format!("mix 16 B to 64 KiB, half full/{name}"), |bencher| {
        bencher.iter(|| {
            let (slot, size) = *steps.next().unwrap();
            if live[slot] == 0 {
                let block = ranges.alloc(Layout::from_size_align(size, 8).unwrap());
                live[slot] = block.map_or(0, |block| block.start);
            } else {
                // SAFETY: the block is live.
                unsafe { ranges.free(live[slot]) };
                live[slot] = 0;
            }
        });
    });
}

fn pairs<S: Store>(criterion: &mut Criterion, arena: &mut [u8], name: &str, strategy: Strategy) {
    let mut ranges = engine::<S>(arena, strategy);
    for size in [64, 4096] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        criterion.bench_function(&format!("alloc and free {size} B/{name}"), |bencher| {
            bencher.iter(|| {
                let block = black_box(ranges.alloc(black_box(layout)).unwrap());
                // SAFETY: the block is live.
                unsafe { ranges.free(block.start) }
            });
        });
    }
}

fn engines(criterion: &mut Criterion) {
    let mut arena = vec![1_u8; ARENA];
    for strategy in [Strategy::Segregated, Strategy::BestFit, Strategy::FirstFit] {
        let name = strategy.name().to_owned();
        mix::<InBlocks>(criterion, &mut arena, &format!("{name}, in blocks"), strategy.clone());
        mix::<Beside>(criterion, &mut arena, &format!("{name}, beside"), strategy.clone());
        pairs::<InBlocks>(criterion, &mut arena, &format!("{name}, in blocks"), strategy.clone());
        pairs::<Beside>(criterion, &mut arena, &format!("{name}, beside"), strategy);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = engines
}
criterion_main!(benches);

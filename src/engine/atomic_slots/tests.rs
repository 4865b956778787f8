use super::*;
use crate::base::error::PointerFault;
use crate::engine::Span;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

/// An engine over addresses that nobody touches; it never does either.
fn engine(block: usize, align: usize, spans: &[(usize, usize)]) -> AtomicSlots {
    let engine = AtomicSlots::new(block, align, 4).unwrap();
    for &(start, len) in spans {
        // SAFETY: the engine only computes with the addresses.
        engine.with_slow(|slow| unsafe { slow.add(Span { start, len, zeroed: true }) }).unwrap();
    }
    engine
}

#[test]
fn slots_are_found_from_their_addresses() {
    for block in [16, 24, 48, 1000, 4096, 12_345, 1 << 20] {
        let len = 100 * block + 7;
        let engine = engine(block, 8, &[(1 << 40, len), (2 << 40, len)]);
        let blocks: Vec<usize> = (0..).map_while(|n| Some(engine.alloc_one(n)?.start)).collect();
        assert_eq!(blocks.len(), 2 * (len / round_up(block, 8).unwrap()));
        for &start in &blocks {
            assert_eq!(engine.with_slow(|slow| slow.usable_size(start)), Some(engine.block_size()));
            assert_eq!(engine.with_slow(|slow| slow.usable_size(start + 1)), None);
            // SAFETY: live until here.
            assert_eq!(unsafe { engine.free_block(start, start / block) }, engine.block_size());
            assert_eq!(engine.with_slow(|slow| slow.usable_size(start)), None);
        }
        engine.with_slow(|slow| slow.check()).unwrap();
        assert_eq!(engine.with_slow(|slow| slow.live_blocks()), 0);
    }
}

#[test]
fn random_operations_hold_every_invariant() {
    for seed in 1..6_u64 {
        let spans = [(1 << 40, 10_000), (1 << 41, 100_000), (3 << 40, 1 << 16)];
        let engine = engine(64, 16, &spans);
        let mut live: BTreeMap<usize, usize> = BTreeMap::new();
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as usize % below
        };
        for _ in 0..4000 {
            match random(10) {
                0..=5 => {
                    let largest = if random(3) == 0 { 5000 } else { 64 };
                    let wanted = layout(1 + random(largest), 1 << random(9));
                    let got = if engine.serves(wanted) {
                        engine.alloc_one(random(4))
                    } else {
                        engine.with_slow(|slow| slow.alloc(wanted))
                    };
                    let Some(got) = got else { continue };
                    assert!(got.size >= wanted.size() && got.start.is_multiple_of(wanted.align()));
                    let before = live.range(..got.start + got.size).next_back();
                    assert!(before.is_none_or(|(start, len)| start + len <= got.start), "overlap");
                    live.insert(got.start, got.size);
                }
                6..=8 if !live.is_empty() => {
                    let (&start, &size) = live.iter().nth(random(live.len())).unwrap();
                    live.remove(&start);
                    // SAFETY: live until here.
                    assert_eq!(unsafe { engine.free_block(start, random(4)) }, size);
                    // SAFETY: nobody uses it.
                    let again = engine.with_slow(|slow| unsafe { slow.free_checked(start) });
                    assert!(matches!(again, Err(PointerFault::NotLive)));
                }
                _ if !live.is_empty() => {
                    let (&start, &size) = live.iter().nth(random(live.len())).unwrap();
                    let wanted = 1 + random(size + 300);
                    // SAFETY: live.
                    let new = engine.with_slow(|slow| unsafe {
                        if wanted > size {
                            slow.grow(start, wanted).unwrap_or(size)
                        } else {
                            slow.shrink(start, wanted)
                        }
                    });
                    live.insert(start, new);
                }
                _ => {}
            }
            engine.with_slow(|slow| {
                slow.check().unwrap();
                assert_eq!(slow.live_blocks(), live.len());
                assert_eq!(slow.live_bytes(), live.values().sum::<usize>());
            });
        }
        let mut seen = BTreeMap::new();
        engine.with_slow(|slow| slow.for_each_live(&mut |block| _ = seen.insert(block.start, block.size)));
        assert_eq!(seen, live);
        // SAFETY: live until here.
        live.keys().for_each(|&start| _ = unsafe { engine.free_block(start, 0) });
        engine.with_slow(|slow| {
            let totals = slow.totals();
            assert_eq!((totals.allocs, slow.live_bytes()), (totals.frees, 0));
            for _ in 0..3 {
                assert!(slow.remove_idle(usize::MAX).is_some());
            }
            assert_eq!((slow.remove_idle(usize::MAX), slow.free_bytes()), (None, (0, 0)));
            assert_eq!(slow.totals().allocs, totals.allocs, "counts outlive spans");
        });
        assert!(engine.alloc_one(0).is_none());
    }
}

#[test]
fn fresh_slots_are_known_until_used() {
    let engine = engine(4096, 4096, &[(1 << 40, 64 << 12)]);
    let first = engine.alloc_one(0).unwrap();
    assert!(first.zeroed());
    // SAFETY: live until here.
    unsafe { engine.free_block(first.start, 0) };
    let again = engine.alloc_one(0).unwrap();
    assert_eq!((again.start, again.dirty), (first.start, 4096));
    assert!(engine.alloc_one(0).unwrap().zeroed());
    let run = engine.with_slow(|slow| slow.alloc(layout(3 << 12, 1))).unwrap();
    assert!(run.zeroed());
}

#[test]
fn full_counts_are_moved_and_not_lost() {
    let engine = engine(64, 16, &[(1 << 40, 64 * 32)]);
    let start = engine.alloc_one(0).unwrap().start;
    let group = engine.stripe(0).group.load(Ordering::Relaxed);
    // SAFETY: a group of the engine.
    let word = unsafe { &(*group).word };
    // As after some 2^25 allocations more.
    word.fetch_or(((1 << 25) - 2) << COUNT_SHIFT, Ordering::Relaxed);
    let before = engine.with_slow(|slow| slow.totals().allocs);
    for n in 1..=5 {
        // SAFETY: live until here.
        unsafe { engine.free_block(start, 0) };
        assert_eq!(engine.alloc_one(0).unwrap().start, start);
        assert_eq!(engine.with_slow(|slow| slow.totals().allocs), before + n);
    }
}

/// Threads take, mark and give back slots of few groups while the slow side takes runs, adds spans and removes
/// them; a slot is never held twice.
#[test]
fn threads_never_share_a_slot() {
    const BLOCK: usize = 64;
    const SLOTS: usize = 96;
    let spans = [(1 << 40, SLOTS * BLOCK), (1 << 41, SLOTS * BLOCK)];
    let engine = engine(BLOCK, 16, &spans);
    let held: Vec<AtomicBool> = (0..2 * SLOTS).map(|_| AtomicBool::new(false)).collect();
    let index = |start: usize| (start >> 41) * SLOTS + (start & ((1 << 40) - 1)) / BLOCK;
    let take = |start: usize| assert!(!held[index(start)].swap(true, Ordering::Relaxed), "held twice");
    let give = |start: usize| assert!(held[index(start)].swap(false, Ordering::Relaxed));
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (engine, take, give) = (&engine, &take, &give);
            scope.spawn(move || {
                let mut own = Vec::new();
                for round in 0..200_000_usize {
                    if round % 7 < 4
                        && let Some(block) = engine.alloc_one(thread)
                    {
                        take(block.start);
                        own.push(block.start);
                    } else if let Some(start) = (!own.is_empty()).then(|| own.swap_remove(round % own.len()))
                    {
                        give(start);
                        // SAFETY: live until here.
                        unsafe { engine.free_block(start, thread) };
                    }
                }
                for start in own {
                    give(start);
                    // SAFETY: live until here.
                    unsafe { engine.free_block(start, thread) };
                }
            });
        }
        scope.spawn(|| {
            for round in 0..4000 {
                let size = (1 + round % 40) * BLOCK;
                if let Some(run) = engine.with_slow(|slow| slow.alloc(layout(size, 1))) {
                    (run.start..run.start + size).step_by(BLOCK).for_each(take);
                    (run.start..run.start + size).step_by(BLOCK).for_each(give);
                    // SAFETY: live until here.
                    unsafe { engine.free_block(run.start, 3) };
                }
                if round % 8 == 0
                    && let Some(span) = engine.with_slow(|slow| slow.remove_idle(usize::MAX))
                {
                    // SAFETY: the engine only computes with the addresses.
                    engine.with_slow(|slow| unsafe { slow.add(span) }).unwrap();
                }
            }
        });
    });
    engine.with_slow(|slow| slow.check()).unwrap();
    assert_eq!(engine.with_slow(|slow| slow.live_blocks()), 0);
}

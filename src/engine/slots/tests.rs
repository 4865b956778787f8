use super::*;
use crate::source::{Region, Source, os::Os};
use std::collections::BTreeMap;

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

/// An engine over one region of the system.
struct Fixture<H: Home> {
    engine: Slots<H>,
    regions: Vec<Region>,
}

impl<H: Home> Fixture<H> {
    fn new(block: usize, align: usize, spans: &[usize]) -> Self {
        let mut fixture = Self { engine: Slots::new(block, align).unwrap(), regions: Vec::new() };
        spans.iter().for_each(|&len| fixture.add(len));
        fixture
    }

    fn add(&mut self, len: usize) {
        let region = Os::new().reserve(len, 1).unwrap();
        let start = region.base.expose_provenance().get();
        // SAFETY: the region is fresh and outlives the engine's use of it.
        unsafe { self.engine.add(Span { start, len, zeroed: true }) }.unwrap();
        self.regions.push(region);
    }
}

impl<H: Home> Drop for Fixture<H> {
    fn drop(&mut self) {
        // SAFETY: nothing uses the regions any more.
        self.regions.iter().for_each(|&region| unsafe { Os::new().release(region) });
    }
}

#[test]
fn division_is_exact() {
    let values = [0, 1, 15, 16, 17, 4095, 4096, 1 << 32, (1 << 47) - 1, usize::MAX - 1, usize::MAX];
    for by in (1..300).chain([1000, 4096, 65537, 1 << 31, (1 << 31) + 1, (1 << 40) + 7]) {
        let divider = Divider::new(by);
        for value in values.into_iter().chain((0..200).map(|n| n * by)).chain((1..200).map(|n| n * by - 1)) {
            assert_eq!(divider.divide(value), value / by, "{value} / {by}");
        }
    }
}

/// Random singles and runs, freed in random order, against a model; the invariants hold after every step.
fn storm<H: Home>(block: usize, align: usize, seed: u64) {
    let mut fixture = Fixture::<H>::new(block, align, &[16 << 10, 40 << 10, 8 << 10]);
    let engine = &mut fixture.engine;
    let mut live: BTreeMap<usize, usize> = BTreeMap::new();
    let mut state = seed | 1;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    let mut handed_out = 0;
    for step in 0..3000 {
        match random(10) {
            0..=4 => {
                let size = if random(4) == 0 { 1 + random(10 * block) } else { 1 + random(block) };
                let wanted = layout(size, 1 << random(9));
                if let Some(got) = engine.alloc(wanted) {
                    assert!(got.size >= size && got.start.is_multiple_of(wanted.align()));
                    let before = live.range(..got.start + got.size).next_back();
                    assert!(before.is_none_or(|(start, len)| start + len <= got.start), "overlap");
                    assert_eq!(engine.usable_size(got.start), Some(got.size));
                    if H::TOUCHES {
                        // SAFETY: the block is live.
                        unsafe {
                            let bytes = ptr::with_exposed_provenance_mut::<u8>(got.start);
                            let bytes = core::slice::from_raw_parts_mut(bytes, got.size);
                            assert!(!got.zeroed() || bytes.iter().all(|&byte| byte == 0), "fresh is zero");
                            bytes.fill(0xEE);
                        }
                    }
                    live.insert(got.start, got.size);
                    handed_out += got.size as u64;
                }
            }
            5..=7 if !live.is_empty() => {
                let (&start, &size) = live.iter().nth(random(live.len())).unwrap();
                live.remove(&start);
                // SAFETY: live until here.
                assert_eq!(unsafe { engine.free(start) }, size);
                assert_eq!(engine.usable_size(start), None);
            }
            8 if !live.is_empty() => {
                let (&start, &size) = live.iter().nth(random(live.len())).unwrap();
                let wanted = 1 + random(size + 3 * block);
                // SAFETY: live.
                let new = unsafe {
                    if wanted > size {
                        engine.grow(start, wanted).unwrap_or(size)
                    } else {
                        engine.shrink(start, wanted)
                    }
                };
                handed_out += new.saturating_sub(size) as u64;
                live.insert(start, new);
            }
            _ if random(20) == 0 => engine.settle(),
            _ => {}
        }
        if let Err(broken) = engine.check() {
            panic!("step {step}: {broken}");
        }
        assert_eq!(engine.live_blocks(), live.len());
        assert_eq!(engine.live_bytes(), live.values().sum::<usize>());
    }
    let mut seen = BTreeMap::new();
    engine.for_each_live(&mut |block| _ = seen.insert(block.start, block.size));
    assert_eq!(seen, live);
    assert_eq!(engine.totals().alloc_bytes, handed_out);
    for start in live.into_keys() {
        // SAFETY: live until here.
        unsafe { engine.free(start) };
    }
    engine.settle();
    let totals = engine.totals();
    assert_eq!((totals.allocs, engine.live_bytes()), (totals.frees, 0));
    let (free, largest) = engine.free_bytes();
    assert!(free > 58 << 10 || block > 512, "{free}");
    assert!(largest > 37 << 10 || block > 512, "{largest}");
    for len in [40 << 10, 16 << 10, 8 << 10] {
        assert_eq!(engine.remove_idle(usize::MAX).map(|span| span.len), Some(len), "whole, largest first");
    }
    assert_eq!(engine.free_bytes(), (0, 0));
}

#[test]
fn random_operations_hold_every_invariant() {
    for (seed, (block, align)) in
        [(64, 16), (8, 8), (48, 16), (100, 4), (512, 512), (3000, 8)].iter().enumerate()
    {
        storm::<InSpan>(*block, *align, seed as u64 * 2 + 3);
        storm::<Beside>(*block, *align, seed as u64 * 2 + 1001);
    }
}

#[test]
fn runs_are_found_wherever_they_fit() {
    let mut fixture = Fixture::<InSpan>::new(64, 16, &[64 << 10]);
    let engine = &mut fixture.engine;
    let (whole, largest) = engine.free_bytes();
    assert_eq!(whole, largest);
    let all = engine.alloc(layout(whole, 1)).unwrap();
    assert!(engine.alloc(layout(1, 1)).is_none());
    // SAFETY: live until here.
    unsafe { engine.free(all.start) };
    // Singles everywhere, then holes of 3, 65 and 130 slots.
    let singles: Vec<usize> = (0..whole / 64).map(|_| engine.alloc(layout(64, 16)).unwrap().start).collect();
    for (first, slots) in [(10, 3), (60, 65), (250, 130)] {
        for &start in &singles[first..first + slots] {
            // SAFETY: live until here.
            unsafe { engine.free(start) };
        }
    }
    for (first, slots) in [(250, 130), (60, 65), (10, 3)] {
        assert!(engine.alloc(layout((slots + 1) * 64, 1)).is_none());
        assert_eq!(engine.alloc(layout(slots * 64, 1)).unwrap().start, singles[first]);
        engine.check().unwrap();
    }
    assert!(engine.alloc(layout(1, 1)).is_none());
}

#[test]
fn spans_of_no_use_come_back() {
    let mut engine = Slots::<InSpan>::new(4096, 4096).unwrap();
    let tiny = Span { start: 4096, len: 4096, zeroed: false };
    // SAFETY: the engine refuses it before it touches anything.
    assert_eq!(unsafe { engine.add(tiny) }, Err(tiny));
    assert!(Slots::<InSpan>::new(usize::MAX, 16).is_none());
}

#[test]
fn the_peak_is_the_most_that_was_ever_live() {
    let mut fixture = Fixture::<InSpan>::new(32, 16, &[8 << 10]);
    let engine = &mut fixture.engine;
    let starts: Vec<usize> = (0..10).map(|_| engine.alloc(layout(32, 1)).unwrap().start).collect();
    // SAFETY: live until here.
    starts[2..].iter().for_each(|&start| _ = unsafe { engine.free(start) });
    assert_eq!(engine.totals().peak_bytes, 320);
    engine.reset_peak();
    assert_eq!(engine.totals().peak_bytes, 64);
    engine.alloc(layout(96, 1)).unwrap();
    assert_eq!(engine.totals().peak_bytes, 160);
    // SAFETY: nothing is used after.
    unsafe { engine.reset() };
    engine.check().unwrap();
    assert_eq!((engine.live_blocks(), engine.totals().allocs), (0, 11));
}

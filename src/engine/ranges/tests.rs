//! Random work against a model, `check()` after every step, for every strategy and both stores.

use std::collections::BTreeMap;

use super::*;
use crate::base::policy::Policy;

/// A small generator, so that a seed names a run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// From 1 to `2^log`, every power of two as likely as the next.
    fn size(&mut self, log: usize) -> usize {
        let bits = self.below(log) + 1;
        self.below(1 << bits) + 1
    }
}

/// Zeroed memory, 64 KiB aligned, whose provenance is exposed.
struct Memory {
    start: usize,
    layout: Layout,
}

impl Memory {
    fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, 1 << 16).unwrap();
        // SAFETY: the layout has a size.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!memory.is_null());
        Self { start: memory.expose_provenance(), layout }
    }

    fn span(&self) -> Span {
        Span { start: self.start, len: self.layout.size(), zeroed: true }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`.
        unsafe { std::alloc::dealloc(core::ptr::with_exposed_provenance_mut(self.start), self.layout) }
    }
}

/// The bytes of a block, if the CPU may look at them.
fn bytes(block: Block) -> &'static mut [u8] {
    // SAFETY: tests use it only on live blocks of `Memory`, one at a time.
    unsafe {
        core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(block.start), block.size)
    }
}

/// Answers well, badly, and not at all, in turn.
#[derive(Debug)]
struct Erratic(std::sync::atomic::AtomicUsize);

impl Policy for Erratic {
    fn name(&self) -> &str {
        "erratic"
    }
    fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
        let turn = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        match turn % 5 {
            0 => None,
            1 => free.next(),
            2 => free.min_by_key(|range| range.len),
            3 => Some(FreeRange { start: turn * 16, len: request.size }),
            _ => free.filter(|range| range.fits(request.size, request.align)).max_by_key(|range| range.len),
        }
    }
}

fn strategies() -> [Strategy; 4] {
    [
        Strategy::Segregated,
        Strategy::BestFit,
        Strategy::FirstFit,
        Strategy::custom(Erratic(std::sync::atomic::AtomicUsize::new(0))),
    ]
}

fn engine<S: Store>(strategy: Strategy, granule: usize, min_rest: usize) -> Ranges<S> {
    Ranges::new(Division { strategy, granule, min_rest }).unwrap()
}

/// What the model knows of a live block: its usable size and the byte it is filled with.
type Model = BTreeMap<usize, (usize, u8)>;

struct Run<S: Store> {
    ranges: Ranges<S>,
    model: Model,
    random: Random,
    touch: bool,
    fill: u8,
}

impl<S: Store> Run<S> {
    fn alloc(&mut self) {
        let size = self.random.size(13);
        let align = 1 << if self.random.below(4) == 0 { self.random.below(13) } else { 0 };
        let expected = self.expected(size, align);
        let block = self.ranges.alloc(Layout::from_size_align(size, align).unwrap());
        assert_eq!(block.is_some(), expected.is_some(), "{size} aligned to {align}: {expected:?}");
        let Some(block) = block else { return };
        assert!(block.size >= size && block.start % align.max(self.ranges.granule) == 0, "{block:?}");
        match self.ranges.strategy {
            Strategy::BestFit | Strategy::FirstFit => {
                let (low, high) = expected.unwrap();
                assert!(block.start == low || block.start + block.size + S::HEAD == high, "{block:?}");
            }
            _ => {}
        }
        let before = self.model.range(..block.start).next_back();
        assert!(before.is_none_or(|(start, (size, _))| start + size <= block.start));
        let behind = self.model.range(block.start..).next();
        assert!(behind.is_none_or(|(start, _)| block.start + block.size <= *start));
        self.fill = self.fill.wrapping_add(1) | 1;
        if self.touch {
            assert!(bytes(block)[block.dirty..].iter().all(|byte| *byte == 0), "{block:?} is not zero");
            bytes(block).fill(self.fill);
        }
        self.model.insert(block.start, (block.size, self.fill));
    }

    /// Whether a request can be met, and where the two exact strategies must put it, by looking at all there is.
    fn expected(&self, size: usize, align: usize) -> Option<(usize, usize)> {
        let ranges = &self.ranges;
        let size = ranges.whole(size).unwrap();
        let want = Want { size, align: align.max(ranges.granule), front: ranges.min_rest };
        let fits = ranges.blocks().filter(|id| ranges.store.is_free(*id)).filter_map(|id| {
            let place = want.place(&ranges.store, id)?;
            let (start, whole) = (ranges.store.start(id), ranges.store.size(id));
            Some((whole, start, start + place.skip))
        });
        match ranges.strategy {
            Strategy::FirstFit => fits.min_by_key(|fit| fit.1),
            _ => fits.min(),
        }
        .map(|(whole, start, at)| (at, start + whole))
    }

    fn pick(&mut self) -> Option<usize> {
        let nth = self.random.below(self.model.len().max(1));
        self.model.keys().nth(nth).copied()
    }

    fn verify(&self, start: usize, len: usize, fill: u8) {
        if self.touch {
            let block = Block { start, size: len, dirty: len };
            assert!(bytes(block).iter().all(|byte| *byte == fill), "{start:#x} was overwritten");
        }
    }

    fn free(&mut self) {
        let Some(start) = self.pick() else { return };
        let (size, fill) = self.model.remove(&start).unwrap();
        self.verify(start, size, fill);
        assert_eq!(self.ranges.usable_size(start), Some(size));
        // SAFETY: the model says it is live.
        let freed = unsafe { self.ranges.free(start) };
        assert_eq!(freed, size);
        assert_eq!(self.ranges.usable_size(start), None);
        // SAFETY: refused before anything is touched.
        assert_eq!(unsafe { self.ranges.free_checked(start) }, Err(PointerFault::NotLive));
    }

    fn resize(&mut self) {
        let Some(start) = self.pick() else { return };
        let (size, fill) = self.model[&start];
        let wanted = self.random.size(13);
        let behind = self.model.range(start + 1..).next().map(|(start, _)| *start);
        // SAFETY: the model says it is live.
        let new = if wanted > size {
            let room = self.ranges.blocks().find(|id| self.ranges.store.start(*id) == start).map(|id| {
                let next = self.ranges.store.next(id);
                let more = if self.ranges.store.is_free(next) { self.ranges.store.size(next) } else { 0 };
                self.ranges.store.size(id) + more
            });
            let fits = self.ranges.whole(wanted).unwrap() <= room.unwrap();
            // SAFETY: the model says it is live.
            let grown = unsafe { self.ranges.grow(start, wanted) };
            assert_eq!(grown.is_some(), fits);
            assert!(grown.is_none_or(|grown| grown >= wanted));
            grown.unwrap_or(size)
        } else {
            // SAFETY: the model says it is live.
            let shrunk = unsafe { self.ranges.shrink(start, wanted) };
            assert!(shrunk >= wanted && shrunk <= size);
            shrunk
        };
        assert!(behind.is_none_or(|behind| start + new <= behind));
        self.verify(start, size.min(new), fill);
        if self.touch {
            bytes(Block { start, size: new, dirty: new }).fill(fill);
        }
        self.model.insert(start, (new, fill));
    }

    fn check(&self) {
        self.ranges.check().unwrap();
        assert_eq!(self.ranges.live_blocks(), self.model.len());
        assert_eq!(self.ranges.live_bytes(), self.model.values().map(|block| block.0).sum::<usize>());
    }

    fn steps(&mut self, steps: usize) {
        for step in 0..steps {
            // Waves, so that the memory is now nearly full and now nearly empty.
            let filling = step / 200 % 2 == 0;
            match self.random.below(10) {
                0..6 if filling => self.alloc(),
                0..6 => self.free(),
                6..8 => self.resize(),
                8 => self.alloc(),
                _ => self.free(),
            }
            self.check();
        }
    }

    fn empty(&mut self) {
        while !self.model.is_empty() {
            self.free();
        }
        self.check();
    }
}

fn run<S: Store>(ranges: Ranges<S>, seed: u64, touch: bool) -> Run<S> {
    Run { ranges, model: Model::new(), random: Random(seed), touch, fill: 0 }
}

fn long() -> usize {
    if std::env::var_os("MEMORY_POOL_LONG_TESTS").is_some() { 100 } else { 1 }
}

fn random_work<S: Store>(touch: bool) {
    for strategy in strategies() {
        for (granule, min_rest) in [(16, 0), (16, 200), (256, 256)] {
            for seed in 1..=2 * long() as u64 {
                let memories = [Memory::new(1 << 16), Memory::new(5000), Memory::new(1 << 15)];
                let mut run = run::<S>(engine(strategy.clone(), granule, min_rest), seed, touch);
                for memory in &memories {
                    // SAFETY: the memory is ours and outlives the engine.
                    unsafe { run.ranges.add(memory.span()) }.unwrap();
                }
                let whole = run.ranges.free_bytes();
                run.steps(1200);
                run.empty();
                assert_eq!(run.ranges.free_bytes(), whole);
                run.steps(100);
                // SAFETY: the model is emptied with it.
                unsafe { run.ranges.reset() };
                for start in std::mem::take(&mut run.model).into_keys() {
                    assert!(run.ranges.usable_size(start).is_none());
                }
                run.check();
                assert_eq!(run.ranges.free_bytes(), whole);
                run.steps(100);
                run.empty();
                let mut given_back = 0;
                while let Some(span) = run.ranges.remove_idle(usize::MAX) {
                    assert!(memories.iter().any(|memory| Span { zeroed: false, ..memory.span() } == span));
                    given_back += 1;
                    run.check();
                }
                assert_eq!((given_back, run.ranges.free_bytes()), (3, (0, 0)));
            }
        }
    }
}

#[test]
fn random_work_in_blocks() {
    random_work::<InBlocks>(true);
}

#[test]
fn random_work_beside() {
    random_work::<Beside>(true);
}

#[test]
fn a_span_of_the_length_it_names_serves_the_request() {
    fn serves<S: Store>(granule: usize, size: usize, align: usize) {
        let mut ranges = engine::<S>(Strategy::Segregated, granule, 0);
        let layout = Layout::from_size_align(size, align).unwrap();
        let need = ranges.need(layout).unwrap();
        let len = ranges.span_len(need).unwrap();
        assert!(ranges.payload(len) >= need);
        for from in [0, 1, 17].map(|from| if align > granule { 0 } else { from }) {
            let memory = Memory::new(len + from);
            // SAFETY: the memory is ours and outlives the span.
            unsafe { ranges.add(Span { start: memory.start + from, len, zeroed: false }) }.unwrap();
            assert!(ranges.free_bytes().0 <= ranges.payload(len));
            let block = ranges.alloc(layout).unwrap();
            // SAFETY: the block is live.
            unsafe { ranges.free(block.start) };
            assert!(ranges.remove_idle(len).is_some());
        }
    }
    for (size, align) in [(1, 1), (24, 8), (1000, 16), (100, 4096), (65536, 65536)] {
        for granule in [16, 512] {
            serves::<InBlocks>(granule, size, align);
            serves::<Beside>(granule, size, align);
        }
    }
}

#[test]
fn what_was_done_is_counted() {
    let memory = Memory::new(1 << 16);
    let mut ranges = engine::<InBlocks>(Strategy::BestFit, 16, 0);
    // SAFETY: the memory is ours and outlives the engine.
    unsafe { ranges.add(memory.span()) }.unwrap();
    let [first, second] = [100, 3000].map(|size| ranges.alloc(Layout::array::<u8>(size).unwrap()).unwrap());
    // SAFETY: live.
    let grown = unsafe {
        ranges.free(first.start);
        ranges.grow(second.start, 5000).unwrap()
    };
    let bytes = (first.size + grown) as u64;
    let peak = grown.max(first.size + second.size);
    assert_eq!(ranges.totals(), Totals { allocs: 2, frees: 1, alloc_bytes: bytes, peak_bytes: peak });
    // SAFETY: live.
    unsafe { ranges.shrink(second.start, 100) };
    ranges.reset_peak();
    assert_eq!(ranges.totals().peak_bytes, ranges.live_bytes());
    let mut buckets = [0; HISTOGRAM_BUCKETS];
    ranges.count_sizes(&mut buckets);
    assert_eq!(buckets.iter().sum::<u64>(), 2);
}

/// Memory that is not there: whoever touches it dies.
#[test]
fn beside_touches_nothing() {
    for strategy in strategies() {
        let mut run = run::<Beside>(engine(strategy, 512, 512), 7, false);
        for start in [0_usize, 1 << 40, 1 << 45] {
            // SAFETY: the books lie beside, and nobody touches the memory.
            unsafe { run.ranges.add(Span { start: start + 100, len: 1 << 20, zeroed: false }) }.unwrap();
        }
        run.steps(1000);
        run.empty();
    }
}

#[test]
fn tickets_free_without_a_look_up() {
    let mut ranges = engine::<Beside>(Strategy::BestFit, 256, 256);
    // SAFETY: nobody touches the memory.
    unsafe { ranges.add(Span { start: 1 << 40, len: 1 << 20, zeroed: false }) }.unwrap();
    let layout = Layout::from_size_align(1000, 1).unwrap();
    let (first, block) = ranges.alloc_ticket(layout).unwrap();
    let (second, other) = ranges.alloc_ticket(layout).unwrap();
    assert_eq!((block.size, ranges.usable_size(block.start)), (1024, None));
    // SAFETY: the tickets are of this engine, and each is used once.
    unsafe {
        assert_eq!(ranges.block_of(&first).start, block.start);
        assert_eq!(ranges.grow_ticket(&second, 5000), Some(5120));
        assert_eq!(ranges.shrink_ticket(&second, 1), 256);
        assert_eq!(ranges.publish(second), other.start);
        assert_eq!(ranges.usable_size(other.start), Some(256));
        let second = ranges.withdraw(other.start);
        assert_eq!(ranges.usable_size(other.start), None);
        assert_eq!(ranges.free_ticket(first), 1024);
        assert_eq!(ranges.free_ticket(second), 256);
    }
    ranges.check().unwrap();
    assert_eq!(ranges.free_bytes(), (1 << 20, 1 << 20));
}

#[test]
fn books_beside_stay_small() {
    let mut ranges = engine::<Beside>(Strategy::Segregated, 256, 256);
    // SAFETY: nobody touches the memory.
    unsafe { ranges.add(Span { start: 1 << 40, len: 1 << 30, zeroed: false }) }.unwrap();
    for _ in 0..100_000 {
        ranges.alloc(Layout::from_size_align(256, 1).unwrap()).unwrap();
        let live = ranges.live_blocks();
        assert!(live < 1000 || ranges.footprint() <= 32 * live, "{} for {live}", ranges.footprint());
    }
}

#[test]
fn books_in_blocks_take_eight_bytes() {
    let memory = Memory::new(1 << 20);
    let mut ranges = engine::<InBlocks>(Strategy::Segregated, 16, 0);
    // SAFETY: the memory is ours and outlives the engine.
    unsafe { ranges.add(memory.span()) }.unwrap();
    let mut count = 0;
    while let Some(block) = ranges.alloc(Layout::new::<[u8; 56]>()) {
        assert!(block.size == 56 || ranges.free_bytes().0 == 0);
        count += 1;
    }
    assert_eq!(count, ((1 << 20) - 48) / 64);
}

#[test]
fn wrong_addresses_are_told_apart() {
    fn faults<S: Store>(ranges: &mut Ranges<S>, start: usize) {
        let layout = Layout::from_size_align(1000, 16).unwrap();
        let blocks = [(); 3].map(|()| ranges.alloc(layout).unwrap());
        let inside = blocks[1].start;
        let expected = [
            (start - 16, PointerFault::Foreign),
            (start + (1 << 16), PointerFault::Foreign),
            (usize::MAX, PointerFault::Foreign),
            (0, PointerFault::Foreign),
            (inside + 1, PointerFault::Interior),
            (inside + 16, PointerFault::Interior),
            (inside + 992, PointerFault::Interior),
            (blocks[2].start + 4096, PointerFault::NotLive),
            (start + (1 << 16) - 1, PointerFault::NotLive),
        ];
        for (address, fault) in expected {
            assert_eq!(ranges.usable_size(address), None);
            // SAFETY: refused before anything is touched.
            assert_eq!(unsafe { ranges.free_checked(address) }, Err(fault), "{address:#x}");
        }
        // Freed, merged to the left, merged to the right, and used again.
        for nth in [0, 2, 1] {
            // SAFETY: live, then refused.
            let (once, twice) =
                unsafe { (ranges.free_checked(blocks[nth].start), ranges.free_checked(blocks[nth].start)) };
            assert!(once.is_ok());
            assert_eq!(twice, Err(PointerFault::NotLive));
            ranges.check().unwrap();
        }
        let all = ranges.alloc(Layout::from_size_align(3000, 16).unwrap()).unwrap();
        // SAFETY: refused before anything is touched.
        assert_eq!(unsafe { ranges.free_checked(blocks[2].start) }, Err(PointerFault::Interior));
        assert_eq!(ranges.usable_size(all.start), Some(all.size));
    }
    let memory = Memory::new(1 << 16);
    let mut ranges = engine::<InBlocks>(Strategy::Segregated, 16, 0);
    // SAFETY: the memory is ours and outlives the engine.
    unsafe { ranges.add(memory.span()) }.unwrap();
    faults(&mut ranges, memory.start);
    let mut ranges = engine::<Beside>(Strategy::Segregated, 16, 0);
    // SAFETY: nobody touches the memory.
    unsafe { ranges.add(memory.span()) }.unwrap();
    faults(&mut ranges, memory.start);
}

#[test]
fn spans_too_small_come_back() {
    let memory = Memory::new(4096);
    let mut ranges = engine::<InBlocks>(Strategy::Segregated, 16, 0);
    for (from, len, room) in [(0, 0, false), (8, 70, false), (1, 64, false), (16, 80, true)] {
        let span = Span { start: memory.start + from, len, zeroed: false };
        // SAFETY: the memory is ours; a span that was taken is removed again.
        let added = unsafe { ranges.add(span) };
        assert_eq!(added, if room { Ok(()) } else { Err(span) }, "{len}");
        ranges.check().unwrap();
        assert_eq!(ranges.remove_idle(usize::MAX).is_some(), room);
    }
    let mut ranges = engine::<Beside>(Strategy::Segregated, 256, 0);
    let span = Span { start: 1, len: 510, zeroed: false };
    // SAFETY: nothing is touched.
    assert_eq!(unsafe { ranges.add(span) }, Err(span));
    // SAFETY: nothing is touched.
    assert_eq!(unsafe { ranges.add(Span { start: 255, len: 257, zeroed: false }) }, Ok(()));
}

#[test]
fn impossible_requests_are_refused() {
    let memory = Memory::new(4096);
    for strategy in strategies() {
        let mut ranges = engine::<InBlocks>(strategy, 16, 0);
        // SAFETY: the memory is ours and outlives the engine.
        unsafe { ranges.add(memory.span()) }.unwrap();
        for (size, align) in
            [(4096, 1), (isize::MAX as usize, 1), (1, 1 << 30), (isize::MAX as usize >> 1, 1 << 62)]
        {
            assert_eq!(ranges.alloc(Layout::from_size_align(size, align).unwrap()), None);
        }
        let block = ranges.alloc(Layout::new::<u64>()).unwrap();
        // SAFETY: the block is live.
        unsafe {
            assert_eq!(ranges.grow(block.start, usize::MAX), None);
            assert_eq!(ranges.grow(block.start, 1 << 20), None);
            assert_eq!(ranges.shrink(block.start, usize::MAX), 24);
        }
        ranges.check().unwrap();
    }
    for granule in [0, 8, 24, 1 << 31] {
        let division = Division { granule, ..Division::default() };
        assert!(Ranges::<InBlocks>::new(division).is_err());
    }
}

#[test]
fn fresh_memory_stays_known_as_zero() {
    let memory = Memory::new(1 << 16);
    let mut ranges = engine::<InBlocks>(Strategy::Segregated, 16, 0);
    // SAFETY: the memory is ours and outlives the engine.
    unsafe { ranges.add(memory.span()) }.unwrap();
    let small = Layout::from_size_align(200, 16).unwrap();
    let first = ranges.alloc(small).unwrap();
    let second = ranges.alloc(small).unwrap();
    assert!(first.zeroed() && second.zeroed());
    for block in [first, second] {
        bytes(block).fill(0xff);
    }
    // SAFETY: both are live.
    unsafe {
        ranges.free(first.start);
        ranges.free(second.start);
    }
    // Both were joined with what was never touched: a large block knows how far the dirt goes.
    let large = ranges.alloc(Layout::from_size_align(32768, 16).unwrap()).unwrap();
    assert!(large.dirty > 400 && large.dirty < 500, "{large:?}");
    assert!(bytes(large)[large.dirty..].iter().all(|byte| *byte == 0));
    bytes(large).fill(0xff);
    // SAFETY: nothing is used any more.
    unsafe { ranges.reset() };
    ranges.check().unwrap();
    let all = ranges.alloc(Layout::from_size_align(60000, 16).unwrap()).unwrap();
    assert!(all.dirty > 32768 && all.dirty < 34000, "{all:?}");
    assert!(bytes(all)[all.dirty..].iter().all(|byte| *byte == 0));
}

#[test]
fn alignment_wastes_nothing() {
    let memory = Memory::new(1 << 18);
    for strategy in strategies() {
        let mut ranges = engine::<InBlocks>(strategy, 16, 0);
        // SAFETY: the memory is ours and outlives the engine.
        unsafe { ranges.add(memory.span()) }.unwrap();
        let (before, _) = ranges.free_bytes();
        let block = ranges.alloc(Layout::from_size_align(4096, 1 << 16).unwrap()).unwrap();
        assert_eq!((block.start % (1 << 16), block.size), (0, 4104));
        assert_eq!(ranges.free_bytes().0, before - 4112);
        // SAFETY: the block is live.
        unsafe { ranges.free(block.start) };
        assert_eq!(ranges.free_bytes().0, before);
        ranges.check().unwrap();
    }
}

#[test]
fn a_broken_invariant_is_found() {
    let memory = Memory::new(1 << 16);
    let mut ranges = engine::<InBlocks>(Strategy::Segregated, 16, 0);
    // SAFETY: the memory is ours and outlives the engine.
    unsafe { ranges.add(memory.span()) }.unwrap();
    let blocks = [(); 4].map(|()| ranges.alloc(Layout::new::<[u8; 100]>()).unwrap());
    // SAFETY: live.
    unsafe { ranges.free(blocks[1].start) };
    ranges.check().unwrap();
    // One word too many written by the owner of the first block.
    // SAFETY: the memory is ours.
    unsafe { core::ptr::with_exposed_provenance_mut::<u64>(blocks[0].start + blocks[0].size).write(0x0102) };
    assert!(ranges.check().is_err());
}

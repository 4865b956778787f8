//! Tests on hubs of their own, with the invariants walked as they go.

#[path = "../../tests/children/mod.rs"]
mod children;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use super::*;

/// A hub that is taken down at the end.
pub(super) struct TestHub(pub(super) Box<Hub>);

impl TestHub {
    pub(super) fn new(limit: usize) -> Self {
        let hub = Box::new(Hub::new(limit));
        hub.enlist();
        Self(hub)
    }

    pub(super) fn heap(&self) -> TestHeap<'_> {
        self.try_heap().unwrap()
    }

    pub(super) fn try_heap(&self) -> Option<TestHeap<'_>> {
        Some(TestHeap { hub: &self.0, heap: self.0.take_heap()? })
    }
}

impl Drop for TestHub {
    fn drop(&mut self) {
        // SAFETY: heaps borrow the hub, so none is in use.
        unsafe { self.0.demolish() };
    }
}

pub(super) struct TestHeap<'a> {
    hub: &'a Hub,
    pub(super) heap: &'a ThreadHeap,
}

// SAFETY: a test heap is used by one thread at a time.
unsafe impl Send for TestHeap<'_> {}

impl TestHeap<'_> {
    fn alloc(&self, size: usize, align: usize) -> *mut u8 {
        let block = match of_layout(size, align) {
            Some(class) => self.heap.alloc(class),
            None => self.heap.alloc_big(size, align).0,
        };
        assert!(block.is_null() || block.addr().is_multiple_of(align), "{size} {align}");
        block
    }

    fn free(&self, block: *mut u8, size: usize, align: usize) {
        // SAFETY: the tests free live blocks, once.
        unsafe {
            match of_layout(size, align) {
                Some(class) => self.heap.free(class, block),
                None => _ = self.heap.free_unsized(block),
            }
        }
    }

    pub(super) fn check(&self) {
        if let Err(broken) = self.heap.check() {
            panic!("{broken}");
        }
    }
}

impl Drop for TestHeap<'_> {
    fn drop(&mut self) {
        self.heap.end();
        self.hub.put_heap(self.heap);
    }
}

pub(super) struct Random(pub(super) u64);
impl Random {
    pub(super) fn next(&mut self) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize
    }
    pub(super) fn below(&mut self, end: usize) -> usize {
        self.next() % end
    }
    /// Small sizes often, large ones now and then.
    fn size(&mut self) -> usize {
        let most = if self.below(50) == 0 { 18 } else { 9 };
        let bits = 4 + self.below(most);
        1 + self.below(1 << bits)
    }
}

fn fill(block: *mut u8, size: usize, seed: usize) {
    // SAFETY: a live block of that size.
    unsafe {
        block.write(seed as u8);
        block.add(size - 1).write(seed as u8);
        block.add(size / 2).write(seed as u8);
    }
}

fn verify(block: *mut u8, size: usize, seed: usize) {
    // SAFETY: as above.
    unsafe {
        assert_eq!(block.add(size / 2).read(), seed as u8);
        assert!(block.read() == seed as u8 && block.add(size - 1).read() == seed as u8);
    }
}

#[test]
fn random_lifetimes_keep_every_invariant() {
    let hub = TestHub::new(usize::MAX);
    let heap = hub.heap();
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut live = Vec::new();
    for step in 0..60_000usize {
        let grow = (step / 10_000) % 2 == 0;
        if live.is_empty() || random.below(100) < if grow { 60 } else { 40 } {
            let size = random.size();
            let align = if random.below(20) == 0 { 1 << random.below(18) } else { 8 };
            let block = heap.alloc(size, align);
            assert!(!block.is_null());
            fill(block, size, step);
            live.push((block, size, align, step));
        } else {
            let (block, size, align, seed) = live.swap_remove(random.below(live.len()));
            verify(block, size, seed);
            if random.below(4) == 0 {
                // SAFETY: live, freed once.
                unsafe { heap.heap.free_unsized(block) };
            } else {
                heap.free(block, size, align);
            }
        }
        if step % 200 == 0 {
            heap.check();
        }
    }
    let mut sorted: Vec<_> = live.iter().map(|&(block, size, ..)| (block.addr(), size)).collect();
    sorted.sort_unstable();
    assert!(sorted.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "blocks overlap");
    for (block, size, align, seed) in live {
        verify(block, size, seed);
        heap.free(block, size, align);
    }
    heap.check();
    heap.heap.purge_all();
    heap.check();
    assert_eq!(heap.heap.live.get(), 0);
    assert_eq!(hub.0.snapshot().large, 0);
}

#[test]
fn memory_goes_back_when_it_is_freed() {
    let hub = TestHub::new(usize::MAX);
    let heap = hub.heap();
    let mut random = Random(7);
    let mut live = Vec::new();
    let mut bytes = 0;
    while bytes < 64 << 20 {
        let size = 16usize << random.below(8) | random.below(16);
        let block = heap.alloc(size, 8);
        // SAFETY: a fresh block.
        unsafe { block.write_bytes(1, size) };
        bytes += size;
        live.push((block, size));
    }
    let full = hub.0.snapshot().committed;
    assert!(full < bytes * 5 / 4, "{full} for {bytes}");
    for at in (1..live.len()).rev() {
        live.swap(at, random.below(at + 1));
    }
    let keep = live.len() / 20;
    for (block, size) in live.drain(keep..) {
        heap.free(block, size, 8);
    }
    heap.check();
    let few = hub.0.snapshot().committed;
    // On larger pages fewer of them hold free blocks only.
    let larger = crate::source::os::page_size() / 4096;
    assert!(few < full / 2 || larger > 1, "{few} of {full} after 95 % was freed");
    for (block, size) in live {
        heap.free(block, size, 8);
    }
    heap.check();
    let idle = hub.0.snapshot().committed;
    assert!(idle < full / if larger > 1 { 4 } else { 8 }, "{idle} of {full} after all was freed");
}

#[test]
fn blocks_travel_between_threads() {
    let hub = TestHub::new(usize::MAX);
    let (sender, receiver) = mpsc::sync_channel::<(usize, usize, usize)>(1000);
    let most = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let hub = &hub;
        scope.spawn(move || {
            let heap = hub.heap();
            let mut random = Random(3);
            for step in 0..200_000 {
                let size = random.size();
                let block = heap.alloc(size, 8);
                fill(block, size, step);
                sender.send((block.addr(), size, step)).unwrap();
                if step % 10_000 == 0 {
                    heap.check();
                }
            }
        });
        scope.spawn(|| {
            let heap = hub.heap();
            for (block, size, seed) in receiver {
                verify(block as *mut u8, size, seed);
                heap.free(block as *mut u8, size, 8);
                most.fetch_max(hub.0.snapshot().reserved as u64, Ordering::Relaxed);
            }
            heap.check();
        });
    });
    // What travels is at most 1000 blocks of some KiB on average: the heap stays small.
    assert!(most.load(Ordering::Relaxed) < 256 << 20, "{most:?} bytes reserved");
    let heap = hub.heap();
    while let Some(segment) = hub.0.adopt_any(heap.heap, |_| true, true) {
        heap.heap.welcome(segment);
    }
    heap.check();
    assert_eq!(heap.heap.live.get(), 0, "a block got lost on its way");
}

#[test]
fn threads_leave_their_blocks_to_others() {
    let hub = TestHub::new(usize::MAX);
    let mut left = HashMap::new();
    for round in 0..40usize {
        let blocks: Vec<(usize, usize)> = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let heap = hub.heap();
                    let mut random = Random(round as u64 + 1);
                    let blocks: Vec<_> = (0..2000)
                        .map(|_| {
                            let size = random.size();
                            let block = heap.alloc(size, 8);
                            fill(block, size, round);
                            (block.addr(), size)
                        })
                        .collect();
                    heap.check();
                    blocks
                })
                .join()
                .unwrap()
        });
        let heap = hub.heap();
        for (at, (block, size)) in blocks.into_iter().enumerate() {
            if at % 10 == 0 {
                assert!(left.insert(block, (size, round)).is_none(), "handed out twice");
            } else {
                verify(block as *mut u8, size, round);
                heap.free(block as *mut u8, size, 8);
            }
        }
        heap.check();
    }
    let heap = hub.heap();
    for (block, (size, round)) in left {
        verify(block as *mut u8, size, round);
        heap.free(block as *mut u8, size, 8);
    }
    heap.heap.purge_all();
    heap.check();
    drop(heap);
    let heap = hub.heap();
    while let Some(segment) = hub.0.adopt_any(heap.heap, |_| true, true) {
        heap.heap.welcome(segment);
    }
    assert_eq!(heap.heap.live.get(), 0);
}

/// Mappings that ask for huge pages are whole ones, and so are the parts that spares are cut into; none takes more than a
/// sixteenth for that.
#[test]
fn large_blocks_take_whole_huge_pages_where_that_is_little_more() {
    const MIB: usize = 1 << 20;
    let hub = TestHub::new(usize::MAX);
    let settings = &hub.0.settings;
    assert_eq!(settings.large_len(39 * MIB), 40 * MIB);
    assert_eq!(settings.large_len(11 * MIB), 11 * MIB, "a megabyte is more than a sixteenth of it");
    assert_eq!(settings.large_len(3 * MIB + 8192), 3 * MIB + 8192, "small pages");
    assert_eq!(settings.large_len(40 * MIB), 40 * MIB);
    let heap = hub.heap();
    let (long, other) = (heap.alloc(25 * MIB, 8), heap.alloc(60 * MIB, 8));
    heap.free(long, 25 * MIB, 8);
    let kept = hub.0.spare_bytes();
    assert_eq!(kept, 26 * MIB);
    let short = heap.alloc(9 * MIB + 5, 8);
    // SAFETY: the block is live.
    assert_eq!(unsafe { usable_size(short) }, 10 * MIB - crate::source::os::page_size());
    assert!(hub.0.spare_bytes().is_multiple_of(2 * MIB));
    heap.free(short, 9 * MIB + 5, 8);
    heap.free(other, 60 * MIB, 8);
    heap.check();
}

/// Whoever frees into a segment of a thread that ended does not come to own what lies idle there; where nothing is live
/// any more it goes to whom it may concern, and what is too much of it back to the system.
#[test]
fn idle_memory_of_threads_that_ended_is_for_who_needs_it() {
    const SIZE: usize = 4000;
    const BLOCKS: usize = 4000;
    let hub = TestHub::new(usize::MAX);
    let blocks: Vec<usize> = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let heap = hub.heap();
            (0..BLOCKS).map(|_| heap.alloc(SIZE, 8).addr()).collect()
        });
        work.join().unwrap()
    });
    let heap = hub.heap();
    let held = hub.0.snapshot().committed;
    assert!(held >= BLOCKS * SIZE && heap.heap.segment_count.get() == 0);
    // A few, from all over: none is adopted.
    let (few, rest): (Vec<_>, Vec<_>) = blocks.into_iter().enumerate().partition(|(at, _)| at % 101 == 0);
    few.iter().for_each(|&(_, block)| heap.free(block as *mut u8, SIZE, 8));
    heap.heap.flush_all();
    heap.check();
    assert_eq!((heap.heap.segment_count.get(), heap.heap.live.get()), (0, 0));
    rest.iter().for_each(|&(_, block)| heap.free(block as *mut u8, SIZE, 8));
    heap.heap.flush_all();
    heap.check();
    let snapshot = hub.0.snapshot();
    assert!(snapshot.committed <= held / 4, "{} of {held}", snapshot.committed);
    assert!(hub.0.shared.lock().warm <= hub.0.settings.warm(hub.0.threads(), 0) + segment::SEGMENT);
    // And it is found by who needs it.
    let reserved = hub.0.counters.reserved.load(Ordering::Relaxed);
    let again: Vec<*mut u8> = (0..BLOCKS / 2).map(|_| heap.alloc(SIZE, 8)).collect();
    assert_eq!(hub.0.counters.reserved.load(Ordering::Relaxed), reserved);
    again.into_iter().for_each(|block| heap.free(block, SIZE, 8));
    heap.check();
}

/// What a heap is put through while the system refuses it memory: all kinds of sizes, growth in place, frees.
/// Returns how many requests failed.
fn strain(hub: &TestHub, seed: u64) -> usize {
    let Some(heap) = hub.try_heap() else { return 1 };
    let mut random = Random(seed + 1);
    let mut live = Vec::new();
    let mut failed = 0;
    for _ in 0..4_000 {
        let size = random.size();
        let align = if random.below(30) == 0 { 1 << random.below(18) } else { 8 };
        let block = heap.alloc(size, align);
        if block.is_null() {
            failed += 1;
            continue;
        }
        fill(block, size, size);
        live.push((block, size, align));
        if random.below(3) == 0 {
            let (block, size, align) = live.swap_remove(random.below(live.len()));
            verify(block, size, size);
            heap.free(block, size, align);
        } else if size > SINGLE_MAX {
            // SAFETY: live, and the books move with the block.
            match unsafe { resize_big(block, 2 * size, true) } {
                Some((moved, _)) => {
                    live.pop();
                    fill(moved, 2 * size, 2 * size);
                    live.push((moved, 2 * size, align));
                }
                None => verify(block, size, size),
            }
        }
    }
    heap.check();
    for (block, size, align) in live.drain(..) {
        verify(block, size, size);
        heap.free(block, size, align);
    }
    heap.check();
    failed
}

/// Every call to the system fails in its turn, first alone and then with all that follow.
#[test]
fn a_heap_without_memory_says_so_and_goes_on() {
    let mut needed = 0;
    for nth in 0.. {
        let hub = TestHub::new(usize::MAX);
        hub.0.fail_after.store(nth, Ordering::Relaxed);
        hub.0.fail_once.store(true, Ordering::Relaxed);
        strain(&hub, 7);
        if hub.0.fail_after.load(Ordering::Relaxed) != u64::MAX {
            needed = nth;
            break;
        }
        block_after_all(&hub);
    }
    assert!(needed > 20, "{needed} calls are too few to say much");
    let mut starved = 0;
    for from in 0..needed {
        let hub = TestHub::new(usize::MAX);
        hub.0.fail_after.store(from, Ordering::Relaxed);
        // Late calls only give back or try to grow in place, and nobody misses those.
        starved += usize::from(strain(&hub, 7) > 0);
        hub.0.fail_after.store(u64::MAX, Ordering::Relaxed);
        block_after_all(&hub);
    }
    assert!(starved > 5, "{starved} of {needed}");
}

fn block_after_all(hub: &TestHub) {
    let heap = hub.heap();
    for size in [64, 300_000, 3 << 20] {
        let block = heap.alloc(size, 8);
        assert!(!block.is_null(), "the heap goes on");
        heap.free(block, size, 8);
    }
    heap.check();
}

#[test]
fn a_limit_holds_and_freed_memory_can_be_had_again() {
    let hub = TestHub::new(4 << 20);
    let heap = hub.heap();
    for size in [16, 1000, 5000, 70_000, 2 << 20] {
        let mut live = Vec::new();
        loop {
            let block = heap.alloc(size, 8);
            if block.is_null() {
                break;
            }
            live.push(block);
        }
        let got = live.len() * size;
        assert!((2 << 20..=4 << 20).contains(&got), "{got} bytes in blocks of {size}");
        heap.check();
        live.into_iter().for_each(|block| heap.free(block, size, 8));
        heap.check();
    }
}

#[test]
fn large_blocks_grow_without_copying() {
    let hub = TestHub::new(usize::MAX);
    let heap = hub.heap();
    let mut block = heap.alloc(2 << 20, 64);
    // SAFETY: a live block, which moves.
    unsafe {
        block.write(42);
        for size in [5 << 20, 40 << 20, 3 << 20, 90 << 20, 2 << 20] {
            // Other tests of this process map meanwhile, so a place may be gone before the block gets there.
            let resized = (0..1000).find_map(|_| resize_big(block, size, true));
            block = resized.unwrap().0;
            assert!(usable_size(block) >= size && owns(&hub.0, block.addr() + size - 1));
            assert_eq!(block.read(), 42);
            block.add(size - 1).write(1);
        }
    }
    assert_eq!(block_size_at(&hub.0, block), Some(2 << 20));
    heap.free(block, 2 << 20, 64);
    assert!(!owns(&hub.0, block.addr()));
    assert_eq!(hub.0.counters.large_live.load(Ordering::Relaxed), 0);
}

#[test]
fn a_large_block_takes_the_pages_of_one_freed_and_no_more_than_a_part_is_kept() {
    const SIZE: usize = 4 << 20;
    let hub = TestHub::new(usize::MAX);
    let heap = hub.heap();
    let held = || hub.0.counters.reserved.load(Ordering::Relaxed);
    let mut blocks: Vec<_> = (0..24).map(|_| heap.alloc(SIZE, 64)).collect();
    // SAFETY: live blocks, whose last word nobody else writes.
    let last_word = |block: *mut u8| unsafe { block.add(usable_size(block) - 8).cast::<usize>() };
    for (at, &block) in blocks.iter().enumerate() {
        // SAFETY: as above.
        unsafe { last_word(block).write(at) };
    }
    let mut peak = 0;
    for (step, size) in
        [SIZE, SIZE / 2, 2 * SIZE, SIZE + 4096, 3 * SIZE, 2 << 20].into_iter().enumerate().cycle().take(40)
    {
        let at = step * 7 % blocks.len();
        let before = (held(), hub.0.counters.large_live.load(Ordering::Relaxed));
        fill(blocks[at], SIZE / 4, 0xEE);
        // SAFETY: as above.
        assert_eq!(unsafe { last_word(blocks[at]).read() }, at, "no block lies in another");
        heap.free(blocks[at], SIZE, 64);
        assert!(!owns(&hub.0, blocks[at].addr()), "free is free, its pages kept or not");
        let idle = held() + before.1 - before.0 - hub.0.counters.large_live.load(Ordering::Relaxed);
        let live = hub.0.counters.large_live.load(Ordering::Relaxed);
        peak = peak.max(before.1);
        assert!(
            idle <= live / 2 && idle + live <= peak + peak / 16,
            "{idle} bytes kept beside {live} of {peak}"
        );
        let (block, zeroed) = heap.heap.alloc_big(size, 64);
        assert!(block_size_at(&hub.0, block).is_some_and(|usable| usable >= size));
        // SAFETY: a live block of that size.
        let bytes = unsafe { std::slice::from_raw_parts(block, size) };
        assert!(!zeroed || bytes.iter().all(|byte| *byte == 0), "said to be zero");
        // SAFETY: as above.
        unsafe { last_word(block).write(at) };
        blocks[at] = block;
    }
    heap.check();
    let all = held();
    blocks.into_iter().for_each(|block| heap.free(block, 2 << 20, 64));
    heap.heap.purge_all();
    assert_eq!(hub.0.counters.large_live.load(Ordering::Relaxed), 0);
    assert!(all - held() >= 24 * (2 << 20), "no large block, and nothing kept for one");
    assert_eq!(hub.0.trim(), 0, "nothing was left to give");
}

#[test]
fn absurd_requests_are_refused() {
    let hub = TestHub::new(usize::MAX);
    let heap = hub.heap();
    for (size, align) in
        [(isize::MAX as usize, 1), (1, 1 << 62), (1 << 46, 1 << 46), (isize::MAX as usize - 4096, 4096)]
    {
        assert!(heap.alloc(size, align).is_null(), "{size} {align}");
    }
    // Address space would do for this one; memory would not, and Linux says so unless it was told to believe all.
    let mode = std::fs::read_to_string("/proc/sys/vm/overcommit_memory");
    if mode.is_ok_and(|mode| mode.trim() != "1") {
        assert!(heap.alloc(1 << 45, 16).is_null());
    }
    for align in [1 << 17, 1 << 22, 1 << 23, 1 << 30] {
        let block = heap.alloc(100, align);
        assert!(!block.is_null());
        fill(block, 100, 1);
        // SAFETY: live.
        unsafe { heap.heap.free_unsized(block) };
    }
    heap.check();
}

/// The same tests on pages of 16 and 64 KiB.
#[test]
fn pages_may_be_larger() {
    use crate::source::os::{PLAYED_PAGE, page_size};
    if page_size() > 4096 {
        return;
    }
    for kib in [16usize, 64] {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["heap::tests", "--test-threads", "1"]).env(PLAYED_PAGE, (kib << 10).to_string());
        let run = children::output_of(&mut command).unwrap();
        let text = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success(), "{kib} KiB: {text}");
        assert!(!text.contains("running 0 tests"), "{text}");
    }
}

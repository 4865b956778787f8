//! Everything at once, at random: heaps that are hardened or not, limited or not, threads that come and go and pass
//! blocks around, blocks that are resized, idle memory given back, a system that fails; what blocks hold and the
//! invariants are checked on the way. `cargo test` does it for seconds; `just soak 600` for as long as one likes.

use core::cell::Cell;
use core::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::lock::SpinLock;
use super::tests::{Random, TestHeap, TestHub};
use super::*;
use crate::base::heap_config::{Hardening, HeapConfig, HugeUse, Purge};

const WORKERS: usize = 3;
const MOST_LIVE: usize = 300;

struct Block {
    at: *mut u8,
    size: usize,
    align: usize,
    seed: u8,
}
// SAFETY: whoever has it, has the block.
unsafe impl Send for Block {}

impl Block {
    /// What is looked at: the ends.
    fn ends(&self) -> impl Iterator<Item = &Cell<u8>> {
        let len = self.size.min(64);
        // SAFETY: a live block of that size, in this thread's hands.
        let end = |from: usize| unsafe { core::slice::from_raw_parts(self.at.add(from).cast(), len) };
        end(0).iter().chain(end(self.size - len))
    }

    fn fill(&self) {
        self.ends().for_each(|byte| byte.set(self.seed));
    }

    fn verify(&self) {
        let holds = self.ends().all(|byte| byte.get() == self.seed);
        assert!(holds, "{} bytes at {:p} were overwritten", self.size, self.at);
    }
}

/// One hub and what is on its way between its threads.
struct Round {
    hub: TestHub,
    /// Under the heap's own lock, since the thread sanitizer does not see into that of std.
    mail: [SpinLock<Vec<Block>>; WORKERS],
    /// Whether calls to the system are made to fail.
    faults: bool,
    may_refuse: bool,
}

impl Round {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed | 1);
        let mut one_in = |n| random.below(n) == 0;
        let hardened = match (one_in(2), one_in(2)) {
            (true, _) => Hardening::OFF,
            (false, true) => Hardening::FULL,
            (false, false) => Hardening {
                checks: one_in(2),
                guard_pages: one_in(2),
                random_order: one_in(2),
                quarantine: one_in(2),
            },
        };
        let config = HeapConfig::new()
            .hardened(hardened)
            .zero_on_free(one_in(5))
            .debug(one_in(5))
            .limit(if one_in(3) { 24 << 20 } else { usize::MAX })
            .purge([Purge::Balanced, Purge::Eager, Purge::Never][random.below(3)])
            .huge_pages([HugeUse::WhenLarge, HugeUse::Never, HugeUse::Always][random.below(3)]);
        let faults = random.below(4) == 0;
        let hub = TestHub::new(config.limit);
        hub.0.configure(&config);
        Self {
            hub,
            mail: core::array::from_fn(|_| SpinLock::new(Vec::new())),
            faults,
            may_refuse: faults || config.limit != usize::MAX,
        }
    }

    fn run(&self, seed: u64, steps: usize) {
        std::thread::scope(|scope| {
            for worker in 0..WORKERS {
                let name = format!("soak, seed {seed:#x}");
                let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (worker as u64 + 1);
                let work = move || Worker::new(self, worker, seed).run(steps);
                std::thread::Builder::new().name(name).spawn_scoped(scope, work).unwrap();
            }
        });
        self.hub.0.fail_after.store(u64::MAX, Ordering::Relaxed);
        let heap = self.hub.heap();
        for block in self.mail.iter().flat_map(|mail| core::mem::take(&mut *mail.lock())) {
            block.verify();
            free(&heap, &block);
        }
        let mut live = 0;
        heap.heap.for_each_live(|_, _| live += 1);
        heap.check();
        heap.heap.purge_all();
        heap.check();
        assert_eq!((live, heap.heap.live.get(), self.hub.0.snapshot().large), (0, 0, 0), "seed {seed:#x}");
    }
}

fn alloc(heap: &TestHeap<'_>, size: usize, align: usize) -> (*mut u8, bool) {
    match of_layout(size, align) {
        Some(class) => (heap.heap.alloc_aligned(class, align), false),
        None => heap.heap.alloc_big(size, align),
    }
}

fn free(heap: &TestHeap<'_>, block: &Block) {
    // SAFETY: a live block, which whoever calls has and forgets.
    unsafe { heap.heap.free_unsized(block.at) };
}

struct Worker<'a> {
    round: &'a Round,
    number: usize,
    random: Random,
    heap: Option<TestHeap<'a>>,
    live: Vec<Block>,
}

impl<'a> Worker<'a> {
    fn new(round: &'a Round, number: usize, seed: u64) -> Self {
        Self { round, number, random: Random(seed | 1), heap: None, live: Vec::new() }
    }

    fn run(mut self, steps: usize) {
        for _ in 0..steps {
            if self.heap.is_none() {
                // Where the system fails there may be none this time.
                self.heap = self.round.hub.try_heap();
                assert!(self.heap.is_some() || self.round.may_refuse);
                continue;
            }
            match self.random.below(200) {
                0..90 if self.live.len() < MOST_LIVE => self.take_one(),
                0..150 => self.free_one(),
                150..170 => self.send_one(),
                170..184 => {
                    let arrived = core::mem::take(&mut *self.round.mail[self.number].lock());
                    self.live.extend(arrived);
                }
                184..196 => self.resize_one(),
                _ => self.do_something_rare(),
            }
        }
        self.heap = self.heap.or_else(|| self.round.hub.try_heap());
        let Some(heap) = &self.heap else {
            return self.round.mail[self.number].lock().extend(self.live);
        };
        for block in &self.live {
            block.verify();
            free(heap, block);
        }
        heap.check();
    }

    fn heap(&self) -> &TestHeap<'a> {
        self.heap.as_ref().unwrap()
    }

    fn any(&mut self) -> Option<Block> {
        (!self.live.is_empty()).then(|| self.live.swap_remove(self.random.below(self.live.len())))
    }

    fn size(&mut self) -> usize {
        let most = if self.random.below(100) == 0 { 18 } else { 10 };
        let bits = 4 + self.random.below(most);
        1 + self.random.below(1 << bits)
    }

    fn take_one(&mut self) {
        let size = self.size();
        let align = if self.random.below(30) == 0 { 1 << self.random.below(24) } else { 8 };
        let (at, zeroed) = alloc(self.heap(), size, align);
        if at.is_null() {
            return assert!(self.round.may_refuse, "{size} bytes aligned to {align}");
        }
        assert!(at.addr().is_multiple_of(align), "{size} {align}");
        // SAFETY: live.
        assert!(unsafe { usable_size(at) } >= size);
        let block = Block { at, size, align, seed: self.random.next() as u8 };
        assert!(!zeroed || block.ends().all(|byte| byte.get() == 0), "{size}");
        block.fill();
        self.live.push(block);
    }

    fn free_one(&mut self) {
        if let Some(block) = self.any() {
            block.verify();
            free(self.heap(), &block);
        }
    }

    fn send_one(&mut self) {
        let to = self.random.below(WORKERS);
        if let Some(block) = self.any() {
            self.round.mail[to].lock().push(block);
        }
    }

    fn resize_one(&mut self) {
        let Some(mut block) = self.any() else { return };
        let size = if self.random.below(2) == 0 { self.size() } else { block.size + block.size / 2 + 1 };
        // SAFETY: a live block of ours.
        let resized = if unsafe { usable_size(block.at) } > CLASS_MAX {
            // SAFETY: as above.
            unsafe { resize_big(block.at, size, self.random.below(2) == 0) }
        } else {
            None
        };
        match resized {
            Some((at, zero_from)) => {
                block.at = at;
                let kept = block.size.min(size).min(64);
                // SAFETY: live, and as large as both.
                let bytes = unsafe { core::slice::from_raw_parts(at, size) };
                assert!(bytes[..kept].iter().all(|&byte| byte == block.seed), "resized to {size}");
                assert!(bytes.iter().skip(zero_from).take(64).all(|&byte| byte == 0), "resized to {size}");
            }
            None => {
                let (at, _) = alloc(self.heap(), size, block.align);
                if at.is_null() {
                    return self.live.push(block);
                }
                block.verify();
                free(self.heap(), &block);
                block.at = at;
            }
        }
        block.size = size;
        block.fill();
        self.live.push(block);
    }

    fn do_something_rare(&mut self) {
        let hub = &self.round.hub.0;
        match self.random.below(16) {
            0 => _ = self.heap().heap.purge_all(),
            1 => _ = hub.trim(),
            // The thread ends and another begins: what it had lives on, in segments that somebody adopts.
            2 => self.heap = None,
            3 => _ = hub.snapshot(),
            4 if self.round.faults => {
                hub.fail_once.store(true, Ordering::Relaxed);
                hub.fail_after.store(self.random.below(4) as u64, Ordering::Relaxed);
            }
            _ => self.heap().check(),
        }
    }
}

#[test]
fn soak() {
    let seconds: u64 = std::env::var("MEMORY_POOL_SOAK_SECONDS").map_or(0, |text| text.parse().unwrap());
    let first = if seconds == 0 { 1 } else { std::process::id() as u64 };
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0;
    while rounds < 16 || Instant::now() < until {
        let seed = (first + rounds).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        if seconds > 0 {
            println!("seed {seed:#x}");
        }
        Round::new(seed).run(seed, 6000);
        rounds += 1;
    }
}

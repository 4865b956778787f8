//! How much more than its live bytes the process heap comes to hold, on its default configuration, under work that
//! makes heaps grow without bound: memory that only travels one way, threads that come and go, sizes that shift.
//!
//! The bound of each is stated where it is checked. A short form runs with all tests; an hour's worth of operations by
//! `just blow-up`, or with `MEMORY_POOL_BLOW_UP` set to the factor of work wanted.
//!
//! What is measured is what the system counts as resident, less what was resident before the work, and where the system
//! does not say, what the heap says it holds.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::mpsc;
use std::thread;

use memory_pool::GlobalPool;

#[global_allocator]
static POOL: GlobalPool = GlobalPool::new();

/// In this order, since what one thread may keep idle grows with the threads that ran at once so far.
#[test]
fn what_the_heap_holds_stays_in_bounds() {
    sizes_that_shift_stay_in_bounds();
    what_one_thread_makes_and_others_free_stays_in_bounds();
    threads_that_come_and_go_stay_in_bounds();
    idle_threads_hold_little();
}

/// How many times the short form's work is done.
fn factor() -> usize {
    std::env::var("MEMORY_POOL_BLOW_UP").map_or(1, |text| text.parse().expect("a number"))
}

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let fields = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = fields.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok());
    pages.map_or_else(|| GlobalPool::stats().committed, |pages| pages * 4096)
}

/// Checks what is held beside a known number of live bytes.
struct Gauge(usize);

impl Gauge {
    fn new() -> Self {
        GlobalPool::trim();
        Self(resident())
    }

    /// What is held beyond what was before.
    fn held(&self) -> usize {
        resident().saturating_sub(self.0)
    }

    /// What is held is at most `live · factor + base`.
    fn expect(&self, live: usize, factor: f64, base: usize, when: &str) {
        Self::expect_held(self.held(), live, factor, base, when);
    }

    fn expect_held(held: usize, live: usize, factor: f64, base: usize, when: &str) {
        let bound = (live as f64 * factor) as usize + base;
        assert!(held <= bound, "{when}: {held} bytes beside {live} live ones, {bound} allowed");
        if std::env::var_os("MEMORY_POOL_BLOW_UP").is_some() {
            println!("{when}: {:.1} MiB beside {:.1} live", held as f64 / 1048576.0, live as f64 / 1048576.0);
        }
    }
}

/// A stream of numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((((mixed ^ (mixed >> 31)) >> 32) * limit as u64) >> 32) as usize
    }
}

/// A block of which every page is written.
struct Block(*mut u8, Layout);
// SAFETY: a block is whoever's holds it.
unsafe impl Send for Block {}

impl Block {
    fn new(size: usize) -> Self {
        let layout = Layout::from_size_align(size, 8).unwrap();
        // SAFETY: no size here is zero.
        let block = unsafe { POOL.alloc(layout) };
        assert!(!block.is_null());
        for at in (0..size).step_by(4096).chain([size - 1]) {
            // SAFETY: within the block.
            unsafe { block.add(at).write(at as u8 | 1) };
        }
        Self(block, layout)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: live, and whole.
        unsafe {
            assert_eq!(self.0.add(self.1.size() - 1).read(), (self.1.size() - 1) as u8 | 1);
            POOL.dealloc(self.0, self.1);
        }
    }
}

/// One thread makes all blocks, others free them all, and never more than a few thousand are on the way.
fn what_one_thread_makes_and_others_free_stays_in_bounds() {
    const CONSUMERS: usize = 3;
    const ON_THE_WAY: usize = 500;
    const MEAN: usize = 1024;
    let gauge = Gauge::new();
    let mut numbers = Numbers(1);
    thread::scope(|scope| {
        let ways: Vec<_> = (0..CONSUMERS)
            .map(|_| {
                let (send, receive) = mpsc::sync_channel::<Block>(ON_THE_WAY);
                scope.spawn(move || receive.into_iter().for_each(drop));
                send
            })
            .collect();
        for step in 0..300_000 * factor() {
            ways[step % CONSUMERS].send(Block::new(16 + numbers.below(2 * MEAN - 16))).unwrap();
            if step % 50_000 == 49_999 {
                // So much is on the way at most; the base is for stacks, caches, and what is kept in any case.
                gauge.expect(CONSUMERS * ON_THE_WAY * MEAN, 2.0, 12 << 20, "a producer and consumers");
            }
        }
    });
}

/// Threads that come, take over half of the live blocks of those before them, and go.
fn threads_that_come_and_go_stay_in_bounds() {
    const BLOCKS: usize = 20_000;
    const THREADS: usize = 4;
    let gauge = Gauge::new();
    let mut tables: Vec<Vec<Block>> = (0..THREADS).map(|_| Vec::new()).collect();
    for round in 0..30 * factor() {
        tables = thread::scope(|scope| {
            let work = |at: usize, mut table: Vec<Block>| {
                let mut numbers = Numbers((round * THREADS + at) as u64);
                for _ in 0..BLOCKS {
                    let block = Block::new(16 + numbers.below(600));
                    if table.len() < BLOCKS {
                        table.push(block);
                    } else {
                        table[numbers.below(BLOCKS)] = block;
                    }
                }
                table
            };
            let threads: Vec<_> = tables
                .into_iter()
                .enumerate()
                .map(|(at, table)| scope.spawn(move || work(at, table)))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        // Each goes on with what another left.
        tables.rotate_left(1);
        let live = tables.iter().flatten().map(|block| block.1.size()).sum();
        // A thread keeps idle memory up to half of its live bytes, and up to 16 MiB that proved worth keeping.
        gauge.expect(live, 3.0, 8 << 20, "threads that come and go");
    }
}

/// Bytes of the pages that blocks lie in.
fn pages(blocks: &[Vec<Block>]) -> usize {
    let of = |block: &Block| block.0 as usize / 4096..(block.0 as usize + block.1.size()).div_ceil(4096);
    let mut all: Vec<u32> = Vec::with_capacity(blocks.iter().flatten().map(|block| of(block).len()).sum());
    all.extend(blocks.iter().flatten().flat_map(of).map(|page| page as u32));
    all.sort_unstable();
    all.dedup();
    all.len() * 4096 + blocks.iter().map(|table| table.capacity() * size_of::<Block>()).sum::<usize>()
}

/// Phases, each of other sizes than the last, that leave a tenth of their blocks to the next three. No heap that moves
/// nothing can hold less than the pages that live blocks lie in.
fn sizes_that_shift_stay_in_bounds() {
    const LIVE: usize = 24 << 20;
    let sizes = [24, 200, 56, 1000, 400, 9000, 120, 3000, 40_000, 700, 300_000, 80, 2_000_000, 16];
    let gauge = Gauge::new();
    let mut numbers = Numbers(5);
    let mut left: Vec<Vec<Block>> = Vec::with_capacity(5);
    for phase in 0..sizes.len() * 2 * factor() {
        let size = sizes[phase % sizes.len()];
        let count = LIVE / size;
        let mut blocks = Vec::with_capacity(count);
        blocks.extend((0..count).map(|_| Block::new(size + numbers.below(size / 4 + 1))));
        left.push(blocks);
        let held = gauge.held();
        Gauge::expect_held(held, pages(&left), 1.5, 64 << 20, "the crest of a phase");
        // Nine of ten go, in random order.
        let blocks = left.last_mut().unwrap();
        while blocks.len() * 10 > count {
            let at = numbers.below(blocks.len());
            drop(blocks.swap_remove(at));
        }
        if left.len() > 3 {
            left.remove(0);
        }
        let held = gauge.held();
        Gauge::expect_held(held, pages(&left), 2.0, 64 << 20, "after a phase");
    }
    drop(left);
    GlobalPool::trim();
    gauge.expect(0, 1.0, 4 << 20, "all freed");
}

/// Many threads that were busy once and wait since, while others free what they made.
fn idle_threads_hold_little() {
    const THREADS: usize = 32;
    let gauge = Gauge::new();
    thread::scope(|scope| {
        let (made, blocks) = mpsc::channel::<Vec<Block>>();
        let waiting: Vec<_> = (0..THREADS)
            .map(|at| {
                let made = made.clone();
                let (end, until) = mpsc::channel::<()>();
                scope.spawn(move || {
                    let mut numbers = Numbers(at as u64);
                    for _ in 0..20 * factor() {
                        drop((0..1000).map(|_| Block::new(16 + numbers.below(2000))).collect::<Vec<_>>());
                    }
                    made.send((0..100).map(|_| Block::new(16 + numbers.below(2000))).collect()).unwrap();
                    _ = until.recv();
                });
                end
            })
            .collect();
        for _ in 0..THREADS {
            drop(blocks.recv().unwrap());
        }
        // Each has had a megabyte live at once; as much again for what it keeps idle, its caches, its stack and its books.
        gauge.expect(THREADS << 20, 2.0, 8 << 20, "threads that wait");
        drop(waiting);
    });
}

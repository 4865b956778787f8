//! The debug layer over a pool of the simplest kind: every inner block is one of the system allocator.

use core::alloc::Layout;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use super::*;
use crate::base::config::{DebugConfig, OnFinding, PoolConfig};
use crate::base::diagnostics::{Diagnostics, OperationKind};
use crate::base::finding::{Finding, FindingKind};

struct TestPool {
    layer: DebugLayer,
    blocks: Mutex<HashMap<usize, Layout>>,
}

const COLLECT: DebugConfig = DebugConfig { on_finding: OnFinding::Collect, ..DebugConfig::FULL };

impl TestPool {
    fn new(config: DebugConfig) -> Self {
        let config = PoolConfig::default_cpu().debug(config);
        Self { layer: DebugLayer::new("", &config).unwrap(), blocks: Mutex::default() }
    }

    fn allocate(&self, size: usize, align: usize) -> *mut u8 {
        let asked = Layout::from_size_align(size, align).unwrap();
        let inner = self.layer.inflate(asked).unwrap();
        // SAFETY: no size here is 0.
        let start = unsafe { std::alloc::alloc(inner) } as usize;
        assert_eq!(self.blocks.lock().unwrap().insert(start, inner), None);
        // SAFETY: just allocated.
        let outer =
            unsafe { self.layer.on_alloc(asked, Block { start, size: inner.size(), dirty: inner.size() }) };
        assert!(outer.start.is_multiple_of(align) && outer.size >= size);
        assert!(outer.start >= start && outer.start + outer.size <= start + inner.size());
        outer.start as *mut u8
    }

    fn free(&self, outer: *mut u8, layout: Option<(usize, usize)>) {
        let layout = layout.map(|(size, align)| Layout::from_size_align(size, align).unwrap());
        // SAFETY: what is wrong with the address is what the layer is to find.
        if let Some(start) = unsafe { self.layer.on_free(outer as usize, layout) } {
            self.give_back(start);
        }
        while let Some(start) = self.layer.evict(false) {
            self.give_back(start);
        }
    }

    fn give_back(&self, start: usize) {
        let layout = self.blocks.lock().unwrap().remove(&start).expect("given back once");
        // SAFETY: allocated with this layout, and removed from the map.
        unsafe { std::alloc::dealloc(start as *mut u8, layout) }
    }

    fn empty_quarantine(&self) {
        while let Some(start) = self.layer.evict(true) {
            self.give_back(start);
        }
    }

    fn kinds(&self) -> Vec<FindingKind> {
        self.layer.findings().iter().map(|finding| finding.kind).collect()
    }
}

impl Drop for TestPool {
    fn drop(&mut self) {
        self.layer.on_drop();
        for (start, layout) in self.blocks.lock().unwrap().drain() {
            // SAFETY: allocated with this layout, and not freed yet.
            unsafe { std::alloc::dealloc(start as *mut u8, layout) }
        }
    }
}

#[inline(never)]
fn allocate_here(pool: &TestPool, size: usize, align: usize) -> *mut u8 {
    core::hint::black_box(pool.allocate(size, align))
}

#[inline(never)]
fn free_here(pool: &TestPool, block: *mut u8) {
    pool.free(core::hint::black_box(block), None);
    core::hint::black_box(());
}

fn only(findings: Vec<Finding>) -> Finding {
    assert_eq!(findings.len(), 1, "{findings:#?}");
    findings.into_iter().next().unwrap()
}

#[test]
fn overflow_and_underflow_by_one_byte_are_found_at_free() {
    for (size, align) in [(1, 1), (24, 8), (13, 4), (100, 64), (5000, 4096)] {
        for (offset, kind) in [(size as isize, FindingKind::Overflow), (-1, FindingKind::Underflow)] {
            let pool = TestPool::new(COLLECT);
            let block = allocate_here(&pool, size, align);
            // SAFETY: a canary of this pool.
            unsafe { block.offset(offset).write(0x41) };
            free_here(&pool, block);
            let found = only(pool.layer.findings());
            assert_eq!(
                (found.kind, found.address, found.size, found.align),
                (kind, block as usize, size, align)
            );
            assert_eq!((found.offset, found.damaged), (offset, 1));
            let at = block as usize as isize + offset - found.bytes_at as isize;
            assert_eq!(found.bytes[at as usize], 0x41);
            let allocated = found.allocated.as_ref().unwrap().stack.unwrap().to_string();
            assert!(allocated.contains("allocate_here"), "{allocated}");
            let at_free = found.found.as_ref().unwrap().stack.unwrap().to_string();
            assert!(at_free.contains("free_here"), "{at_free}");
        }
    }
}

#[test]
fn damage_is_found_on_demand_and_once() {
    let pool = TestPool::new(COLLECT);
    let block = pool.allocate(32, 8);
    assert_eq!(pool.layer.check(), 0);
    // SAFETY: a canary of this pool.
    unsafe { block.add(32).write_bytes(0, 3) };
    assert_eq!(pool.layer.check(), 1);
    assert_eq!(pool.layer.check(), 0);
    pool.free(block, Some((32, 8)));
    let found = only(pool.layer.findings());
    assert_eq!((found.kind, found.damaged, found.offset), (FindingKind::Overflow, 3, 32));
}

#[test]
fn writes_after_free_are_found_on_demand_and_before_reuse() {
    for on_demand in [false, true] {
        let pool = TestPool::new(COLLECT);
        let block = allocate_here(&pool, 200, 8);
        free_here(&pool, block);
        // SAFETY: the quarantine holds it.
        unsafe { block.add(150).write(7) };
        if on_demand {
            assert_eq!(pool.layer.check(), 1);
        }
        pool.empty_quarantine();
        // Findings of an allocation that runs out of memory are told afterwards.
        pool.layer.check();
        let found = only(pool.layer.findings());
        assert_eq!((found.kind, found.offset, found.damaged), (FindingKind::WriteAfterFree, 150, 1));
        assert!(found.freed.unwrap().stack.unwrap().to_string().contains("free_here"));
        assert!(pool.blocks.lock().unwrap().is_empty());
    }
}

#[test]
fn a_block_larger_than_the_quarantine_is_held_until_the_next_free() {
    let pool = TestPool::new(DebugConfig { quarantine: 4096, ..COLLECT });
    let block = pool.allocate(100_000, 8);
    pool.free(block, None);
    // SAFETY: the quarantine holds it.
    unsafe { block.add(99_999).write(7) };
    let other = pool.allocate(8, 8);
    pool.free(other, None);
    assert_eq!(pool.kinds(), [FindingKind::WriteAfterFree]);
    assert_eq!(pool.layer.held().0, 1);
}

#[test]
fn the_quarantine_keeps_within_its_bytes() {
    let pool = TestPool::new(DebugConfig { quarantine: 4096, ..COLLECT });
    for _ in 0..1000 {
        let block = pool.allocate(100, 8);
        pool.free(block, None);
        let (blocks, bytes) = pool.layer.held();
        assert!(bytes <= 4096 && blocks == pool.blocks.lock().unwrap().len());
    }
    assert_eq!(pool.kinds(), []);
}

#[test]
fn double_free_is_told_from_foreign_and_interior_free() {
    let pool = TestPool::new(COLLECT);
    let block = allocate_here(&pool, 64, 8);
    let live = pool.allocate(64, 8);
    free_here(&pool, block);
    free_here(&pool, block);
    pool.empty_quarantine();
    free_here(&pool, block);
    pool.free(live.wrapping_add(8), None);
    let mut foreign = 0u64;
    pool.free((&raw mut foreign).cast(), None);
    pool.free(core::ptr::dangling_mut::<u64>().cast(), None);
    use FindingKind::{DoubleFree, ForeignFree, InteriorFree};
    assert_eq!(pool.kinds(), [DoubleFree, DoubleFree, InteriorFree, ForeignFree]);
    let found = &pool.layer.findings()[0];
    for site in [&found.freed, &found.found] {
        assert!(site.as_ref().unwrap().stack.unwrap().to_string().contains("free_here"));
    }
    assert!(found.allocated.as_ref().unwrap().stack.unwrap().to_string().contains("allocate_here"));
    assert_eq!(pool.layer.findings()[2].offset, 8);
    pool.free(live, None);
    assert_eq!(pool.layer.leaks().len(), 0);
}

#[test]
fn a_wrong_layout_is_found_and_the_block_freed_nevertheless() {
    for given in [(25, 8), (23, 8), (24, 4), (24, 16)] {
        let pool = TestPool::new(COLLECT);
        let block = pool.allocate(24, 8);
        pool.free(block, Some(given));
        let found = only(pool.layer.findings());
        assert_eq!((found.kind, found.given), (FindingKind::WrongLayout, Some(given)));
        assert!(pool.layer.leaks().is_empty());
    }
}

#[test]
fn leaks_are_told_at_drop_with_the_stack_that_allocated() {
    let pool = TestPool::new(COLLECT);
    let log = pool.layer.log();
    let freed = pool.allocate(10, 1);
    let kept = allocate_here(&pool, 1000, 8);
    pool.free(freed, None);
    assert_eq!(only(pool.layer.leaks()).address, kept as usize);
    drop(pool);
    let found = only(log.take());
    assert_eq!((found.kind, found.size), (FindingKind::Leak, 1000));
    assert!(found.allocated.unwrap().stack.unwrap().to_string().contains("allocate_here"));
    assert_eq!((log.findings().len(), log.total()), (0, 1));
}

#[test]
fn fresh_and_freed_memory_hold_patterns() {
    let pool = TestPool::new(COLLECT);
    let block = pool.allocate(40, 8);
    // SAFETY: the block is live, then in quarantine; both are this test's own.
    unsafe {
        assert_eq!(std::slice::from_raw_parts(block, 40), [bytes::FRESH; 40]);
        pool.free(block, None);
        assert_eq!(std::slice::from_raw_parts(block, 40), [bytes::FREED; 40]);
    }
}

#[test]
fn a_panic_on_a_finding_loses_no_block() {
    let pool =
        TestPool::new(DebugConfig { on_finding: OnFinding::Panic, quarantine: 1, stacks: false, ..COLLECT });
    let first = pool.allocate(16, 8);
    let second = pool.allocate(16, 8);
    pool.free(first, None);
    // SAFETY: the quarantine holds it.
    unsafe { first.write(1) };
    let panic = catch_unwind(AssertUnwindSafe(|| pool.free(second, None))).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().contains("write after free"));
    assert_eq!(pool.layer.held().0, 2);
    pool.empty_quarantine();
    assert!(pool.blocks.lock().unwrap().is_empty());
}

#[test]
fn a_panic_at_drop_comes_when_the_pool_gave_its_memory_back() {
    let pool = TestPool::new(DebugConfig { on_finding: OnFinding::Panic, stacks: false, ..COLLECT });
    pool.allocate(16, 8);
    let panic = catch_unwind(AssertUnwindSafe(|| drop(pool))).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().contains("reported above"));
}

#[test]
fn history_has_the_last_operations_with_their_stacks() {
    let pool = TestPool::new(DebugConfig { history: 3, ..COLLECT });
    pool.layer.on_grow(4096);
    let first = allocate_here(&pool, 8, 8);
    let _second = pool.allocate(16, 8);
    pool.free(first, None);
    let history = pool.layer.history();
    let seen: Vec<_> = history.iter().map(|op| (op.number, op.kind, op.size)).collect();
    use OperationKind::{Allocate, Free};
    assert_eq!(seen, [(2, Allocate, 8), (3, Allocate, 16), (4, Free, 8)]);
    assert!(history[0].stack.unwrap().to_string().contains("allocate_here"));
    assert!(history[0].to_string().contains("allocate"), "{}", history[0]);
    pool.layer.on_reset();
    assert_eq!(pool.layer.history()[2].kind, OperationKind::Reset);
    assert_eq!(pool.layer.leaks().len(), 0);
}

#[test]
fn live_blocks_are_found_and_listed_as_the_user_sees_them() {
    for guard_pages in [false, true] {
        let pool = TestPool::new(DebugConfig { guard_pages, ..COLLECT });
        for (size, align) in [(8, 8), (24, 1), (100, 256), (5, 8192)] {
            let block = pool.allocate(size, align) as usize;
            let (inner, usable) = pool.layer.find(block).unwrap();
            assert!(inner <= block && usable == Some(size));
            assert_eq!(pool.layer.live().unwrap(), [ActiveAllocation::new(block, size)]);
            pool.free(block as *mut u8, None);
            assert!(pool.layer.find(block).is_none() && pool.layer.live().unwrap().is_empty());
        }
    }
}

#[test]
fn latency_alone_leaves_blocks_as_they_are() {
    let config = PoolConfig::default_cpu().debug(DebugConfig { latency: true, ..DebugConfig::OFF });
    let layer = DebugLayer::new("", &config).unwrap();
    let asked = Layout::new::<[u64; 3]>();
    assert_eq!(layer.inflate(asked), Some(asked));
    let block = Block { start: 4096, size: 32, dirty: 5 };
    // SAFETY: the layer does not touch the block when it only takes times.
    assert_eq!(unsafe { layer.on_alloc(asked, block) }, block);
    // SAFETY: as above.
    assert_eq!(unsafe { layer.on_free(4096, None) }, Some(4096));
    assert!(layer.in_place() && layer.latency().unwrap().max < 1_000_000_000);
}

#[test]
fn correct_programs_make_no_finding() {
    let rounds =
        std::env::var("MEMORY_POOL_TEST_OPS").ok().and_then(|text| text.parse().ok()).unwrap_or(60_000u64);
    for guard_pages in [false, true] {
        let config = DebugConfig { guard_pages, quarantine: 1 << 16, stacks: false, ..COLLECT };
        let pool = TestPool::new(config);
        let rounds = if guard_pages { rounds / 30 } else { rounds };
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let pool = &pool;
                scope.spawn(move || random_operations(pool, rounds / 2, thread + 1));
            }
        });
        assert_eq!(pool.layer.check(), 0);
        assert_eq!(pool.kinds(), []);
        assert_eq!(pool.layer.leaks().len(), 0);
    }
}

fn random_operations(pool: &TestPool, rounds: u64, mut seed: u64) {
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % below
    };
    let mut live = Vec::new();
    for _ in 0..rounds {
        if live.len() < 100 && (live.is_empty() || random(2) == 0) {
            let align = 1usize << random(8);
            let bits = random(13);
            let size = 1 + random(1 << bits) as usize;
            let block = pool.allocate(size, align);
            // SAFETY: the block is live and this long.
            unsafe { block.write_bytes(random(256) as u8, size) };
            live.push((block as usize, size, align));
        } else {
            let (block, size, align) = live.swap_remove(random(live.len() as u64) as usize);
            pool.free(block as *mut u8, (random(2) == 0).then_some((size, align)));
        }
    }
    for (block, size, align) in live {
        pool.free(block as *mut u8, Some((size, align)));
    }
}

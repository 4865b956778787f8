//! Planted bugs on every kind of host pool: all are found, with the stack that made them; correct programs
//! make no finding. `MEMORY_POOL_TEST_OPS` sets the number of random operations (a hundred million in the
//! long form).

mod children;

use std::alloc::Layout;
use std::ptr::NonNull;

use memory_pool::{
    AllocatorType, AnyPool, CpuPool, DebugLayer, Error, FindingKind, FixedPool, LocalFixedPool,
    LocalVariablePool, OnFinding, PoolConfig, Result, Strategy, SyncType, VariablePool, WatchedCpuPool,
    source::slice::Slice,
};

/// What the bugs need of a pool.
trait Target {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>>;
    unsafe fn free(&self, block: NonNull<u8>, layout: Option<Layout>);
    fn watch(&self) -> &dyn memory_pool::Diagnostics;
    fn live(&self) -> usize;
}

macro_rules! target {
    ($($pool:ty),*) => {$(
        impl Target for $pool {
            fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>> {
                self.allocate(layout)
            }
            unsafe fn free(&self, block: NonNull<u8>, layout: Option<Layout>) {
                // SAFETY: the caller's contract, as far as a planted bug has one.
                unsafe {
                    match layout {
                        Some(layout) => self.deallocate_sized(block, layout),
                        None => self.deallocate(block),
                    }
                }
            }
            fn watch(&self) -> &dyn memory_pool::Diagnostics {
                self.diagnostics().expect("the configuration has debugging on")
            }
            fn live(&self) -> usize {
                self.active_allocations().len()
            }
        }
    )*};
}

type Memory = memory_pool::pool::HostMemory;

target!(
    AnyPool,
    FixedPool<Memory, DebugLayer>,
    VariablePool<Memory, DebugLayer>,
    LocalFixedPool<Memory, DebugLayer>,
    LocalVariablePool<Memory, DebugLayer>,
    WatchedCpuPool
);

fn collecting(config: PoolConfig) -> PoolConfig {
    let mut debug = PoolConfig::debug_cpu().debug;
    debug.on_finding = OnFinding::Collect;
    config.debug(debug)
}

/// Calls `act` with every kind of host pool.
fn on_each(act: impl Fn(&str, &mut dyn FnMut() -> Box<dyn Target>)) {
    let fixed = || collecting(PoolConfig::fixed_size_cpu(512));
    let variable = |strategy| collecting(PoolConfig::default_cpu().strategy(strategy));
    act("any fixed", &mut || Box::new(AnyPool::new(fixed()).unwrap()));
    act("any variable", &mut || Box::new(AnyPool::new(variable(Strategy::BestFit)).unwrap()));
    act("any lock-free", &mut || Box::new(AnyPool::new(fixed().sync_type(SyncType::LockFree)).unwrap()));
    act("any size class", &mut || {
        let config = collecting(PoolConfig::default_cpu().allocator_type(AllocatorType::SizeClass));
        Box::new(AnyPool::new(config.sync_type(SyncType::ThreadCached)).unwrap())
    });
    act("size class", &mut || Box::new(CpuPool::watched(collecting(PoolConfig::default_cpu())).unwrap()));
    act("fixed", &mut || Box::new(FixedPool::watched(fixed()).unwrap()));
    for strategy in [Strategy::Segregated, Strategy::BestFit, Strategy::FirstFit] {
        let name = format!("variable {}", strategy.name());
        act(&name, &mut || Box::new(VariablePool::watched(variable(strategy.clone())).unwrap()));
    }
    act("local fixed", &mut || Box::new(LocalFixedPool::watched(fixed()).unwrap()));
    act("local variable", &mut || {
        Box::new(LocalVariablePool::watched(variable(Strategy::Segregated)).unwrap())
    });
}

const LAYOUT: Layout = Layout::new::<[u8; 24]>();

#[inline(never)]
fn who_allocates(pool: &dyn Target) -> NonNull<u8> {
    std::hint::black_box(pool.allocate(LAYOUT)).unwrap().cast()
}

#[inline(never)]
fn who_frees(pool: &dyn Target, block: NonNull<u8>) {
    // SAFETY: what is wrong with the block is what the layer is to find.
    unsafe { pool.free(std::hint::black_box(block), None) };
    std::hint::black_box(());
}

fn names(site: &Option<memory_pool::Site>) -> String {
    site.as_ref().expect("a site").stack.expect("a stack").to_string()
}

#[test]
fn every_planted_bug_is_found_on_every_pool() {
    on_each(|name, make| {
        // One byte behind, one in front.
        for (offset, kind) in [(24, FindingKind::Overflow), (-1, FindingKind::Underflow)] {
            let pool = make();
            let block = who_allocates(&*pool);
            // SAFETY: a canary of the pool.
            unsafe { block.offset(offset).write(0x41) };
            who_frees(&*pool, block);
            let found = pool.watch().findings();
            assert_eq!((found.len(), found[0].kind, found[0].offset), (1, kind, offset), "{name}");
            assert!(names(&found[0].allocated).contains("who_allocates"), "{name}: {}", found[0]);
            assert!(names(&found[0].found).contains("who_frees"), "{name}: {}", found[0]);
        }

        // A write to what was freed.
        let pool = make();
        let block = who_allocates(&*pool);
        who_frees(&*pool, block);
        // SAFETY: the quarantine holds it.
        unsafe { block.add(8).write(1) };
        assert_eq!(pool.watch().check(), 1, "{name}");
        let found = &pool.watch().findings()[0];
        assert_eq!((found.kind, found.offset), (FindingKind::WriteAfterFree, 8), "{name}");
        assert!(names(&found.freed).contains("who_frees"), "{name}: {found}");

        // A second free, and one of what is not the pool's.
        who_frees(&*pool, block);
        let mut elsewhere = 0u64;
        who_frees(&*pool, NonNull::from(&mut elsewhere).cast());
        let kinds: Vec<_> = pool.watch().findings().iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds[1..], [FindingKind::DoubleFree, FindingKind::ForeignFree], "{name}");
        assert!(names(&pool.watch().findings()[1].found).contains("who_frees"), "{name}");

        // A layout that does not fit.
        let pool = make();
        let block = who_allocates(&*pool);
        // SAFETY: live; the wrong layout is the bug.
        unsafe { pool.free(block, Some(Layout::new::<[u8; 16]>())) };
        let found = &pool.watch().findings()[0];
        assert_eq!((found.kind, found.given), (FindingKind::WrongLayout, Some((16, 1))), "{name}");

        // A leak.
        let pool = make();
        let log = pool.watch().log();
        let block = who_allocates(&*pool);
        assert_eq!(pool.live(), 1, "{name}");
        drop(pool);
        let found = log.findings();
        assert_eq!((found.len(), found[0].kind), (1, FindingKind::Leak), "{name}");
        assert_eq!((found[0].address, found[0].size), (block.as_ptr() as usize, 24), "{name}");
        assert!(names(&found[0].allocated).contains("who_allocates"), "{name}");
    });
}

#[test]
fn a_freed_block_is_checked_before_it_is_used_again() {
    on_each(|name, make| {
        let pool = make();
        let block = who_allocates(&*pool);
        who_frees(&*pool, block);
        // SAFETY: the quarantine holds it.
        unsafe { block.write(1) };
        // Enough frees to push it out.
        let large = Layout::from_size_align(100_000, 16).unwrap();
        for _ in 0..30 {
            let other = pool.allocate(large).unwrap().cast();
            // SAFETY: live, freed once.
            unsafe { pool.free(other, Some(large)) };
        }
        let kinds: Vec<_> = pool.watch().findings().iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, [FindingKind::WriteAfterFree], "{name}");
    });
}

#[test]
fn what_is_held_back_is_not_live_and_comes_back_when_memory_is_short() {
    let memory = std::thread::spawn(|| {
        let config = collecting(PoolConfig::fixed_size_cpu(512).max_size(64 << 10));
        let pool = AnyPool::new(config).unwrap();
        let layout = Layout::from_size_align(512, 16).unwrap();
        let mut most = 0;
        for _ in 0..3 {
            let mut blocks = Vec::new();
            while let Ok(block) = pool.allocate(layout) {
                blocks.push(block.cast());
            }
            assert!(
                most == 0 || blocks.len() == most,
                "the quarantine kept some: {} of {most}",
                blocks.len()
            );
            most = blocks.len();
            let stats = pool.stats();
            assert_eq!(stats.active_count(), most as u64);
            // SAFETY: all live.
            unsafe { pool.deallocate_batch(&blocks) };
            assert_eq!((pool.stats().active_count(), pool.stats().current_allocated), (0, 0));
            assert!(!pool.has_leaks() && pool.active_allocations().is_empty());
        }
        pool.reset().unwrap();
        assert!(pool.diagnostics().unwrap().findings().is_empty());
        most
    });
    assert!(memory.join().unwrap() > 80);
}

#[test]
fn fixed_blocks_keep_their_size_under_the_layer() {
    let pool = FixedPool::watched(collecting(PoolConfig::fixed_size_cpu(512).max_size(1 << 20))).unwrap();
    let blocks: Vec<_> = (0..1000).map(|_| pool.allocate(Layout::new::<[u8; 512]>()).unwrap()).collect();
    // 1000 blocks of 512 bytes and two canaries, not 1000 runs of two blocks.
    assert!(pool.stats().reserved <= 1 << 20);
    blocks.iter().for_each(|block| who_frees(&pool, block.cast()));
}

#[test]
fn an_access_past_a_guarded_block_stops_the_program() {
    const CHILD: &str = "MEMORY_POOL_TEST_FAULT";
    let mut config = collecting(PoolConfig::default_cpu());
    config.debug.guard_pages = true;
    if let Ok(what) = std::env::var(CHILD) {
        let pool = AnyPool::new(config).unwrap();
        let block = pool.allocate(Layout::new::<[u64; 4]>()).unwrap().cast::<u8>();
        // SAFETY: the first 32 bytes are live; what follows is what should stop the program.
        unsafe {
            block.write_bytes(7, 32);
            match what.as_str() {
                "behind" => println!("read {}", block.add(32).read_volatile()),
                "freed" => {
                    pool.deallocate(block);
                    println!("read {}", block.read_volatile());
                }
                _ => pool.deallocate(block),
            }
        }
        std::process::exit(0);
    }
    for (what, killed) in [("behind", true), ("freed", true), ("nothing", false)] {
        let exe = std::env::current_exe().unwrap();
        let mut command = std::process::Command::new(exe);
        command.args(["--exact", "an_access_past_a_guarded_block_stops_the_program"]).env(CHILD, what);
        let status = children::output_of(&mut command).unwrap().status;
        assert_eq!(status.success(), !killed, "{what}: {status}");
    }
}

#[test]
fn a_type_without_the_layer_refuses_debugging_rather_than_ignore_it() {
    let error = VariablePool::new(PoolConfig::debug_cpu()).unwrap_err();
    assert!(matches!(error, Error::Config(_)) && error.to_string().contains("debug"));
}

#[test]
fn a_layer_works_over_memory_of_the_callers() {
    let mut memory = vec![std::mem::MaybeUninit::<u8>::uninit(); 256 << 10];
    let config = collecting(PoolConfig::default_cpu());
    let layer = DebugLayer::new("slice", &config).unwrap();
    let pool = LocalVariablePool::assemble("slice", config, Slice::new(&mut memory), layer).unwrap();
    let block = pool.allocate(LAYOUT).unwrap().cast::<u8>();
    // SAFETY: a canary of the pool, then a live block freed once.
    unsafe {
        block.add(24).write(0);
        pool.deallocate(block);
    }
    assert_eq!(pool.diagnostics().unwrap().findings()[0].kind, FindingKind::Overflow);
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn correct_programs_make_no_finding_on_any_pool() {
    let operations = std::env::var("MEMORY_POOL_TEST_OPS").ok().and_then(|text| text.parse().ok());
    let operations: u64 = operations.unwrap_or(400_000) / 10;
    on_each(|name, make| {
        let pool = make();
        let mut random = Random(7);
        let mut live: Vec<(NonNull<u8>, Layout, u8)> = Vec::new();
        for _ in 0..operations {
            if live.len() < 64 && (live.is_empty() || random.below(2) == 0) {
                let bits = random.below(12);
                let size = 1 + random.below(1 << bits) as usize;
                let layout = Layout::from_size_align(size, 1 << random.below(7)).unwrap();
                let block = pool.allocate(layout).unwrap().cast::<u8>();
                let fill = random.below(256) as u8;
                // SAFETY: live and this long.
                unsafe { block.write_bytes(fill, size) };
                live.push((block, layout, fill));
            } else {
                let (block, layout, fill) = live.swap_remove(random.below(live.len() as u64) as usize);
                // SAFETY: live; the first and last byte were written, and it is freed once.
                unsafe {
                    assert_eq!((block.read(), block.add(layout.size() - 1).read()), (fill, fill), "{name}");
                    pool.free(block, (random.below(2) == 0).then_some(layout));
                }
            }
        }
        assert_eq!(pool.watch().check(), 0, "{name}");
        assert!(pool.watch().findings().is_empty(), "{name}: {}", pool.watch().findings()[0]);
        assert_eq!((pool.live(), pool.watch().leaks().len()), (live.len(), live.len()), "{name}");
    });
}

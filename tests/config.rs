//! Every field of `PoolConfig` has its documented effect on host pools (GPU pools: `gpu_config`), and every
//! constructor and preset sets what it says.

use std::alloc::Layout;
use std::ptr::NonNull;

use memory_pool::{
    AllocatorType, AnyPool, DebugConfig, Error, LocalVariablePool, OnFinding, PoolConfig, Result, Strategy,
    SyncType,
};

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn address(block: NonNull<[u8]>) -> usize {
    block.cast::<u8>().as_ptr() as usize
}

#[test]
fn allocator_type_and_block_size_choose_the_engine() -> Result<()> {
    let fixed =
        AnyPool::new(PoolConfig::default_cpu().allocator_type(AllocatorType::FixedSize).block_size(96))?;
    assert_eq!(fixed.allocate(layout(10))?.len(), 96);
    assert_eq!(fixed.allocate(layout(100))?.len(), 192);
    let variable = AnyPool::new(PoolConfig::default_cpu().allocator_type(AllocatorType::VariableSize))?;
    assert!(variable.allocate(layout(10))?.len() < 96);
    // Rounded up to the alignment.
    let rounded = AnyPool::new(PoolConfig::fixed_size_cpu(50))?;
    assert_eq!(rounded.allocate(layout(1))?.len(), 64);
    for wrong in [0, usize::MAX] {
        let error = AnyPool::new(PoolConfig::fixed_size_cpu(wrong)).unwrap_err();
        assert!(error.to_string().contains("block_size"), "{error}");
    }
    Ok(())
}

#[test]
fn strategy_chooses_the_place() -> Result<()> {
    // Holes of 1024 and of 256 bytes, in this order.
    let placed = |strategy| -> Result<usize> {
        let pool = LocalVariablePool::new(PoolConfig::default_cpu().strategy(strategy))?;
        let sizes = [1024, 64, 256, 64];
        let blocks: Vec<_> = sizes.iter().map(|&size| pool.allocate(layout(size)).unwrap()).collect();
        // SAFETY: both live, each freed once.
        unsafe {
            pool.deallocate(blocks[0].cast());
            pool.deallocate(blocks[2].cast());
        }
        let found = address(pool.allocate(layout(256))?);
        Ok(blocks.iter().position(|&block| address(block) == found).unwrap_or(4))
    };
    assert_eq!(placed(Strategy::FirstFit)?, 0);
    assert_eq!(placed(Strategy::BestFit)?, 2);
    Ok(())
}

#[test]
fn initial_size_is_reserved_at_once_and_max_size_never_exceeded() -> Result<()> {
    for config in [PoolConfig::default_cpu(), PoolConfig::fixed_size_cpu(128)] {
        assert_eq!(AnyPool::new(config.clone())?.stats().reserved, 0);
        let pool = AnyPool::new(config.clone().initial_size(1 << 20))?;
        assert!(pool.stats().reserved >= 1 << 20);
        let calls = pool.stats().source_calls;
        let mut served = 0;
        while served < 900 << 10 {
            served += pool.allocate(layout(128))?.len();
        }
        assert_eq!(pool.stats().source_calls, calls, "served from what was reserved");

        let pool = AnyPool::new(config.initial_size(1 << 18).max_size(1 << 18))?;
        let error = loop {
            match pool.allocate(layout(100)) {
                Ok(_) => assert!(pool.stats().reserved <= 1 << 18),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::OutOfMemory { requested: 100, .. }), "{error}");
        assert!(error.to_string().contains("max_size") && pool.stats().failed_count == 1);
    }
    Ok(())
}

#[test]
fn thread_safe_false_binds_the_pool_to_its_thread() -> Result<()> {
    let pool = AnyPool::new(PoolConfig::default_cpu().thread_safe(false))?;
    pool.allocate(layout(8))?;
    let other = pool.clone();
    std::thread::spawn(move || {
        let refused = |result: Result<()>| {
            assert!(result.unwrap_err().to_string().contains("thread_safe"));
        };
        refused(other.allocate(layout(8)).map(|_| ()));
        refused(other.reserve(1000));
        refused(other.reset());
    })
    .join()
    .unwrap();
    Ok(())
}

#[test]
fn sync_types_serve_two_threads_or_name_what_they_go_with() -> Result<()> {
    let configs = [
        PoolConfig::fixed_size_cpu(64),
        PoolConfig::fixed_size_cpu(64).sync_type(SyncType::LockFree),
        PoolConfig::default_cpu(),
    ];
    for config in configs {
        let pool = AnyPool::new(config)?;
        std::thread::scope(|scope| {
            for value in 0..2u64 {
                let pool = &pool;
                scope.spawn(move || {
                    for _ in 0..5000 {
                        let block = pool.allocate(layout(64)).unwrap().cast::<u64>();
                        // SAFETY: live, large enough, freed once.
                        unsafe {
                            block.write(value);
                            assert_eq!(block.read(), value);
                            pool.deallocate(block.cast());
                        }
                    }
                });
            }
        });
        assert_eq!((pool.stats().allocation_count, pool.stats().active_count()), (10_000, 0));
    }
    for (config, fields) in [
        (PoolConfig::default_cpu().sync_type(SyncType::LockFree), "sync_type, allocator_type"),
        (PoolConfig::default_cpu().sync_type(SyncType::ThreadCached), "sync_type, allocator_type"),
        (PoolConfig::default_cpu().initial_size(2).max_size(1), "initial_size, max_size"),
        (PoolConfig::fixed_size_cpu(64).max_size(1), "block_size, max_size"),
        (PoolConfig::default_cpu().min_block_size(64).max_size(32), "min_block_size, max_size"),
        (PoolConfig::default_cpu().growth_factor(f64::NAN), "growth_factor"),
        (PoolConfig::default_cpu().alignment(3), "alignment"),
        (PoolConfig::default_cpu().max_size(0), "max_size"),
        (
            PoolConfig::default_gpu().use_pinned_memory(true).use_managed_memory(true),
            "use_pinned_memory, use_managed_memory",
        ),
        (PoolConfig::default_cpu().use_pinned_memory(true), "use_pinned_memory"),
        (PoolConfig::default_cpu().use_managed_memory(true), "use_managed_memory"),
        (PoolConfig::default_cpu().stream_ordered(true), "stream_ordered"),
        (PoolConfig::high_performance_cpu().path("/tmp/file"), "path, allocator_type"),
    ] {
        let error = AnyPool::new(config).unwrap_err();
        assert!(matches!(error, Error::Config(bad) if bad.field == fields), "{error}");
        assert!(error.to_string().contains(fields), "{error}");
    }
    Ok(())
}

#[test]
fn track_stats_off_counts_nothing_until_switched_on() -> Result<()> {
    for config in [
        PoolConfig::default_cpu(),
        PoolConfig::fixed_size_cpu(128),
        PoolConfig::fixed_size_cpu(128).sync_type(SyncType::LockFree),
        PoolConfig::high_performance_cpu(),
    ] {
        let pool = AnyPool::new(config.clone().track_stats(false))?;
        pool.allocate(layout(100))?;
        assert!(!pool.is_tracking() && pool.stats().allocation_count == 0, "{config:?}");
        assert!(pool.stats().current_allocated >= 100, "what is live is known in any case");
        pool.set_tracking(true);
        pool.allocate(layout(100))?;
        assert!(pool.is_tracking());
        assert_eq!(pool.stats().allocation_count, 1);
        assert_eq!(pool.stats().size_histogram.iter().sum::<u64>(), 1);
        assert_eq!(pool.stats().size_histogram[3], 1, "65 to 128 bytes");
        pool.set_tracking(false);
        pool.allocate(layout(100))?;
        assert_eq!(pool.stats().allocation_count, 1);
        assert_eq!(AnyPool::new(config.track_stats(true))?.stats().allocation_count, 0);
    }
    Ok(())
}

#[test]
fn peaks_start_anew_for_a_scope() -> Result<()> {
    let pool = AnyPool::new(PoolConfig::default_cpu())?;
    let block = pool.allocate(layout(100_000))?;
    // SAFETY: live, freed once.
    unsafe { pool.deallocate(block.cast()) };
    assert!(pool.stats().peak_allocated >= 100_000);
    pool.reset_peak();
    pool.allocate(layout(10))?;
    assert!(pool.stats().peak_allocated < 1000);
    Ok(())
}

#[test]
fn alignment_holds_for_every_block() -> Result<()> {
    for align in [1, 16, 64, 4096] {
        for config in [PoolConfig::default_cpu(), PoolConfig::fixed_size_cpu(48), PoolConfig::debug_cpu()] {
            let mut config = config.alignment(align);
            config.debug.on_finding = OnFinding::Collect;
            let pool = AnyPool::new(config)?;
            for size in [1, 40, 3000] {
                assert!(address(pool.allocate(Layout::from_size_align(size, 1)?)?).is_multiple_of(align));
            }
        }
    }
    Ok(())
}

#[test]
fn growth_factor_says_how_much_more_each_growth_takes() -> Result<()> {
    let growths = |factor| -> Result<u64> {
        let pool = AnyPool::new(PoolConfig::default_cpu().growth_factor(factor).initial_size(64 << 10))?;
        for _ in 0..1000 {
            pool.allocate(layout(8000))?;
        }
        Ok(pool.stats().source_calls)
    };
    let (slow, fast) = (growths(1.0)?, growths(8.0)?);
    assert!(fast < slow && fast <= 4, "{slow} growths by 1, {fast} by 8");
    Ok(())
}

#[test]
fn min_block_size_keeps_splits_from_leaving_crumbs() -> Result<()> {
    let usable = |min_block_size| -> Result<usize> {
        let pool = LocalVariablePool::new(PoolConfig::default_cpu().min_block_size(min_block_size))?;
        let hole = pool.allocate(layout(1024))?;
        let _after = pool.allocate(layout(64))?;
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(hole.cast()) };
        let block = pool.allocate(layout(900))?;
        assert_eq!(address(block), address(hole));
        Ok(block.len())
    };
    assert!(usable(32)? < 1000);
    assert!(usable(512)? >= 1024, "the rest was too small to stay");
    Ok(())
}

#[test]
fn path_puts_the_memory_into_a_file() -> Result<()> {
    let path = std::env::temp_dir().join(format!("memory-pool-config-{}", std::process::id()));
    let pool = AnyPool::new(PoolConfig::default_cpu().path(&path))?;
    let block = pool.allocate(layout(100))?.cast::<u8>();
    // SAFETY: live and this long.
    unsafe { block.copy_from(NonNull::from(b"in the file").cast(), 11) };
    let contents = std::fs::read(&path).unwrap();
    assert!(contents.windows(11).any(|window| window == b"in the file"));
    drop(pool);
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(AnyPool::new(PoolConfig::default_cpu().path("/nowhere/at/all")), Err(Error::Io(_))));
    Ok(())
}

#[test]
fn debug_is_on_where_any_part_is() -> Result<()> {
    assert!(!DebugConfig::OFF.is_on() && DebugConfig::FULL.is_on());
    let mut config = PoolConfig::default_cpu();
    config.debug.latency = true;
    let pool = AnyPool::new(config)?;
    for _ in 0..100 {
        let block = pool.allocate(layout(64))?;
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(block.cast()) };
    }
    let latency = pool.stats().latency.expect("asked for");
    assert!(latency.p50 <= latency.p90 && latency.p90 <= latency.p99 && latency.p99 <= latency.max);
    assert!(latency.max > 0 && pool.stats().to_string().contains("latency"));
    assert!(AnyPool::new(PoolConfig::default_cpu())?.stats().latency.is_none());
    Ok(())
}

#[test]
fn presets_are_what_they_say() {
    let cpu = PoolConfig::default_cpu();
    assert_eq!(cpu, PoolConfig::default());
    assert!(cpu.thread_safe && cpu.track_stats && !cpu.debug.is_on() && cpu.max_size == usize::MAX);
    assert_eq!((cpu.allocator_type, cpu.sync_type), (AllocatorType::VariableSize, SyncType::Mutex));
    let fixed = PoolConfig::fixed_size_cpu(512);
    assert_eq!((fixed.allocator_type, fixed.block_size), (AllocatorType::FixedSize, 512));
    let gpu = PoolConfig::default_gpu();
    assert!(gpu.stream_ordered && gpu.alignment >= 256);
    let fixed_gpu = PoolConfig::fixed_size_gpu(4096, 2);
    assert_eq!((fixed_gpu.block_size, fixed_gpu.device_id, fixed_gpu.alignment), (4096, 2, gpu.alignment));
    let fast = PoolConfig::high_performance_cpu();
    assert_eq!((fast.allocator_type, fast.sync_type), (AllocatorType::SizeClass, SyncType::ThreadCached));
    assert!(!fast.track_stats);
    let fast = PoolConfig::high_performance_gpu(1);
    assert!(fast.device_id == 1 && !fast.track_stats && fast.initial_size > 0);
    assert_eq!(PoolConfig::debug_cpu(), cpu.debug(DebugConfig::FULL));
    let debug = PoolConfig::debug_gpu(1);
    assert!(debug.debug.is_on() && debug.device_id == 1 && debug.stream_ordered);
    for config in [fixed, gpu, fixed_gpu, debug] {
        config.validate().unwrap();
    }
}

//! Every field, constructor and preset of `PoolConfig` has its documented effect on GPU pools, shown on the
//! simulated device.

use std::alloc::Layout;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memory_pool::{
    AllocatorType, DevicePool, Error, FindingKind, GpuDevice, ManagedPool, MemoryType, OnFinding, PinnedPool,
    PoolConfig, Result, SimConfig, Strategy, SyncType,
};

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn device() -> GpuDevice {
    GpuDevice::simulated(SimConfig::default())
}

#[test]
fn allocator_type_and_block_size_say_what_a_request_takes() -> Result<()> {
    let gpu = device();
    let take = |config: PoolConfig, size: usize| -> Result<usize> {
        let pool = DevicePool::new(&gpu, config)?;
        let block = pool.allocate(layout(size))?;
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(block.cast()) };
        Ok(block.len())
    };
    let variable = PoolConfig::default_gpu;
    assert_eq!(take(variable(), 1000)?, 1024);
    assert_eq!(take(variable().allocator_type(AllocatorType::SizeClass), 1100)?, 2048);
    assert_eq!(take(PoolConfig::fixed_size_gpu(4096, 0), 1000)?, 4096);
    assert_eq!(take(PoolConfig::fixed_size_gpu(4096, 0), 5000)?, 8192);
    assert_eq!(take(PoolConfig::fixed_size_gpu(4096, 0).block_size(1 << 20), 5000)?, 1 << 20);
    Ok(())
}

#[test]
fn strategy_chooses_the_place_and_min_block_size_the_rest() -> Result<()> {
    let gpu = device();
    let stream = gpu.new_stream()?;
    // Holes of 64 and of 16 KiB, in this order; which one takes `size`, and how much of it.
    let placed = |config: PoolConfig, size: usize| -> Result<(Option<usize>, Option<usize>)> {
        let pool = DevicePool::new(&gpu, config)?;
        let sizes = [64, 4, 16, 4].map(|kib: usize| kib << 10);
        let blocks: Vec<_> =
            sizes.iter().map(|&size| pool.allocate_async(size, &stream)).collect::<Result<_>>()?;
        for hole in [0, 2] {
            // SAFETY: live, freed once.
            unsafe { pool.deallocate_async(blocks[hole], &stream) };
        }
        let found = pool.allocate_async(size, &stream)?;
        let answer = (blocks.iter().position(|&block| block == found), pool.usable_size(found.cast()));
        // SAFETY: nothing was given to the device.
        unsafe { pool.reset_unchecked()? };
        Ok(answer)
    };
    let config = PoolConfig::default_gpu;
    assert_eq!(placed(config().strategy(Strategy::FirstFit), 16 << 10)?, (Some(0), Some(16 << 10)));
    assert_eq!(placed(config().strategy(Strategy::BestFit), 16 << 10)?, (Some(2), Some(16 << 10)));
    assert_eq!(
        placed(config().strategy(Strategy::BestFit).min_block_size(512), 15 << 10)?,
        (Some(2), Some(15 << 10))
    );
    assert_eq!(
        placed(config().strategy(Strategy::BestFit).min_block_size(4096), 15 << 10)?,
        (Some(2), Some(16 << 10))
    );
    Ok(())
}

#[test]
fn stream_ordered_false_makes_frees_wait() -> Result<()> {
    for ordered in [true, false] {
        // Nothing runs before somebody waits for it.
        let gpu = GpuDevice::simulated(SimConfig::default().eagerness(0));
        let stream = gpu.new_stream()?;
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().stream_ordered(ordered))?;
        let block = pool.allocate_async(1000, &stream)?;
        let done = Arc::new(AtomicBool::new(false));
        let flag = done.clone();
        stream.on_host(move || flag.store(true, Ordering::Relaxed))?;
        // SAFETY: live, freed once.
        unsafe { pool.deallocate_async(block, &stream) };
        assert_eq!(done.load(Ordering::Relaxed), !ordered);
    }
    Ok(())
}

#[test]
fn thread_safe_false_binds_a_gpu_pool_to_its_thread() -> Result<()> {
    let gpu = device();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().thread_safe(false))?;
    let stream = gpu.new_stream()?;
    drop(pool.alloc::<u8>(8, &stream)?);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for refused in [
                pool.allocate(layout(8)).unwrap_err(),
                pool.allocate_async(8, &stream).unwrap_err(),
                pool.alloc::<u8>(8, &stream).unwrap_err(),
            ] {
                assert!(refused.to_string().contains("thread_safe"), "{refused}");
            }
        });
    });
    Ok(())
}

#[test]
fn the_debug_preset_finds_an_overflow_and_the_fast_one_carries_no_layer() -> Result<()> {
    let gpu = device();
    assert!(DevicePool::new(&gpu, PoolConfig::high_performance_gpu(0))?.diagnostics().is_none());
    let mut config = PoolConfig::debug_gpu(0);
    config.debug.on_finding = OnFinding::Collect;
    let pool = ManagedPool::new(&gpu, config)?;
    let block = pool.allocate(layout(100))?.cast::<u8>();
    // SAFETY: the byte behind the block is a canary of the pool; the block is live and freed once.
    unsafe {
        block.add(100).write(0);
        pool.deallocate(block);
    }
    let findings = pool.diagnostics().expect("debugging is on").findings();
    assert_eq!(findings[0].kind, FindingKind::Overflow);
    assert!(findings[0].allocated.is_some(), "the stack that allocated");
    Ok(())
}

#[test]
fn what_a_gpu_pool_cannot_be_is_an_error_that_names_the_field() -> Result<()> {
    let gpu = device();
    let config = PoolConfig::default_gpu;
    let mut guarded = config();
    guarded.debug.guard_pages = true;
    for (field, config) in [
        ("sync_type", PoolConfig::fixed_size_gpu(64, 0).sync_type(SyncType::LockFree)),
        ("sync_type", PoolConfig::high_performance_cpu()),
        ("path", config().path("/tmp/file")),
        ("debug.guard_pages", guarded),
        ("alignment", config().alignment(48)),
        ("initial_size, max_size", config().initial_size(2 << 20).max_size(1 << 20)),
        ("block_size, max_size", PoolConfig::fixed_size_gpu(4096, 0).max_size(1024)),
        ("use_pinned_memory, use_managed_memory", config().use_pinned_memory(true).use_managed_memory(true)),
    ] {
        let error = DevicePool::new(&gpu, config).unwrap_err();
        assert!(matches!(error, Error::Config(bad) if bad.field == field), "{field}: {error}");
    }
    Ok(())
}

#[test]
fn gpu_pools_grow_by_the_factor_and_never_beyond_the_limit() -> Result<()> {
    let gpu = GpuDevice::simulated(SimConfig::default().memory(2 << 30));
    let growths = |factor| -> Result<u64> {
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().growth_factor(factor))?;
        for _ in 0..100 {
            pool.allocate(layout(2 << 20))?;
        }
        let stats = pool.stats();
        // SAFETY: nothing was given to the device.
        unsafe { pool.reset_unchecked()? };
        Ok(stats.source_calls)
    };
    let (slow, fast) = (growths(1.0)?, growths(4.0)?);
    assert!(slow >= 50 && fast <= 10, "{slow} growths by 1, {fast} by 4");

    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(16 << 20).growth_factor(8.0))?;
    let mut served = 0;
    let error = loop {
        match pool.allocate(layout(1 << 20)) {
            Ok(block) => served += block.len(),
            Err(error) => break error,
        }
        assert!(pool.stats().reserved <= 16 << 20);
    };
    assert_eq!(served, 16 << 20, "all of the limit is served");
    assert!(error.to_string().contains("max_size"), "{error}");
    // SAFETY: nothing was given to the device.
    unsafe { pool.reset_unchecked() }
}

#[test]
fn gpu_pools_begin_with_the_initial_size_and_keep_the_alignment() -> Result<()> {
    let gpu = GpuDevice::simulated(SimConfig::default());
    for align in [256, 4096, 1 << 16] {
        let config = PoolConfig::default_gpu().initial_size(8 << 20).alignment(align);
        let pool = DevicePool::new(&gpu, config)?;
        let calls = pool.stats().source_calls;
        assert!(pool.pool_size() >= 8 << 20 && calls > 0);
        let stream = gpu.new_stream()?;
        for size in [1, 700, 5000] {
            assert!(pool.alloc::<u8>(size, &stream)?.as_device_ptr().is_multiple_of(align as u64));
            let raw = pool.allocate_async(size, &stream)?;
            assert!(raw.as_ptr().addr().is_multiple_of(align));
            // SAFETY: live, freed once.
            unsafe { pool.deallocate_async(raw, &stream) };
        }
        assert_eq!(pool.stats().source_calls, calls, "served from what was there at the start");
    }
    let error = DevicePool::new(&gpu, PoolConfig::default_gpu().initial_size(1 << 50)).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    Ok(())
}

#[test]
fn gpu_pools_count_when_they_are_asked_to() -> Result<()> {
    let gpu = GpuDevice::simulated(SimConfig::default());
    let pool = DevicePool::new(&gpu, PoolConfig::high_performance_gpu(0).initial_size(1 << 20))?;
    let pair = || -> Result<()> {
        let block = pool.allocate(layout(1000))?;
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(block.cast()) };
        Ok(())
    };
    pair()?;
    assert_eq!((pool.is_tracking(), pool.stats().allocation_count), (false, 0));
    pool.set_tracking(true);
    pair()?;
    assert_eq!((pool.is_tracking(), pool.stats().allocation_count), (true, 1));
    Ok(())
}

#[test]
fn the_kind_of_gpu_memory_is_the_types_and_the_device_the_one_given() -> Result<()> {
    let gpu = GpuDevice::simulated(SimConfig::default());
    let (pinned, managed) = (
        PoolConfig::default_gpu().use_pinned_memory(true),
        PoolConfig::default_gpu().use_managed_memory(true),
    );
    assert_eq!(PinnedPool::new(&gpu, pinned.clone())?.memory_type(), MemoryType::Pinned);
    assert_eq!(ManagedPool::new(&gpu, managed.clone())?.memory_type(), MemoryType::Managed);
    for (field, error) in [
        ("use_pinned_memory", DevicePool::new(&gpu, pinned.clone()).unwrap_err()),
        ("use_managed_memory", DevicePool::new(&gpu, managed.clone()).unwrap_err()),
        ("use_pinned_memory", ManagedPool::new(&gpu, pinned).unwrap_err()),
        ("use_managed_memory", PinnedPool::new(&gpu, managed).unwrap_err()),
    ] {
        assert!(matches!(error, Error::Config(bad) if bad.field == field), "{error}");
    }
    // Who opens the device reads `device_id`: here the helper does, and says which one is missing.
    let mut config = PoolConfig::default_gpu();
    config.device_id = 4321;
    assert_eq!(DevicePool::new(&gpu, config.clone())?.device().ordinal(), gpu.ordinal());
    match GpuDevice::open(config.device_id) {
        Err(Error::NoDevice { ordinal, .. }) => assert_eq!(ordinal, 4321),
        Err(Error::NoDriver) => {}
        other => panic!("{other:?}"),
    }
    Ok(())
}

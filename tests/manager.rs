//! Pools by name: creation, look-up, destruction, totals, copies, helpers, from one thread and from many.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use allocator_api2::vec::Vec as PoolVec;
use memory_pool::{
    AllocFlags, AllocatorType, AnyPool, CpuPool, DevicePool, Durability, Error, FindingKind, FixedPool,
    GpuDevice, LockFreeFixedPool, Managed, ManagedPool, MemoryPool, OnFinding, PersistentConfig,
    PersistentPool, PinnedPool, PoolBox, PoolConfig, PoolManager, Result, SimConfig, Strategy, SyncType,
    VariablePool,
    base::error::{PointerFault, Refusal},
    source::slice::Slice,
};

fn refusal(error: Error) -> Refusal {
    match error {
        Error::InvalidOperation(refusal) => refusal,
        other => panic!("{other}"),
    }
}

#[test]
fn names_are_taken_unknown_and_free_again() -> Result<()> {
    let manager = PoolManager::new();
    manager.create_cpu_pool("a", PoolConfig::fixed_size_cpu(64))?;
    let error = manager.create_cpu_pool("a", PoolConfig::default_cpu()).unwrap_err();
    assert!(error.to_string().contains("\"a\"") && matches!(refusal(error), Refusal::NameTaken(_)));
    let error = manager.cpu_pool("b").unwrap_err();
    assert!(error.to_string().contains("\"b\"") && matches!(refusal(error), Refusal::NameUnknown(_)));
    assert!(matches!(refusal(manager.destroy_pool("b").unwrap_err()), Refusal::NameUnknown(_)));
    assert!(manager.create_cpu_pool("", PoolConfig::default_cpu()).is_err());
    assert!(manager.create_cpu_pool("c", PoolConfig::default_cpu().max_size(0)).is_err());
    assert_eq!(manager.names(), ["a"]);
    assert_eq!(manager.cpu_pool("a")?.name(), "a");
    for block_size in [32, 128] {
        manager.destroy_pool("a")?;
        assert!(!manager.contains("a") && manager.cpu_pool("a").is_err());
        manager.create_cpu_pool("a", PoolConfig::fixed_size_cpu(block_size))?;
        assert_eq!(manager.cpu_pool("a")?.config().block_size, block_size);
    }
    Ok(())
}

/// Every kind of host pool that a configuration can ask for.
fn host_configs() -> Vec<PoolConfig> {
    let quiet = |mut config: PoolConfig| {
        config.debug.on_finding = OnFinding::Collect;
        config
    };
    let cached = PoolConfig::high_performance_cpu().initial_size(0);
    let plain = [
        PoolConfig::fixed_size_cpu(64),
        PoolConfig::fixed_size_cpu(64).sync_type(SyncType::LockFree),
        PoolConfig::default_cpu(),
        PoolConfig::default_cpu().strategy(Strategy::BestFit),
        PoolConfig::default_cpu().allocator_type(AllocatorType::SizeClass),
        cached,
    ];
    let debug = plain.clone().map(|config| quiet(config.debug(PoolConfig::debug_cpu().debug)));
    plain.into_iter().chain(debug).collect()
}

/// Whatever a handle is asked for after its pool was destroyed, it says so.
fn says_destroyed(pool: &dyn MemoryPool) {
    for size in [8, 64, 5 << 20] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        for flags in [AllocFlags::NONE, AllocFlags::ZEROED] {
            let error = pool.allocate_with(layout, flags).unwrap_err();
            assert!(error.to_string().contains("create it again"), "{error}");
            assert!(matches!(refusal(error), Refusal::Destroyed));
        }
        assert!(matches!(refusal(pool.allocate(layout).unwrap_err()), Refusal::Destroyed));
    }
    assert!(matches!(refusal(pool.reserve(1000).unwrap_err()), Refusal::Destroyed));
    assert!(!pool.has_leaks() && pool.active_allocations().is_empty());
}

#[test]
fn destruction_waits_for_what_is_live_and_handles_say_so_afterwards() -> Result<()> {
    for config in host_configs() {
        let manager = PoolManager::new();
        let handle = manager.create_cpu_pool("a", config.clone())?;
        let numbers = PoolBox::<[u64]>::new_zeroed_slice_in(4, manager.cpu_pool("a")?)?;
        let large = handle.allocate(Layout::from_size_align(3 << 20, 16)?)?;
        let error = manager.destroy_pool("a").unwrap_err();
        assert!(matches!(refusal(error), Refusal::StillLive(2)), "{error} {config:?}");
        assert_eq!(numbers.len(), 4);
        // As it was.
        drop(PoolBox::<[u64]>::new_zeroed_slice_in(4, manager.cpu_pool("a")?)?);
        drop(numbers);
        // SAFETY: live, freed once.
        unsafe { handle.deallocate(large.cast()) };
        manager.destroy_pool("a")?;
        assert_eq!(handle.stats().reserved, 0, "{config:?}");
        says_destroyed(&*handle);
        assert!(PoolVec::<u8, _>::new_in(handle.clone()).try_reserve(1).is_err());
    }
    Ok(())
}

#[test]
fn what_another_thread_holds_keeps_the_pool() -> Result<()> {
    for config in host_configs() {
        let manager = PoolManager::new();
        let handle = manager.create_cpu_pool("a", config.clone())?;
        let (go, wait) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| -> Result<()> {
            let (ready, is_ready) = std::sync::mpsc::channel();
            let manager = &manager;
            let holder = scope.spawn(move || {
                let block = manager.cpu_pool("a").unwrap().allocate(Layout::new::<[u64; 5]>()).unwrap();
                ready.send(()).unwrap();
                wait.recv().unwrap();
                // SAFETY: live, freed once.
                unsafe { manager.cpu_pool("a").unwrap().deallocate(block.cast()) };
            });
            is_ready.recv().unwrap();
            assert!(handle.has_leaks(), "{config:?}");
            assert!(handle.stats().current_allocated >= 40);
            assert!(matches!(refusal(manager.destroy_pool("a").unwrap_err()), Refusal::StillLive(1)));
            if config.debug.is_on() {
                assert_eq!(handle.active_allocations()[0].size, 40);
            }
            go.send(()).unwrap();
            holder.join().unwrap();
            manager.destroy_pool("a")
        })?;
        says_destroyed(&*handle);
    }
    Ok(())
}

#[test]
fn handles_of_pools_by_type_say_that_they_were_destroyed() -> Result<()> {
    fn destroyed<P: Managed>(pool: P) -> Result<()> {
        let manager = PoolManager::new();
        let handle = manager.register("a", pool)?;
        let block = handle.allocate(Layout::new::<u64>())?;
        assert!(matches!(refusal(manager.destroy_pool("a").unwrap_err()), Refusal::StillLive(1)));
        // SAFETY: live, freed once.
        unsafe { handle.deallocate(block.cast()) };
        manager.destroy_pool("a")?;
        assert_eq!(handle.stats().reserved, 0, "{}", P::KIND);
        says_destroyed(&*handle);
        Ok(())
    }
    destroyed(CpuPool::new(PoolConfig::high_performance_cpu())?)?;
    destroyed(CpuPool::watched(PoolConfig::debug_cpu())?)?;
    destroyed(FixedPool::new(PoolConfig::fixed_size_cpu(64))?)?;
    destroyed(LockFreeFixedPool::new(PoolConfig::fixed_size_cpu(64))?)?;
    destroyed(VariablePool::watched(PoolConfig::debug_cpu())?)?;
    let gpu = GpuDevice::simulated(SimConfig::default());
    destroyed(DevicePool::new(&gpu, PoolConfig::default_gpu().initial_size(8 << 20))?)?;
    destroyed(PinnedPool::new(&gpu, PoolConfig::default_gpu())?)?;
    destroyed(ManagedPool::new(&gpu, PoolConfig::default_gpu())?)?;
    assert_eq!(gpu.memory_info()?.0, gpu.memory_info()?.1, "the device has all of its memory back");
    Ok(())
}

#[test]
fn a_destroyed_gpu_pool_refuses_buffers_too() -> Result<()> {
    let gpu = GpuDevice::simulated(SimConfig::default());
    let stream = gpu.new_stream()?;
    let manager = PoolManager::new();
    let pool = manager.create_gpu_pool("weights", &gpu, PoolConfig::default_gpu())?;
    let weights = pool.alloc::<f32>(1000, &stream)?;
    assert!(matches!(refusal(manager.destroy_pool("weights").unwrap_err()), Refusal::StillLive(1)));
    drop(weights);
    manager.destroy_pool("weights")?;
    assert!(matches!(refusal(pool.alloc::<f32>(1000, &stream).unwrap_err()), Refusal::Destroyed));
    assert!(matches!(refusal(pool.allocate_async(100, &stream).unwrap_err()), Refusal::Destroyed));
    assert_eq!(pool.pool_size(), 0);
    Ok(())
}

#[test]
fn a_destroyed_persistent_pool_keeps_what_is_stored_and_its_file_is_free_again() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("memory-pool-manager-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("orders");
    let manager = PoolManager::new();
    let config = PersistentConfig::new(1 << 20).layout("orders").durability(Durability::ProcessCrash);
    let handle = manager.create_persistent_pool("orders", &path, config)?;
    // A thread that looked the pool up and sleeps does not keep the file.
    let (go, wait) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| -> Result<()> {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let manager = &manager;
        scope.spawn(move || {
            manager.persistent_pool("orders").unwrap();
            ready.send(()).unwrap();
            let _ = wait.recv();
        });
        is_ready.recv().unwrap();
        handle.transaction(|tx| tx.set_root("latest", &tx.alloc(250u64)?))?;
        let scratch = PoolVec::<u64, _>::with_capacity_in(10, handle.clone());
        assert!(matches!(refusal(manager.destroy_pool("orders").unwrap_err()), Refusal::StillLive(1)));
        drop(scratch);
        manager.destroy_pool("orders")?;
        says_destroyed(&*handle);
        assert!(PoolVec::<u8, _>::new_in(handle.clone()).try_reserve(1).is_err());
        for error in [
            handle.transaction(|tx| tx.alloc(1u64).map(|_| ())).unwrap_err(),
            handle.read(|r| r.root::<u64>("latest").map(|_| ())).unwrap_err(),
            handle.grow(1 << 20).unwrap_err(),
        ] {
            assert!(matches!(refusal(error), Refusal::Destroyed));
        }
        drop(handle);
        let again = PersistentPool::open(&path, "orders")?;
        assert_eq!(again.read(|r| Ok(*r.root::<u64>("latest")?))?, 250);
        go.send(()).unwrap();
        Ok(())
    })?;
    std::fs::remove_dir_all(&folder).unwrap();
    Ok(())
}

#[test]
fn the_wrong_kind_is_named() -> Result<()> {
    let manager = PoolManager::new();
    manager.register("tiles", FixedPool::new(PoolConfig::fixed_size_cpu(4096))?)?;
    assert_eq!(manager.get::<FixedPool>("tiles")?.config().block_size, 4096);
    for _ in 0..2 {
        let error = manager.cpu_pool("tiles").unwrap_err();
        assert!(matches!(refusal(error), Refusal::WrongKind { found: "host", .. }), "{error}");
    }
    assert!(manager.get::<VariablePool>("tiles").is_err());
    assert_eq!(manager.with_pool("tiles", |pool| pool.config().block_size)?, 4096);
    Ok(())
}

#[test]
fn totals_count_a_pool_with_two_names_once() -> Result<()> {
    let manager = PoolManager::new();
    let pool = AnyPool::new(PoolConfig::default_cpu())?;
    manager.register("one", pool.clone())?;
    manager.register("same", pool.clone())?;
    let fixed = manager.create_cpu_pool("other", PoolConfig::fixed_size_cpu(100))?;
    let (block, other) = (pool.allocate(Layout::new::<[u8; 1000]>())?, fixed.allocate(Layout::new::<u8>())?);
    let stats = manager.all_stats();
    assert_eq!(
        stats.pools.iter().map(|pool| pool.name.as_str()).collect::<Vec<_>>(),
        ["one", "other", "same"]
    );
    assert_eq!(stats.total.active_count(), 2);
    assert_eq!(stats.total.reserved, pool.stats().reserved + fixed.stats().reserved);
    assert_eq!(
        stats.total.current_allocated,
        pool.stats().current_allocated + fixed.stats().current_allocated
    );
    let table = stats.to_string();
    let widths: Vec<usize> = table.lines().map(|line| line.chars().count()).collect();
    assert!(widths.len() == 5 && widths.iter().all(|width| *width == widths[0]), "columns align:\n{table}");
    // SAFETY: both live, each freed once.
    unsafe {
        pool.deallocate(block.cast());
        fixed.deallocate(other.cast());
    }
    manager.reset_all_pools()
}

#[test]
fn totals_count_memory_of_a_pool_inside_another_once() -> Result<()> {
    // The inner pool's name before and after the outer's: the order must not matter.
    for inner in ["a", "z"] {
        let manager = PoolManager::new();
        let outer = manager.create_cpu_pool("outer", PoolConfig::default_cpu().initial_size(1 << 20))?;
        let apart = manager.create_cpu_pool("apart", PoolConfig::fixed_size_cpu(64).initial_size(1 << 16))?;
        let arena = outer.allocate(Layout::from_size_align(1 << 18, 64)?)?;
        // SAFETY: the block is live until the end, and nobody else uses it.
        let memory = unsafe { std::slice::from_raw_parts_mut(arena.as_ptr().cast(), 1 << 18) };
        let tiles = FixedPool::with_source(
            PoolConfig::fixed_size_cpu(1024).initial_size(1 << 17),
            Slice::new(memory),
        )?;
        let tiles = manager.register(inner, tiles)?;
        let tile = tiles.allocate(Layout::new::<[u8; 1024]>())?;
        let stats = manager.all_stats();
        assert_eq!(stats.pools.len(), 3);
        let (outside, inside) = (outer.stats(), tiles.stats());
        assert!(inside.reserved >= 1 << 17);
        assert_eq!(stats.total.reserved, outside.reserved + apart.stats().reserved);
        assert_eq!(stats.total.committed, stats.total.reserved);
        // Live is what is not free in any of them, nor lost to the inner pool's books.
        let live = outside.current_allocated - inside.reserved + inside.current_allocated;
        assert_eq!(stats.total.current_allocated, live);
        assert_eq!(stats.total.free, outside.free + inside.free + apart.stats().free);
        assert_eq!(stats.total.active_count(), 2);
        // SAFETY: live, freed once.
        unsafe { tiles.deallocate(tile.cast()) };
        manager.destroy_pool(inner)?;
        assert_eq!(manager.all_stats().total.reserved, outside.reserved + apart.stats().reserved);
        // SAFETY: as above; the inner pool has given its memory back.
        unsafe { outer.deallocate(arena.cast()) };
    }
    Ok(())
}

/// Plants each bug in a pool that the manager made, and returns what was found.
fn planted(manager: &PoolManager, config: PoolConfig) -> Result<Vec<FindingKind>> {
    manager.create_cpu_pool("watched", config)?;
    let pool = manager.cpu_pool("watched")?;
    let log = pool.diagnostics().expect("debugging is on").log();
    let layout = Layout::new::<[u8; 24]>();
    let mut elsewhere = 0u64;
    // SAFETY: what is written lies in the blocks, their canaries or the quarantine; the layer is to refuse the wrong
    // frees.
    unsafe {
        for offset in [24, -1] {
            let block = pool.allocate(layout)?.cast::<u8>();
            block.offset(offset).write(0x41);
            pool.deallocate(block);
        }
        let block = pool.allocate(layout)?.cast::<u8>();
        pool.deallocate(block);
        block.write(1);
        assert_eq!(manager.check_all(), 1, "the write to what was freed");
        pool.deallocate(block);
        pool.deallocate(NonNull::from(&mut elsewhere).cast());
        memory_pool::HostPool::give_back(&pool, pool.allocate(layout)?.cast(), Layout::new::<[u8; 16]>());
    }
    pool.allocate(layout)?;
    drop(pool);
    assert_eq!(refusal(manager.destroy_pool("watched").unwrap_err()), Refusal::StillLive(1));
    let findings = log.findings();
    assert!(findings.iter().all(|finding| finding.allocated.is_some() || finding.found.is_some()));
    Ok(findings.iter().map(|finding| finding.kind).collect())
}

#[test]
fn planted_bugs_are_found_in_every_kind_of_pool_that_a_manager_makes() -> Result<()> {
    for config in host_configs() {
        let manager = PoolManager::new();
        let name = format!("{:?} {:?}", config.allocator_type, config.sync_type);
        let mut debug = PoolConfig::debug_cpu().debug;
        debug.on_finding = OnFinding::Collect;
        let found = planted(&manager, config.debug(debug))?;
        use FindingKind::{DoubleFree, ForeignFree, Overflow, Underflow, WriteAfterFree, WrongLayout};
        let expected = [Overflow, Underflow, WriteAfterFree, DoubleFree, ForeignFree, WrongLayout];
        assert_eq!(found, expected, "{name}");
    }
    Ok(())
}

#[test]
fn resetting_all_says_what_is_live_and_resets_the_rest() -> Result<()> {
    let manager = PoolManager::new();
    let busy = manager.create_cpu_pool("busy", PoolConfig::default_cpu())?;
    manager.create_cpu_pool("idle", PoolConfig::default_cpu().initial_size(1 << 20))?;
    let block = busy.allocate(Layout::new::<u64>())?;
    assert!(matches!(refusal(manager.reset_all_pools().unwrap_err()), Refusal::StillLive(1)));
    // SAFETY: live, freed once.
    unsafe { busy.deallocate(block.cast()) };
    manager.reset_all_pools()
}

#[test]
fn copies_find_the_owners_and_mind_the_ends() -> Result<()> {
    let manager = PoolManager::new();
    let a = manager.create_cpu_pool("a", PoolConfig::default_cpu())?;
    let b = manager.create_cpu_pool("b", PoolConfig::fixed_size_cpu(64))?;
    let from = PoolBox::<[u8]>::from_slice_in(&[7; 64], a.clone())?;
    let mut to = PoolBox::<[u8]>::new_zeroed_slice_in(64, b.clone())?;
    let (src, dst): (NonNull<u8>, NonNull<u8>) =
        (NonNull::from(&*from).cast(), NonNull::from(&mut *to).cast());
    // SAFETY: 64 bytes each, used by nobody else; the longer copies are refused before a byte is touched.
    unsafe {
        manager.copy(dst, src, 64)?;
        manager.copy(dst, src, 0)?;
        let error = manager.copy(dst, src, 1 << 30).unwrap_err();
        assert!(
            matches!(error, Error::InvalidPointer(bad) if bad.fault == PointerFault::OutOfRange),
            "{error}"
        );
        assert!(manager.copy(dst, src, usize::MAX).is_err());
    }
    assert_eq!(*to, [7; 64]);
    let on_the_stack = [9u8; 64];
    // SAFETY: as above.
    unsafe { manager.copy(dst, NonNull::from(&on_the_stack).cast(), 64)? };
    assert_eq!(*to, on_the_stack);
    manager.copy_slice(&mut to[..3], &[1, 2, 3][..])?;
    assert_eq!(to[..4], [1, 2, 3, 9]);
    assert!(manager.copy_slice(&mut to[..3], &[1, 2][..]).is_err());
    Ok(())
}

#[test]
fn helpers_use_the_global_manager() -> Result<()> {
    let manager = PoolManager::global();
    manager.create_cpu_pool("helpers", PoolConfig::default_cpu())?;
    let mut numbers = memory_pool::allocate_in::<u32>("helpers", 100)?;
    numbers[99] = 1;
    assert_eq!(numbers.iter().sum::<u32>(), 1);
    assert!(manager.cpu_pool("helpers")?.has_leaks());
    assert!(manager.destroy_pool("helpers").is_err());
    drop(numbers);
    manager.destroy_pool("helpers")?;
    let empty = memory_pool::allocate::<u64>(0)?;
    assert!(empty.is_empty());
    assert!(matches!(memory_pool::allocate::<u64>(usize::MAX), Err(Error::OutOfMemory { .. })));
    assert!(memory_pool::allocate_in::<u8>("no such pool", 1).is_err());
    assert!(manager.contains("default"));
    Ok(())
}

#[test]
fn handles_go_to_other_threads_and_outlive_what_made_them() -> Result<()> {
    let manager = PoolManager::new();
    manager.create_cpu_pool("a", PoolConfig::default_cpu())?;
    let vector = std::thread::scope(|scope| {
        let fill = || {
            let mut vector = PoolVec::new_in(manager.cpu_pool("a").unwrap());
            vector.extend(0..1000u32);
            vector
        };
        scope.spawn(fill).join().unwrap()
    });
    drop(manager);
    assert_eq!(vector.iter().sum::<u32>(), 499_500);
    Ok(())
}

#[test]
fn look_ups_and_destructions_race_without_harm() -> Result<()> {
    let manager = PoolManager::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut served = 0;
                while !stop.load(Ordering::Relaxed) {
                    match manager.cpu_pool("a") {
                        Ok(pool) => match pool.allocate(Layout::new::<u64>()) {
                            Ok(block) => {
                                // SAFETY: live, written within its size, freed once.
                                unsafe {
                                    block.cast::<u64>().write(served);
                                    pool.deallocate(block.cast());
                                }
                                served += 1;
                            }
                            Err(error) => assert!(matches!(refusal(error), Refusal::Destroyed)),
                        },
                        Err(error) => assert!(matches!(refusal(error), Refusal::NameUnknown(_))),
                    }
                }
            });
        }
        let mut destroyed = 0;
        for round in 0..300 {
            let config =
                if round % 2 == 0 { PoolConfig::fixed_size_cpu(16) } else { PoolConfig::default_cpu() };
            manager.create_cpu_pool("a", config).unwrap();
            loop {
                match manager.destroy_pool("a") {
                    Ok(()) => break,
                    Err(error) => assert!(matches!(refusal(error), Refusal::StillLive(_))),
                }
            }
            destroyed += 1;
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(destroyed, 300);
    });
    assert!(manager.names().is_empty());
    Ok(())
}

#[test]
fn a_thread_that_ends_can_still_look_up() {
    /// Looks up while the thread's variables are being dropped.
    struct Late;
    impl Drop for Late {
        fn drop(&mut self) {
            let pool = PoolManager::global().default_cpu_pool().unwrap();
            let block = pool.allocate(Layout::new::<u64>()).unwrap();
            // SAFETY: live, freed once.
            unsafe { pool.deallocate(block.cast()) };
        }
    }
    thread_local!(static LATE: Late = const { Late });
    std::thread::spawn(|| {
        LATE.with(|_| {});
        PoolManager::global().default_cpu_pool().unwrap();
    })
    .join()
    .unwrap();
}

#[test]
fn one_trait_object_for_all() -> Result<()> {
    fn fill(pool: &dyn MemoryPool) -> Result<u64> {
        let block = pool.allocate(Layout::new::<[u8; 100]>())?;
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(block.cast()) };
        Ok(pool.stats().allocation_count)
    }
    let manager = PoolManager::new();
    for (name, config) in [("fixed", PoolConfig::fixed_size_cpu(128)), ("any", PoolConfig::debug_cpu())] {
        manager.create_cpu_pool(name, config)?;
        assert_eq!(manager.with_pool(name, fill)??, 1);
    }
    assert_eq!(manager.check_all(), 0);
    Ok(())
}

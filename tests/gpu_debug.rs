//! Debug layers on GPU pools, on the simulated device: bugs are planted in kernels and in the host's calls, and
//! each must be found and told; programs without one must find nothing.

use std::alloc::Layout;
use std::ffi::c_void;
use std::ptr::NonNull;

use memory_pool::gpu::Touch;
use memory_pool::{
    DebugConfig, DevicePool, Error, Finding, FindingKind, GpuDevice, GpuPool, ManagedPool, MemoryPool,
    OnFinding, OperationKind, PinnedPool, PoolConfig, SimConfig, Stream,
};

fn device(seed: u64) -> GpuDevice {
    GpuDevice::simulated(SimConfig::default().seed(seed).memory(1 << 30))
}

fn watched() -> PoolConfig {
    let mut config = PoolConfig::debug_gpu(0);
    config.debug.on_finding = OnFinding::Collect;
    config
}

fn clean(gpu: &GpuDevice) {
    let hazards = gpu.simulation().unwrap().hazards();
    assert!(hazards.is_empty(), "{}", hazards[0]);
}

/// A kernel that writes one byte.
fn poke(gpu: &GpuDevice, stream: &Stream, at: usize) {
    let sim = gpu.simulation().unwrap();
    sim.launch(stream, 500, &[Touch::write(at, 1)], move |memory| {
        assert!(memory.write(at, &[0x41]));
    })
    .unwrap();
}

fn only(pool: &impl MemoryPool) -> Finding {
    let findings = pool.diagnostics().unwrap().findings();
    assert_eq!(findings.len(), 1, "{findings:#?}");
    findings.into_iter().next().unwrap()
}

#[inline(never)]
fn allocate_here(pool: &DevicePool, bytes: usize, stream: &Stream) -> NonNull<c_void> {
    std::hint::black_box(pool.allocate_async(bytes, stream).unwrap())
}

fn stack(site: &Option<memory_pool::Site>) -> String {
    site.as_ref().unwrap().stack.unwrap().to_string()
}

#[test]
fn a_kernel_that_writes_past_its_block_is_found_at_free() {
    for (before, offset, kind) in [(false, 1000, FindingKind::Overflow), (true, -1, FindingKind::Underflow)] {
        let gpu = device(1);
        let stream = gpu.new_stream().unwrap();
        let pool = DevicePool::new(&gpu, watched()).unwrap();
        let block = allocate_here(&pool, 1000, &stream);
        let start = block.as_ptr() as usize;
        poke(&gpu, &stream, if before { start - 1 } else { start + 1000 });
        // SAFETY: live, and freed once.
        unsafe { pool.deallocate_async(block, &stream) };
        let found = only(&pool);
        assert_eq!((found.kind, found.address, found.size), (kind, start, 1000));
        assert_eq!((found.offset, found.damaged), (offset, 1));
        assert!(found.bytes.contains(&0x41));
        assert!(stack(&found.allocated).contains("allocate_here"), "{found}");
        clean(&gpu);
    }
}

#[test]
fn buffers_are_guarded_as_raw_blocks_are() {
    let gpu = device(2);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, watched()).unwrap();
    let buffer = pool.alloc_from_host(&[1u32; 77], &stream).unwrap();
    poke(&gpu, &stream, buffer.as_device_ptr() as usize + 77 * 4 + 3);
    stream.synchronize().unwrap();
    assert_eq!(buffer.to_vec(&stream).unwrap(), [1; 77]);
    assert_eq!(pool.diagnostics().unwrap().check(), 1, "found while the block lives");
    assert_eq!(pool.diagnostics().unwrap().check(), 0, "and once");
    drop(buffer);
    assert_eq!((only(&pool).kind, only(&pool).offset), (FindingKind::Overflow, 77 * 4 + 3));
}

#[test]
fn writes_to_freed_blocks_are_found_on_demand_and_before_reuse() {
    for on_demand in [false, true] {
        let gpu = device(3);
        let stream = gpu.new_stream().unwrap();
        let pool = DevicePool::new(&gpu, watched()).unwrap();
        let buffer = pool.alloc::<u8>(5000, &stream).unwrap();
        let start = buffer.as_device_ptr() as usize;
        drop(buffer);
        poke(&gpu, &stream, start + 4321);
        stream.synchronize().unwrap();
        if on_demand {
            assert_eq!(pool.diagnostics().unwrap().check(), 1);
        }
        // Nothing held back is left after this, and all of it was looked at.
        pool.trim(0).unwrap();
        pool.diagnostics().unwrap().check();
        let found = only(&pool);
        assert_eq!((found.kind, found.offset, found.damaged), (FindingKind::WriteAfterFree, 4321, 1));
        assert_eq!(pool.pool_size(), 0);
    }
}

#[test]
fn double_foreign_and_interior_frees_are_told_apart() {
    let gpu = device(4);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, watched()).unwrap();
    let block = allocate_here(&pool, 100, &stream);
    let live = allocate_here(&pool, 100, &stream);
    let mut mine = 0u64;
    let inside = live.cast::<u8>().map_addr(|at| at.checked_add(8).unwrap()).cast();
    // SAFETY: the first free is right; what the others do wrong is what the layer is to find.
    unsafe {
        pool.deallocate_async(block, &stream);
        assert!(matches!(pool.try_deallocate_async(block, &stream), Err(Error::InvalidPointer(_))));
        pool.deallocate_async(block, &stream);
        pool.deallocate_async(inside, &stream);
        pool.deallocate(NonNull::from(&mut mine).cast());
        pool.deallocate(NonNull::<u64>::dangling().cast());
    }
    let findings = pool.diagnostics().unwrap().findings();
    let kinds: Vec<_> = findings.iter().map(|finding| finding.kind).collect();
    use FindingKind::{DoubleFree, ForeignFree, InteriorFree};
    assert_eq!(kinds, [DoubleFree, DoubleFree, InteriorFree, ForeignFree]);
    assert!(stack(&findings[0].allocated).contains("allocate_here"));
    assert!(stack(&findings[0].freed).contains("double_foreign"));
    assert_eq!(findings[2].offset, 8);
    assert_eq!(pool.active_allocations().len(), 1);
    // SAFETY: live still, whatever was tried.
    unsafe { pool.deallocate_async(live, &stream) };
    assert!(!pool.has_leaks());
    pool.check().unwrap();
    clean(&gpu);
}

#[test]
fn leaks_are_told_at_drop_with_the_stack_that_allocated() {
    let gpu = device(5);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, watched()).unwrap();
    let log = pool.diagnostics().unwrap().log();
    let kept = allocate_here(&pool, 12_345, &stream);
    drop(pool.alloc::<u8>(99, &stream).unwrap());
    assert_eq!(pool.diagnostics().unwrap().leaks().len(), 1);
    assert_eq!((pool.active_allocations().len(), pool.stats().current_allocated), (1, 12_345));
    pool.print_allocated_blocks();
    drop(pool);
    let found = &log.findings()[..];
    assert_eq!((found.len(), found[0].kind, found[0].size), (1, FindingKind::Leak, 12_345));
    assert_eq!(found[0].address, kept.as_ptr() as usize);
    assert!(stack(&found[0].allocated).contains("allocate_here"));
    assert_eq!(gpu.simulation().unwrap().memory_in_use(), 0, "the memory went back nevertheless");
}

#[test]
fn history_has_growth_allocations_and_frees() {
    let gpu = device(6);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, watched()).unwrap();
    let block = allocate_here(&pool, 300, &stream);
    // SAFETY: live, and freed once.
    unsafe { pool.deallocate_async(block, &stream) };
    let history = pool.diagnostics().unwrap().history();
    let seen: Vec<_> = history.iter().map(|operation| operation.kind).collect();
    assert_eq!(seen, [OperationKind::Grow, OperationKind::Allocate, OperationKind::Free]);
    assert_eq!((history[1].size, history[2].address), (300, block.as_ptr() as usize));
    assert!(history[1].stack.unwrap().to_string().contains("allocate_here"));
}

#[test]
fn the_host_is_watched_in_pinned_and_managed_memory() {
    let gpu = device(7);
    let pinned = PinnedPool::new(&gpu, watched()).unwrap();
    let managed = ManagedPool::new(&gpu, watched()).unwrap();
    fn overrun<K: memory_pool::gpu::MemoryKind>(pool: &GpuPool<K>) {
        let block = pool.allocate(Layout::new::<[u8; 40]>()).unwrap();
        assert_eq!(block.len(), 40);
        // SAFETY: the byte behind the block is the layer's canary.
        unsafe { block.cast::<u8>().add(40).write(7) };
        // SAFETY: live, and freed once.
        unsafe { pool.deallocate(block.cast()) };
        assert_eq!((only(pool).kind, only(pool).offset), (FindingKind::Overflow, 40));
    }
    overrun(&pinned);
    overrun(&managed);
    let mut map = hashbrown::HashMap::new_in(&pinned);
    (0..1000u32).for_each(|key| _ = map.insert(key, key));
    drop(map);
    let transfer = {
        let stream = gpu.new_stream().unwrap();
        let pool = DevicePool::new(&gpu, watched()).unwrap();
        let mut buffer = pool.alloc::<u8>(100, &stream).unwrap();
        buffer.copy_from_pinned(pinned.alloc_from(&[3u8; 100]).unwrap(), &stream).unwrap().wait().unwrap()
    };
    assert_eq!(transfer[..], [3; 100]);
    drop(transfer);
    assert_eq!(pinned.diagnostics().unwrap().findings().len(), 1, "the planted one alone");
    clean(&gpu);
}

#[test]
fn programs_without_a_bug_find_nothing() {
    for seed in 0..20 {
        let gpu = device(seed);
        let streams: Vec<_> = (0..3).map(|_| gpu.new_stream().unwrap()).collect();
        // Small, so that blocks come back soon, and the quarantine is emptied where memory is short.
        let mut config = watched().max_size(2 << 20);
        config.debug.quarantine = 300 << 10;
        let pool = DevicePool::new(&gpu, config).unwrap();
        let mut random = seed * 2 + 1;
        let mut below = |limit: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % limit
        };
        let mut live = Vec::new();
        for round in 0..300 {
            let stream = &streams[below(3)];
            match pool.alloc_from_host(&vec![round as u8; 1 + below(200 << 10)], stream) {
                Ok(buffer) => {
                    if below(3) == 0 {
                        buffer.record_stream(&streams[below(3)]).unwrap();
                    }
                    live.push((buffer, round as u8));
                }
                Err(Error::OutOfMemory { .. }) => live.clear(),
                Err(error) => panic!("{error}"),
            }
            if live.len() > 6 {
                let (buffer, mark) = live.swap_remove(below(live.len()));
                assert!(buffer.to_vec(&streams[below(3)]).unwrap().iter().all(|&byte| byte == mark));
            }
            pool.check().unwrap();
        }
        live.clear();
        assert_eq!(pool.diagnostics().unwrap().check(), 0);
        assert!(pool.diagnostics().unwrap().findings().is_empty());
        assert!(!pool.has_leaks());
        clean(&gpu);
    }
}

#[test]
fn graphs_run_on_memory_that_is_let_through() {
    let gpu = device(8);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, watched()).unwrap();
    let source = pool.alloc_from_host(&[9u8; 500], &stream).unwrap();
    let outside = pool.alloc_from_host(&[1u8; 500], &stream).unwrap();
    let capture = stream.begin_capture().unwrap();
    let mut scratch = pool.alloc::<u8>(500, &stream).unwrap();
    scratch.copy_from_device(&source, &stream).unwrap();
    assert_eq!(pool.active_allocations().len(), 3);
    drop(scratch);
    drop(outside);
    let graph = capture.end().unwrap();
    for _ in 0..3 {
        graph.launch(&stream).unwrap();
    }
    stream.synchronize().unwrap();
    drop(graph);
    drop(source);
    pool.trim(0).unwrap();
    assert_eq!((pool.diagnostics().unwrap().check(), pool.pool_size()), (0, 0));
    assert_eq!(pool.diagnostics().unwrap().findings(), []);
    clean(&gpu);
}

#[test]
fn a_failing_driver_is_no_finding() {
    fn work(gpu: &GpuDevice, log: &mut Vec<Finding>) -> memory_pool::Result<()> {
        let stream = gpu.new_stream()?;
        let pool = DevicePool::new(gpu, watched().max_size(4 << 20))?;
        let record = |pool: &DevicePool| pool.diagnostics().unwrap().findings();
        let done = (|| {
            let buffer = pool.alloc_from_host(&[5u8; 3000], &stream)?;
            let other = pool.alloc::<u8>(70_000, &stream)?;
            drop(buffer);
            pool.diagnostics().unwrap().check();
            drop(other);
            pool.trim(0).map(|_| ())
        })();
        log.extend(record(&pool));
        done
    }
    let gpu = device(9);
    work(&gpu, &mut Vec::new()).unwrap();
    let total = gpu.simulation().unwrap().calls();
    assert!(total > 20);
    for nth in 1..=total {
        let gpu = device(9);
        let sim = gpu.simulation().unwrap();
        sim.fail_call(nth, 1);
        let mut log = Vec::new();
        let _ = work(&gpu, &mut log);
        assert!(log.is_empty(), "call {nth}: {}", log[0]);
        sim.cancel_fault();
        assert_eq!(sim.memory_in_use(), 0, "call {nth}");
        work(&gpu, &mut Vec::new()).unwrap();
    }
}

#[test]
fn latency_alone_leaves_the_pool_as_it_is() {
    let gpu = device(10);
    let stream = gpu.new_stream().unwrap();
    let mut config = PoolConfig::default_gpu();
    config.debug.latency = true;
    let pool = DevicePool::new(&gpu, config).unwrap();
    let calls = |pool: &DevicePool| {
        drop(pool.alloc_uninit::<u8>(1000, &stream).unwrap());
        gpu.simulation().unwrap().calls()
    };
    let first = calls(&pool);
    assert_eq!(calls(&pool), first, "no call to the driver where nothing is guarded");
    assert!(pool.stats().latency.is_some());
    assert!(
        DevicePool::new(&gpu, PoolConfig::default_gpu().debug(DebugConfig::OFF))
            .unwrap()
            .diagnostics()
            .is_none()
    );
}

//! GPU pools on the simulated device: the conformance suite, faults at every driver call, threads and streams,
//! capture, limits and misuse.

#[allow(dead_code, reason = "some helpers serve the pools of other test programs")]
mod conformance;
mod gpu_suite;

use std::alloc::Layout;
use std::sync::Arc;

use conformance::Subject;
use memory_pool::base::error::Refusal;
use memory_pool::gpu::Touch;
use memory_pool::{
    DevicePool, DeviceVec, Error, GpuDevice, ManagedPool, PinnedPool, PoolConfig, Result, SimConfig, Stream,
};

subject!(shared DevicePool);
subject!(shared PinnedPool);
subject!(shared ManagedPool);

fn device(seed: u64) -> GpuDevice {
    GpuDevice::simulated(SimConfig::default().seed(seed).memory(4 << 30))
}

fn clean(gpu: &GpuDevice) {
    let hazards = gpu.simulation().unwrap().hazards();
    assert!(hazards.is_empty(), "{}", hazards[0]);
}

fn subject(name: &'static str, touchable: bool) -> Subject {
    Subject { name, config: PoolConfig::default_gpu(), largest: 64 << 20, max_align: 1 << 16, touchable }
}

#[test]
fn device_pools_conform() {
    let gpu = device(1);
    let make = |config| DevicePool::new(&gpu, config);
    conformance::all_rules(&subject("device", false), &make);
    conformance::shared_rules(&subject("device", false), &make);
    clean(&gpu);
}

#[test]
fn pinned_pools_conform() {
    let gpu = device(2);
    let mut subject = subject("pinned", true);
    subject.config = subject.config.use_pinned_memory(true);
    let make = |config| PinnedPool::new(&gpu, config);
    conformance::all_rules(&subject, &make);
    conformance::shared_rules(&subject, &make);
    clean(&gpu);
}

#[test]
fn managed_pools_conform() {
    let gpu = device(3);
    let mut subject = subject("managed", true);
    subject.config = subject.config.use_managed_memory(true);
    let make = |config| ManagedPool::new(&gpu, config);
    conformance::all_rules(&subject, &make);
    conformance::shared_rules(&subject, &make);
    clean(&gpu);
}

#[test]
fn containers_live_in_pinned_and_managed_memory() {
    let gpu = device(4);
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let managed = ManagedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    conformance::containers::v04::all(&pinned, 1 << 12);
    conformance::containers::v02::all(&pinned, 1 << 12);
    conformance::containers::v04::all(&managed, 1 << 12);
    conformance::containers::maps(&pinned);
    assert!(!pinned.has_leaks() && !managed.has_leaks());
}

/// A program that uses most of what there is; every step may fail.
fn work(gpu: &GpuDevice) -> Result<()> {
    let (a, b) = (gpu.new_stream()?, gpu.new_stream()?);
    let pool = DevicePool::new(gpu, PoolConfig::default_gpu().max_size(96 << 20))?;
    let pinned = PinnedPool::new(gpu, PoolConfig::default_gpu())?;
    let mut x = pool.alloc_from_host(&[7u32; 1000], &a)?;
    let y = pool.alloc::<u32>(1000, &b)?;
    x.copy_from_device(&y, &b)?;
    let host = pinned.alloc_from(&[9u32; 1000])?;
    let transfer = x.copy_from_pinned(host, &a)?;
    assert_eq!(transfer.wait()?[0], 9);
    x.record_stream(&b)?;
    drop(x);
    let mut vec = DeviceVec::<u64>::new_in(&pool, &b);
    vec.extend_from_host(&[1, 2, 3])?;
    vec.resize_zeroed(400_000)?;
    assert_eq!(vec.to_vec()?[..4], [1, 2, 3, 0]);
    drop(b);
    drop(y);
    pool.process_deferred();
    pool.trim(0)?;
    let capture = a.begin_capture()?;
    let inside = pool.alloc::<u32>(100, &a)?;
    drop(inside);
    let graph = capture.end()?;
    graph.launch(&a)?;
    a.synchronize()?;
    drop(graph);
    pool.check()?;
    drop(vec);
    a.synchronize()?;
    pool.trim(0)?;
    assert!(!pool.has_leaks());
    Ok(())
}

#[test]
fn every_driver_call_may_fail() {
    let gpu = device(5);
    work(&gpu).unwrap();
    let total = gpu.simulation().unwrap().calls();
    for code in [2, 1, 700] {
        for nth in 1..=total {
            let gpu = device(5);
            let sim = gpu.simulation().unwrap();
            sim.fail_call(nth, code);
            // Some failures are absorbed; the others are errors, never panics.
            if let Err(error) = work(&gpu) {
                assert!(matches!(error, Error::Cuda { .. } | Error::OutOfMemory { .. }), "{error}");
            }
            sim.cancel_fault();
            clean(&gpu);
            assert_eq!(sim.memory_in_use(), 0, "call {nth}, code {code}: memory was lost");
            work(&gpu).unwrap_or_else(|error| panic!("call {nth}, code {code}: unusable after: {error}"));
        }
    }
}

#[test]
fn threads_and_streams() {
    let gpu = device(6);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(48 << 20)).unwrap();
    let shared: Arc<Vec<Stream>> = Arc::new((0..3).map(|_| gpu.new_stream().unwrap()).collect());
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (pool, shared, gpu) = (pool.clone(), shared.clone(), gpu.clone());
            scope.spawn(move || {
                let own = gpu.new_stream().unwrap();
                let mut held = Vec::new();
                for round in 0..400usize {
                    let stream = if round % 3 == 0 { &shared[round / 3 % 3] } else { &own };
                    let len = 1 + (round * 7919 + thread * 104_729) % 200_000;
                    match pool.alloc_from_host(&vec![thread as u8; len], stream) {
                        Ok(buffer) => held.push((buffer, len)),
                        Err(Error::OutOfMemory { .. }) => held.clear(),
                        Err(error) => panic!("{error}"),
                    }
                    if held.len() > 8 {
                        let (buffer, len) = held.swap_remove(round % 8);
                        let back = buffer.to_vec(&own).unwrap();
                        assert_eq!(back.len(), len);
                        assert!(back.iter().all(|&byte| byte == thread as u8));
                    }
                }
            });
        }
    });
    pool.check().unwrap();
    assert!(!pool.has_leaks());
    clean(&gpu);
}

#[test]
fn reuse_costs_no_more_calls_than_it_must() {
    let gpu = GpuDevice::simulated(SimConfig::default().eagerness(0).memory(4 << 30));
    let sim = gpu.simulation().unwrap();
    let (a, b) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(1 << 20)).unwrap();
    let whole = 1 << 20;
    let block = pool.allocate_async(whole, &a).unwrap();
    sim.launch(&a, 100, &[Touch::write(block.as_ptr() as usize, whole)], |_| ()).unwrap();
    let calls = sim.calls();
    // SAFETY: live, and used on its own stream alone.
    unsafe { pool.deallocate_async(block, &a) };
    let block = pool.allocate_async(whole, &a).unwrap();
    // SAFETY: as above.
    unsafe { pool.deallocate_async(block, &a) };
    assert_eq!(sim.calls(), calls, "the same stream needs no call");
    let block = pool.allocate_async(whole, &b).unwrap();
    assert_eq!((sim.count("cuEventRecord"), sim.count("cuStreamWaitEvent")), (1, 1));
    // SAFETY: as above.
    unsafe { pool.deallocate_async(block, &b) };
    clean(&gpu);
}

#[test]
fn a_graph_keeps_its_memory() {
    let gpu = device(8);
    let (a, b) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
    let sim = gpu.simulation().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(1 << 20)).unwrap();
    pool.reserve(1 << 20).unwrap();
    let capture = a.begin_capture().unwrap();
    let scratch = pool.alloc::<u8>(512 << 10, &a).unwrap();
    let address = scratch.as_device_ptr();
    drop(scratch);
    let again = pool.alloc::<u8>(512 << 10, &a).unwrap();
    assert_eq!(again.as_device_ptr(), address, "the capture reuses its own");
    drop(again);
    assert!(a.synchronize().is_err(), "waiting would invalidate the capture");
    let graph = capture.end().unwrap();
    assert!(pool.alloc::<u8>(768 << 10, &b).is_err(), "half of the memory is the graph's");
    let other = pool.alloc::<u8>(256 << 10, &b).unwrap();
    for _ in 0..3 {
        graph.launch(&b).unwrap();
    }
    drop(other);
    drop(graph);
    assert!(pool.alloc::<u8>(768 << 10, &b).is_ok(), "the graph is gone");
    sim.run_all();
    clean(&gpu);
}

#[test]
fn misuse_is_an_error_that_says_so() {
    let group = GpuDevice::simulated_group(SimConfig::default().memory(1 << 30), 2);
    let (gpu, other) = (&group[0], &group[1]);
    let stream = gpu.new_stream().unwrap();
    let far = other.new_stream().unwrap();
    let pool = DevicePool::new(gpu, PoolConfig::default_gpu()).unwrap();
    let far_stream = pool.alloc::<u8>(1, &far).unwrap_err();
    let wrong = Refusal::WrongDevice { found: 1, needed: 0 };
    assert_eq!(far_stream, Error::InvalidOperation(wrong));
    assert!(matches!(pool.alloc::<u8>(1 << 50, &stream), Err(Error::OutOfMemory { .. })));
    assert!(matches!(pool.alloc::<u64>(usize::MAX, &stream), Err(Error::OutOfMemory { .. })));
    assert!(matches!(pool.alloc::<u8>(2 << 30, &stream), Err(Error::OutOfMemory { .. })));
    let mut buffer = pool.alloc::<u8>(100, &stream).unwrap();
    let lengths = Refusal::Lengths { source: 99, target: 100 };
    assert_eq!(buffer.copy_from_host(&[0; 99], &stream), Err(Error::InvalidOperation(lengths)));
    assert!(buffer.slice(50..101).is_err());
    assert!(buffer.split_at_mut(101).is_err());
    let empty = pool.alloc::<u8>(0, &stream).unwrap();
    assert!(empty.to_vec(&stream).unwrap().is_empty());
    let foreign = std::ptr::NonNull::from(&mut buffer).cast();
    // SAFETY: a foreign pointer is refused, which is what this shows.
    let refused = unsafe { pool.try_deallocate_async(foreign, &stream) };
    assert!(matches!(refused, Err(Error::InvalidPointer(_))));
    let block = pool.allocate(Layout::new::<u64>()).unwrap();
    // SAFETY: the first free is right; the second is refused.
    unsafe {
        pool.try_deallocate_async(block.cast(), &stream).unwrap();
        assert!(pool.try_deallocate_async(block.cast(), &stream).is_err());
    }
    let strict = SimConfig::default().concurrent_managed(false);
    assert!(ManagedPool::new(&GpuDevice::simulated(strict), PoolConfig::default_gpu()).is_err());
    clean(gpu);
}

#[test]
fn two_devices_copy_between_each_other() {
    let group = GpuDevice::simulated_group(SimConfig::default().seed(11).memory(1 << 30), 2);
    let streams: Vec<_> = group.iter().map(|gpu| gpu.new_stream().unwrap()).collect();
    let pools: Vec<_> =
        group.iter().map(|gpu| DevicePool::new(gpu, PoolConfig::default_gpu()).unwrap()).collect();
    group[0].enable_peer_access(&group[1]).unwrap();
    let source = pools[0].alloc_from_host(&[5u16; 300], &streams[0]).unwrap();
    let mut target = pools[1].alloc::<u16>(300, &streams[1]).unwrap();
    target.copy_from_device(&source, &streams[1]).unwrap();
    drop(source);
    assert_eq!(target.to_vec(&streams[1]).unwrap(), [5; 300]);
    clean(&group[0]);
}

#[test]
fn leaked_values_are_never_reused() {
    let gpu = device(12);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let mut buffer = pool.alloc::<u8>(4096, &stream).unwrap();
    let transfer = buffer.copy_from_pinned(pinned.alloc::<u8>(4096).unwrap(), &stream).unwrap();
    std::mem::forget(transfer);
    let dropped = buffer.copy_from_pinned(pinned.alloc::<u8>(4096).unwrap(), &stream).unwrap();
    drop(dropped);
    for _ in 0..100 {
        let mut host = pinned.alloc::<u8>(4096).unwrap();
        host.fill(1);
    }
    drop(buffer);
    stream.synchronize().unwrap();
    clean(&gpu);
}

#[test]
fn the_manager_copies_between_all_kinds() {
    let gpu = device(13);
    let manager = memory_pool::PoolManager::new();
    let config = PoolConfig::default_gpu();
    let device = manager.create_gpu_pool("device", &gpu, config.clone()).unwrap();
    let pinned = manager.create_pinned_pool("pinned", &gpu, config.clone()).unwrap();
    let managed = manager.create_managed_pool("managed", &gpu, config.clone()).unwrap();
    assert!(manager.create_gpu_pool("device", &gpu, config).is_err());
    assert!(manager.gpu_pool("pinned").is_err());
    let layout = Layout::array::<u8>(1000).unwrap();
    let blocks = [
        device.allocate(layout).unwrap(),
        pinned.allocate(layout).unwrap(),
        managed.allocate(layout).unwrap(),
        device.allocate(layout).unwrap(),
    ];
    let (source, mut target) = ([42u8; 1000], [0u8; 1000]);
    let host = std::ptr::NonNull::from(&source).cast();
    let mut from = host;
    // SAFETY: all ranges are live and 1000 bytes long, and nobody else uses them.
    unsafe {
        for block in blocks {
            manager.copy(block.cast(), from, 1000).unwrap();
            from = block.cast();
        }
        manager.copy(std::ptr::NonNull::from(&mut target).cast(), from, 1000).unwrap();
        assert!(manager.copy(blocks[0].cast(), host, 5000).is_err(), "past the end of the block");
        device.deallocate(blocks[0].cast());
        pinned.deallocate(blocks[1].cast());
        managed.deallocate(blocks[2].cast());
        device.deallocate(blocks[3].cast());
    }
    assert_eq!(source, target);
    for name in ["device", "pinned", "managed"] {
        manager.destroy_pool(name).unwrap();
    }
    drop((device, pinned, managed));
    clean(&gpu);
}

#[test]
fn the_books_stay_small() {
    let gpu = device(14);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let before = pool.metadata_size();
    let blocks: Vec<_> = (0..50_000).map(|_| pool.alloc_uninit::<u8>(512, &stream).unwrap()).collect();
    let each = (pool.metadata_size() - before) as f64 / blocks.len() as f64;
    assert!(each <= 32.0, "{each} bytes a block");
    // Blocks that can be found by their address, at any load of the look-up chains.
    drop(blocks);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let before = pool.metadata_size();
    for count in 1..=100_000 {
        pool.allocate_async(512, &stream).unwrap();
        if count > 20_000 && count % 1000 == 0 {
            let each = (pool.metadata_size() - before) as f64 / f64::from(count);
            assert!(each <= 32.0, "{each} bytes a block with {count} blocks");
        }
    }
}

#[test]
fn the_callback_frees_what_it_can() {
    let gpu = device(15);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(8 << 20)).unwrap();
    pool.reserve(8 << 20).unwrap();
    let cache = Arc::new(std::sync::Mutex::new(Vec::new()));
    for _ in 0..8 {
        cache.lock().unwrap().push(pool.alloc_uninit::<u8>(1 << 20, &stream).unwrap());
    }
    let held = cache.clone();
    pool.set_oom_callback(move |_| held.lock().unwrap().pop().is_some());
    let big = pool.alloc_uninit::<u8>(3 << 20, &stream).unwrap();
    assert_eq!(cache.lock().unwrap().len(), 5, "as much as was needed");
    assert!(matches!(pool.alloc_uninit::<u8>(9 << 20, &stream), Err(Error::OutOfMemory { .. })));
    drop(big);
    pool.clear_oom_callback();
    clean(&gpu);
}

#[test]
fn loads_of_other_allocators_tests() {
    let gpu = GpuDevice::simulated(SimConfig::default().seed(21).memory(512 << 20));
    gpu_suite::all(&gpu, gpu_suite::Scale { count: 1000, largest: 8 << 20, cap: 128 << 20 });
    clean(&gpu);
}

/// A stream with its owner, and as it was given to us.
fn borrowed(gpu: &GpuDevice) -> (Stream, Stream) {
    let owner = gpu.new_stream().unwrap();
    // SAFETY: every test drops the borrowed handle first.
    let borrowed = unsafe { gpu.stream_from_raw(owner.as_raw()) };
    (owner, borrowed)
}

/// Whether the pool has `bytes` for `stream` within a moment: the driver tells of a graph's end on its own thread.
fn soon(pool: &DevicePool, bytes: usize, stream: &Stream) -> bool {
    (0..2000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        pool.alloc_uninit::<u8>(bytes, stream).is_ok()
    })
}

#[test]
fn a_capture_begun_by_somebody_else_has_memory_of_its_own() {
    let gpu = device(22);
    let sim = gpu.simulation().unwrap();
    let (owner, given) = borrowed(&gpu);
    let other = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(1 << 20)).unwrap();
    pool.reserve(1 << 20).unwrap();
    let before = pool.alloc_uninit::<u8>(128 << 10, &given).unwrap();
    // The pool learns of the capture by asking; we know nothing of the graph on the owner's side.
    let capture = owner.begin_capture().unwrap();
    let block = pool.allocate_async(512 << 10, &given).unwrap();
    let address = block.as_ptr() as usize;
    sim.launch(&given, 1000, &[Touch::write(address, 512 << 10)], |_| ()).unwrap();
    // SAFETY: live, and used on its stream alone.
    unsafe { pool.deallocate_async(block, &given) };
    drop(before);
    let again = pool.allocate_async(512 << 10, &given).unwrap();
    assert_eq!(again.as_ptr() as usize, address, "the capture reuses its own");
    // SAFETY: as above.
    unsafe { pool.deallocate_async(again, &given) };
    assert!(pool.process_deferred() <= 512 << 10);
    let graph = capture.end().unwrap();
    // What the graph uses is nobody else's, before and after launches, until it is gone.
    for _ in 0..3 {
        assert!(pool.alloc_uninit::<u8>(512 << 10, &other).is_err());
        graph.launch(&owner).unwrap();
        let small = pool.alloc_uninit::<u8>(256 << 10, &other).unwrap();
        sim.launch(&other, 1000, &[Touch::write(small.as_device_ptr() as usize, 256 << 10)], |_| ()).unwrap();
    }
    drop(graph);
    assert!(soon(&pool, 1 << 20, &other), "the graph is gone");
    // The stream is an ordinary one again.
    pool.alloc::<u8>(1 << 20, &given).unwrap();
    sim.run_all();
    clean(&gpu);
    pool.check().unwrap();
    drop((given, other));
}

#[test]
fn a_foreign_graph_keeps_a_pool_alive_that_its_owner_let_go() {
    let gpu = device(23);
    let sim = gpu.simulation().unwrap();
    let (owner, given) = borrowed(&gpu);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let capture = owner.begin_capture().unwrap();
    let scratch = pool.alloc::<u8>(1000, &given).unwrap();
    drop((scratch, pool));
    let graph = capture.end().unwrap();
    graph.launch(&owner).unwrap();
    owner.synchronize().unwrap();
    assert_ne!(sim.memory_in_use(), 0);
    drop(graph);
    assert!((0..2000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        sim.memory_in_use() == 0
    }));
    drop(given);
    clean(&gpu);
}

#[test]
fn a_capture_that_comes_to_nothing_gives_its_memory_back() {
    let gpu = device(24);
    let (owner, given) = borrowed(&gpu);
    let other = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(1 << 20)).unwrap();
    let capture = owner.begin_capture().unwrap();
    drop(pool.alloc_uninit::<u8>(1 << 20, &given).unwrap());
    drop(capture);
    assert!(soon(&pool, 1 << 20, &other));
    clean(&gpu);
    drop(given);
}

#[test]
fn branches_of_a_graph_do_not_share_what_they_free() {
    let gpu = device(25);
    let sim = gpu.simulation().unwrap();
    let (a, b) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(1 << 20)).unwrap();
    pool.reserve(1 << 20).unwrap();
    let capture = a.begin_capture().unwrap();
    b.wait_for(&a).unwrap();
    assert!(b.is_capturing(), "the wait drew it in");
    let left = pool.alloc_uninit::<u8>(256 << 10, &a).unwrap();
    let address = left.as_device_ptr();
    drop(left);
    let right = pool.alloc_uninit::<u8>(256 << 10, &b).unwrap();
    assert_ne!(right.as_device_ptr(), address, "both branches run at once");
    drop(right);
    a.wait_for(&b).unwrap();
    let graph = capture.end().unwrap();
    assert!(!a.is_capturing() && !b.is_capturing());
    assert!(pool.alloc_uninit::<u8>(768 << 10, &b).is_err(), "half of the memory is the graph's");
    graph.launch(&a).unwrap();
    drop(graph);
    assert!(pool.alloc_uninit::<u8>(768 << 10, &b).is_ok());
    sim.run_all();
    clean(&gpu);
}

#[test]
fn a_graph_launched_elsewhere_meets_no_work_from_before_its_capture() {
    for seed in 0..20 {
        let gpu = GpuDevice::simulated(SimConfig::default().seed(seed).eagerness(0).memory(1 << 30));
        let sim = gpu.simulation().unwrap();
        let (a, b) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(4 << 20)).unwrap();
        pool.reserve(4 << 20).unwrap();
        let before = pool.alloc_uninit::<u8>(1 << 20, &a).unwrap();
        sim.launch(&a, 1000, &[Touch::write(before.as_device_ptr() as usize, 1 << 20)], |_| ()).unwrap();
        let capture = a.begin_capture().unwrap();
        drop(before);
        let inside = pool.alloc_uninit::<u8>(1 << 20, &a).unwrap();
        sim.launch(&a, 1000, &[Touch::write(inside.as_device_ptr() as usize, 1 << 20)], |_| ()).unwrap();
        let graph = capture.end().unwrap();
        graph.launch(&b).unwrap();
        drop((graph, inside));
        sim.run_all();
        clean(&gpu);
        // The block from before is everybody's once its work is over.
        a.synchronize().unwrap();
        pool.alloc_uninit::<u8>(4 << 20, &b).unwrap();
        pool.check().unwrap();
    }
}

#[test]
fn what_a_graph_left_is_read_to_the_end() {
    for seed in 0..20 {
        let gpu = GpuDevice::simulated(SimConfig::default().seed(seed).eagerness(0).memory(1 << 30));
        let sim = gpu.simulation().unwrap();
        let (a, b) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(2 << 20)).unwrap();
        pool.reserve(2 << 20).unwrap();
        let capture = a.begin_capture().unwrap();
        let output = pool.alloc_uninit::<u8>(1 << 20, &a).unwrap();
        let touched = output.as_device_ptr() as usize;
        sim.launch(&a, 1000, &[Touch::write(touched, 1 << 20)], |_| ()).unwrap();
        let graph = capture.end().unwrap();
        graph.launch(&a).unwrap();
        a.synchronize().unwrap();
        sim.launch(&a, 1000, &[Touch::read(touched, 1 << 20)], |_| ()).unwrap();
        drop((output, graph));
        let next = pool.alloc_uninit::<u8>(2 << 20, &b).unwrap();
        sim.launch(&b, 1000, &[Touch::write(next.as_device_ptr() as usize, 2 << 20)], |_| ()).unwrap();
        sim.run_all();
        clean(&gpu);
    }
}

#[test]
fn a_drained_pool_keeps_its_addresses() {
    let gpu = GpuDevice::simulated(SimConfig::default().seed(26).memory(512 << 20));
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let mut first = None;
    for round in 0..3 {
        // As much as fills the addresses of small blocks.
        let blocks: Vec<_> = (0..300).map(|_| pool.alloc_uninit::<u8>(512 << 10, &stream).unwrap()).collect();
        let lowest = blocks.iter().map(|block| block.as_device_ptr()).min();
        assert_eq!(*first.get_or_insert(lowest), lowest, "round {round}");
        drop(blocks);
        gpu.synchronize().unwrap();
        pool.check().unwrap();
        pool.trim(0).unwrap();
        pool.check().unwrap();
        assert_eq!(pool.pool_size(), 0, "waiting made everything idle");
    }
    clean(&gpu);
}

/// A pool of four blocks whose first and third are freed behind a queue of kernels; then one block as large as both.
fn two_blocks_in_flight(kernels: usize) -> (usize, usize) {
    let gpu = GpuDevice::simulated(SimConfig::default().seed(9).memory(4 << 30).eagerness(0));
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let stream = gpu.new_stream().unwrap();
    let mut blocks: Vec<_> = (0..4).map(|_| Some(pool.alloc::<u8>(32 << 20, &stream).unwrap())).collect();
    gpu.synchronize().unwrap();
    let before = pool.pool_size();
    for index in [0, 2] {
        let at = blocks[index].as_ref().unwrap().as_device_ptr() as usize;
        for _ in 0..kernels {
            let touch = [Touch::write(at, 1)];
            gpu.simulation().unwrap().launch(&stream, 1000, &touch, |_| {}).unwrap();
        }
        blocks[index] = None;
    }
    let mut large = pool.alloc::<u8>(64 << 20, &stream).unwrap();
    large.set_zero(&stream).unwrap();
    gpu.synchronize().unwrap();
    clean(&gpu);
    pool.check().unwrap();
    (before, pool.pool_size())
}

#[test]
fn a_pool_waits_a_moment_for_work_in_flight_rather_than_growing() {
    let (before, after) = two_blocks_in_flight(300);
    assert_eq!(before, after);
}

#[test]
fn a_pool_grows_where_work_in_flight_does_not_end() {
    let (before, after) = two_blocks_in_flight(20_000);
    assert!(after > before, "{after}");
}

#[test]
fn a_request_misses_once_however_much_it_takes_to_serve_it() {
    let gpu = device(31);
    let stream = gpu.new_stream().unwrap();
    for config in [PoolConfig::default_gpu(), PoolConfig::default_gpu().max_size(8 << 20)] {
        let pool = DevicePool::new(&gpu, config).unwrap();
        // The pool grows, which looks for room several times.
        let first = pool.alloc_uninit::<u8>(1 << 20, &stream).unwrap();
        let stats = pool.stats();
        assert_eq!((stats.allocation_count, stats.cache_misses, stats.cache_hits), (1, 1, 0));
        drop(first);
        let _again = pool.alloc_uninit::<u8>(1 << 20, &stream).unwrap();
        let stats = pool.stats();
        assert_eq!((stats.allocation_count, stats.cache_misses, stats.cache_hits), (2, 1, 1));
    }
}

#[test]
fn a_borrowed_stream_is_asked_once_at_each_step() {
    // What watches blocks on a device asks once more.
    for (gpu, more) in [(device(32), 1), (GpuDevice::simulated(SimConfig::default().detector(false)), 0)] {
        let sim = gpu.simulation().unwrap();
        let asked = || sim.count("cuStreamIsCapturing");
        let owner = gpu.new_stream().unwrap();
        // SAFETY: `owner` outlives the handle.
        let borrowed = unsafe { gpu.stream_from_raw(owner.as_raw()) };
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
        pool.reserve(64 << 20).unwrap();
        // Sizes that come back and sizes that do not: through a cache and past it.
        for step in 0..200 {
            let bytes = 4096 + step % 7 * step * 512;
            let before = asked();
            let block = pool.allocate_async(bytes, &borrowed).unwrap();
            assert_eq!(asked(), before + 1 + more);
            // SAFETY: live, never used, freed once.
            unsafe { pool.deallocate_async(block, &borrowed) };
            assert_eq!(asked(), before + 2 + more);
            if more == 0 {
                let buffer = pool.alloc_uninit::<u8>(bytes, &borrowed).unwrap();
                assert_eq!(asked(), before + 3);
                drop(buffer);
                assert_eq!(asked(), before + 4);
            }
        }
        assert!(pool.stats().cache_hits > 0);
        pool.check().unwrap();
    }
}

#[test]
fn pieces_side_by_side_go_back_in_one_call() {
    let gpu = device(33);
    let sim = gpu.simulation().unwrap();
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    // Each takes a piece of its own behind the last.
    let blocks: Vec<_> = (0..16).map(|_| pool.alloc_uninit::<u8>(8 << 20, &stream).unwrap()).collect();
    let made = sim.count("cuMemCreate");
    assert!(made >= 8, "{made}");
    drop(blocks);
    gpu.synchronize().unwrap();
    let before = sim.count("cuMemUnmap");
    let reserved = pool.pool_size();
    assert_eq!((pool.trim(0).unwrap(), pool.pool_size()), (reserved, 0));
    assert_eq!((sim.count("cuMemUnmap") - before, sim.count("cuMemRelease")), (1, made));
    pool.check().unwrap();
}

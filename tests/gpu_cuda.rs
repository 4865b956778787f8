//! The GPU pools on a real card. Without one, every test says so and passes.

#![cfg(feature = "cuda")]

use std::sync::OnceLock;

use memory_pool::{DevicePool, DeviceVec, Error, GpuDevice, ManagedPool, PinnedPool, PoolConfig, Stream};

/// The card, or `None` with a line that says why.
fn card() -> Option<GpuDevice> {
    static CARD: OnceLock<Result<GpuDevice, Error>> = OnceLock::new();
    match CARD.get_or_init(|| GpuDevice::open(0)) {
        Ok(gpu) => Some(gpu.clone()),
        Err(error) => {
            eprintln!("skipped, there is no card here: {error}");
            None
        }
    }
}

fn streams(gpu: &GpuDevice, count: usize) -> Vec<Stream> {
    (0..count).map(|_| gpu.new_stream().unwrap()).collect()
}

#[test]
fn opening_what_is_not_there_is_an_error() {
    assert!(matches!(GpuDevice::open(1000), Err(Error::NoDriver | Error::NoDevice { .. })));
}

#[test]
fn buffers_carry_data() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 2);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let source: Vec<u32> = (0..1_000_000).collect();
    let mut a = pool.alloc_from_host(&source, &s[0]).unwrap();
    let mut b = pool.alloc::<u32>(source.len(), &s[1]).unwrap();
    assert!(b.to_vec(&s[1]).unwrap().iter().all(|&x| x == 0));
    b.copy_from_device(&a, &s[1]).unwrap();
    a.set_zero(&s[0]).unwrap();
    assert_eq!(b.to_vec(&s[0]).unwrap(), source);
    let (mut left, right) = b.split_at_mut(500_000).unwrap();
    left.copy_from_device(&right, &s[0]).unwrap();
    assert_eq!(b.to_vec(&s[1]).unwrap()[..500_000], source[500_000..]);
    let mut vec = DeviceVec::<u64>::new_in(&pool, &s[0]);
    for value in 0..2000 {
        vec.push(value).unwrap();
    }
    assert_eq!(vec.to_vec().unwrap(), (0..2000).collect::<Vec<_>>());
    drop((a, b, vec));
    gpu.synchronize().unwrap();
    assert!(pool.trim(0).unwrap() > 0);
    pool.check().unwrap();
    assert_eq!(pool.pool_size(), 0);
}

#[test]
fn transfers_own_their_buffers() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 1);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let mut device = pool.alloc::<f32>(1 << 20, &s[0]).unwrap();
    for round in 0..20 {
        let mut host = pinned.alloc::<f32>(1 << 20).unwrap();
        host.fill(round as f32);
        let transfer = device.copy_from_pinned(host, &s[0]).unwrap();
        if round % 2 == 0 {
            drop(transfer);
        } else {
            assert_eq!(transfer.wait().unwrap()[77], round as f32);
        }
        let back = device.copy_to_pinned(pinned.alloc(1 << 20).unwrap(), &s[0]).unwrap().wait().unwrap();
        assert!(back.iter().all(|&x| x == round as f32));
    }
    let (from, mut to) = (vec![3.5f32; 1 << 20], vec![0f32; 1 << 20]);
    s[0].scope(|scope| {
        scope.copy_from_host(&mut device, &from)?;
        scope.copy_to_host(&device, &mut to)
    })
    .unwrap();
    assert_eq!(from, to);
}

#[test]
fn managed_and_pinned_memory_hold_containers() {
    let Some(gpu) = card() else { return };
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let mut map = hashbrown::HashMap::new_in(&pinned);
    (0..10_000u32).for_each(|key| _ = map.insert(key, key * 2));
    assert_eq!(map[&777], 1554);
    let managed = match ManagedPool::new(&gpu, PoolConfig::default_gpu()) {
        Ok(pool) => pool,
        Err(error) => return eprintln!("skipped, managed memory: {error}"),
    };
    let mut values = allocator_api2::vec::Vec::new_in(&managed);
    values.extend(0..100_000u32);
    assert_eq!(values.iter().map(|&x| u64::from(x)).sum::<u64>(), 4_999_950_000);
}

/// Random blocks on random streams, each filled on the device and read back: a block handed out too early
/// shows another's bytes.
#[test]
fn streams_never_see_each_others_bytes() {
    let Some(gpu) = card() else { return };
    let mut seed = 88_172_645_463_325_252u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) as usize % below
    };
    let mut s = streams(&gpu, 4);
    s.push(gpu.default_stream());
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(64 << 20)).unwrap();
    let mut live = Vec::new();
    for round in 0..3000u32 {
        let stream = &s[random(s.len())];
        let len = 1 + random(1 << 18);
        match pool.alloc_from_host(&vec![round; len], stream) {
            Ok(buffer) => live.push((buffer, round)),
            Err(Error::OutOfMemory { .. }) => live.clear(),
            Err(error) => panic!("{error}"),
        }
        if live.len() > 20 {
            let (buffer, mark) = live.swap_remove(random(live.len()));
            if random(4) == 0 {
                let other = &s[random(s.len())];
                assert!(buffer.to_vec(other).unwrap().iter().all(|&x| x == mark), "round {round}");
            }
        }
        if round % 500 == 499 {
            s[random(4)] = gpu.new_stream().unwrap();
        }
    }
    for (buffer, mark) in live {
        assert!(buffer.to_vec(&s[0]).unwrap().iter().all(|&x| x == mark));
    }
    pool.check().unwrap();
}

#[test]
fn graphs_keep_their_memory() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 2);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let source = pool.alloc_from_host(&[1u32, 2, 3, 4], &s[0]).unwrap();
    let mut target = pool.alloc::<u32>(4, &s[0]).unwrap();
    s[0].synchronize().unwrap();
    let capture = s[0].begin_capture().unwrap();
    let mut scratch = pool.alloc::<u32>(4, &s[0]).unwrap();
    scratch.copy_from_device(&source, &s[0]).unwrap();
    target.copy_from_device(&scratch, &s[0]).unwrap();
    let inside = scratch.as_device_ptr();
    drop(scratch);
    let graph = capture.end().unwrap();
    let outside: Vec<_> = (0..50).map(|_| pool.alloc::<u32>(4, &s[1]).unwrap()).collect();
    assert!(outside.iter().all(|buffer| buffer.as_device_ptr() != inside));
    graph.launch(&s[0]).unwrap();
    assert_eq!(target.to_vec(&s[0]).unwrap(), [1, 2, 3, 4]);
}

#[test]
fn too_much_is_an_error_and_the_pool_goes_on() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 1);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    assert!(matches!(pool.alloc::<u8>(1 << 50, &s[0]), Err(Error::OutOfMemory { .. })));
    let (free, _) = gpu.memory_info().unwrap();
    let most = pool.alloc_uninit::<u8>(free / 10 * 9, &s[0]).unwrap();
    assert!(matches!(pool.alloc_uninit::<u8>(free / 2, &s[0]), Err(Error::OutOfMemory { .. })));
    drop(most);
    pool.alloc_uninit::<u8>(free / 2, &s[0]).unwrap();
}

#[test]
fn trimming_does_not_wait_for_a_busy_card() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 2);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    pool.reserve(1 << 30).unwrap();
    let other = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let busy = other.alloc_uninit::<u8>(4 << 30, &s[0]).unwrap();
    let start = std::time::Instant::now();
    // SAFETY: bytes are valid whatever they are.
    let mut zeros = unsafe { busy.assume_init() };
    for _ in 0..20 {
        zeros.set_zero(&s[0]).unwrap();
    }
    let issued = start.elapsed();
    let given = pool.trim(0).unwrap();
    let trimmed = start.elapsed() - issued;
    s[0].synchronize().unwrap();
    let done = start.elapsed();
    assert_eq!(given, 1 << 30);
    eprintln!("trim of 1 GiB took {trimmed:?} while work took {done:?}");
}

mod cudarc_interop {
    use cudarc::driver::CudaContext;
    use memory_pool::{DevicePool, GpuDevice, PoolConfig};

    #[test]
    fn buffers_go_into_cudarcs_calls() {
        if super::card().is_none() {
            return;
        }
        let context = CudaContext::new(0).unwrap();
        let theirs = context.new_stream().unwrap();
        let gpu = GpuDevice::from_cuda_context(&context).unwrap();
        let stream = gpu.stream_from_cuda(&theirs).unwrap();
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
        let mut buffer = pool.alloc::<f32>(1000, &stream).unwrap();
        let source: Vec<f32> = (0..1000).map(|x| x as f32).collect();
        let mut bound = buffer.for_cuda(&theirs).unwrap();
        theirs.memcpy_htod(&source, &mut bound).unwrap();
        assert_eq!(theirs.clone_dtoh(&bound).unwrap(), source);
        drop(bound);
        assert_eq!(buffer.to_vec(&stream).unwrap(), source);
        let slice = theirs.clone_htod(&source).unwrap();
        let adopted = memory_pool::gpu::copy_from_cuda(&pool, &slice, &theirs).unwrap();
        assert_eq!(adopted.to_vec(&stream).unwrap(), source);
    }
}

//! Load that GPU pools must bear, after the ideas of RMM's and PyTorch's own tests: the same on a real card and,
//! scaled down, on the simulated device.

use std::sync::mpsc;

use memory_pool::{DeviceBuffer, DevicePool, Error, GpuDevice, PoolConfig};

/// How large the load is.
#[derive(Clone, Copy)]
pub struct Scale {
    /// Allocations of a random run.
    pub count: usize,
    /// The largest of them in bytes.
    pub largest: usize,
    /// Most bytes live at once.
    pub cap: usize,
}

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed * 2 + 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 20) % limit as u64) as usize
    }
}

fn pool(gpu: &GpuDevice) -> DevicePool {
    DevicePool::new(gpu, PoolConfig::default_gpu()).unwrap()
}

type Raw = DeviceBuffer<core::mem::MaybeUninit<u8>>;

/// Sizes evenly spread up to the largest, 73 of 100 steps an allocation, a cap on what is live.
pub fn random_allocations(gpu: &GpuDevice, scale: Scale) {
    let (pool, stream) = (pool(gpu), gpu.new_stream().unwrap());
    let mut random = Random::new(scale.largest as u64);
    let mut live: Vec<Raw> = Vec::new();
    let (mut bytes, mut made) = (0, 0);
    while made < scale.count {
        let size = 1 + random.below(scale.largest);
        if random.below(100) < 73 && bytes + size <= scale.cap || live.is_empty() {
            live.push(pool.alloc_uninit(size, &stream).unwrap());
            bytes += size;
            made += 1;
        } else {
            bytes -= live.swap_remove(random.below(live.len())).len();
        }
    }
    assert_eq!(pool.active_allocations().len(), live.len());
    pool.check().unwrap();
    drop(live);
    gpu.synchronize().unwrap();
    pool.trim(0).unwrap();
    assert_eq!((pool.allocated_size(), pool.pool_size()), (0, 0));
}

/// Four pieces of work, each on a block of its own, spread over so many streams; results are read back.
pub fn multi_stream_allocations(gpu: &GpuDevice, streams: usize, bytes: usize, rounds: usize) {
    let pool = pool(gpu);
    let streams: Vec<_> = (0..streams).map(|_| gpu.new_stream().unwrap()).collect();
    for round in 0..rounds {
        let work: Vec<_> = (0..4)
            .map(|kernel| {
                let stream = &streams[kernel % streams.len()];
                let mark = (round * 4 + kernel) as u8;
                let buffer = pool.alloc_from_host(&vec![mark; bytes], stream).unwrap();
                let mut copy = pool.alloc::<u8>(bytes, stream).unwrap();
                copy.copy_from_device(&buffer, stream).unwrap();
                (copy, mark)
            })
            .collect();
        for (copy, mark) in work {
            assert!(copy.to_vec(copy.stream()).unwrap().iter().all(|&byte| byte == mark), "round {round}");
        }
    }
    pool.check().unwrap();
}

/// Nine tenths of what is free in one piece, twice, and the pool is usable after.
pub fn ninety_per_cent(gpu: &GpuDevice) {
    let (pool, stream) = (pool(gpu), gpu.new_stream().unwrap());
    let most = gpu.memory_info().unwrap().0 / 10 * 9;
    for _ in 0..2 {
        let large = pool.alloc_uninit::<u8>(most, &stream).unwrap();
        let error = pool.alloc_uninit::<u8>(most, &stream).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        drop(large);
    }
    pool.alloc_uninit::<u8>(1 << 20, &stream).unwrap();
}

/// Two buffers of two fifths each: the second must not need the first one's place.
pub fn two_large_buffers(gpu: &GpuDevice) {
    let (pool, stream) = (pool(gpu), gpu.new_stream().unwrap());
    let size = gpu.memory_info().unwrap().0 / 5 * 2;
    let first = pool.alloc_uninit::<u8>(size, &stream).unwrap();
    let second = pool.alloc_uninit::<u8>(size, &stream).unwrap();
    let (a, b) = (first.as_device_ptr(), second.as_device_ptr());
    assert!(a + size as u64 <= b || b + size as u64 <= a);
}

/// A pool that begins small grows when it must, to its limit and no further.
pub fn forced_growth(gpu: &GpuDevice) {
    let stream = gpu.new_stream().unwrap();
    let config = PoolConfig::default_gpu().initial_size(2 << 20).max_size(256 << 20);
    let pool = DevicePool::new(gpu, config).unwrap();
    assert_eq!(pool.pool_size(), 2 << 20);
    let held: Vec<Raw> = (0..3).map(|_| pool.alloc_uninit(64 << 20, &stream).unwrap()).collect();
    assert!(pool.pool_size() >= 192 << 20);
    let error = pool.alloc_uninit::<u8>(65 << 20, &stream).unwrap_err();
    assert!(error.to_string().contains("max_size = 268435456"), "{error}");
    drop(held);
    pool.alloc_uninit::<u8>(200 << 20, &stream).unwrap();
    assert!(pool.pool_size() <= 256 << 20);
}

/// What was freed on a stream that is gone is used by others.
pub fn deleted_stream(gpu: &GpuDevice) {
    let config = PoolConfig::default_gpu().max_size(64 << 20);
    let pool = DevicePool::new(gpu, config).unwrap();
    for round in 0..20u8 {
        let stream = gpu.new_stream().unwrap();
        let buffer = pool.alloc_from_host(&vec![round; 40 << 20], &stream).unwrap();
        drop(stream);
        assert_eq!(buffer.to_vec(buffer.stream()).unwrap()[12_345], round);
    }
    pool.check().unwrap();
}

/// Blocks are allocated by one thread and freed by another, on one stream for all or on a stream each.
pub fn allocate_here_and_free_there(gpu: &GpuDevice, streams: usize, count: usize) {
    let pool = pool(gpu);
    let streams: Vec<_> = (0..streams).map(|_| gpu.new_stream().unwrap()).collect();
    let (sender, receiver) = mpsc::sync_channel::<(DeviceBuffer<u8>, u8)>(10);
    std::thread::scope(|scope| {
        let pool = &pool;
        let streams = &streams;
        scope.spawn(move || {
            for index in 0..count {
                let mark = index as u8;
                let source = vec![mark; 1 + index * 37 % 5000];
                sender.send((pool.alloc_from_host(&source, &streams[0]).unwrap(), mark)).unwrap();
            }
        });
        scope.spawn(move || {
            let mine = &streams[streams.len() - 1];
            for (buffer, mark) in receiver {
                assert!(buffer.to_vec(mine).unwrap().iter().all(|&byte| byte == mark));
            }
        });
    });
    assert!(!pool.has_leaks());
    pool.check().unwrap();
}

/// A pebibyte is too much, however it is asked for, and costs nothing.
pub fn too_much(gpu: &GpuDevice) {
    let (pool, stream) = (pool(gpu), gpu.new_stream().unwrap());
    for bytes in [1 << 50, usize::MAX / 2, usize::MAX] {
        assert!(matches!(pool.allocate_async(bytes, &stream), Err(Error::OutOfMemory { .. })));
    }
    assert!(matches!(pool.reserve(1 << 50), Err(Error::OutOfMemory { .. })));
    assert_eq!(pool.pool_size(), 0);
    pool.alloc_uninit::<u8>(1 << 20, &stream).unwrap();
}

/// Blocks a little larger each time, as activations of growing batches are: what was freed serves the next ones
/// where it is large enough, and what is reserved stays near what was live.
pub fn growing_sizes(gpu: &GpuDevice) {
    let (pool, stream) = (pool(gpu), gpu.new_stream().unwrap());
    let mut peak = 0;
    for step in 1..=40 {
        let held: Vec<Raw> =
            (0..4).map(|layer| pool.alloc_uninit((step + layer) << 20, &stream).unwrap()).collect();
        peak = peak.max(held.iter().map(|buffer| buffer.len()).sum::<usize>());
    }
    let ratio = pool.stats().peak_reserved as f64 / peak as f64;
    assert!(ratio < 3.5, "{ratio} times what was live");
    gpu.synchronize().unwrap();
    pool.trim(0).unwrap();
    assert_eq!(pool.pool_size(), 0, "everything idle goes back");
}

/// A block that another stream still uses is not handed out, and is once that work is over.
pub fn recorded_streams(gpu: &GpuDevice) {
    let config = PoolConfig::default_gpu().max_size(32 << 20);
    let pool = DevicePool::new(gpu, config).unwrap();
    let (a, b) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
    for round in 0..50u8 {
        let buffer = pool.alloc_from_host(&vec![round; 8 << 20], &a).unwrap();
        let mut sink = pool.alloc::<u8>(8 << 20, &b).unwrap();
        sink.copy_from_device(&buffer, &b).unwrap();
        buffer.record_stream(&b).unwrap();
        drop(buffer);
        let mut next = pool.alloc::<u8>(8 << 20, &a).unwrap();
        next.set_zero(&a).unwrap();
        assert!(sink.to_vec(&b).unwrap().iter().all(|&byte| byte == round), "round {round}");
    }
}

/// Everything, at this scale.
pub fn all(gpu: &GpuDevice, scale: Scale) {
    for largest in [1 << 12, 1 << 20, scale.largest] {
        random_allocations(gpu, Scale { largest, ..scale });
    }
    for streams in [1, 2, 4] {
        multi_stream_allocations(gpu, streams, scale.largest.min(1 << 20), 5);
    }
    ninety_per_cent(gpu);
    two_large_buffers(gpu);
    forced_growth(gpu);
    deleted_stream(gpu);
    allocate_here_and_free_there(gpu, 1, scale.count.min(2000));
    allocate_here_and_free_there(gpu, 2, scale.count.min(2000));
    too_much(gpu);
    growing_sizes(gpu);
    recorded_streams(gpu);
}

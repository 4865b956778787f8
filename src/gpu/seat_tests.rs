//! Who keeps pools and streams: buffers do, caches alone do not, on devices that watch blocks and on those that do not.

use std::sync::{Arc, Weak};

use super::pool::Inner;
use super::{DevicePool, DeviceVec, GpuDevice, ManagedPool, PinnedPool, SimConfig, Stream};
use crate::base::config::PoolConfig;

fn devices() -> impl Iterator<Item = GpuDevice> {
    [false, true].into_iter().map(|on| GpuDevice::simulated(SimConfig::default().detector(on)))
}

fn pool(gpu: &GpuDevice) -> (DevicePool, Weak<Inner>) {
    let pool = DevicePool::new(gpu, PoolConfig::default_gpu()).unwrap();
    let weak = Arc::downgrade(&pool.inner);
    (pool, weak)
}

/// Pairs enough that a cache has blocks and seats.
fn warm(pool: &DevicePool, stream: &Stream) {
    for _ in 0..4 {
        let buffers = [(); 3].map(|()| pool.alloc_uninit::<u8>(1000, stream).unwrap());
        drop(buffers);
    }
    pool.check().unwrap();
}

fn destroyed(gpu: &GpuDevice) -> u64 {
    gpu.simulation().unwrap().count("cuStreamDestroy")
}

fn memory(gpu: &GpuDevice) -> usize {
    gpu.simulation().unwrap().memory_in_use()
}

#[test]
fn caches_alone_keep_nothing() {
    for gpu in devices() {
        let (stream, other) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
        let (pool, weak) = pool(&gpu);
        warm(&pool, &stream);
        warm(&pool, &other);
        warm(&pool, &gpu.default_stream());
        drop(stream);
        assert_eq!(destroyed(&gpu), 1, "a cache keeps no stream");
        warm(&pool, &other);
        pool.check().unwrap();
        drop(pool);
        assert!(weak.upgrade().is_none(), "a cache keeps no pool");
        assert_eq!(memory(&gpu), 0);
        drop(other);
        assert_eq!(destroyed(&gpu), 2);
    }
}

#[test]
fn buffers_keep_their_pool_and_stream() {
    for gpu in devices() {
        let (pool, weak) = pool(&gpu);
        let stream = gpu.new_stream().unwrap();
        warm(&pool, &stream);
        let mut buffers: Vec<_> =
            (0..5u32).map(|value| pool.alloc_from_host(&[value; 100], &stream).unwrap()).collect();
        drop(pool);
        drop(stream);
        assert_eq!(destroyed(&gpu), 0);
        while let Some(buffer) = buffers.pop() {
            assert!(weak.upgrade().is_some() && destroyed(&gpu) == 0);
            assert_eq!(buffer.to_vec(buffer.stream()).unwrap(), [buffers.len() as u32; 100]);
        }
        assert!(weak.upgrade().is_none());
        assert_eq!((destroyed(&gpu), memory(&gpu)), (1, 0));
    }
}

#[test]
fn host_buffers_and_vectors_keep_their_pool() {
    for gpu in devices() {
        let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
        let managed = ManagedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
        let weak = [Arc::downgrade(&pinned.inner), Arc::downgrade(&managed.inner)];
        for _ in 0..4 {
            drop((pinned.alloc::<u8>(700).unwrap(), managed.alloc::<u8>(700).unwrap()));
        }
        let pair = (pinned.alloc_from(&[7u8; 700]).unwrap(), managed.alloc_from(&[8u8; 700]).unwrap());
        drop((pinned, managed));
        assert!(weak.iter().all(|weak| weak.upgrade().is_some()));
        std::thread::spawn(move || assert!(*pair.0 == [7; 700] && *pair.1 == [8; 700])).join().unwrap();
        assert!(weak.iter().all(|weak| weak.upgrade().is_none()));

        let (pool, weak) = pool(&gpu);
        let stream = gpu.new_stream().unwrap();
        let mut vec = DeviceVec::new_in(&pool, &stream);
        drop((pool, stream));
        for value in 0..2000u32 {
            vec.push(value).unwrap();
        }
        assert_eq!(vec.to_vec().unwrap(), (0..2000).collect::<Vec<_>>());
        assert!(weak.upgrade().is_some());
        drop(vec);
        assert!(weak.upgrade().is_none());
        assert_eq!(destroyed(&gpu), 1);
    }
}

#[test]
fn a_cached_pair_counts_nothing() {
    let gpu = GpuDevice::simulated(SimConfig::default().detector(false));
    let (pool, _) = pool(&gpu);
    let stream = gpu.new_stream().unwrap();
    warm(&pool, &stream);
    let count = Arc::strong_count(&pool.inner);
    for _ in 0..100 {
        let buffers = [(); 2].map(|()| pool.alloc_uninit::<u8>(1000, &stream).unwrap());
        assert_eq!(Arc::strong_count(&pool.inner), count);
        drop(buffers);
        assert_eq!(Arc::strong_count(&pool.inner), count);
    }
    let stats = pool.stats();
    assert!(stats.cache_hits >= 200 && stats.current_allocated == 0, "{stats:?}");
}

#[test]
fn a_stream_that_a_buffer_names_is_a_user_again() {
    for gpu in devices() {
        let (pool, _) = pool(&gpu);
        let stream = gpu.new_stream().unwrap();
        warm(&pool, &stream);
        let buffer = pool.alloc_uninit::<u8>(1000, &stream).unwrap();
        drop(stream);
        let again = buffer.stream().clone();
        drop(buffer);
        assert_eq!(destroyed(&gpu), 0);
        warm(&pool, &again);
        let hits = pool.stats().cache_hits;
        warm(&pool, &again);
        assert_eq!(pool.stats().cache_hits, hits + 12, "its blocks are cached again");
        drop(again);
        assert_eq!(destroyed(&gpu), 1);
    }
}

#[test]
fn raw_blocks_keep_nothing() {
    for gpu in devices() {
        let (pool, weak) = pool(&gpu);
        let stream = gpu.new_stream().unwrap();
        warm(&pool, &stream);
        let raw = pool.alloc::<u8>(1000, &stream).unwrap().into_raw().unwrap();
        assert_ne!(raw, 0);
        drop(stream);
        assert_eq!(destroyed(&gpu), 1);
        drop(pool);
        assert!(weak.upgrade().is_none());
        assert_eq!(memory(&gpu), 0);
    }
}

/// Buffers of several streams are dropped by other threads, while pool and streams go.
#[test]
fn whoever_comes_last_closes() {
    for (gpu, rounds) in devices().zip([200, 20]) {
        for round in 0..rounds {
            let (pool, weak) = pool(&gpu);
            let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
            let weak_pinned = Arc::downgrade(&pinned.inner);
            let streams: Vec<_> = (0..3).map(|_| gpu.new_stream().unwrap()).collect();
            let before = destroyed(&gpu);
            std::thread::scope(|scope| {
                for at in 0..3 {
                    let mut buffers = Vec::new();
                    let (mine, host) = (streams[at].clone(), pinned.clone());
                    for other in &streams {
                        warm(&pool, other);
                        buffers.extend((0..2).map(|_| pool.alloc_uninit::<u8>(1000, other).unwrap()));
                    }
                    let (pool, weak) = (pool.clone(), &weak);
                    scope.spawn(move || {
                        for _ in 0..(round + at) % 5 {
                            drop((pool.alloc_uninit::<u8>(1000, &mine), host.alloc::<u64>(10)));
                        }
                        let last = host.alloc::<u64>(10);
                        drop((pool, host, mine));
                        let pool = weak.upgrade();
                        assert!(pool.is_some());
                        drop((buffers, pool, last));
                    });
                }
                drop((pool, pinned, streams));
            });
            assert!(weak.upgrade().is_none() && weak_pinned.upgrade().is_none(), "round {round}");
            assert_eq!((destroyed(&gpu) - before, memory(&gpu)), (3, 0), "round {round}");
        }
    }
}

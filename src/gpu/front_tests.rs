//! How deep caches are, what gives way in them, and what comes back.

use std::ptr::NonNull;

use super::front::{Cache, MOST_BLOCKS, Whose};
use super::{DevicePool, GpuDevice, SimConfig, Stream};
use crate::base::config::PoolConfig;
use crate::base::policy::Strategy;

type Pointer = NonNull<core::ffi::c_void>;

fn pool(config: PoolConfig) -> (GpuDevice, DevicePool, Stream) {
    let gpu = GpuDevice::simulated(SimConfig::default());
    let (pool, stream) = (DevicePool::new(&gpu, config).unwrap(), gpu.new_stream().unwrap());
    (gpu, pool, stream)
}

fn usual() -> (GpuDevice, DevicePool, Stream) {
    pool(PoolConfig::default_gpu().initial_size(64 << 20))
}

fn take(pool: &DevicePool, stream: &Stream, sizes: impl IntoIterator<Item = usize>) -> Vec<Pointer> {
    sizes.into_iter().map(|bytes| pool.allocate_async(bytes, stream).unwrap()).collect()
}

fn give(pool: &DevicePool, stream: &Stream, blocks: Vec<Pointer>) {
    for block in blocks {
        // SAFETY: live blocks of the pool, that nothing works on.
        unsafe { pool.try_deallocate_async(block, stream) }.unwrap();
    }
}

fn cache<'a>(pool: &'a DevicePool, stream: &Stream) -> &'a Cache {
    pool.inner.front.cache(Whose::Stream(stream.slot())).unwrap()
}

fn served(pool: &DevicePool, stream: &Stream) -> u64 {
    cache(pool, stream).turn.lock().served.allocations()
}

#[test]
fn hundreds_of_a_size_come_back_the_youngest_first() {
    let (_gpu, pool, stream) = usual();
    let mut blocks = take(&pool, &stream, [2048; 500]);
    give(&pool, &stream, blocks.clone());
    assert_eq!(cache(&pool, &stream).blocks(), 500);
    pool.check().unwrap();
    let again = take(&pool, &stream, [2048; 500]);
    blocks.reverse();
    assert_eq!((again, served(&pool, &stream)), (blocks, 500));
    pool.check().unwrap();
    assert_eq!(pool.allocated_size(), 500 * 2048);
}

#[test]
fn sizes_do_not_get_into_each_others_way() {
    let (_gpu, pool, stream) = usual();
    // As many as a set holds on average, and some of their sets hold more.
    let sizes: Vec<usize> = (1..=250).map(|size| size * 512).collect();
    for _ in 0..5 {
        let blocks = take(&pool, &stream, sizes.iter().copied());
        give(&pool, &stream, blocks);
        pool.check().unwrap();
    }
    let before = served(&pool, &stream);
    give(&pool, &stream, take(&pool, &stream, sizes.iter().copied()));
    assert!(served(&pool, &stream) - before > 225, "{} of 250", served(&pool, &stream) - before);
}

#[test]
fn what_is_never_asked_for_again_gives_way() {
    let (_gpu, pool, stream) = usual();
    for size in 1..2000 {
        give(&pool, &stream, take(&pool, &stream, [size * 512]));
    }
    pool.check().unwrap();
    // Four ways of each set are all that can be left.
    assert!(cache(&pool, &stream).blocks() <= 128 * 4);
    let before = served(&pool, &stream);
    for _ in 0..40 {
        give(&pool, &stream, take(&pool, &stream, [5000; 3]));
    }
    assert!(served(&pool, &stream) - before > 80, "and a size that is finds room");
}

#[test]
fn a_small_request_has_the_larger_ones_back_first() {
    let (_gpu, pool, stream) = pool(PoolConfig::default_gpu().max_size(64 << 20).growth_factor(1.0));
    let tiny = take(&pool, &stream, [4096; 100]);
    let mut more = Vec::new();
    while let Ok(block) = pool.allocate_async(400 << 10, &stream) {
        more.push(block);
    }
    let many = more.len();
    give(&pool, &stream, tiny);
    give(&pool, &stream, more);
    assert_eq!(cache(&pool, &stream).blocks(), 100 + many);
    // Of a size of which none is cached; all memory lies in caches.
    let other = take(&pool, &stream, [500 << 10]);
    assert_eq!(cache(&pool, &stream).blocks(), 100);
    pool.check().unwrap();
    give(&pool, &stream, other);
    // Nothing else would do for a block of nearly all.
    assert!(pool.allocate_async(63 << 20, &stream).is_ok());
    assert_eq!(cache(&pool, &stream).blocks(), 0);
    pool.check().unwrap();
}

#[test]
fn caches_hold_so_many_blocks_and_bytes() {
    let (_gpu, pool, stream) = pool(PoolConfig::default_gpu().max_size(16 << 30));
    give(&pool, &stream, take(&pool, &stream, [512; MOST_BLOCKS + 1000]));
    let blocks = cache(&pool, &stream).blocks();
    // Some find no record.
    assert!((MOST_BLOCKS * 9 / 10..=MOST_BLOCKS).contains(&blocks), "{blocks}");
    pool.check().unwrap();
    pool.process_deferred();
    assert_eq!((cache(&pool, &stream).blocks(), cache(&pool, &stream).bytes()), (0, 0));
    give(&pool, &stream, take(&pool, &stream, [900 << 10; 400]));
    let bytes = cache(&pool, &stream).bytes();
    assert!((255 << 20..=256 << 20).contains(&bytes), "{bytes}");
    pool.check().unwrap();
}

#[test]
fn blocks_without_a_record_go_to_the_books() {
    // A thousand records for five thousand blocks.
    let (gpu, pool, stream) = pool(PoolConfig::default_gpu().max_size(64 << 20));
    for _ in 0..3 {
        give(&pool, &stream, take(&pool, &stream, [512; 5000]));
        let blocks = cache(&pool, &stream).blocks();
        assert!((500..=1024).contains(&blocks), "{blocks}");
        assert_eq!(pool.allocated_size(), 0);
        pool.check().unwrap();
    }
    assert!(pool.trim(0).unwrap() > 0);
    assert_eq!((pool.pool_size(), cache(&pool, &stream).blocks()), (0, 0));
    assert_eq!(gpu.simulation().unwrap().memory_in_use(), 0);
}

#[test]
fn aligned_requests_look_a_little_further() {
    let (_gpu, pool, stream) = usual();
    let blocks = take(&pool, &stream, [512; 64]);
    give(&pool, &stream, blocks);
    let inner = &pool.inner;
    let mut taken = Vec::new();
    for align in [1024, 2048, 4096, 4096, 1024, 1] {
        let place = inner.front.look(cache(&pool, &stream), 512).unwrap();
        let mut inside = cache(&pool, &stream).turn.lock();
        if let Some(record) = inner.front.pick(cache(&pool, &stream), &mut inside, place, 512, align) {
            assert_eq!(record.start() % align, 0);
            taken.push(NonNull::new(record.start() as *mut _).unwrap());
        }
        drop(inside);
        pool.check().unwrap();
    }
    assert!(taken.len() >= 4);
    give(&pool, &stream, taken);
    assert_eq!(cache(&pool, &stream).blocks(), 64);
    pool.check().unwrap();
}

#[test]
fn every_strategy_counts_right_whatever_comes() {
    for strategy in [Strategy::Segregated, Strategy::BestFit, Strategy::FirstFit] {
        let (gpu, pool, stream) = pool(PoolConfig::default_gpu().max_size(256 << 20).strategy(strategy));
        let streams = [stream, gpu.new_stream().unwrap(), gpu.default_stream()];
        let mut random = 0x2545_F491_4F6C_DD1Du64;
        let mut below = |limit: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 11) as usize % limit
        };
        let mut live = Vec::new();
        for step in 0..6000 {
            let stream = below(3);
            if below(100) < 52 {
                let bytes = if below(8) == 0 { below(4 << 20) + 1 } else { (below(40) + 1) * 700 };
                live.extend(pool.allocate_async(bytes, &streams[stream]).map(|block| (block, stream)));
            } else if !live.is_empty() {
                let (block, stream) = live.swap_remove(below(live.len()));
                give(&pool, &streams[stream], vec![block]);
            }
            if step % 500 == 0 {
                pool.check().unwrap();
            }
        }
        for (block, stream) in live {
            give(&pool, &streams[stream], vec![block]);
        }
        pool.check().unwrap();
        assert_eq!(pool.allocated_size(), 0);
        gpu.synchronize().unwrap();
        pool.trim(0).unwrap();
        assert_eq!(pool.pool_size(), 0);
    }
}

#[test]
fn threads_share_a_stream_and_its_chains() {
    let (_gpu, pool, stream) = usual();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (pool, stream) = (&pool, &stream);
            scope.spawn(move || {
                for round in 0..40 {
                    let sizes = (0..50).map(|at| 512 * (1 + (at * 7 + round + thread) % 30));
                    let blocks = take(pool, stream, sizes);
                    if round % 8 == thread {
                        pool.check().unwrap();
                        pool.process_deferred();
                    }
                    give(pool, stream, blocks);
                }
            });
        }
    });
    pool.check().unwrap();
    assert_eq!(pool.allocated_size(), 0);
    assert!(served(&pool, &stream) > 1000);
}

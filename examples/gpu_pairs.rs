//! Times pairs of allocation and free that the pool serves from what it has, on a real card where there is one, else on
//! the simulated device: blocks of one size, of another size each time, and those that another stream freed.

use std::alloc::Layout;
use std::time::Instant;

use memory_pool::{DevicePool, GpuDevice, PinnedPool, PoolConfig, SimConfig, Stream};

/// Nanoseconds a pair: the median of eleven runs.
fn median(mut pair: impl FnMut()) -> f64 {
    const PAIRS: u32 = 20_000;
    (0..100).for_each(|_| pair());
    let mut runs: Vec<f64> = (0..11)
        .map(|_| {
            let start = Instant::now();
            (0..PAIRS).for_each(|_| pair());
            start.elapsed().as_nanos() as f64 / f64::from(PAIRS)
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    runs[5]
}

fn main() -> memory_pool::Result<()> {
    let gpu = GpuDevice::open(0).unwrap_or_else(|error| {
        eprintln!("no card ({error}); this is the simulated device");
        GpuDevice::simulated(SimConfig::default())
    });
    let stream = gpu.new_stream()?;
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu())?;
    println!("{}: nanoseconds a pair", gpu.name());
    println!("{:>10} {:>10} {:>10} {:>10}", "bytes", "buffer", "raw", "pinned");
    for bytes in [512, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20] {
        let buffer = median(|| drop(pool.alloc_uninit::<u8>(bytes, &stream)));
        let raw = median(|| {
            if let Ok(block) = pool.allocate_async(bytes, &stream) {
                // SAFETY: live, never used, freed once.
                unsafe { pool.deallocate_async(block, &stream) };
            }
        });
        let layout = Layout::from_size_align(bytes, 64)?;
        let host = median(|| {
            if let Ok(block) = pinned.allocate(layout) {
                // SAFETY: live, never used, freed once.
                unsafe { pinned.deallocate(block.cast()) };
            }
        });
        println!("{bytes:>10} {buffer:>10.1} {raw:>10.1} {host:>10.1}");
    }
    misses(&gpu, &pool)?;
    for threads in [2, 4, 8, 16] {
        const PAIRS: u32 = 200_000;
        let each = |pair: &(dyn Fn(&Stream) + Sync)| {
            let streams: Vec<_> = (0..threads).map_while(|_| gpu.new_stream().ok()).collect();
            streams.iter().for_each(pair);
            let start = Instant::now();
            std::thread::scope(|scope| {
                for stream in &streams {
                    scope.spawn(move || (0..PAIRS).for_each(|_| pair(stream)));
                }
            });
            start.elapsed().as_nanos() as f64 / f64::from(PAIRS)
        };
        let buffer = each(&|stream| drop(pool.alloc_uninit::<u8>(1 << 20, stream)));
        let raw = each(&|stream| {
            if let Ok(block) = pool.allocate_async(1 << 20, stream) {
                // SAFETY: live, never used, freed once.
                unsafe { pool.deallocate_async(block, stream) };
            }
        });
        println!(
            "{threads:>3} threads, a stream each, 1 MiB: {buffer:.1} (buffer), {raw:.1} (raw) ns a pair"
        );
    }
    Ok(())
}

/// Pairs that no block freed just before can serve as it is: each is cut from a larger range, and joins it again.
fn misses(gpu: &GpuDevice, pool: &DevicePool) -> memory_pool::Result<()> {
    const LIVE: usize = 64;
    let stream = gpu.new_stream()?;
    for largest in [64 << 10, 1 << 20, 64 << 20] {
        pool.reserve(4 << 30)?;
        let (mut seed, mut held, mut at) = (1u64, [const { None }; LIVE], 0);
        let mut pair = || {
            // Sizes of all magnitudes, hardly ever the same twice.
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bytes = 1 + (seed >> 33) as usize % (largest >> ((seed >> 24) % 8));
            at = (at + 1) % LIVE;
            held[at] = pool.alloc_uninit::<u8>(bytes, &stream).ok();
        };
        (0..10_000).for_each(|_| pair());
        let before = pool.stats().source_calls;
        let time = median(&mut pair);
        let calls = pool.stats().source_calls - before;
        println!(
            "another size each time, 64 live, to {largest:>8} bytes: {time:.1} ns, {calls} calls of the driver for memory"
        );
    }
    let other = gpu.new_stream()?;
    let mut turn = false;
    let pair = median(|| {
        turn = !turn;
        drop(pool.alloc_uninit::<u8>(1 << 20, if turn { &stream } else { &other }));
    });
    println!("two streams in turn, 1 MiB: {pair:.1} ns");
    // SAFETY: `other` outlives the handle.
    let borrowed = unsafe { gpu.stream_from_raw(other.as_raw()) };
    let pair = median(|| drop(pool.alloc_uninit::<u8>(1 << 20, &borrowed)));
    println!("a borrowed stream, 1 MiB: {pair:.1} ns");
    Ok(())
}

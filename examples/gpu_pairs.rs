//! Times pairs of allocation and free that the pool serves from what it has, on a real card where there is one, else on
//! the simulated device: blocks of one size, of another size each time, and those that another stream freed. Beside
//! them the driver's own pair, what giving memory back to a busy card takes, and what the books take.

use std::alloc::Layout;
use std::time::Instant;

use memory_pool::{DevicePool, GpuDevice, ManagedPool, PinnedPool, PoolConfig, SimConfig, Stream};

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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = GpuDevice::open(0).unwrap_or_else(|error| {
        eprintln!("no card ({error}); this is the simulated device");
        GpuDevice::simulated(SimConfig::default().detector(false))
    });
    let stream = gpu.new_stream()?;
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu())?;
    println!("{}: nanoseconds a pair", gpu.name());
    println!("{:>10} {:>10} {:>10} {:>10} {:>14}", "bytes", "buffer", "raw", "pinned", "pinned buffer");
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
        // A typed buffer is filled with zeros, so a small one shows what it costs beside that.
        let typed = (bytes <= 4 << 10).then(|| median(|| drop(pinned.alloc::<u8>(bytes))));
        let typed = typed.map_or("-".into(), |ns| format!("{ns:.1}"));
        println!("{bytes:>10} {buffer:>10.1} {raw:>10.1} {host:>10.1} {typed:>14}");
    }
    if let Ok(managed) = ManagedPool::new(&gpu, PoolConfig::default_gpu()) {
        println!("a managed buffer of 64 bytes: {:.1} ns", median(|| drop(managed.alloc::<u8>(64))));
    }
    drivers_own(&gpu, median(|| drop(pool.alloc_uninit::<u8>(1 << 20, &stream))))?;
    misses(&gpu, &pool)?;
    books(&gpu)?;
    if !gpu.is_simulated() {
        // The simulated device would fill 4 GiB of the host's memory.
        trim(&gpu)?;
    }
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
    let buffer = median(|| drop(pool.alloc_uninit::<u8>(1 << 20, &borrowed)));
    let raw = median(|| {
        if let Ok(block) = pool.allocate_async(1 << 20, &borrowed) {
            // SAFETY: live, never used, freed once.
            unsafe { pool.deallocate_async(block, &borrowed) };
        }
    });
    let ask = median(|| assert!(!borrowed.is_capturing()));
    println!(
        "a borrowed stream, 1 MiB: {buffer:.1} (buffer), {raw:.1} (raw) ns, of which the driver is asked twice \
         whether somebody captures the stream: {ask:.1} ns each"
    );
    Ok(())
}

/// The driver's own pair of 1 MiB, which waits for the card, beside ours.
fn drivers_own(gpu: &GpuDevice, ours: f64) -> Result<(), Box<dyn std::error::Error>> {
    #[cfg(feature = "cuda")]
    if !gpu.is_simulated() {
        use cudarc::driver::{CudaContext, result};
        let context = CudaContext::new(gpu.ordinal())?;
        context.bind_to_thread()?;
        let mut runs: Vec<f64> = (0..11)
            .map_while(|_| {
                let start = Instant::now();
                for _ in 0..100 {
                    // SAFETY: the context is current on this thread; the block is freed once.
                    unsafe { result::malloc_sync(1 << 20).and_then(|block| result::free_sync(block)) }
                        .ok()?;
                }
                Some(start.elapsed().as_nanos() as f64 / 100.0)
            })
            .collect();
        runs.sort_by(f64::total_cmp);
        if let Some(theirs) = runs.get(5) {
            let times = theirs / ours;
            println!(
                "cuMemAlloc + cuMemFree, 1 MiB: {theirs:.0} ns, {times:.0} times the buffer's {ours:.1}"
            );
        }
        return Ok(());
    }
    println!(
        "cuMemAlloc + cuMemFree are a card's, not {}'s; the buffer's pair takes {ours:.1} ns",
        gpu.name()
    );
    Ok(())
}

/// Host memory that the books take, with blocks of one size live in all of the pool.
fn books(gpu: &GpuDevice) -> memory_pool::Result<()> {
    for (bytes, total) in [(64 << 10, 1 << 30), (1 << 20, 4 << 30), (16 << 20, 16 << 30)] {
        let stream = gpu.new_stream()?;
        let pool = DevicePool::new(gpu, PoolConfig::default_gpu())?;
        let live: memory_pool::Result<Vec<_>> =
            (0..total / bytes).map(|_| pool.alloc_uninit::<u8>(bytes, &stream)).collect();
        let (live, books, size) = (live?.len(), pool.metadata_size(), pool.pool_size());
        let part = 100.0 * books as f64 / size as f64;
        println!("{live} blocks of {bytes} bytes: the books take {books} bytes, {part:.4} % of the pool");
    }
    Ok(())
}

/// Giving back 1 GiB while the card works.
fn trim(gpu: &GpuDevice) -> memory_pool::Result<()> {
    let (stream, pool) = (gpu.new_stream()?, DevicePool::new(gpu, PoolConfig::default_gpu())?);
    let other = DevicePool::new(gpu, PoolConfig::default_gpu())?;
    let mut busy = other.alloc::<u8>(4 << 30, &stream)?;
    let mut times = Vec::new();
    for _ in 0..5 {
        pool.reserve(1 << 30)?;
        let start = Instant::now();
        for _ in 0..20 {
            busy.set_zero(&stream)?;
        }
        let issued = start.elapsed();
        let given = pool.trim(0)?;
        let trimmed = start.elapsed() - issued;
        assert_eq!(given, 1 << 30);
        stream.synchronize()?;
        times.push((trimmed, start.elapsed()));
    }
    times.sort();
    let (trimmed, work) = times[2];
    println!("trim of 1 GiB: {trimmed:?}, while the card worked for {work:?}");
    Ok(())
}

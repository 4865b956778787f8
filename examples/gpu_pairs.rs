//! Times cached pairs of allocation and free, on a real card where there is one, else on the simulated device.

use std::alloc::Layout;
use std::time::Instant;

use memory_pool::{DevicePool, GpuDevice, PinnedPool, PoolConfig, SimConfig};

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
    for threads in [2, 4, 8, 16] {
        const PAIRS: u32 = 50_000;
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let Ok(stream) = gpu.new_stream() else { return };
                    for _ in 0..PAIRS {
                        drop(pool.alloc_uninit::<u8>(1 << 20, &stream));
                    }
                });
            }
        });
        let pair = start.elapsed().as_nanos() as f64 / f64::from(PAIRS);
        println!("{threads:>3} threads, a stream each, 1 MiB: {pair:.1} ns a pair and thread");
    }
    Ok(())
}

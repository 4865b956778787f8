//! What statistics, the common interface, look-ups by name and debugging cost. Variants run in turn, many short
//! rounds each; the figures are medians in nanoseconds.

use std::alloc::Layout;
use std::hint::black_box;
use std::ptr::NonNull;
use std::time::Instant;

use memory_pool::{
    AnyPool, CpuPool, FixedPool, LocalFixedPool, LocalVariablePool, LockFreeFixedPool, MemoryPool, OnFinding,
    PoolConfig, PoolManager, Result, SyncType, VariablePool,
};

const ROUNDS: usize = 41;

/// The median time of a call of each of `variants`, which do `calls` calls a round.
fn medians<const N: usize>(calls: u32, mut variants: [&mut dyn FnMut(u32); N]) -> [f64; N] {
    let mut times = [const { Vec::new() }; N];
    for _ in 0..ROUNDS {
        for (variant, times) in variants.iter_mut().zip(&mut times) {
            let began = Instant::now();
            variant(calls);
            times.push(began.elapsed().as_secs_f64() * 1e9 / f64::from(calls));
        }
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    })
}

fn say(what: &str, base: f64, other: f64) {
    println!("{what:<58} {base:>8.2} {other:>8.2} {:>+8.2} {:>7.2} x", other - base, other / base);
}

/// Allocates and frees one block, again and again.
macro_rules! pairs {
    ($pool:expr, $layout:expr) => {
        &mut |calls| {
            for _ in 0..calls {
                let block = black_box($pool.allocate(black_box($layout)).unwrap().cast::<u8>());
                // SAFETY: live, freed once.
                unsafe { $pool.deallocate(block) };
            }
        }
    };
}

/// Random operations on up to 256 live blocks of 16 B to `1 << bits` B.
fn mix(pool: &dyn MemoryPool, bits: u64) -> impl FnMut(u32) + '_ {
    let mut seed = 1u64;
    let mut live: [Option<NonNull<u8>>; 256] = [None; 256];
    move |calls| {
        for _ in 0..calls {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let slot = &mut live[(seed >> 33) as usize % 256];
            match slot.take() {
                // SAFETY: live, and taken out, so freed once.
                Some(block) => unsafe { pool.deallocate(block) },
                None => {
                    let size = 16usize << ((seed >> 45) % (bits - 4));
                    let size = size + (seed >> 50) as usize % size;
                    *slot = Some(pool.allocate(Layout::from_size_align(size, 16).unwrap()).unwrap().cast());
                }
            }
        }
    }
}

fn watched(config: PoolConfig) -> PoolConfig {
    let mut debug = PoolConfig::debug_cpu().debug;
    (debug.stacks, debug.on_finding) = (false, OnFinding::Collect);
    config.debug(debug)
}

fn statistics(layout: Layout) -> Result<()> {
    println!("{:<58} {:>8} {:>8} {:>8}", "statistics, a pair", "off", "on", "");
    let variable =
        [false, true].map(|on| VariablePool::new(PoolConfig::default_cpu().track_stats(on)).unwrap());
    let [off, on] = medians(20_000, [pairs!(variable[0], layout), pairs!(variable[1], layout)]);
    say("VariablePool", off, on);
    let fixed =
        [false, true].map(|on| FixedPool::new(PoolConfig::fixed_size_cpu(64).track_stats(on)).unwrap());
    let [off, on] = medians(20_000, [pairs!(fixed[0], layout), pairs!(fixed[1], layout)]);
    say("FixedPool", off, on);
    let local =
        [false, true].map(|on| LocalFixedPool::new(PoolConfig::fixed_size_cpu(64).track_stats(on)).unwrap());
    let [off, on] = medians(50_000, [pairs!(local[0], layout), pairs!(local[1], layout)]);
    say("LocalFixedPool", off, on);
    Ok(())
}

fn interface(layout: Layout) -> Result<()> {
    println!("\n{:<58} {:>8} {:>8}", "the interface, a pair", "itself", "dyn");
    macro_rules! row {
        ($name:literal, $pool:expr) => {{
            let pool = $pool;
            let dynamic = black_box(&pool as &dyn MemoryPool);
            let [itself, through] = medians(20_000, [pairs!(pool, layout), pairs!(dynamic, layout)]);
            say($name, itself, through);
        }};
    }
    let fixed = || PoolConfig::fixed_size_cpu(64);
    row!("FixedPool", FixedPool::new(fixed())?);
    row!("FixedPool, lock-free", FixedPool::new(fixed().sync_type(SyncType::LockFree))?);
    row!("LockFreeFixedPool", LockFreeFixedPool::new(fixed())?);
    row!("VariablePool", VariablePool::new(PoolConfig::default_cpu())?);
    row!("CpuPool", CpuPool::new(PoolConfig::high_performance_cpu())?);
    row!("AnyPool, fixed", AnyPool::new(fixed())?);
    row!("AnyPool, size class", AnyPool::new(PoolConfig::high_performance_cpu())?);
    Ok(())
}

fn look_ups() -> Result<()> {
    println!("\n{:<58} {:>8} {:>8}", "look-up and drop of the handle, each of n threads", "1", "2");
    for pools in [3, 1000] {
        let manager = PoolManager::new();
        for number in 0..pools {
            manager.create_cpu_pool(&format!("frames {number}"), PoolConfig::default_cpu())?;
        }
        let look_up = || {
            medians(
                50_000,
                [&mut |calls| {
                    for _ in 0..calls {
                        black_box(manager.cpu_pool(black_box("frames 2")).unwrap());
                    }
                }],
            )[0]
        };
        let alone = look_up();
        let together = std::thread::scope(|scope| {
            let threads = [0; 2].map(|_| scope.spawn(look_up));
            threads.map(|thread| thread.join().unwrap()).iter().sum::<f64>() / 2.0
        });
        say(&format!("among {pools} pools"), alone, together);
    }
    Ok(())
}

fn debugging(layout: Layout) -> Result<()> {
    println!("\n{:<58} {:>8} {:>8}", "debug preset without stacks", "plain", "debug");
    let (plain, debug) =
        (AnyPool::new(PoolConfig::default_cpu())?, AnyPool::new(watched(PoolConfig::default_cpu()))?);
    let [off, on] = medians(5_000, [pairs!(plain, layout), pairs!(debug, layout)]);
    say("variable, a pair of 64 B", off, on);
    for bits in [8, 12, 16] {
        let (plain, debug) =
            (AnyPool::new(PoolConfig::default_cpu())?, AnyPool::new(watched(PoolConfig::default_cpu()))?);
        let [off, on] = medians(5_000, [&mut mix(&plain, bits), &mut mix(&debug, bits)]);
        say(&format!("variable, an operation of a mix of 16 B – {} B", 1 << bits), off, on);
    }
    let fixed = PoolConfig::fixed_size_cpu(64);
    let (plain, debug) = (AnyPool::new(fixed.clone())?, AnyPool::new(watched(fixed.clone()))?);
    let [off, on] = medians(5_000, [pairs!(plain, layout), pairs!(debug, layout)]);
    say("fixed, a pair", off, on);
    let (plain, debug) = (LocalFixedPool::new(fixed.clone())?, LocalFixedPool::watched(watched(fixed))?);
    let [off, on] = medians(5_000, [pairs!(plain, layout), pairs!(debug, layout)]);
    say("local fixed, a pair", off, on);
    let (plain, debug) = (
        LocalVariablePool::new(PoolConfig::default_cpu())?,
        LocalVariablePool::watched(watched(PoolConfig::default_cpu()))?,
    );
    let [off, on] = medians(5_000, [pairs!(plain, layout), pairs!(debug, layout)]);
    say("local variable, a pair", off, on);
    let mut stacks = PoolConfig::debug_cpu();
    stacks.debug.on_finding = OnFinding::Collect;
    let (plain, debug) = (AnyPool::new(PoolConfig::default_cpu())?, AnyPool::new(stacks)?);
    let [off, on] = medians(1_000, [pairs!(plain, layout), pairs!(debug, layout)]);
    say("with stacks: variable, a pair of 64 B", off, on);
    Ok(())
}

/// What each part of the debug layer costs alone, on the fastest pool there is.
fn parts(layout: Layout) -> Result<()> {
    println!("\n{:<58} {:>8} {:>8}", "one part of the debug layer, LocalFixedPool", "plain", "with it");
    let full = watched(PoolConfig::fixed_size_cpu(64)).debug;
    let mut leaks = PoolConfig::default_cpu().debug;
    (leaks.leaks, leaks.on_finding) = (true, OnFinding::Collect);
    let [mut canary, mut fill, mut history, mut short, mut quarantine] = [leaks; 5];
    canary.canary = full.canary;
    fill.fill = full.fill;
    history.history = full.history;
    short.quarantine = 16 << 10;
    quarantine.quarantine = full.quarantine;
    let plain = LocalFixedPool::new(PoolConfig::fixed_size_cpu(64))?;
    for (name, debug) in [
        ("leaks", leaks),
        ("canary", canary),
        ("fill", fill),
        ("history", history),
        ("quarantine of 16 KiB", short),
        ("quarantine", quarantine),
        ("all", full),
    ] {
        let config = PoolConfig::fixed_size_cpu(64).debug(debug);
        let debug = LocalFixedPool::watched(config)?;
        let [off, on] = medians(5_000, [pairs!(plain, layout), pairs!(debug, layout)]);
        say(name, off, on);
    }
    Ok(())
}

fn main() -> Result<()> {
    let layout = Layout::new::<[u8; 64]>();
    // `cargo bench --bench observe interface` runs that part alone.
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let parts: [(&str, &dyn Fn() -> Result<()>); 5] = [
        ("statistics", &|| statistics(layout)),
        ("interface", &|| interface(layout)),
        ("look-ups", &look_ups),
        ("debugging", &|| debugging(layout)),
        ("parts", &|| parts(layout)),
    ];
    parts
        .into_iter()
        .filter(|(name, _)| wanted.as_deref().is_none_or(|wanted| wanted == *name))
        .try_for_each(|(_, part)| part())
}

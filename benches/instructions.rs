//! Instructions that a pair of allocation and free takes, counted by callgrind and therefore the same every time:
//! statistics off and on, through the pool and through the trait object, plain and under the debug layer.
//!
//! `cargo bench --bench instructions` runs itself under valgrind, each workload with two numbers of pairs; the
//! difference is what the pairs took.

use std::alloc::Layout;
use std::hint::black_box;
use std::process::Command;

use memory_pool::{
    AnyPool, CpuPool, DebugLayer, DevicePool, FixedPool, GpuDevice, LocalFixedPool, LocalVariablePool,
    LockFreeFixedPool, MemoryPool, OnFinding, PinnedPool, PoolConfig, Result, SimConfig, SyncType,
    VariablePool,
};

type Memory = memory_pool::pool::HostMemory;

/// Pairs through a pool of a known type, which inlines, or through the trait object.
macro_rules! pairs {
    ($pool:expr, $layout:expr, $count:expr) => {{
        let pool = $pool;
        for _ in 0..$count {
            let block = black_box(pool.allocate(black_box($layout)).unwrap().cast::<u8>());
            // SAFETY: live, freed once.
            unsafe { pool.deallocate(block) };
        }
    }};
}

/// Pairs through calls that do not inline, as a program makes whose code is in several crates.
macro_rules! calls {
    ($pool:expr, $type:ty, $layout:expr, $count:expr) => {{
        #[inline(never)]
        fn take(pool: &$type, layout: Layout) -> std::ptr::NonNull<u8> {
            pool.allocate(layout).unwrap().cast()
        }
        #[inline(never)]
        fn give(pool: &$type, block: std::ptr::NonNull<u8>) {
            // SAFETY: live, freed once.
            unsafe { pool.deallocate(block) };
        }
        let pool = $pool;
        for _ in 0..$count {
            give(&pool, black_box(take(&pool, black_box($layout))));
        }
    }};
}

fn dynamic(pool: impl MemoryPool, layout: Layout, count: usize) {
    pairs!(black_box(&pool as &dyn MemoryPool), layout, count);
}

fn debug(config: PoolConfig) -> PoolConfig {
    let mut debug = PoolConfig::debug_cpu().debug;
    (debug.stacks, debug.on_finding) = (false, OnFinding::Collect);
    config.debug(debug)
}

/// One workload: a pool, how it is called (`itself`, `calls`, `dyn`, `off` for statistics off, `debug`), and
/// the size of the blocks.
fn work(pool: &str, how: &str, size: usize, count: usize) -> Result<()> {
    let layout = Layout::from_size_align(size, 16)?;
    let counted = |config: PoolConfig| config.track_stats(how != "off").initial_size(1 << 20);
    let fixed = || counted(PoolConfig::fixed_size_cpu(size));
    let lock_free = || fixed().sync_type(SyncType::LockFree);
    let variable = || counted(PoolConfig::default_cpu());
    let classes = || counted(PoolConfig::high_performance_cpu());
    match (pool, how) {
        ("FixedPool", "itself" | "off") => pairs!(FixedPool::new(fixed())?, layout, count),
        ("FixedPool", "calls") => calls!(FixedPool::new(fixed())?, FixedPool, layout, count),
        ("FixedPool", "dyn") => dynamic(FixedPool::new(fixed())?, layout, count),
        ("FixedPool", "debug") => {
            pairs!(FixedPool::<Memory, DebugLayer>::watched(debug(fixed()))?, layout, count)
        }
        ("FixedPool, lock-free", "itself" | "off") => pairs!(FixedPool::new(lock_free())?, layout, count),
        ("FixedPool, lock-free", "dyn") => dynamic(FixedPool::new(lock_free())?, layout, count),
        ("LockFreeFixedPool", "itself" | "off") => pairs!(LockFreeFixedPool::new(fixed())?, layout, count),
        ("LockFreeFixedPool", "calls") => {
            calls!(LockFreeFixedPool::new(fixed())?, LockFreeFixedPool, layout, count)
        }
        ("LockFreeFixedPool", "dyn") => dynamic(LockFreeFixedPool::new(fixed())?, layout, count),
        ("LocalFixedPool", "itself" | "off") => pairs!(LocalFixedPool::new(fixed())?, layout, count),
        ("LocalFixedPool", "calls") => calls!(LocalFixedPool::new(fixed())?, LocalFixedPool, layout, count),
        ("LocalFixedPool", "debug") => {
            pairs!(LocalFixedPool::<Memory, DebugLayer>::watched(debug(fixed()))?, layout, count)
        }
        ("VariablePool", "itself" | "off") => pairs!(VariablePool::new(variable())?, layout, count),
        ("VariablePool", "calls") => calls!(VariablePool::new(variable())?, VariablePool, layout, count),
        ("VariablePool", "dyn") => dynamic(VariablePool::new(variable())?, layout, count),
        ("VariablePool", "debug") => {
            pairs!(VariablePool::<Memory, DebugLayer>::watched(debug(variable()))?, layout, count)
        }
        ("LocalVariablePool", "itself" | "off") => pairs!(LocalVariablePool::new(variable())?, layout, count),
        ("LocalVariablePool", "debug") => {
            pairs!(LocalVariablePool::<Memory, DebugLayer>::watched(debug(variable()))?, layout, count)
        }
        ("CpuPool", "itself" | "off") => pairs!(CpuPool::new(classes())?, layout, count),
        ("CpuPool", "calls") => calls!(CpuPool::new(classes())?, CpuPool, layout, count),
        ("CpuPool", "dyn") => dynamic(CpuPool::new(classes())?, layout, count),
        ("CpuPool", "debug") => pairs!(CpuPool::watched(debug(classes()))?, layout, count),
        ("AnyPool, fixed", "itself" | "off") => pairs!(AnyPool::new(fixed())?, layout, count),
        ("AnyPool, fixed", "dyn") => dynamic(AnyPool::new(fixed())?, layout, count),
        ("AnyPool, fixed", "debug") => pairs!(AnyPool::new(debug(fixed()))?, layout, count),
        ("AnyPool, size class", "itself" | "off") => pairs!(AnyPool::new(classes())?, layout, count),
        ("AnyPool, size class", "dyn") => dynamic(AnyPool::new(classes())?, layout, count),
        ("DevicePool" | "PinnedPool", _) => return on_device(pool, how, size, count),
        _ => panic!("no such workload: {pool}, {how}"),
    }
    Ok(())
}

/// Pairs on the simulated device, which a cache of the pool serves: typed buffers, or addresses.
fn on_device(pool: &str, how: &str, size: usize, count: usize) -> Result<()> {
    let gpu = GpuDevice::simulated(SimConfig::default().detector(false));
    let stream = gpu.new_stream()?;
    let device = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu())?;
    match (pool, how) {
        ("DevicePool", "typed") => {
            (0..count).for_each(|_| drop(black_box(device.alloc_uninit::<u8>(black_box(size), &stream))));
        }
        ("DevicePool", "raw") => (0..count).for_each(|_| {
            let block = device.allocate_async(black_box(size), &stream).unwrap();
            // SAFETY: live, never used, freed once.
            unsafe { device.deallocate_async(black_box(block), &stream) };
        }),
        // Filled with zeros, as typed memory of the host is.
        ("PinnedPool", "typed") => {
            (0..count).for_each(|_| drop(black_box(pinned.alloc::<u8>(black_box(size)))))
        }
        ("PinnedPool", "raw") => pairs!(pinned, Layout::from_size_align(size, 16)?, count),
        _ => panic!("no such workload: {pool}, {how}"),
    }
    Ok(())
}

/// Instructions that one pair takes.
fn count(pool: &str, how: &str, size: usize) -> f64 {
    let instructions = |count: usize| -> f64 {
        let itself = std::env::current_exe().unwrap();
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(itself);
        let said = valgrind.args(["--work", pool, how, &size.to_string(), &count.to_string()]).output();
        let said = said.expect("valgrind runs");
        let said = String::from_utf8_lossy(&said.stderr);
        let total = said.lines().find_map(|line| line.split_once("Collected : "));
        total.unwrap_or_else(|| panic!("no count for {pool}, {how}:\n{said}")).1.trim().parse().unwrap()
    };
    // The first pairs warm up: growth, first use of a thread's cache, and a quarantine that fills.
    let warm = if how == "debug" { 12_000 } else { 1_000 };
    (instructions(warm + 2_000) - instructions(warm)) / 2_000.0
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, work_, pool, how, size, count] = &arguments[..]
        && work_ == "--work"
    {
        // Valgrind maps memory at addresses so low that they might be the alignments by which pools know empty
        // blocks; no system does. This keeps them out of the way.
        let low: Vec<u8> = Vec::with_capacity(black_box(1 << 30));
        work(pool, how, size.parse().unwrap(), count.parse().unwrap())?;
        drop(black_box(low));
        return Ok(());
    }
    let wanted = arguments.iter().skip(1).find(|argument| !argument.starts_with('-'));
    let table = |title: &str, size: usize, pools: &[&str], hows: &[&str]| {
        if wanted.is_some_and(|wanted| !title.contains(wanted.as_str())) {
            return;
        }
        print!("{title:<48}");
        hows.iter().for_each(|how| print!("{how:>9}"));
        println!();
        for pool in pools {
            print!("{pool:<48}");
            hows.iter().for_each(|how| print!("{:>9.1}", count(pool, how, size)));
            println!();
        }
        println!();
    };
    table(
        "statistics, pairs of 64 B",
        64,
        &[
            "LocalFixedPool",
            "FixedPool",
            "LockFreeFixedPool",
            "FixedPool, lock-free",
            "LocalVariablePool",
            "VariablePool",
            "CpuPool",
        ],
        &["off", "itself"],
    );
    let shared = ["FixedPool", "LockFreeFixedPool", "VariablePool", "CpuPool"];
    table("calls, pairs of 64 B", 64, &shared, &["itself", "calls", "dyn"]);
    table(
        "dyn, pairs of 64 B",
        64,
        &["FixedPool, lock-free", "AnyPool, fixed", "AnyPool, size class"],
        &["itself", "dyn"],
    );
    let watched = ["LocalFixedPool", "FixedPool", "LocalVariablePool", "VariablePool", "CpuPool"];
    table("gpu, cached pairs of 64 B", 64, &["DevicePool", "PinnedPool"], &["raw", "typed"]);
    for size in [64, 128, 1024] {
        table(&format!("debug, pairs of {size} B"), size, &watched, &["itself", "debug"]);
    }
    Ok(())
}

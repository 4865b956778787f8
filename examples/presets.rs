//! The presets: plain, fast, and watched, and what the environment makes of them.

use std::alloc::Layout;
use std::time::Instant;

use memory_pool::{AnyPool, OnFinding, PoolConfig, Result};

fn pairs(pool: &AnyPool) -> Result<f64> {
    let layout = Layout::new::<[u8; 64]>();
    let began = Instant::now();
    for _ in 0..200_000 {
        let block = pool.allocate(layout)?;
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(block.cast()) };
    }
    Ok(began.elapsed().as_nanos() as f64 / 200_000.0)
}

fn main() -> Result<()> {
    let mut debug = PoolConfig::debug_cpu();
    debug.debug.stacks = false;
    debug.debug.on_finding = OnFinding::Collect;
    for (name, config) in [
        ("default_cpu", PoolConfig::default_cpu()),
        ("fixed_size_cpu(64)", PoolConfig::fixed_size_cpu(64)),
        ("high_performance_cpu", PoolConfig::high_performance_cpu()),
        ("debug_cpu without stacks", debug),
        ("from_env", PoolConfig::from_env()?),
    ] {
        match AnyPool::new(config) {
            Ok(pool) => println!("{name:<26} {:>7.1} ns for an allocation and its free", pairs(&pool)?),
            Err(error) => println!("{name:<26} {error}"),
        }
    }
    Ok(())
}

//! Pools by name: created in one place, used from others, listed, destroyed.

use allocator_api2::vec::Vec;
use memory_pool::{PoolConfig, PoolManager, Result, Strategy};

fn decode_frame() -> Result<usize> {
    // A look-up writes nothing that other threads read, so it may stand where the pool is used.
    let mut frame = Vec::new_in(PoolManager::global().cpu_pool("frames")?);
    frame.resize(64 * 1024, 0u8);
    Ok(frame.len())
}

fn main() -> Result<()> {
    let manager = PoolManager::global();
    manager.create_cpu_pool("frames", PoolConfig::fixed_size_cpu(64 * 1024).initial_size(4 << 20))?;
    manager.create_cpu_pool("names", PoolConfig::default_cpu().strategy(Strategy::BestFit))?;

    println!("decoded {} bytes", decode_frame()?);
    let names: Vec<&str, _> = {
        let mut names = Vec::new_in(manager.cpu_pool("names")?);
        names.extend(["Ada", "Grace", "Barbara"]);
        names
    };
    println!("{names:?}\n\n{}\n", manager.all_stats());

    // Nothing live is ever taken away.
    println!("destroy: {}", manager.destroy_pool("names").unwrap_err());
    drop(names);
    manager.destroy_pool("names")?;
    println!("look up: {}", manager.cpu_pool("names").unwrap_err());
    manager.create_cpu_pool("names", PoolConfig::default_cpu())?;
    manager.reset_all_pools()
}

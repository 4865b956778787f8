//! A pool of 512-byte blocks: single blocks, runs of them, batches.

use std::alloc::Layout;

use memory_pool::{FixedPool, PoolConfig, Result};

fn main() -> Result<()> {
    let pool = FixedPool::new(PoolConfig::fixed_size_cpu(512).initial_size(1 << 20).max_size(8 << 20))?;

    let sector = Layout::new::<[u8; 512]>();
    let one = pool.allocate(sector)?;
    println!("one block: {} bytes", one.len());

    // A larger request takes adjacent blocks.
    let run = pool.allocate(Layout::new::<[u8; 1300]>())?;
    println!("1300 bytes: a run of {} blocks", run.len() / 512);

    // Many at once, with the lock taken once.
    let batch = pool.allocate_batch(sector, 1000)?;
    println!("a batch of {}", batch.len());

    println!("\n{}", pool.stats());
    // SAFETY: all are live, freed once and not used after.
    unsafe {
        pool.deallocate(one.cast());
        pool.deallocate(run.cast());
        pool.deallocate_batch(&batch);
    }
    println!("given back to the system: {} bytes", pool.trim(0)?);
    Ok(())
}

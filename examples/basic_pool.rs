//! A pool, a few blocks, containers in it, and what it says of itself.

use std::alloc::Layout;

use allocator_api2::{boxed::Box, vec::Vec};
use memory_pool::{PoolBox, PoolConfig, Result, VariablePool};

fn main() -> Result<()> {
    let pool = VariablePool::new(PoolConfig::default_cpu())?;

    // Raw memory, as an allocator gives it.
    let block = pool.allocate(Layout::new::<[u64; 16]>())?;
    println!("a block of {} bytes at {:p}", block.len(), block.cast::<u8>());
    // SAFETY: the block is live, freed once and not used after.
    unsafe { pool.deallocate(block.cast()) };

    // Containers that live in the pool.
    let mut primes = Vec::new_in(&pool);
    primes.extend([2, 3, 5, 7, 11]);
    let greeting = Box::new_in("hello from the pool", &pool);
    println!("{primes:?}, {greeting}");

    // Memory that frees itself, made fallibly.
    let zeros = PoolBox::<[f64]>::new_zeroed_slice_in(1000, &pool)?;
    assert!(zeros.iter().all(|&x| x == 0.0));

    println!("\n{}", pool.stats());
    drop((primes, greeting, zeros));
    assert!(!pool.has_leaks());
    Ok(())
}

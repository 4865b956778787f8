//! What can go wrong, what the error says, and how a program goes on.

use std::alloc::Layout;
use std::ptr::NonNull;

use memory_pool::{AllocFlags, AnyPool, Error, ErrorCategory, FixedPool, PoolConfig, Result};

fn show<T>(what: &str, result: Result<T>) {
    match result {
        Ok(_) => println!("{what}: fine"),
        Err(error) => println!("{what}:\n    {} {:?}: {error}", error.code(), error.category()),
    }
}

fn main() -> Result<()> {
    // Impossible configurations name the fields.
    show("a limit below the start", AnyPool::new(PoolConfig::default_cpu().initial_size(100).max_size(10)));
    show("an odd alignment", AnyPool::new(PoolConfig::default_cpu().alignment(24)));

    // A limit is an error one can handle.
    let pool = FixedPool::new(PoolConfig::fixed_size_cpu(4096).max_size(64 << 10))?;
    let layout = Layout::new::<[u8; 4096]>();
    let mut blocks = Vec::new();
    let full = loop {
        match pool.allocate(layout) {
            Ok(block) => blocks.push(block.cast::<u8>()),
            Err(error) => break error,
        }
    };
    assert_eq!(full.category(), ErrorCategory::Memory);
    println!("after {} blocks:\n    {full}", blocks.len());

    // Misuse is told from bad luck.
    show("reset while blocks are live", pool.reset());
    show("pinned memory from a host pool", pool.allocate_with(layout, AllocFlags::PINNED));
    let mut elsewhere = [0u8; 16];
    // SAFETY: a pointer that is no block is refused, and nothing is freed.
    show("freeing what is not ours", unsafe { pool.try_deallocate(NonNull::from(&mut elsewhere).cast()) });
    show("an absurd size", pool.allocate(Layout::from_size_align(isize::MAX as usize - 4096, 16)?));

    // The pool goes on working.
    let last = blocks.pop().ok_or(full)?;
    // SAFETY: live, freed once.
    unsafe { pool.deallocate(last) };
    let again = pool.allocate(layout)?;
    blocks.push(again.cast());
    // SAFETY: all live, each freed once.
    unsafe { pool.deallocate_batch(&blocks) };
    if let Err(Error::OutOfMemory { requested, .. }) = pool.reserve(1 << 30) {
        println!("reserving {requested} bytes is past the limit; the pool holds {}", pool.stats().reserved);
    }
    Ok(())
}

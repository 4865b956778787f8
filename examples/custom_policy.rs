//! A placement strategy of one's own: long-lived blocks low, short-lived ones high.
//!
//! A policy is safe code: it sees places and answers with one, and the engine verifies the answer.

use std::alloc::Layout;

use memory_pool::{FreeRange, Policy, PoolConfig, Request, Result, Strategy, VariablePool};

/// Small requests from the lowest range that fits, large ones from the highest, so that they do not mix.
#[derive(Debug)]
struct TwoEnds {
    large: usize,
}

impl Policy for TwoEnds {
    fn name(&self) -> &str {
        "two_ends"
    }

    fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
        let fitting = free.filter(|range| range.fits(request.size, request.align));
        if request.size >= self.large {
            fitting.max_by_key(|range| range.start)
        } else {
            fitting.min_by_key(|range| range.start)
        }
    }
}

/// Fills the pool with a mix, frees every other block, and says how much of the free memory is in one piece.
fn fragmentation(strategy: impl Into<Strategy>) -> Result<(String, f64)> {
    let config = PoolConfig::default_cpu().strategy(strategy).initial_size(4 << 20).max_size(4 << 20);
    let pool = VariablePool::new(config)?;
    let mut blocks = Vec::new();
    let mut seed = 1u32;
    loop {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let size = if seed >> 31 == 0 { 48 } else { 4000 };
        match pool.allocate(Layout::from_size_align(size, 16)?) {
            Ok(block) => blocks.push((size, block.cast::<u8>())),
            Err(_) => break,
        }
    }
    for (_, block) in blocks.iter().filter(|(size, _)| *size == 4000) {
        // SAFETY: live, and freed here alone.
        unsafe { pool.deallocate(*block) };
    }
    Ok((pool.config().strategy.name().to_owned(), pool.stats().fragmentation_ratio()))
}

fn main() -> Result<()> {
    println!("fragmentation once the large blocks are freed:");
    for (name, ratio) in [
        fragmentation(Strategy::Segregated)?,
        fragmentation(Strategy::BestFit)?,
        fragmentation(Strategy::FirstFit)?,
        fragmentation(TwoEnds { large: 1024 })?,
    ] {
        println!("    {name:<12} {:>5.1} %", 100.0 * ratio);
    }
    Ok(())
}

//! A placement strategy of one's own, beside those that come with the crate.
//!
//! A policy is safe code: it sees places and answers with one, and the engine verifies the answer.

use std::alloc::Layout;

use memory_pool::{FreeRange, Policy, PoolConfig, Request, Result, Strategy, VariablePool};

/// Takes the tightest range that leaves either nothing or something useful behind.
#[derive(Debug)]
struct NoCrumbs {
    useful: usize,
}

impl Policy for NoCrumbs {
    fn name(&self) -> &str {
        "no_crumbs"
    }

    fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
        let rest = |range: &FreeRange| range.len - request.size;
        let is_crumb = |range: &FreeRange| (1..self.useful).contains(&rest(range));
        free.filter(|range| range.fits(request.size, request.align))
            .min_by_key(|range| (is_crumb(range), rest(range), range.start))
    }
}

/// Fills four MiB with a mix of sizes, frees a fifth at random and refills, some rounds; then says how much of
/// the memory is in use when a request first fails.
fn efficiency(strategy: impl Into<Strategy>) -> Result<(String, f64)> {
    const MEMORY: usize = 4 << 20;
    let pool = VariablePool::new(
        PoolConfig::default_cpu().strategy(strategy).initial_size(MEMORY).max_size(MEMORY),
    )?;
    let mut seed = 1u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as usize % below
    };
    let mut blocks: Vec<(usize, std::ptr::NonNull<u8>)> = Vec::new();
    for _ in 0..20 {
        for _ in 0..blocks.len() / 5 {
            let (_, block) = blocks.swap_remove(random(blocks.len()));
            // SAFETY: live, and taken from the list, so freed once.
            unsafe { pool.deallocate(block) };
        }
        loop {
            let size = 64 << random(8);
            let size = size + random(size);
            match pool.allocate(Layout::from_size_align(size, 16)?) {
                Ok(block) => blocks.push((size, block.cast())),
                Err(_) => break,
            }
        }
    }
    let used: usize = blocks.iter().map(|(size, _)| size).sum();
    Ok((pool.config().strategy.name().to_owned(), used as f64 / MEMORY as f64))
}

fn main() -> Result<()> {
    println!("memory in use when a request first fails:");
    for (name, ratio) in [
        efficiency(Strategy::Segregated)?,
        efficiency(Strategy::BestFit)?,
        efficiency(Strategy::FirstFit)?,
        efficiency(NoCrumbs { useful: 256 })?,
    ] {
        println!("    {name:<12} {:>5.1} %", 100.0 * ratio);
    }
    Ok(())
}

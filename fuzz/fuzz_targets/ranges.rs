//! The variable engine, every strategy and both stores.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memory_pool::engine::ranges::{Beside, Division, InBlocks, Ranges};
use memory_pool::{FreeRange, Policy, Request, Strategy};

/// Answers with any range, fitting or not.
#[derive(Debug)]
struct Last;

impl Policy for Last {
    fn name(&self) -> &str {
        "last"
    }
    fn choose(&self, _: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
        free.last()
    }
}

fuzz_target!(|script: &[u8]| {
    let Some((first, script)) = script.split_first() else { return };
    let strategy = match first % 4 {
        0 => Strategy::Segregated,
        1 => Strategy::BestFit,
        2 => Strategy::FirstFit,
        _ => Strategy::custom(Last),
    };
    let granule = 16 << (first / 4 % 4);
    let division = Division { strategy, granule, min_rest: usize::from(first / 16) * 16 };
    if first & 128 == 0 {
        memory_pool_fuzz::run(Ranges::<InBlocks>::new(division).unwrap(), script, 8192);
    } else {
        memory_pool_fuzz::run(Ranges::<Beside>::new(division).unwrap(), script, 8192);
    }
});

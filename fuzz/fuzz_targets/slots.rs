//! The engine of blocks of one size, single blocks and runs, with both homes of its maps.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memory_pool::engine::slots::{Beside, InSpan, Slots};

fuzz_target!(|script: &[u8]| {
    let Some((first, script)) = script.split_first() else { return };
    let block = 16 + usize::from(first % 32) * 16;
    let align = 1 << (block.trailing_zeros().min(12));
    if first & 128 == 0 {
        let Some(slots) = Slots::<InSpan>::new(block, align) else { return };
        memory_pool_fuzz::run(slots, script, block * 4);
    } else {
        let Some(slots) = Slots::<Beside>::new(block, align) else { return };
        memory_pool_fuzz::run(slots, script, block * 4);
    }
});

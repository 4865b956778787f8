//! The header of a persistent pool: whatever stands in it, opening and checking end in a pool or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memory_pool_fuzz::pools::{Image, PAGE, patch, seal_header};

fuzz_target!(|script: &[u8]| {
    let Some((how, script)) = script.split_first() else { return };
    let mut image = Image::whole();
    let bytes = image.bytes();
    // Bytes as they are, or changes of a whole header whose checksum is then made right.
    if how & 1 == 0 {
        let len = script.len().min(2 * PAGE);
        bytes[..len].copy_from_slice(&script[..len]);
    } else {
        patch(bytes, 0..PAGE, script);
        seal_header(bytes, 0);
    }
    match how >> 1 & 3 {
        0 => bytes.copy_within(0..PAGE, PAGE),
        1 => bytes[PAGE..2 * PAGE].fill(0),
        _ => {}
    }
    if how & 128 != 0 {
        let kept = bytes.len() / 64 * usize::from(how >> 3 & 15) * 4;
        image.truncate(kept);
    }
    image.open_and_check();
});

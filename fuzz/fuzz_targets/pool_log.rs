//! The log and what lies behind it: records with right checksums and any operations, changed tables and lists.
//! Opening recovers or says what is wrong; nothing panics, and checking writes nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memory_pool_fuzz::pools::{Image, LOG, Record, SUPER, patch, words};

fuzz_target!(|script: &[u8]| {
    let Some((how, script)) = script.split_first() else { return };
    let mut image = Image::whole();
    let (changes, records) = script.split_at(script.len() / 4);
    if how & 1 != 0 {
        let end = image.bytes().len();
        patch(image.bytes(), SUPER..end, changes);
    }
    let (identity, len) = (image.identity, image.bytes().len() as u64);
    let mut rest = records;
    for lane in 0..4 {
        let Some((&[size, group], tail)) = rest.split_first_chunk() else { break };
        let (body, tail) = tail.split_at(tail.len().min(usize::from(size) * 2));
        rest = tail;
        let body = words(body, len);
        let record = Record { sequence: 5 + lane, settled: u64::from(group & 7), group: u64::from(group >> 4), body };
        record.write(&mut image.bytes()[LOG..], identity, lane as usize, how & 2 != 0);
    }
    image.open_and_check();
});

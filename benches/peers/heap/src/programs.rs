//! Work that programs do.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::hint::black_box;
use std::time::Instant;

use crate::Random;

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// 50 MB of JSON into values, dropped, and again.
pub(crate) fn json() -> Vec<f64> {
    let text = document(50 << 20);
    let start = Instant::now();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let parse = milliseconds(start);
    let start = Instant::now();
    drop(black_box(value));
    let freed = milliseconds(start);
    let start = Instant::now();
    for _ in 0..2 {
        drop(black_box(serde_json::from_str::<serde_json::Value>(&text).unwrap()));
    }
    vec![parse, freed, milliseconds(start) / 2.0]
}

/// Records with strings, numbers and lists.
fn document(bytes: usize) -> String {
    let mut random = Random::new(11);
    let mut text = String::with_capacity(bytes + 1024);
    text.push('[');
    while text.len() < bytes {
        let id = random.next();
        let _ = write!(
            text,
            r#"{{"id":{id},"name":"user {}","score":{}.{},"tags":["{:x}","{:x}","{:x}"],"nested":{{"a":[{},{},{}],"note":"{}"}}}},"#,
            id % 1000,
            id % 100,
            id % 97,
            id >> 40,
            id >> 44,
            id >> 50,
            id % 7,
            id % 11,
            id % 13,
            "lorem ipsum ".repeat(1 + (id % 5) as usize),
        );
    }
    text.pop();
    text.push(']');
    text
}

/// Maps of strings that grow, change and shrink.
pub(crate) fn maps() -> Vec<f64> {
    let start = Instant::now();
    let mut random = Random::new(5);
    let mut hashed: HashMap<String, Vec<u32>> = HashMap::new();
    let mut sorted: BTreeMap<u64, String> = BTreeMap::new();
    for step in 0..1_500_000u32 {
        let key = random.next() % 200_000;
        match step % 5 {
            0 | 1 => hashed.entry(format!("key number {key}")).or_default().push(step),
            2 => _ = sorted.insert(key, "x".repeat(1 + (key % 90) as usize)),
            3 => _ = sorted.remove(&key),
            _ => _ = hashed.remove(&format!("key number {key}")),
        }
    }
    black_box((hashed.len(), sorted.len()));
    drop((hashed, sorted));
    vec![milliseconds(start)]
}

/// A vector pushed to 64 MiB, and the same loop into a buffer that is there already: the second is what no
/// allocator can beat.
pub(crate) fn vec_push() -> Vec<f64> {
    const BYTES: usize = 64 << 20;
    let push = |vector: &mut Vec<u8>| {
        for at in 0..BYTES {
            vector.push(black_box(at as u8));
        }
    };
    let mut ready: Vec<u8> = vec![1; BYTES];
    ready.clear();
    let start = Instant::now();
    push(&mut ready);
    let faulted = milliseconds(start);
    drop(black_box(ready));
    let start = Instant::now();
    let mut grown = Vec::new();
    push(&mut grown);
    black_box(grown.len());
    let pushed = milliseconds(start);
    vec![pushed, faulted]
}

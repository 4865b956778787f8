//! What stays resident.

use std::time::Duration;

use crate::Random;

fn mebibytes(kib: f64) -> f64 {
    kib / 1024.0
}

/// A line of /proc/self/status, in KiB.
fn status(field: &str) -> f64 {
    // Read by hand into the stack: the allocator under test shall not see it.
    let mut text = [0u8; 4096];
    // SAFETY: the path is terminated, the buffer as long as said, and the file closed.
    let len = unsafe {
        let file = libc::open(c"/proc/self/status".as_ptr(), libc::O_RDONLY);
        let len = libc::read(file, text.as_mut_ptr().cast(), text.len());
        libc::close(file);
        usize::try_from(len).expect("/proc/self/status is readable")
    };
    let text = std::str::from_utf8(&text[..len]).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).expect("the field is there");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// What this process held at most.
pub(crate) fn peak() -> f64 {
    mebibytes(status("VmHWM:"))
}

/// A gibibyte of small objects; most freed at random; all freed; and a pause without a call.
pub(crate) fn gibibyte() -> Vec<f64> {
    const BYTES: usize = 1 << 30;
    let mut random = Random::new(3);
    let mut objects: Vec<Box<[u8]>> = Vec::with_capacity(2 << 20);
    let before = status("VmRSS:");
    let mut total = 0;
    while total < BYTES {
        let size = random.log_uniform(16, 4096);
        objects.push(vec![1u8; size].into_boxed_slice());
        total += size;
    }
    let full = status("VmRSS:") - before;
    let left = objects.len() / 20;
    while objects.len() > left {
        let at = random.below(objects.len());
        drop(objects.swap_remove(at));
    }
    let sparse = status("VmRSS:") - before;
    objects.clear();
    let empty = status("VmRSS:") - before;
    std::thread::sleep(Duration::from_secs(2));
    vec![full, sparse, empty, status("VmRSS:") - before].into_iter().map(mebibytes).collect()
}

/// A program that does little: some strings, a map, a thread. Its peak is mostly the allocator's.
pub(crate) fn small_program() -> Vec<f64> {
    let words: Vec<String> = (0..2000).map(|n| format!("word {n}")).collect();
    let map: std::collections::HashMap<_, _> = words.iter().map(|word| (word.clone(), word.len())).collect();
    let sum = std::thread::spawn(move || map.values().sum::<usize>()).join().unwrap();
    assert!(sum > words.len());
    vec![peak()]
}

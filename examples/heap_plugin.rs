//! A plugin that brings the heap along as its allocator: any program, in whatever language and with whatever
//! allocator of its own, may load it with `dlopen`, use it from many threads, and unload it again.
//!
//! `cargo build --release --example heap_plugin` makes `libheap_plugin.so`.

use memory_pool::GlobalPool;

#[global_allocator]
static POOL: GlobalPool = GlobalPool::new();

/// Counts the words of `n` generated lines: something that allocates a lot.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_words(n: usize) -> usize {
    let lines: Vec<String> = (0..n).map(|at| format!("line {at} {}", "and more ".repeat(at % 40))).collect();
    lines.iter().map(|line| line.split_whitespace().count()).sum()
}

/// An object of the plugin's, for the host to keep.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_open(size: usize) -> *mut Vec<u8> {
    Box::into_raw(Box::new(vec![7; size]))
}

/// Gives such an object back, from any thread; returns its size.
///
/// # Safety
/// `object` came from `plugin_open` and is given back once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn plugin_close(object: *mut Vec<u8>) -> usize {
    // SAFETY: the caller's contract.
    unsafe { Box::from_raw(object) }.iter().filter(|byte| **byte == 7).count()
}

/// Whether the plugin's own heap holds an object.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_owns(object: *const Vec<u8>) -> bool {
    GlobalPool::owns(object.cast())
}

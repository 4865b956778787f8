//! The workloads on snmalloc 0.7.
#[cfg(feature = "peers")]
#[global_allocator]
static HEAP: snmalloc_rs::SnMalloc = snmalloc_rs::SnMalloc;

fn main() {
    heap_peers::main(cfg!(feature = "peers"));
}

//! The workloads on rusty_alloc 2.4.
#[cfg(feature = "peers")]
#[global_allocator]
static HEAP: rusty_alloc_api::RustyAlloc = rusty_alloc_api::RustyAlloc;

fn main() {
    heap_peers::main(cfg!(feature = "peers"));
}

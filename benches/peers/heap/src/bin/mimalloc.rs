//! The workloads on mimalloc 3.
#[cfg(feature = "peers")]
#[global_allocator]
static HEAP: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    heap_peers::main(cfg!(feature = "peers"));
}

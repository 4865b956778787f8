//! The workloads on jemalloc 5.3.
#[cfg(feature = "peers")]
#[global_allocator]
static HEAP: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() {
    heap_peers::main(cfg!(feature = "peers"));
}

//! The workloads on rpmalloc 1.4.
#[cfg(feature = "peers")]
#[global_allocator]
static HEAP: rpmalloc::RpMalloc = rpmalloc::RpMalloc;

fn main() {
    heap_peers::main(cfg!(feature = "peers"));
}

//! The workloads on google tcmalloc.
#[cfg(feature = "tcmalloc")]
#[global_allocator]
static HEAP: tcmalloc_better::TCMalloc = tcmalloc_better::TCMalloc;

fn main() {
    heap_peers::main(cfg!(feature = "tcmalloc"));
}

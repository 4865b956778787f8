//! The workloads on the process heap.
#[global_allocator]
static HEAP: memory_pool::GlobalPool = memory_pool::GlobalPool::new();

fn main() {
    heap_peers::main(true);
}

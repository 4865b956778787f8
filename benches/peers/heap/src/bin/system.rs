//! The workloads on the system's allocator.
#[global_allocator]
static HEAP: std::alloc::System = std::alloc::System;

fn main() {
    heap_peers::main(true);
}

//! The process heap under programs that nobody here wrote: a drop-in `malloc`.
//!
//! ```text
//! cargo build --release --example malloc_preload
//! LD_PRELOAD=target/release/examples/libmalloc_preload.so python3 …
//! ```
//! | module | what |
//! |---|---|
//! | `c` | the functions of C, as POSIX and glibc describe them |
//! | `cxx` | `operator new` and `delete` in all their forms |
//! | `heap` | where both get blocks from |
//! | `start` | what happens when the library is loaded and when the program ends |
//! | `report` | `malloc_stats` and its kin, written without allocating |
//!
//! Nothing has to be initialised before the first call: the heap is made of constants, and a thread gets its
//! part of it when it first allocates, be that while the loader still works. The library asks the loader for
//! nothing while it allocates, so there is no `dlsym` to recurse into. No function unwinds but the throwing
//! forms of `operator new`, through which the exception of the C++ library passes.
//!
//! What this library itself allocates (for reports) comes straight from the process heap.

mod c;
mod cxx;
mod heap;
mod report;
mod start;

use memory_pool::GlobalPool;

#[global_allocator]
static POOL: GlobalPool = GlobalPool::new();

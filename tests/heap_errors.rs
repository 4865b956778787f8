//! What the heap says of errors it says without allocating: here every allocation of the program ends it, from the
//! moment on at which the error is made.

mod children;

use std::alloc::{GlobalAlloc, Layout};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use memory_pool::GlobalPool;

static POOL: GlobalPool = GlobalPool::new();

/// The pool, until nothing may be allocated any more.
struct Sealed;

static IS_SEALED: AtomicBool = AtomicBool::new(false);
const ALLOCATED: i32 = 7;

fn refuse_when_sealed() {
    if IS_SEALED.load(Ordering::Relaxed) {
        // SAFETY: no preconditions.
        unsafe { libc::_exit(ALLOCATED) }
    }
}

// SAFETY: all comes from the pool and goes there.
unsafe impl GlobalAlloc for Sealed {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        refuse_when_sealed();
        // SAFETY: the caller's contract.
        unsafe { POOL.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { POOL.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        refuse_when_sealed();
        // SAFETY: the caller's contract.
        unsafe { POOL.realloc(block, layout, size) }
    }
}

#[global_allocator]
static HEAP: Sealed = Sealed;

/// An error, the variable under which it is found out, and what is said of it.
type Error = (&'static str, &'static str, &'static str, fn());

fn alloc(size: usize) -> *mut u8 {
    POOL.alloc_unsized(size, 16)
}

fn free(block: *mut u8) {
    // SAFETY: not always: see the errors.
    unsafe { POOL.free_unsized(block) }
}

fn free_twice(size: usize) {
    let block = alloc(size);
    free(block);
    free(block);
}

/// Writes `bytes` behind a block.
fn overflow(bytes: [u8; 8]) {
    let block = alloc(100);
    // SAFETY: none: this is the error.
    unsafe { block.add(GlobalPool::usable_size(block).unwrap()).cast::<[u8; 8]>().write_unaligned(bytes) };
    free(block);
}

fn write_after_free() {
    let block = alloc(100);
    free(block);
    // SAFETY: none: this is the error.
    unsafe { block.add(50).write_volatile(1) };
    for _ in 0..1000 {
        free(alloc(100));
    }
}

static ELSEWHERE: [u64; 8] = [7; 8];

const ERRORS: &[Error] = &[
    ("a block of the stack freed", "NONE", "free of what was not allocated here, at 0x", || {
        let mut here = [0u64; 8];
        free((&raw mut here).cast());
    }),
    ("a static freed", "NONE", "free of what was not allocated here, at 0x", || {
        free((&raw const ELSEWHERE).cast_mut().cast());
    }),
    ("a small number freed", "NONE", "free of what was not allocated here, at 0x", || {
        free(ptr::without_provenance_mut(48));
    }),
    ("a block of slices freed twice", "NONE", "free of what was not allocated here, at 0x", || {
        free_twice(200_000);
    }),
    ("a large block freed twice", "NONE", "free of what was not allocated here, at 0x", || {
        free_twice(9 << 20)
    }),
    ("a block freed twice", "MEMORY_POOL_HARDENED", "double free at 0x", || free_twice(100)),
    ("a block with the word of 64 KiB freed twice", "MEMORY_POOL_HARDENED", "double free at 0x", || {
        free_twice(64 << 10);
    }),
    (
        "an address in a block freed",
        "MEMORY_POOL_HARDENED",
        "free of what was not allocated here, at 0x",
        || {
            free(alloc(1000).wrapping_add(16));
        },
    ),
    ("an overflow", "MEMORY_POOL_HARDENED", "block was written to past its end, at 0x", || {
        overflow([0x41; 8])
    }),
    (
        "an overflow of zeros",
        "MEMORY_POOL_HARDENED",
        "double free, or a block zeroed past its end, at 0x",
        || {
            overflow([0; 8]);
        },
    ),
    ("a write after free", "MEMORY_POOL_HEAP_DEBUG", "free block was written to, at 0x", write_after_free),
];

const WHICH: &str = "TEST_HEAP_ERROR";

#[test]
fn errors_are_told_in_one_line_without_allocating() {
    if let Ok(which) = std::env::var(WHICH) {
        let (.., make) = ERRORS[which.parse::<usize>().unwrap()];
        // The thread's heap is there, as it would be in any program.
        free(alloc(100));
        IS_SEALED.store(true, Ordering::Relaxed);
        make();
        unreachable!("the heap went on");
    }
    for (at, (what, variable, line, _)) in ERRORS.iter().enumerate() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "errors_are_told_in_one_line_without_allocating", "--nocapture"]);
        let output = children::output_of(command.env(WHICH, at.to_string()).env(variable, "1")).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{what}: {:?} {said}", output.status);
        assert_eq!(said.lines().count(), 1, "{what}: {said}");
        assert!(said.starts_with("memory-pool: ") && said.contains(line), "{what}: {said}");
    }
}

#[test]
fn a_report_allocates_nothing() {
    if std::env::var_os(WHICH).is_some() {
        free(alloc(100));
        IS_SEALED.store(true, Ordering::Relaxed);
        GlobalPool::print_report();
        IS_SEALED.store(false, Ordering::Relaxed);
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_report_allocates_nothing", "--nocapture"]).env(WHICH, "1");
    let output = children::output_of(&mut command).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?} {said}", output.status);
    assert!(said.contains("block size") && said.contains("committed"), "{said}");
}

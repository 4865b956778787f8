//! Large blocks that grow and move while the system refuses, for want of address space or of entries in its table of
//! mappings: none loses what it holds, and none touches what other threads map meanwhile.
#![cfg(target_os = "linux")]

mod children;

use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use memory_pool::GlobalPool;

static POOL: GlobalPool = GlobalPool::new();

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
/// Set in the process that does the work.
const CHILD: &str = "TEST_HEAP_LIMITED";

/// Runs `work` in a process of its own, since limits are for ever: the test `name` of this program again.
fn in_a_child(name: &str, work: fn()) {
    if std::env::var_os(CHILD).is_some() {
        return work();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(CHILD, "1");
    let output = children::output_of(&mut command).unwrap();
    let said = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{:?}\n{}\n{}", output.status, said.0, said.1);
}

/// A block of which every page says where it belongs.
struct Block {
    at: *mut u8,
    size: usize,
}

impl Block {
    fn new(size: usize) -> Option<Self> {
        let at = POOL.alloc_unsized(size, 16);
        (!at.is_null()).then(|| {
            let block = Self { at, size };
            block.mark(0);
            block
        })
    }

    fn mark(&self, from: usize) {
        for page in (from..self.size).step_by(PAGE) {
            // SAFETY: within the block.
            unsafe { self.at.add(page).cast::<usize>().write(page + 1) };
        }
    }

    fn check(&self) {
        for page in (0..self.size).step_by(PAGE) {
            // SAFETY: within the block.
            assert_eq!(unsafe { self.at.add(page).cast::<usize>().read() }, page + 1, "of {}", self.size);
        }
    }

    /// Resizes to a multiple of a page; whether that worked, and whether the block moved.
    fn resize(&mut self, size: usize) -> (bool, bool) {
        // SAFETY: the block is ours.
        let at = unsafe { POOL.realloc_unsized(self.at, size) };
        if at.is_null() {
            self.check();
            return (false, false);
        }
        let moved = at != std::mem::replace(&mut self.at, at);
        let before = std::mem::replace(&mut self.size, size);
        self.mark(before);
        self.check();
        (true, moved)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.check();
        // SAFETY: the block is ours.
        unsafe { POOL.free_unsized(self.at) }
    }
}

fn map(len: usize) -> Option<*mut u8> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping where the system likes.
    let base = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags | libc::MAP_NORESERVE, -1, 0) };
    (base != libc::MAP_FAILED).then_some(base.cast())
}

/// Runs `work` while threads map, write, read and unmap memory of their own, in lengths like those of the blocks.
fn beside_threads_that_map(work: impl FnOnce()) {
    const FEW: usize = 3;
    let (is_over, mapped) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for mark in 1..=2u8 {
            let (is_over, mapped) = (&is_over, &mapped);
            scope.spawn(move || {
                let mut held = [(ptr::null_mut::<u8>(), 0); FEW];
                let mut turn = 0;
                while !is_over.load(Ordering::Relaxed) {
                    turn += 1;
                    let (base, len) = &mut held[turn % FEW];
                    if !base.is_null() {
                        // SAFETY: this thread's own mapping.
                        unsafe {
                            assert_eq!([base.read(), base.add(*len / 2).read()], [mark; 2]);
                            // Refused where the system would have to cut a mapping in two; it stays, then.
                            libc::munmap(base.cast(), *len);
                        }
                    }
                    *len = (1 + turn * 7 % 12) * MIB;
                    *base = map(*len).unwrap_or(ptr::null_mut());
                    if !base.is_null() {
                        mapped.fetch_add(1, Ordering::Relaxed);
                        // SAFETY: as above.
                        unsafe {
                            assert_eq!([base.read(), base.add(*len / 2).read()], [0; 2]);
                            base.write(mark);
                            base.add(*len / 2).write(mark);
                        }
                    }
                }
            });
        }
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        is_over.store(true, Ordering::Relaxed);
        worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    assert!(mapped.into_inner() > 0);
}

/// Blocks that double until the system refuses, shrink, and grow again.
fn grow_and_shrink(rounds: usize) -> (usize, usize) {
    let (mut moves, mut refusals) = (0, 0);
    let mut blocks: Vec<Block> = Vec::with_capacity(8);
    for round in 0..rounds {
        let Some(mut block) = Block::new((2 + round % 5) * MIB) else {
            refusals += 1;
            blocks.clear();
            continue;
        };
        loop {
            let (worked, moved) = block.resize(block.size + block.size / 2 / PAGE * PAGE);
            moves += usize::from(moved);
            if !worked || block.size > 60 * MIB {
                refusals += usize::from(!worked);
                break;
            }
        }
        block.resize((3 + round % 4) * MIB);
        blocks.push(block);
        if blocks.len() > 4 {
            blocks.remove(round % 3);
        }
    }
    (moves, refusals)
}

#[test]
fn a_limit_of_the_address_space_costs_no_block_and_no_mapping_of_others() {
    in_a_child("a_limit_of_the_address_space_costs_no_block_and_no_mapping_of_others", || {
        beside_threads_that_map(|| {
            let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
            let held = pages.split(' ').next().unwrap().parse::<u64>().unwrap() * PAGE as u64;
            let limit = libc::rlimit { rlim_cur: held + (128 << 20), rlim_max: libc::RLIM_INFINITY };
            // SAFETY: no preconditions.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
            // What the other threads hold meanwhile is up to the scheduler: on until there was some of both.
            let (mut moves, mut refusals) = (0, 0);
            for _ in 0..100 {
                let (moved, refused) = grow_and_shrink(25);
                moves += moved;
                refusals += refused;
                if moves > 0 && refusals > 0 {
                    return;
                }
            }
            panic!("{moves} moves, {refusals} refusals");
        });
    });
}

#[test]
fn a_full_table_of_mappings_costs_no_block_and_no_mapping_of_others() {
    in_a_child("a_full_table_of_mappings_costs_no_block_and_no_mapping_of_others", || {
        let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        if most.trim().parse::<usize>().unwrap() > 200_000 {
            return;
        }
        beside_threads_that_map(|| {
            // Pages of which every other one may not be written: a mapping each.
            let len = 300_000 * PAGE;
            let base = map(len).unwrap();
            let shut = |page: usize, prot| {
                // SAFETY: a page of that mapping.
                unsafe { libc::mprotect(base.add(page * PAGE).cast(), PAGE, prot) == 0 }
            };
            let mut full = (0..len / PAGE).step_by(2).find(|&page| !shut(page, libc::PROT_NONE)).unwrap();
            let (mut moves, mut refusals) = (0, 0);
            for room in 0..8 {
                let (moved, refused) = grow_and_shrink(2);
                moves += moved;
                refusals += refused;
                // Two mappings less.
                for _ in 0..=room / 2 {
                    full -= 2;
                    shut(full, libc::PROT_READ | libc::PROT_WRITE);
                }
            }
            assert!(moves + refusals > 0, "{moves} moves, {refusals} refusals");
        });
    });
}

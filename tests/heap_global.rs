//! The process heap under a real program: this test's own allocator.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;

use memory_pool::GlobalPool;

#[global_allocator]
static POOL: GlobalPool = GlobalPool::new();

#[test]
fn the_program_runs_on_it() {
    let text: Vec<String> = (0..10_000).map(|n| format!("{n} {}", "x".repeat(n % 300))).collect();
    assert!(GlobalPool::owns(text[77].as_ptr()) && !GlobalPool::owns((&raw const POOL).cast()));
    let map: HashMap<&str, usize> = text.iter().enumerate().map(|(at, line)| (line.as_str(), at)).collect();
    let tree: BTreeMap<usize, &str> = map.iter().map(|(line, at)| (*at, *line)).collect();
    assert!(tree.iter().all(|(at, line)| text[*at] == **line));
    assert!(GlobalPool::usable_size(text[299].as_ptr()).unwrap() >= text[299].capacity());
}

#[test]
fn sizes_change_in_place_or_by_moving() {
    // SAFETY: each block is live until its realloc or dealloc.
    unsafe {
        for align in [1, 8, 64, 4096, 1 << 17] {
            let mut size = 1;
            let mut block = POOL.alloc(Layout::from_size_align(size, align).unwrap());
            block.write(99);
            for next in [24, 100, 100_000, 300_000, 3 << 20, 80 << 20, 5 << 20, 70_000, 65_536, 500, 8] {
                block = POOL.realloc(block, Layout::from_size_align(size, align).unwrap(), next);
                assert!(!block.is_null() && (block as usize).is_multiple_of(align));
                assert_eq!(block.read(), 99);
                block.add(next - 1).write(if next == 1 { 99 } else { 7 });
                size = next;
            }
            POOL.dealloc(block, Layout::from_size_align(size, align).unwrap());
        }
    }
}

#[test]
fn zeroed_memory_is_zero_however_often_it_was_used() {
    for size in [16, 1000, 40_000, 200_000, 900_000, 3 << 20] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        for _ in 0..5 {
            // SAFETY: live until freed.
            unsafe {
                let block = POOL.alloc_zeroed(layout);
                let bytes = std::slice::from_raw_parts_mut(block, size);
                assert!(bytes.iter().all(|byte| *byte == 0), "{size}");
                bytes.fill(0xFF);
                POOL.dealloc(block, layout);
            }
        }
    }
}

#[test]
fn absurd_layouts_are_refused() {
    for (size, align) in [(isize::MAX as usize, 1), (1, 1 << 62), (1 << 47, 1 << 21)] {
        // SAFETY: the size is not 0.
        assert!(unsafe { POOL.alloc(Layout::from_size_align(size, align).unwrap()) }.is_null());
    }
    assert!(Vec::<u8>::new().try_reserve_exact(isize::MAX as usize).is_err());
}

/// Blocks are freed by destructors of thread-locals, and by those that run after them.
#[test]
fn late_frees_and_allocations_work() {
    struct Late(Vec<String>);
    impl Drop for Late {
        fn drop(&mut self) {
            self.0.push(String::from("allocated while the thread ends"));
            assert_eq!(self.0.len(), 101);
        }
    }
    thread_local! {
        static KEPT: RefCell<Option<Late>> = const { RefCell::new(None) };
    }
    extern "C" fn after_everything(value: *mut libc::c_void) {
        // SAFETY: made by `Box::into_raw` below.
        let text = unsafe { Box::from_raw(value.cast::<String>()) };
        assert_eq!(text.len(), 1000);
        drop(black_box(vec![text.clone(); 10]));
    }
    for _ in 0..20 {
        let worker = std::thread::spawn(|| {
            let mut key = 0;
            // SAFETY: a key of this test's own.
            unsafe {
                assert_eq!(libc::pthread_key_create(&mut key, Some(after_everything)), 0);
                libc::pthread_setspecific(key, Box::into_raw(Box::new("y".repeat(1000))).cast());
            }
            KEPT.set(Some(Late((0..100).map(|n| n.to_string()).collect())));
        });
        worker.join().unwrap();
    }
}

#[test]
fn a_storm_of_threads_leaves_no_memory_behind() {
    let storm = if std::env::var_os("MEMORY_POOL_LONG_TESTS").is_some() { 100_000 } else { 4_000 };
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let mut before = 0;
    for n in 0..storm {
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || {
                let lists: Vec<Vec<u8>> = (0..20).map(|size| vec![1; 1 << (size % 14)]).collect();
                black_box(lists).len() + n
            })
            .unwrap()
            .join()
            .unwrap();
        if n == storm / 4 {
            before = resident();
        }
    }
    let after = resident();
    assert!(after < before + (32 << 20), "grew from {before} to {after}");
}

/// The child of a process with many busy threads allocates at once.
#[test]
fn a_forked_child_allocates() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..3usize {
            let stop = &stop;
            scope.spawn(move || {
                let mut kept = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    kept.push(vec![0u8; (seed + kept.len() * 37) % 100_000]);
                    if kept.len() > 200 {
                        kept.clear();
                    }
                }
            });
        }
        for _ in 0..60 {
            // SAFETY: the child only allocates and leaves without running anything of the parent's.
            unsafe {
                let child = libc::fork();
                assert!(child >= 0);
                if child == 0 {
                    libc::alarm(20);
                    let lists: Vec<Vec<u8>> = (0..2000).map(|n| vec![n as u8; n * 31 % 70_000]).collect();
                    let sum: usize = lists.iter().map(Vec::len).sum();
                    drop(black_box(lists));
                    libc::_exit(if sum > 0 { 0 } else { 1 });
                }
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "child: {status:#x}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn trim_gives_back_what_is_idle() {
    let lists: Vec<Vec<u8>> = (0..5000).map(|n| vec![1; 100 + n]).collect();
    drop(black_box(lists));
    GlobalPool::trim();
    let again: Vec<Vec<u8>> = (0..5000).map(|n| vec![2; 100 + n]).collect();
    assert!(again.iter().all(|list| list[99] == 2));
}

#[test]
fn statistics_know_what_is_live() {
    let blocks: Vec<Box<[u64; 60]>> = (0..3000).map(|n| Box::new([n; 60])).collect();
    let stats = GlobalPool::stats();
    // A hardened heap takes the next larger class.
    let class = stats.classes.iter().find(|class| class.size >= 480 && class.live >= 3000).unwrap();
    assert!(class.live >= 3000, "{class:?}");
    assert!(stats.committed >= 3000 * 480 && stats.reserved >= stats.committed && stats.os_calls > 0);
    let report = GlobalPool::report();
    assert!(report.contains("remote frees") && report.contains(&format!("\n{:>12}", class.size)), "{report}");
    assert_eq!(blocks[2999][59], 2999);
}

/// As a C library would: no size at the free, alignments beyond the block's, sizes down to nothing.
#[test]
fn blocks_are_freed_and_resized_without_their_size() {
    let mut kept = Vec::new();
    for align in [1, 8, 16, 32, 128, 4096, 1 << 16, 1 << 17, 8 << 20] {
        for size in [0, 1, 24, 100, 1000, 5000, 40_000, 65_536, 65_537, 300_000, 3 << 20] {
            let block = POOL.alloc_unsized(size, align);
            assert!(block.addr().is_multiple_of(align), "{size} {align}");
            let usable = GlobalPool::usable_size(block).unwrap();
            assert!(usable >= size.max(1), "{size} {align}: {usable}");
            // SAFETY: all of the block is the test's.
            unsafe { block.write_bytes(kept.len() as u8, usable) };
            kept.push((block.addr(), usable));
        }
    }
    let blocks = std::mem::take(&mut kept);
    // From another thread as well, and after a change of size.
    let (here, there) = blocks.split_at(blocks.len() / 2);
    let finish = |blocks: &[(usize, usize)], first: usize| {
        for (at, &(address, usable)) in blocks.iter().enumerate() {
            let block = std::ptr::with_exposed_provenance_mut::<u8>(address);
            let byte = (first + at) as u8;
            // SAFETY: each block is live, written above, and freed once.
            unsafe {
                assert!(block.read() == byte && block.add(usable - 1).read() == byte);
                let block = POOL.realloc_unsized(block, usable * 3);
                assert!(block.read() == byte && block.add(usable - 1).read() == byte);
                let block = POOL.realloc_unsized(block, 1 + usable / 7);
                assert!(block.read() == byte && block.add(usable / 7).read() == byte);
                POOL.free_unsized(block);
            }
        }
    };
    finish(here, 0);
    std::thread::scope(|scope| _ = scope.spawn(|| finish(there, here.len())));
    // SAFETY: null is nothing to free, and allocates.
    unsafe {
        POOL.free_unsized(std::ptr::null_mut());
        POOL.free_unsized(POOL.realloc_unsized(std::ptr::null_mut(), 10));
        let block = POOL.alloc_unsized(10, 16);
        assert!(POOL.realloc_unsized(block, usize::MAX - 5).is_null());
        POOL.free_unsized(block);
    }
    assert!(POOL.alloc_unsized(usize::MAX, 16).is_null() && POOL.alloc_unsized(1, 24).is_null());
}

#[test]
fn a_block_that_grows_by_small_steps_is_seldom_copied() {
    let mut size = 1000;
    let mut block = POOL.alloc_unsized(size, 16);
    let mut moves = 0;
    while size < 1 << 20 {
        // SAFETY: the test's own block, of that many bytes and more.
        let grown = unsafe {
            block.add(size - 1).write(size as u8);
            POOL.realloc_unsized(block, size + 500)
        };
        // SAFETY: as above.
        assert_eq!(unsafe { grown.add(size - 1).read() }, size as u8);
        moves += usize::from(grown != block);
        (block, size) = (grown, size + 500);
    }
    // By an eighth each time up to a page, which takes twelve, then by a quarter, which takes twenty-five.
    assert!(moves <= 45, "{moves}");
    // SAFETY: the test's own, freed once.
    unsafe { POOL.free_unsized(block) };
}

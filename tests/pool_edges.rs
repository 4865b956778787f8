//! What the conformance suite does not ask: memory handed in without any system call, fresh pages left alone,
//! growth in place and by moving pages, callbacks, batches, wrong addresses, and who keeps what alive.

use std::alloc::Layout;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use allocator_api2::alloc::Allocator;
use memory_pool::source::failing::Failing;
use memory_pool::source::os::Os;
use memory_pool::source::slice::Slice;
use memory_pool::{
    AllocFlags, AnyPool, Error, FixedPool, LocalFixedPool, LocalVariablePool, LockFreeFixedPool, PoolBox,
    PoolConfig, SyncType, VariablePool,
};
use proptest::prelude::*;

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

/// Runs `work` in a child process that is killed at its first system call.
#[cfg(target_os = "linux")]
fn without_system_calls(work: impl FnOnce()) {
    // SAFETY: the child does `work`, which allocates from its own memory alone, and leaves at once.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            // Strict mode leaves read, write, exit and sigreturn; all else kills.
            if libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) != 0 {
                libc::_exit(2);
            }
            work();
            libc::syscall(libc::SYS_exit, 0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert!(libc::WIFEXITED(status), "a system call was made");
        assert_ne!(libc::WEXITSTATUS(status), 2, "seccomp is not to be had here");
        assert_eq!(libc::WEXITSTATUS(status), 0);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn pools_on_memory_handed_in_make_no_system_call() {
    let mut memory = vec![MaybeUninit::<u8>::uninit(); 1 << 18];
    memory.fill(MaybeUninit::new(7));
    let (for_fixed, for_variable) = memory.split_at_mut(1 << 17);
    without_system_calls(|| {
        let fixed =
            LocalFixedPool::with_source(PoolConfig::fixed_size_cpu(64), Slice::new(for_fixed)).unwrap();
        let variable =
            LocalVariablePool::with_source(PoolConfig::default_cpu(), Slice::new(for_variable)).unwrap();
        let mut blocks = [None; 100];
        for round in 0..10 {
            for (index, block) in blocks.iter_mut().enumerate() {
                let size = 1 + (index * 37 + round) % 300;
                let got = if index % 2 == 0 {
                    fixed.allocate(layout(size, 8))
                } else {
                    variable.allocate(layout(size, 8))
                };
                *block = got.ok();
                assert!(block.is_some());
            }
            for (index, block) in blocks.iter().enumerate() {
                let block = block.unwrap().cast();
                // SAFETY: live, freed once.
                unsafe { if index % 2 == 0 { fixed.deallocate(block) } else { variable.deallocate(block) } }
            }
        }
        // The end of the memory is an error, and the pool goes on.
        assert!(matches!(fixed.allocate(layout(1 << 20, 1)), Err(Error::OutOfMemory { .. })));
        assert!(variable.allocate(layout(1 << 20, 1)).is_err());
        assert!(fixed.allocate(layout(64, 8)).is_ok() && variable.allocate(layout(64, 8)).is_ok());
    });
}

/// Bytes of `block` that are backed by memory.
#[cfg(target_os = "linux")]
fn resident(block: NonNull<[u8]>) -> usize {
    // SAFETY: sysconf has no preconditions.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let start = (block.cast::<u8>().as_ptr() as usize).next_multiple_of(page);
    let end = (block.cast::<u8>().as_ptr() as usize + block.len()) / page * page;
    let mut pages = vec![0u8; (end - start) / page];
    // SAFETY: the range is mapped, and there is a byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(start as *mut _, end - start, pages.as_mut_ptr()) }, 0);
    pages.iter().filter(|&&page| page & 1 != 0).count() * page
}

#[cfg(target_os = "linux")]
#[test]
fn fresh_pages_are_zero_without_being_touched() {
    let big = layout(32 << 20, 16);
    for sync in [SyncType::Mutex, SyncType::LockFree] {
        let pool = FixedPool::new(PoolConfig::fixed_size_cpu(64 << 10).sync_type(sync)).unwrap();
        let block = pool.allocate_zeroed(big).unwrap();
        assert!(resident(block) <= 4 << 20, "{sync:?}: {} bytes were touched", resident(block));
        let used = pool.allocate(layout(64 << 10, 16)).unwrap();
        // SAFETY: live; and freed once, before the block is asked for again.
        unsafe {
            used.cast::<u8>().write_bytes(0xFF, used.len());
            pool.deallocate(used.cast());
        }
        let again = pool.allocate_zeroed(layout(64 << 10, 16)).unwrap();
        // SAFETY: live and zeroed.
        assert!(unsafe { again.as_ref() }.iter().all(|&byte| byte == 0));
    }
    let pool = VariablePool::new(PoolConfig::default_cpu().initial_size(64 << 20)).unwrap();
    let block = pool.allocate_zeroed(big).unwrap();
    assert!(resident(block) <= 4 << 20, "{} bytes were touched", resident(block));
}

#[test]
fn large_blocks_grow_without_being_copied() {
    let source = Arc::new(Failing::new(Os::new()));
    let pool = VariablePool::with_source(PoolConfig::default_cpu(), source.clone()).unwrap();
    let mut bytes = allocator_api2::vec::Vec::new_in(&pool);
    for value in 0..(24u32 << 20) / 4 {
        bytes.push(value);
    }
    assert!(bytes.iter().enumerate().all(|(index, &value)| index as u32 == value));
    // The copies of small beginnings aside, one region grew: nothing near the sum of all sizes was reserved.
    assert!(source.outstanding() <= 40 << 20, "{}", source.outstanding());
    let capacity = bytes.capacity();
    bytes.truncate(100);
    bytes.shrink_to_fit();
    assert!(bytes.capacity() < capacity && bytes[99] == 99);
    assert!(source.outstanding() <= 4 << 20);
    drop(bytes);
    pool.trim(0).unwrap();
    assert_eq!((source.outstanding(), pool.stats().reserved), (0, 0));
}

#[test]
fn blocks_grow_and_shrink_in_place() {
    let fixed = FixedPool::new(PoolConfig::fixed_size_cpu(64)).unwrap();
    let lock_free = LockFreeFixedPool::new(PoolConfig::fixed_size_cpu(64)).unwrap();
    let variable = VariablePool::new(PoolConfig::default_cpu()).unwrap();
    fn grows(pool: &impl Allocator) {
        let (small, large) = (layout(60, 8), layout(600, 8));
        let block = pool.allocate(small).unwrap();
        // SAFETY: live with these layouts, in turn.
        unsafe {
            block.cast::<u8>().write_bytes(9, 60);
            let grown = pool.grow(block.cast(), small, large).unwrap();
            assert_eq!(grown.cast::<u8>(), block.cast(), "there was room behind it");
            let shrunk = pool.shrink(grown.cast(), large, small).unwrap();
            assert_eq!(shrunk.cast::<u8>(), block.cast());
            assert_eq!(shrunk.cast::<[u8; 60]>().read(), [9; 60]);
            pool.deallocate(shrunk.cast(), small);
        }
    }
    grows(&fixed);
    grows(&lock_free);
    grows(&variable);
    assert!(!fixed.has_leaks() && !lock_free.has_leaks() && !variable.has_leaks());
}

#[test]
fn the_callback_may_free_what_is_missing() {
    let one = layout(1000, 8);
    for config in [
        PoolConfig::fixed_size_cpu(1000).max_size(8 << 10),
        PoolConfig::fixed_size_cpu(1000).max_size(8 << 10).sync_type(SyncType::LockFree),
        PoolConfig::default_cpu().max_size(64 << 10),
    ] {
        let pool = AnyPool::new(config).unwrap();
        let mut held: Vec<NonNull<u8>> = Vec::new();
        while let Ok(block) = pool.allocate(one) {
            held.push(block.cast());
        }
        let failed = pool.stats().failed_count;
        let spare = AtomicUsize::new(held.pop().unwrap().as_ptr() as usize);
        let again = pool.clone();
        pool.set_oom_callback(move |wanted| {
            assert_eq!(wanted.size(), 1000);
            // The first call frees a block; the second has nothing left.
            let Some(ptr) = NonNull::new(spare.swap(0, Ordering::Relaxed) as *mut u8) else { return false };
            // SAFETY: live, freed once.
            unsafe { again.deallocate(ptr) };
            true
        });
        held.push(pool.allocate(one).unwrap().cast());
        assert!(pool.allocate(one).is_err());
        assert_eq!(pool.stats().failed_count, failed + 1);
        // It holds a handle of the pool, which would keep the pool for ever.
        pool.clear_oom_callback();
        // SAFETY: live, each freed once.
        unsafe { pool.deallocate_batch(&held) };
        assert!(!pool.has_leaks());
    }
}

#[test]
fn batches_are_all_or_nothing() {
    for sync in [SyncType::Mutex, SyncType::LockFree] {
        let pool =
            FixedPool::new(PoolConfig::fixed_size_cpu(512).max_size(100 * 512).sync_type(sync)).unwrap();
        let blocks = pool.allocate_batch(layout(512, 16), 100).unwrap();
        assert_eq!((blocks.len(), pool.active_allocations().len()), (100, 100), "the limit is exact");
        // SAFETY: live, each freed once.
        unsafe { pool.deallocate_batch(&blocks) };
        assert!(matches!(pool.allocate_batch(layout(512, 16), 101), Err(Error::OutOfMemory { .. })));
        assert!(!pool.has_leaks(), "a failed batch keeps nothing");
        assert!(pool.allocate_batch(layout(512, 16), usize::MAX).is_err());
        let empty = pool.allocate_batch(layout(0, 64), 3).unwrap();
        // SAFETY: empty blocks may be freed like others.
        unsafe { pool.deallocate_batch(&empty) };
        pool.check().unwrap();
    }
}

#[test]
fn wrong_addresses_are_errors_and_change_nothing() {
    let other = Box::new(0u64);
    for config in [
        PoolConfig::fixed_size_cpu(64),
        PoolConfig::fixed_size_cpu(64).sync_type(SyncType::LockFree),
        PoolConfig::default_cpu(),
    ] {
        let pool = AnyPool::new(config).unwrap();
        let block: NonNull<u8> = pool.allocate(layout(200, 8)).unwrap().cast();
        // SAFETY: nothing uses these addresses through the pool; the block is given up last.
        unsafe {
            for foreign in [NonNull::from(&*other).cast(), NonNull::dangling()] {
                assert!(matches!(pool.try_deallocate(foreign), Err(Error::InvalidPointer(_))));
            }
            for inside in [1, 64, 100] {
                let error = pool.try_deallocate(block.add(inside)).unwrap_err();
                assert!(matches!(error, Error::InvalidPointer(_)), "{error}");
            }
            assert_eq!(pool.active_allocations().len(), 1);
            pool.try_deallocate(block).unwrap();
            let error = pool.try_deallocate(block).unwrap_err();
            assert!(matches!(error, Error::InvalidPointer(_)), "{error}");
        }
        pool.check().unwrap();
        assert!(pool.allocate(layout(200, 8)).is_ok());
    }
}

#[test]
fn the_last_holder_gives_everything_back() {
    let source = Arc::new(Failing::new(Os::new()));
    let pool = VariablePool::with_source(PoolConfig::default_cpu(), source.clone()).unwrap();
    let boxed = PoolBox::new_in([1u8; 4096], pool.clone()).unwrap();
    let large = PoolBox::<[u8]>::new_zeroed_slice_in(4 << 20, pool.clone()).unwrap();
    let list = std::thread::spawn({
        let pool = pool.clone();
        move || {
            let mut list = allocator_api2::vec::Vec::new_in(pool);
            list.extend(0..1000);
            list
        }
    });
    let list = list.join().unwrap();
    drop(pool);
    assert_eq!((boxed[4095], large[0], list[999]), (1, 0, 999), "what is live keeps its memory");
    drop((boxed, list));
    assert!(source.outstanding() > 0);
    drop(large);
    assert_eq!(source.outstanding(), 0);
    // Raw blocks hold nothing: with the last handle they go too.
    let pool = FixedPool::with_source(PoolConfig::fixed_size_cpu(64), source.clone()).unwrap();
    pool.allocate(layout(64, 8)).unwrap();
    drop(pool);
    assert_eq!(source.outstanding(), 0);
}

#[test]
fn a_mapped_file_can_be_the_memory() {
    let path = std::env::temp_dir().join(format!("memory-pool-edges-{}", std::process::id()));
    let pool = VariablePool::new(PoolConfig::default_cpu().path(&path).initial_size(1 << 20)).unwrap();
    let mut list = allocator_api2::vec::Vec::new_in(&pool);
    list.extend(0..100_000u64);
    assert!(std::fs::metadata(&path).unwrap().len() >= 1 << 20);
    assert_eq!(list.iter().sum::<u64>(), (0..100_000).sum());
    drop(list);
    drop(pool);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn growth_follows_the_factor_up_to_the_limit() {
    let one = layout(4096, 16);
    for factor in [1.0, 2.0, 4.0] {
        let limit = 16 << 20;
        let config = PoolConfig::fixed_size_cpu(4096).growth_factor(factor).max_size(limit);
        let pool = FixedPool::new(config).unwrap();
        let mut steps = vec![0];
        while pool.allocate(one).is_ok() {
            let reserved = pool.stats().reserved;
            if reserved != steps[steps.len() - 1] {
                steps.push(reserved);
            }
        }
        assert_eq!(*steps.last().unwrap(), limit, "all of the limit was used: {steps:?}");
        // The first step is the least there is, and the last ends at the limit.
        for pair in steps[1..steps.len() - 1].windows(2) {
            let grown = (pair[1] - pair[0]) as f64 / pair[0] as f64;
            assert!((grown / factor - 1.0).abs() < 0.1, "{grown} instead of {factor}: {steps:?}");
        }
    }
}

#[test]
fn no_growth_means_no_call_to_the_source() {
    let source = Arc::new(Failing::new(Os::new()));
    let pool = FixedPool::with_source(PoolConfig::fixed_size_cpu(64), source.clone()).unwrap();
    let error = pool.allocate_with(layout(64, 8), AllocFlags::NO_GROW).unwrap_err();
    assert!(error.to_string().contains("NO_GROW") && source.calls() == 0, "{error}");
    pool.reserve(1 << 20).unwrap();
    let calls = source.calls();
    assert!(pool.allocate_with(layout(64, 8), AllocFlags::NO_GROW).is_ok());
    for _ in 1..(1 << 20) / 64 {
        pool.allocate(layout(64, 8)).unwrap();
    }
    assert_eq!(source.calls(), calls, "what was reserved is there");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any sequence of operations leaves the books in order and the counts right.
    #[test]
    fn any_sequence_of_operations(
        kind in 0..4,
        steps in prop::collection::vec((0..6u8, 1..4000usize, 0..8u32, any::<prop::sample::Index>()), 1..120),
    ) {
        let config = match kind {
            0 => PoolConfig::fixed_size_cpu(96),
            1 => PoolConfig::fixed_size_cpu(96).sync_type(SyncType::LockFree),
            2 => PoolConfig::default_cpu().strategy(memory_pool::Strategy::BestFit),
            _ => PoolConfig::default_cpu(),
        };
        let pool = AnyPool::new(config.max_size(256 << 10)).unwrap();
        let mut live: Vec<(NonNull<u8>, Layout)> = Vec::new();
        for (step, size, align, index) in steps {
            match step {
                0..=2 => {
                    let wanted = layout(size, 1 << align);
                    if let Ok(block) = pool.allocate(wanted) {
                        prop_assert!(block.len() >= size);
                        live.push((block.cast(), wanted));
                    }
                }
                3 if !live.is_empty() => {
                    let (ptr, layout) = live.swap_remove(index.index(live.len()));
                    // SAFETY: live, freed once.
                    unsafe { pool.deallocate_sized(ptr, layout) };
                }
                4 if !live.is_empty() => {
                    let at = index.index(live.len());
                    let (ptr, old) = live[at];
                    let new = layout(size, old.align());
                    // SAFETY: live with `old`; sizes go the way each call demands.
                    let resized = unsafe {
                        if size >= old.size() { pool.grow(ptr, old, new) } else { pool.shrink(ptr, old, new) }
                    };
                    if let Ok(block) = resized {
                        live[at] = (block.cast(), new);
                    }
                }
                _ => _ = pool.trim(size * 16).unwrap(),
            }
            prop_assert!(pool.check().is_ok());
            prop_assert_eq!(pool.stats().active_count() as usize, live.len());
            prop_assert!(pool.stats().reserved <= 256 << 10);
        }
    }
}

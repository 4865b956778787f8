//! The rules of a pool, one a function.

use std::alloc::Layout;
use std::ptr::NonNull;

use memory_pool::{AllocFlags, Error, MemoryPool, MemoryType};

use super::{Held, Make, Pool, Subject};

fn bytes(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn obtain<P: Pool>(pool: &P, layout: Layout) -> Held {
    Held::new(pool.allocate(layout).unwrap(), layout)
}

fn free<P: Pool>(pool: &P, held: Held) {
    // SAFETY: each caller passes live blocks of this pool, once.
    unsafe { pool.deallocate(held.ptr) }
}

pub fn sizes_of_zero_are_dangling<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone()).unwrap();
    for shift in 0..=20 {
        let layout = Layout::from_size_align(0, 1 << shift).unwrap();
        let held = obtain(&pool, layout);
        assert_eq!(held.len, 0);
        free(&pool, held);
    }
    assert!(!pool.has_leaks());
    pool.check();
}

pub fn absurd_sizes_are_errors<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone()).unwrap();
    for (size, align) in [
        (isize::MAX as usize, 1),
        (isize::MAX as usize - 4095, 4096),
        (1 << 62, 1 << 30),
        (1 << 56, 16),
        (1, 1 << 62),
    ] {
        let layout = Layout::from_size_align(size, align).unwrap();
        let error = pool.allocate(layout).expect_err("absurd, and served");
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        assert!(error.to_string().contains(';'), "no advice in: {error}");
    }
    assert!(matches!(pool.reserve(usize::MAX), Err(Error::OutOfMemory { .. })));
    let held = obtain(&pool, bytes(subject.largest.min(100)));
    free(&pool, held);
    pool.check();
}

pub fn alignment_is_kept<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone()).unwrap();
    let mut live = Vec::new();
    for shift in 0..=30 {
        let align = 1usize << shift;
        if align > subject.max_align {
            break;
        }
        for size in [1, 24, subject.largest.min(5000)] {
            // `Held::new` asserts the alignment.
            let held = obtain(&pool, Layout::from_size_align(size, align).unwrap());
            if subject.touchable {
                held.fill();
            }
            live.push(held);
        }
    }
    for held in live {
        if subject.touchable {
            held.verify();
        }
        free(&pool, held);
    }
    pool.check();
    assert!(!pool.has_leaks());
}

pub fn growth_stops_at_the_limit<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let limit = 4 << 20;
    let size = subject.largest.min(10_000);
    let pool = make(subject.config.clone().initial_size(0).max_size(limit)).unwrap();
    let mut live = Vec::new();
    let error = loop {
        match pool.allocate(bytes(size)) {
            Ok(block) => live.push(Held::new(block, bytes(size))),
            Err(error) => break error,
        }
        assert!(pool.stats().reserved <= limit, "{} of {limit} reserved", pool.stats().reserved);
    };
    assert!(matches!(error, Error::OutOfMemory { requested, .. } if requested >= size), "{error}");
    assert!(error.to_string().contains("max_size"), "{error}");
    let served: usize = live.iter().map(|held| held.len).sum();
    assert!(served >= limit / 2, "only {served} of {limit} bytes could be used");
    pool.check();
    // What is freed can be had again.
    free(&pool, live.pop().unwrap());
    live.push(obtain(&pool, bytes(size)));
    for held in live {
        free(&pool, held);
    }
    assert!(pool.stats().failed_count >= 1);
    pool.check();
}

pub fn reserve_makes_later_growth_needless<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone().initial_size(0)).unwrap();
    pool.reserve(1 << 20).unwrap();
    let before = pool.stats();
    assert!(before.reserved >= 1 << 20);
    let size = subject.largest.min(1000);
    let mut served = 0;
    let mut held = Vec::new();
    while served < 700 << 10 {
        let block = obtain(&pool, bytes(size));
        served += block.len.max(512);
        held.push(block);
    }
    assert_eq!(pool.stats().reserved, before.reserved, "grew although enough was reserved");
    held.into_iter().for_each(|block| free(&pool, block));
    let with_initial = make(subject.config.clone().initial_size(1 << 20)).unwrap();
    assert!(with_initial.stats().reserved >= 1 << 20);
}

pub fn trim_gives_idle_memory_back<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone().initial_size(0)).unwrap();
    let size = subject.largest.min(3000);
    let live: Vec<_> = (0..2000).map(|_| obtain(&pool, bytes(size))).collect();
    let full = pool.stats().reserved;
    for (index, held) in live.iter().enumerate() {
        if index != 0 {
            free(&pool, *held);
        }
    }
    pool.trim(0).unwrap();
    let kept = live[0];
    if subject.touchable {
        kept.fill();
        kept.verify();
    }
    assert!(pool.owns(kept.ptr), "trim took memory that is live");
    free(&pool, kept);
    pool.trim(0).unwrap();
    let trimmed = pool.stats().reserved;
    assert!(trimmed <= full / 10, "{trimmed} of {full} bytes are still reserved after trim(0)");
    pool.check();
    free(&pool, obtain(&pool, bytes(size)));
    pool.reserve(2 << 20).unwrap();
    pool.trim(1 << 20).unwrap();
    assert!(pool.stats().reserved >= 1 << 20, "trim(keep) gave back what was to be kept");
    pool.check();
}

pub fn zeroed_means_zeroed<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    if !subject.touchable {
        return;
    }
    let pool = make(subject.config.clone()).unwrap();
    let sizes = [1, 17, 64, 300, subject.largest.min(5000), subject.largest.min(200_000)];
    for round in 0..4 {
        let live: Vec<_> = sizes
            .iter()
            .map(|&size| {
                let block = pool.allocate_with(bytes(size), AllocFlags::ZEROED).unwrap();
                let held = Held::new(block, bytes(size));
                // SAFETY: a live block of the test, zeroed and thus initialised.
                let contents = unsafe { std::slice::from_raw_parts(held.ptr.as_ptr(), held.len) };
                assert!(contents.iter().all(|&byte| byte == 0), "round {round}: {size} bytes are not zero");
                // SAFETY: as above; dirt for the next round.
                unsafe { held.ptr.write_bytes(0xFF, held.len) };
                held
            })
            .collect();
        live.into_iter().for_each(|held| free(&pool, held));
    }
}

pub fn no_grow_serves_from_what_is_there<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone().initial_size(0)).unwrap();
    let size = subject.largest.min(2000);
    let error = pool.allocate_with(bytes(size), AllocFlags::NO_GROW).expect_err("an empty pool served");
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert_eq!(pool.stats().reserved, 0);
    pool.reserve(64 << 10).unwrap();
    let block = pool.allocate_with(bytes(size), AllocFlags::NO_GROW).unwrap();
    free(&pool, Held::new(block, bytes(size)));
}

pub fn foreign_addresses_are_recognised<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone()).unwrap();
    let other = make(subject.config.clone()).unwrap();
    let held = obtain(&other, bytes(subject.largest.min(64)));
    let kept = obtain(&pool, bytes(subject.largest.min(64)));
    let mut local = 0u64;
    let on_stack = NonNull::from(&mut local).cast::<u8>();
    for ptr in [held.ptr, on_stack, NonNull::dangling(), NonNull::new(usize::MAX as *mut u8).unwrap()] {
        assert!(!pool.owns(ptr), "{ptr:?} claimed");
        assert_eq!(pool.usable_size(ptr), None, "{ptr:?} measured");
    }
    free(&other, held);
    free(&pool, kept);
}

pub fn live_blocks_are_listed<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone()).unwrap();
    assert!(pool.active_allocations().is_empty() && !pool.has_leaks());
    let live: Vec<_> = (1..40).map(|n| obtain(&pool, bytes((n * 37).min(subject.largest)))).collect();
    let mut listed: Vec<_> = pool.active_allocations().iter().map(|a| (a.address, a.size)).collect();
    let mut expected: Vec<_> = live.iter().map(|held| (held.start(), held.len)).collect();
    listed.sort_unstable();
    expected.sort_unstable();
    assert_eq!(listed, expected);
    assert!(pool.has_leaks());
    live.into_iter().for_each(|held| free(&pool, held));
    assert!(pool.active_allocations().is_empty() && !pool.has_leaks());
}

pub fn counts_and_peaks_add_up<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone().track_stats(true)).unwrap();
    assert!(pool.is_tracking());
    let size = subject.largest.min(500);
    let live: Vec<_> = (0..10).map(|_| obtain(&pool, bytes(size))).collect();
    let held_bytes: usize = live.iter().map(|held| held.len).sum();
    let stats = pool.stats();
    assert_eq!((stats.allocation_count, stats.deallocation_count, stats.active_count()), (10, 0, 10));
    assert_eq!(stats.current_allocated, held_bytes);
    assert!(stats.peak_allocated >= held_bytes && stats.total_allocated >= held_bytes as u64);
    assert!(stats.reserved >= held_bytes && stats.peak_reserved >= stats.reserved);
    live.into_iter().for_each(|held| free(&pool, held));
    let stats = pool.stats();
    assert_eq!((stats.allocation_count, stats.deallocation_count, stats.current_allocated), (10, 10, 0));
    assert!(stats.peak_allocated >= held_bytes);
    pool.reset_peak();
    assert_eq!(pool.stats().peak_allocated, 0);
    assert!(!stats.to_string().is_empty());
    // Switching the counting off loses no block.
    pool.set_tracking(false);
    assert!(!pool.is_tracking());
    let quiet = obtain(&pool, bytes(size));
    assert!(pool.has_leaks());
    pool.set_tracking(true);
    free(&pool, quiet);
    assert!(!pool.has_leaks());
    assert_eq!(pool.stats().current_allocated, 0);
}

pub fn device_wishes_are_refused_by_host_pools<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let config = &subject.config;
    if config.use_pinned_memory || config.use_managed_memory || !subject.touchable {
        return;
    }
    let pool = make(config.clone()).unwrap();
    for wish in [AllocFlags::PINNED, AllocFlags::MANAGED] {
        let refused = pool.allocate_with(bytes(8), wish).expect_err("a host pool gave device memory");
        assert!(matches!(refused, Error::InvalidOperation { .. }), "{refused}");
    }
    assert!(!pool.has_leaks());
}

pub fn reset_empties<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    let mut pool = make(subject.config.clone()).unwrap();
    for _ in 0..3 {
        let live: Vec<_> = (0..100).map(|_| obtain(&pool, bytes(subject.largest.min(700)))).collect();
        live.into_iter().for_each(|held| free(&pool, held));
        pool.try_reset().unwrap();
        assert!(!pool.has_leaks());
        assert_eq!(pool.stats().current_allocated, 0);
        pool.check();
    }
}

pub fn reset_refuses_while_anything_is_live<P: Pool + MemoryPool>(subject: &Subject, make: Make<'_, P>) {
    let mut pool = make(subject.config.clone()).unwrap();
    let held = obtain(&pool, bytes(subject.largest.min(64)));
    let refused = pool.try_reset().expect_err("reset with a live block");
    assert!(matches!(refused, Error::InvalidOperation { .. }), "{refused}");
    assert_eq!(pool.usable_size_of(held.ptr), Some(held.len), "a refused reset changed something");
    // SAFETY: the block is not used any more.
    unsafe { pool.reset_unchecked() }.unwrap();
    assert!(!MemoryPool::has_leaks(&pool));
    free(&pool, obtain(&pool, bytes(subject.largest.min(64))));
    pool.check();
}

/// `usable_size` through the trait object, so that both ways are asked.
trait ThroughTheTrait {
    fn usable_size_of(&self, ptr: NonNull<u8>) -> Option<usize>;
}

impl<P: MemoryPool> ThroughTheTrait for P {
    fn usable_size_of(&self, ptr: NonNull<u8>) -> Option<usize> {
        let dynamic: &dyn MemoryPool = self;
        dynamic.usable_size(ptr)
    }
}

pub fn the_trait_says_what_the_pool_says<P: Pool + MemoryPool>(subject: &Subject, make: Make<'_, P>) {
    let pool = make(subject.config.clone()).unwrap();
    let dynamic: &dyn MemoryPool = &pool;
    let block = dynamic.allocate(bytes(subject.largest.min(48))).unwrap();
    assert!(Pool::owns(&pool, block.cast()) && dynamic.owns(block.cast()));
    assert_eq!(dynamic.usable_size(block.cast()), Some(block.len()));
    assert_eq!(dynamic.stats().active_count(), 1);
    assert_eq!(dynamic.active_allocations().len(), 1);
    // SAFETY: live, freed once.
    unsafe { dynamic.deallocate(block.cast()) };
    assert_eq!(dynamic.memory_type() == MemoryType::Gpu, !subject.touchable);
    assert_eq!(dynamic.config().alignment, subject.config.alignment);
    assert_eq!(dynamic.name(), "");
    dynamic.reset().unwrap();
    dynamic.trim(0).unwrap();
}

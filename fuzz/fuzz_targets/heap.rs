//! The thread-cached heap as an instance of its own, with a limit, blocks that other threads make and free, and
//! threads that end.
#![no_main]

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ptr::NonNull;

use allocator_api2::alloc::Allocator;
use libfuzzer_sys::fuzz_target;
use memory_pool::{CpuPool, PoolConfig};

const LIMIT: usize = 24 << 20;

struct Live {
    layout: Layout,
    usable: usize,
    fill: u8,
}

/// The ends and the middle of a block: all of a large one would take the fuzzer's time.
fn marks(usable: usize) -> [usize; 3] {
    [0, usable / 2, usable - 1]
}

fn write(start: usize, usable: usize, fill: u8) {
    let block = std::ptr::with_exposed_provenance_mut::<u8>(start);
    // SAFETY: a live block of that size.
    marks(usable).into_iter().for_each(|at| unsafe { block.add(at).write(fill) });
}

fn verify(start: usize, live: &Live) {
    let block = std::ptr::with_exposed_provenance::<u8>(start);
    // SAFETY: as above.
    assert!(marks(live.usable).into_iter().all(|at| unsafe { block.add(at).read() } == live.fill));
}

/// Frees a live block, of which the pool is told the layout or nothing.
fn free(pool: &CpuPool, start: usize, layout: Option<Layout>) {
    let block = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(start)).unwrap();
    // SAFETY: the model forgets the block.
    unsafe {
        match layout {
            Some(layout) => Allocator::deallocate(pool, block, layout),
            None => pool.deallocate(block),
        }
    }
}

fuzz_target!(|script: &[u8]| {
    let pool = CpuPool::new(PoolConfig::default_cpu().max_size(LIMIT)).unwrap();
    let mut model: BTreeMap<usize, Live> = BTreeMap::new();
    for (step, chunk) in script.chunks_exact(4).enumerate() {
        let fill = step as u8 | 1;
        let number = usize::from(u16::from_le_bytes([chunk[1], chunk[2]]));
        let size = (number % 5000 + 1) << (chunk[3] % 10);
        let align = if chunk[3] / 10 % 4 == 0 { 1 << (chunk[3] / 40 * 3) } else { 8 };
        let layout = Layout::from_size_align(size, align).unwrap();
        let picked = model.keys().nth(number % model.len().max(1)).copied();
        let elsewhere = chunk[0] & 0x80 != 0 && chunk[0] & 0x40 != 0;
        match (chunk[0] % 8, picked) {
            (0..=3, _) => {
                let zeroed = chunk[0] & 8 != 0;
                let ask = || {
                    let block = if zeroed {
                        Allocator::allocate_zeroed(&pool, layout)
                    } else {
                        Allocator::allocate(&pool, layout)
                    };
                    block.ok().map(|block| (block.cast::<u8>().as_ptr().expose_provenance(), block.len()))
                };
                let block = if elsewhere {
                    std::thread::scope(|scope| scope.spawn(ask).join().unwrap())
                } else {
                    ask()
                };
                let Some((start, usable)) = block else {
                    assert!(
                        size + model.values().map(|live| live.usable).sum::<usize>() > LIMIT / 4,
                        "refused early"
                    );
                    continue;
                };
                assert!(usable >= size && start.is_multiple_of(align));
                assert!(
                    model
                        .range(..=start)
                        .next_back()
                        .is_none_or(|(other, live)| other + live.usable <= start)
                );
                assert!(model.range(start..).next().is_none_or(|(other, _)| start + usable <= *other));
                if zeroed {
                    verify(start, &Live { layout, usable: size, fill: 0 });
                }
                write(start, usable, fill);
                model.insert(start, Live { layout, usable, fill });
            }
            (4..=5, Some(start)) => {
                let live = model.remove(&start).unwrap();
                verify(start, &live);
                let layout = (chunk[0] & 8 != 0).then_some(live.layout);
                if elsewhere {
                    std::thread::scope(|scope| scope.spawn(|| free(&pool, start, layout)).join().unwrap());
                } else {
                    free(&pool, start, layout);
                }
            }
            (6, Some(start)) => {
                let live = model.remove(&start).unwrap();
                let new = Layout::from_size_align(size, live.layout.align()).unwrap();
                let block = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(start)).unwrap();
                // SAFETY: a live block of that layout.
                let moved = unsafe {
                    if size >= live.layout.size() {
                        Allocator::grow(&pool, block, live.layout, new)
                    } else {
                        Allocator::shrink(&pool, block, live.layout, new)
                    }
                };
                match moved {
                    Ok(block) => {
                        let (start, usable) = (block.cast::<u8>().as_ptr().expose_provenance(), block.len());
                        // SAFETY: live.
                        assert_eq!(unsafe { block.cast::<u8>().read() }, live.fill);
                        write(start, usable, fill);
                        model.insert(start, Live { layout: new, usable, fill });
                    }
                    Err(_) => {
                        verify(start, &live);
                        model.insert(start, live);
                    }
                }
            }
            (7, picked) => match (chunk[3] % 4, picked) {
                (0, _) => {
                    pool.trim(number).unwrap();
                }
                (1, _) => {
                    // Past the limit it fails, and changes nothing.
                    let _ = pool.reserve(number << 9);
                }
                (2, Some(start)) => {
                    let block = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(start)).unwrap();
                    assert!(pool.owns(block) && pool.usable_size(block) == Some(model[&start].usable));
                }
                _ => assert_eq!(pool.reset().is_err(), !model.is_empty()),
            },
            _ => {}
        }
        pool.check().unwrap();
        assert_eq!(pool.has_leaks(), !model.is_empty());
    }
    for (start, live) in model {
        verify(start, &live);
        free(&pool, start, None);
    }
    assert!(!pool.has_leaks());
    pool.check().unwrap();
});

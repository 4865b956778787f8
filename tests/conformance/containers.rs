//! The containers of the ecosystem, on every version of `Allocator`.

use std::alloc::Layout;
use std::ptr::NonNull;

use super::Random;

/// One module per version of the trait; the two traits have the same methods and are different traits.
macro_rules! version {
    ($version:ident, $api:ident) => {
        pub mod $version {
            use $api::alloc::Allocator;
            use $api::boxed::Box;
            use $api::vec::Vec;

            use super::*;

            /// Vectors, boxes, zero sizes, over-alignment and every way of resizing.
            pub fn all<A: Allocator + Clone>(pool: A, max_align: usize) {
                vectors_grow_and_shrink(pool.clone());
                boxes_hold_values(pool.clone());
                zero_sizes_and_alignment(pool.clone(), max_align);
                resizing_keeps_contents(pool);
            }

            fn vectors_grow_and_shrink<A: Allocator + Clone>(pool: A) {
                let mut vectors: std::vec::Vec<Vec<u32, A>> = std::vec::Vec::new();
                for round in 0..8u32 {
                    let mut vector = Vec::new_in(pool.clone());
                    for value in 0..1000 {
                        vector.push(value ^ round);
                    }
                    vector.truncate(100);
                    vector.shrink_to_fit();
                    vectors.push(vector);
                }
                for (round, vector) in vectors.iter().enumerate() {
                    assert!(vector.iter().enumerate().all(|(at, &value)| value == at as u32 ^ round as u32));
                }
            }

            fn boxes_hold_values<A: Allocator + Clone>(pool: A) {
                let mut nested = Box::new_in([1u64; 8], pool.clone());
                for depth in 0..100 {
                    nested = Box::new_in(nested.map(|value| value + depth), pool.clone());
                }
                assert_eq!(nested[7], 1 + 99 * 100 / 2);
                drop(Box::new_in((), pool));
            }

            fn zero_sizes_and_alignment<A: Allocator>(pool: A, max_align: usize) {
                for shift in 0..=30 {
                    let align = 1usize << shift;
                    let empty = Layout::from_size_align(0, align).unwrap();
                    let block = pool.allocate(empty).unwrap();
                    assert_eq!(block.cast::<u8>().as_ptr() as usize % align, 0);
                    // SAFETY: allocated with this layout.
                    unsafe { pool.deallocate(block.cast(), empty) };
                    if align <= max_align {
                        let layout = Layout::from_size_align(3, align).unwrap();
                        let block = pool.allocate_zeroed(layout).unwrap();
                        assert_eq!(block.cast::<u8>().as_ptr() as usize % align, 0);
                        // SAFETY: three live bytes; any size from asked to returned may be used to free it.
                        unsafe {
                            assert_eq!(block.cast::<[u8; 3]>().read(), [0; 3]);
                            pool.deallocate(block.cast(), layout_of(block.len(), align));
                        }
                    }
                }
            }

            /// Grows and shrinks at random, changing the alignment as well, with and without zeroing.
            fn resizing_keeps_contents<A: Allocator>(pool: A) {
                let mut random = Random::new(3);
                let mut layout = layout_of(0, 8);
                let mut block: NonNull<[u8]> = pool.allocate(layout).unwrap();
                for _ in 0..300 {
                    let size = if random.below(10) == 0 { 0 } else { random.size(6000) };
                    let next = layout_of(size, 1 << random.below(7));
                    let keep = layout.size().min(size);
                    let ptr: NonNull<u8> = block.cast();
                    let zeroed = random.below(2) == 0;
                    // SAFETY: the block is live with `layout`, and sizes go the way each call demands.
                    block = unsafe {
                        match size >= layout.size() {
                            true if zeroed => pool.grow_zeroed(ptr, layout, next),
                            true => pool.grow(ptr, layout, next),
                            false => pool.shrink(ptr, layout, next),
                        }
                    }
                    .unwrap();
                    assert!(block.len() >= size);
                    assert_eq!(block.cast::<u8>().as_ptr() as usize % next.align(), 0);
                    let bytes: NonNull<u8> = block.cast();
                    for at in 0..keep {
                        // SAFETY: within the live block; these bytes were written before.
                        assert_eq!(unsafe { bytes.add(at).read() }, at as u8 ^ 0x33, "byte {at} of {keep}");
                    }
                    if zeroed && size > layout.size() {
                        for at in keep..size {
                            // SAFETY: within the live block; zeroed and thus initialised.
                            assert_eq!(unsafe { bytes.add(at).read() }, 0, "byte {at} of {size}");
                        }
                    }
                    for at in 0..size {
                        // SAFETY: within the live block.
                        unsafe { bytes.add(at).write(at as u8 ^ 0x33) };
                    }
                    layout = next;
                }
                // SAFETY: live with this layout.
                unsafe { pool.deallocate(block.cast(), layout) };
            }
        }
    };
}

fn layout_of(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

version!(v04, allocator_api2);
version!(v02, allocator_api2_02);

/// hashbrown's maps, which speak version 0.2.
pub fn maps<A: allocator_api2_02::alloc::Allocator + Clone>(pool: A) {
    let mut map = hashbrown::HashMap::new_in(pool.clone());
    for key in 0..2000u64 {
        map.insert(key, key * key);
    }
    for key in (0..2000).step_by(3) {
        assert_eq!(map.remove(&key), Some(key * key));
    }
    map.shrink_to_fit();
    assert_eq!(map.len(), 1333);
    assert!(map.iter().all(|(key, value)| key * key == *value));
    let set: hashbrown::HashSet<u8, hashbrown::DefaultHashBuilder, A> = hashbrown::HashSet::new_in(pool);
    assert!(set.is_empty());
}

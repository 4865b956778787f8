//! Random operations against a model: what is live never overlaps, keeps its contents and its size.

use std::collections::BTreeMap;

use super::{Held, Make, Pool, Random, Subject};

/// Live blocks by address, as the model knows them.
#[derive(Debug, Default)]
struct Model {
    by_address: BTreeMap<usize, Held>,
    order: Vec<usize>,
}

impl Model {
    fn insert(&mut self, held: Held) {
        if let Some((&below, block)) = self.by_address.range(..=held.start()).next_back() {
            assert!(below + block.len <= held.start(), "{held:?} overlaps {block:?}");
        }
        if let Some((&above, block)) = self.by_address.range(held.start()..).next() {
            assert!(held.start() + held.len <= above, "{held:?} overlaps {block:?}");
        }
        self.by_address.insert(held.start(), held);
        self.order.push(held.start());
    }

    fn take(&mut self, random: &mut Random) -> Option<Held> {
        if self.order.is_empty() {
            return None;
        }
        let at = random.below(self.order.len());
        self.by_address.remove(&self.order.swap_remove(at))
    }
}

/// Allocates and frees at random, in waves that fill and empty the pool; walks the pool's invariants and the
/// model's after every step.
pub fn random_operations<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    for seed in 1..=4 {
        let pool = make(subject.config.clone()).unwrap();
        let mut random = Random::new(seed);
        let mut model = Model::default();
        for step in 0..1500 {
            // Waves: mostly allocations, then mostly frees.
            let wants_more = (step / 250) % 2 == 0;
            if random.below(10) < if wants_more { 7 } else { 3 } {
                let layout = std::alloc::Layout::from_size_align(
                    random.size(subject.largest.min(64 << 10)),
                    random.align(subject.max_align.min(4096)),
                )
                .unwrap();
                let held = Held::new(pool.allocate(layout).unwrap(), layout);
                assert!(pool.owns(held.ptr), "{held:?} is not owned");
                assert_eq!(pool.usable_size(held.ptr), Some(held.len), "{held:?}");
                if subject.touchable {
                    held.fill();
                }
                model.insert(held);
            } else if let Some(held) = model.take(&mut random) {
                free(&pool, subject, held);
            }
            if step % 16 == 0 {
                pool.check();
            }
        }
        assert_eq!(pool.stats().active_count() as usize, model.order.len());
        while let Some(held) = model.take(&mut random) {
            free(&pool, subject, held);
        }
        pool.check();
        assert!(!pool.has_leaks(), "{} holds blocks that were all freed", subject.name);
    }
}

fn free<P: Pool>(pool: &P, subject: &Subject, held: Held) {
    if subject.touchable {
        held.verify();
    }
    // SAFETY: the model hands out each live block once.
    unsafe { pool.deallocate(held.ptr) };
}

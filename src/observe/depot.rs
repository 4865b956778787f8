//! Every distinct stack once, under a small number.
//!
//! Invariants:
//! 1. `index` has a power of two of slots, at most half of them used; a used slot holds the number of a stack,
//!    which is its place in `stacks` plus one.
//! 2. A stack is reached from the slot of its hash by stepping over used slots only.

use super::metadata::{Metadata, Table, make_room};
use crate::base::stack::Stack;

/// The number that stands for no stack.
pub(super) const NO_STACK: u32 = 0;

/// Distinct stacks kept (17 MiB of them); later ones are not remembered.
const CAPACITY: usize = 1 << 16;

#[derive(Debug)]
pub(super) struct Depot {
    stacks: Table<Stack>,
    index: Table<u32>,
}

fn hash(stack: &Stack) -> usize {
    let mut hash = 0usize;
    for frame in stack.frames() {
        hash = (hash.rotate_left(5) ^ frame).wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as usize);
    }
    hash >> (usize::BITS / 2)
}

impl Depot {
    pub(super) const fn new() -> Self {
        Self { stacks: Table::new_in(Metadata), index: Table::new_in(Metadata) }
    }

    /// The number of `stack`; [`NO_STACK`] where there is no room to remember it.
    pub(super) fn intern(&mut self, stack: &Stack) -> u32 {
        if self.stacks.len() * 2 >= self.index.len() && !self.grow() {
            return NO_STACK;
        }
        let mask = self.index.len() - 1;
        let mut slot = hash(stack) & mask;
        while self.index[slot] != NO_STACK {
            if self.stacks[self.index[slot] as usize - 1] == *stack {
                return self.index[slot];
            }
            slot = (slot + 1) & mask;
        }
        if self.stacks.len() >= CAPACITY || !make_room(&mut self.stacks, 1) {
            return NO_STACK;
        }
        self.stacks.push(*stack);
        self.index[slot] = self.stacks.len() as u32;
        self.index[slot]
    }

    pub(super) fn get(&self, number: u32) -> Option<Stack> {
        self.stacks.get((number as usize).checked_sub(1)?).copied()
    }

    #[cold]
    fn grow(&mut self) -> bool {
        let slots = (self.index.len() * 2).max(1024);
        let mut index = Table::new_in(Metadata);
        if !make_room(&mut index, slots) {
            return false;
        }
        index.resize(slots, NO_STACK);
        for (place, stack) in self.stacks.iter().enumerate() {
            let mut slot = hash(stack) & (slots - 1);
            while index[slot] != NO_STACK {
                slot = (slot + 1) & (slots - 1);
            }
            index[slot] = place as u32 + 1;
        }
        self.index = index;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_stacks_have_one_number_and_distinct_ones_have_two() {
        let mut depot = Depot::new();
        let stack = |n: usize| Stack::from_frames(&[n * 16, n * 7 + 1, 5]);
        let numbers: Vec<u32> = (0..5000).map(|n| depot.intern(&stack(n))).collect();
        for (n, &number) in numbers.iter().enumerate() {
            assert_eq!(depot.intern(&stack(n)), number);
            assert_eq!(depot.get(number), Some(stack(n)));
        }
        assert_eq!(depot.get(NO_STACK), None);
        assert_eq!(depot.stacks.len(), 5000);
    }

    #[test]
    fn a_full_depot_goes_on_without_remembering() {
        let mut depot = Depot::new();
        for n in 0..CAPACITY {
            assert_ne!(depot.intern(&Stack::from_frames(&[n + 1])), NO_STACK);
        }
        assert_eq!(depot.intern(&Stack::from_frames(&[CAPACITY + 1])), NO_STACK);
        assert_eq!(depot.intern(&Stack::from_frames(&[1])), 1);
    }
}

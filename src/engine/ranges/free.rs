//! The free blocks, ordered for the strategy at hand.
//!
//! * `Segregated`: a list for each bin, last in first out.
//! * `BestFit` and `Custom`: a treap for each bin, by size and then address.
//! * `FirstFit`: one tree over all, by address, in which no block is larger than its parent; so whether a
//!   subtree holds anything large enough shows at its root.
//!
//! 1. Every free block of the engine is in here once, under the bin of its size (`FirstFit`: under bin 0), and
//!    nothing else is.
//! 2. `filled` has the bit of a bin set exactly if its head is a block.
//! 3. Lists are linked both ways; trees keep the invariants of their kind.

use super::bins::{BINS, Filled, MAX_SIZE, bin_of, sure_bin};
use super::store::Nodes;
use core::ops::{Deref, DerefMut};

use super::treap::{self, Tree, View, scatter};
use crate::base::bits::round_up;

/// How the free blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Lists,
    BySize,
    ByAddress,
}

/// Where a block is to be cut: the free block, and how many bytes to leave in front.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<I> {
    pub(super) id: I,
    pub(super) skip: usize,
}

/// What is wanted of a free block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Want {
    /// Whole size, a multiple of the granule.
    pub(super) size: usize,
    /// Alignment of the usable part.
    pub(super) align: usize,
    /// The least that may be left in front, if anything is.
    pub(super) front: usize,
}

impl Want {
    /// Where this fits into the free block `id`.
    #[inline]
    pub(super) fn place<S: Nodes>(&self, store: &S, id: S::Id) -> Option<Place<S::Id>> {
        let start = store.start(id);
        let mut skip = start.wrapping_neg() & (self.align - 1);
        if skip != 0 && skip < self.front {
            skip = round_up(start.checked_add(self.front)?, self.align)? - start;
        }
        let fits = store.size(id).checked_sub(skip)? >= self.size;
        fits.then_some(Place { id, skip })
    }
}

#[derive(Debug)]
pub(super) struct Free<S: Nodes> {
    order: Order,
    filled: Filled,
    heads: [S::Id; BINS],
}

/// The blocks of one bin by size, then address. `R` is a reference to the store.
struct BySize<R>(R);

impl<S: Nodes, R: Deref<Target = S>> View for BySize<R> {
    type Id = S::Id;
    const NONE: S::Id = S::NONE;

    #[inline(always)]
    fn child(&self, node: S::Id, side: usize) -> S::Id {
        self.0.link(node, side)
    }

    #[inline(always)]
    fn before(&self, a: S::Id, b: S::Id) -> bool {
        (self.0.size(a), self.0.start(a)) < (self.0.size(b), self.0.start(b))
    }

    #[inline(always)]
    fn above(&self, a: S::Id, b: S::Id) -> bool {
        scatter(self.0.start(a)) > scatter(self.0.start(b))
    }
}

impl<S: Nodes, R: DerefMut<Target = S>> Tree for BySize<R> {
    #[inline(always)]
    fn set_child(&mut self, node: S::Id, side: usize, child: S::Id) {
        self.0.set_link(node, side, child);
    }
}

/// All blocks by address, the largest on top.
struct ByAddress<R>(R);

impl<S: Nodes, R: Deref<Target = S>> View for ByAddress<R> {
    type Id = S::Id;
    const NONE: S::Id = S::NONE;

    #[inline(always)]
    fn child(&self, node: S::Id, side: usize) -> S::Id {
        self.0.link(node, side)
    }

    #[inline(always)]
    fn before(&self, a: S::Id, b: S::Id) -> bool {
        self.0.start(a) < self.0.start(b)
    }

    #[inline(always)]
    fn above(&self, a: S::Id, b: S::Id) -> bool {
        (self.0.size(a), scatter(self.0.start(a))) > (self.0.size(b), scatter(self.0.start(b)))
    }
}

impl<S: Nodes, R: DerefMut<Target = S>> Tree for ByAddress<R> {
    #[inline(always)]
    fn set_child(&mut self, node: S::Id, side: usize, child: S::Id) {
        self.0.set_link(node, side, child);
    }
}

/// The first block by address, behind `behind` if given, of at least `size` bytes.
fn first_fit<S: Nodes>(store: &S, root: S::Id, behind: Option<S::Id>, size: usize) -> Option<S::Id> {
    let behind = behind.map(|id| store.start(id));
    let (mut at, mut best) = (root, None);
    // Under a block that is too small all are.
    while at != S::NONE && store.size(at) >= size {
        let side = usize::from(behind.is_some_and(|behind| store.start(at) <= behind));
        if side == 0 {
            best = Some(at);
        }
        at = store.link(at, side);
    }
    best
}

/// The smallest block of at least `size` bytes of one bin.
#[inline]
fn smallest<S: Nodes>(store: &S, root: S::Id, size: usize) -> Option<S::Id> {
    treap::first(&BySize(store), root, |_, id| store.size(id) >= size)
}

impl<S: Nodes> Free<S> {
    pub(super) fn new(order: Order) -> Self {
        Self { order, filled: Filled::new(), heads: [S::NONE; BINS] }
    }

    pub(super) fn clear(&mut self) {
        self.filled = Filled::new();
        self.heads = [S::NONE; BINS];
    }

    /// The bin of a block of `size` bytes.
    #[inline(always)]
    fn bin(&self, size: usize) -> usize {
        if self.order == Order::ByAddress { 0 } else { bin_of(size) }
    }

    #[inline(always)]
    fn head(&mut self, bin: usize) -> &mut S::Id {
        debug_assert!(bin < BINS);
        // SAFETY: no block is larger than `MAX_SIZE`, whose bins are below `BINS`.
        unsafe { self.heads.get_unchecked_mut(bin) }
    }

    /// Whether the free blocks are in lists, for which there are short ways.
    #[inline(always)]
    pub(super) fn lists(&self) -> bool {
        self.order == Order::Lists
    }

    /// `insert` for lists.
    #[inline(always)]
    pub(super) fn push(&mut self, store: &mut S, id: S::Id, size: usize) {
        debug_assert!(self.order == Order::Lists);
        let bin = bin_of(size);
        let head = core::mem::replace(self.head(bin), id);
        store.set_link(id, 0, S::NONE);
        store.set_link(id, 1, head);
        if head == S::NONE {
            self.filled.set(bin);
        } else {
            store.set_link(head, 0, id);
        }
    }

    /// Takes in a free block of `size` bytes.
    pub(super) fn insert(&mut self, store: &mut S, id: S::Id, size: usize) {
        let bin = self.bin(size);
        self.filled.set(bin);
        match self.order {
            Order::Lists => self.push(store, id, size),
            Order::ByAddress => treap::insert(&mut ByAddress(store), self.head(bin), id),
            Order::BySize => treap::insert(&mut BySize(store), self.head(bin), id),
        }
    }

    /// `remove` for lists.
    #[inline(always)]
    pub(super) fn unlink(&mut self, store: &mut S, id: S::Id, size: usize) {
        debug_assert!(self.order == Order::Lists);
        let (left, right) = (store.link(id, 0), store.link(id, 1));
        if right != S::NONE {
            store.set_link(right, 0, left);
        }
        if left != S::NONE {
            store.set_link(left, 1, right);
            return;
        }
        // The first of its list.
        let bin = bin_of(size);
        *self.head(bin) = right;
        if right == S::NONE {
            self.filled.clear(bin);
        }
    }

    /// Takes out a free block of `size` bytes.
    pub(super) fn remove(&mut self, store: &mut S, id: S::Id, size: usize) {
        let bin = self.bin(size);
        match self.order {
            Order::Lists => return self.unlink(store, id, size),
            Order::ByAddress => treap::remove(&mut ByAddress(store), self.head(bin), id),
            Order::BySize => treap::remove(&mut BySize(store), self.head(bin), id),
        }
        self.note_empty(bin);
    }

    #[inline(always)]
    fn note_empty(&mut self, bin: usize) {
        if *self.head(bin) == S::NONE {
            self.filled.clear(bin);
        }
    }

    /// `take` for lists.
    #[inline(always)]
    pub(super) fn pop(&mut self, store: &mut S, size: usize) -> Option<(S::Id, usize)> {
        debug_assert!(self.order == Order::Lists);
        let Some(bin) = self.filled.first_from(sure_bin(size)) else { return self.scan_slow(store, size) };
        let id = *self.head(bin);
        let next = store.link(id, 1);
        *self.head(bin) = next;
        if next == S::NONE {
            self.filled.clear(bin);
        } else {
            store.set_link(next, 0, S::NONE);
        }
        Some((id, store.size(id)))
    }

    /// Takes out the block that a request is to be cut from that needs no alignment beyond the granule; returns
    /// its size too.
    pub(super) fn take(&mut self, store: &mut S, size: usize) -> Option<(S::Id, usize)> {
        if self.lists() {
            return self.pop(store, size);
        }
        if self.order == Order::ByAddress {
            let id = first_fit(store, self.heads[0], None, size)?;
            let whole = store.size(id);
            self.remove(store, id, whole);
            return Some((id, whole));
        }
        let mut bin = bin_of(size);
        let mut found = None;
        if self.filled.contains(bin) {
            let large = |tree: &BySize<&mut S>, id| tree.0.size(id) >= size;
            found = treap::take_first(&mut BySize(&mut *store), self.head(bin), large);
        }
        if found.is_none() {
            bin = self.filled.first_from(bin + 1)?;
            found = treap::take_first(&mut BySize(&mut *store), self.head(bin), |_, _| true);
        }
        self.note_empty(bin);
        found.map(|id| (id, store.size(id)))
    }

    /// Where no bin is sure to serve, the request's own may still hold a block that does.
    #[cold]
    fn scan_slow(&mut self, store: &mut S, size: usize) -> Option<(S::Id, usize)> {
        let mut at = *self.head(bin_of(size));
        while at != S::NONE {
            let whole = store.size(at);
            if whole >= size {
                self.remove(store, at, whole);
                return Some((at, whole));
            }
            at = store.link(at, 1);
        }
        None
    }

    /// A block for a request of any alignment.
    #[cold]
    pub(super) fn find_aligned_slow(&self, store: &S, want: &Want) -> Option<Place<S::Id>> {
        if self.order == Order::Lists {
            // A block of this size can be cut wherever it lies.
            let sure = want.size.checked_add(want.front + want.align)?;
            if sure <= MAX_SIZE
                && let Some(bin) = self.filled.first_from(sure_bin(sure))
            {
                return want.place(store, self.heads[bin]);
            }
        }
        let mut bin = self.bin(want.size);
        loop {
            bin = self.filled.first_from(bin)?;
            let mut at = match self.order {
                Order::Lists => Some(self.heads[bin]),
                Order::BySize => smallest(store, self.heads[bin], want.size),
                Order::ByAddress => first_fit(store, self.heads[bin], None, want.size),
            };
            while let Some(id) = at {
                let place = want.place(store, id);
                if place.is_some() {
                    return place;
                }
                at = self.next_in_bin(store, bin, id, want.size);
            }
            bin += 1;
        }
    }

    /// The next of a bin that may have `size` bytes.
    fn next_in_bin(&self, store: &S, bin: usize, id: S::Id, size: usize) -> Option<S::Id> {
        match self.order {
            Order::Lists => Some(store.link(id, 1)).filter(|next| *next != S::NONE),
            Order::BySize => treap::after(&BySize(store), self.heads[bin], id),
            Order::ByAddress => first_fit(store, self.heads[bin], Some(id), size),
        }
    }

    /// The largest free block's size.
    pub(super) fn largest(&self, store: &S) -> usize {
        let Some(bin) = self.filled.last() else { return 0 };
        let mut at = self.heads[bin];
        let mut largest = store.size(at);
        if self.order != Order::ByAddress {
            loop {
                at = store.link(at, 1);
                if at == S::NONE {
                    break;
                }
                largest = largest.max(store.size(at));
            }
        }
        largest
    }

    /// Checks the invariants; the caller sees to it that links name free blocks. Returns how many there are.
    pub(super) fn check(&self, store: &S, known: &dyn Fn(S::Id) -> bool) -> Result<usize, &'static str> {
        if !self.filled.consistent() {
            return Err("free 2: the summary agrees with the words");
        }
        let mut count = 0;
        for bin in 0..BINS {
            if self.filled.contains(bin) != (self.heads[bin] != S::NONE) {
                return Err("free 2: a bin's bit is set exactly if it holds something");
            }
            let mut at = match self.order {
                _ if self.heads[bin] == S::NONE => None,
                Order::Lists => Some(self.heads[bin]),
                Order::BySize => smallest(store, self.heads[bin], 0),
                Order::ByAddress => first_fit(store, self.heads[bin], None, 0),
            };
            while let Some(id) = at {
                count += 1;
                if !known(id) || !store.is_free(id) || self.bin(store.size(id)) != bin {
                    return Err("free 1: what is filed is free and under its bin");
                }
                if !(0..2).all(|side| self.linked(store, self.heads[bin], id, side)) {
                    return Err("free 3: lists are linked both ways and trees are ordered");
                }
                at = self.next_in_bin(store, bin, id, 0);
            }
        }
        Ok(count)
    }

    /// Whether a link of `id`, in the bin of that head, is as it should be.
    fn linked(&self, store: &S, head: S::Id, id: S::Id, side: usize) -> bool {
        let link = store.link(id, side);
        match self.order {
            Order::Lists if link == S::NONE => side == 1 || head == id,
            Order::Lists => store.link(link, 1 - side) == id,
            _ if link == S::NONE => true,
            Order::BySize => {
                let tree = BySize(store);
                tree.before(id, link) == (side == 1) && tree.above(id, link)
            }
            Order::ByAddress => {
                let tree = ByAddress(store);
                tree.before(id, link) == (side == 1) && tree.above(id, link)
            }
        }
    }
}

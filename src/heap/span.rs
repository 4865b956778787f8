//! Spans: the blocks of one class, and which of them are free. The invariants are those of `segment`.

use core::cell::Cell;
use core::sync::atomic::{AtomicU64, Ordering};

use super::list::{Chain, Links};
use super::segment::{MIN_PAGE, SLICE};
use super::thread::Slot;

/// Words of a bitmap that lie with the books.
pub(super) const INLINE_WORDS: usize = 4;

/// `class_of` a slice with no span.
pub(crate) const NO_CLASS: u8 = 255;
/// `class_of` a span that is one block larger than any class.
pub(crate) const SINGLE: u8 = 254;

/// Where a span stands with its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nothing is free (or the span is a single block): on no list, found again by its frees.
    Full,
    /// On the owner's list of spans with free blocks.
    Partial,
    /// The span its class is served from.
    Current,
}

/// The books of a span.
#[repr(C, align(64))]
pub(crate) struct Span {
    // Frozen.
    pub(crate) base: Cell<usize>,
    pub(super) remote: Cell<*const AtomicU64>,
    pub(crate) size: Cell<u32>,
    pub(super) reciprocal: Cell<u32>,
    pub(crate) capacity: Cell<u32>,
    pub(crate) class: Cell<u8>,
    pub(crate) first: Cell<u8>,
    pub(crate) slices: Cell<u8>,
    pub(super) remote_inline: [AtomicU64; INLINE_WORDS],
    // The owner's.
    pub(super) free: Cell<*const Cell<u64>>,
    pub(super) free_inline: [Cell<u64>; INLINE_WORDS],
    pub(crate) free_count: Cell<u32>,
    pub(crate) carved: Cell<u32>,
    /// `free_count` at which the next free is told to the owner's lists.
    pub(crate) notify_at: Cell<u32>,
    /// Free blocks that a purge has seen already.
    pub(crate) settled: Cell<u32>,
    /// Pages of this span that are marked discarded.
    pub(crate) discarded: Cell<u32>,
    /// No free bit in the words before this one.
    pub(super) hint: Cell<u16>,
    pub(crate) place: Cell<Place>,
    pub(crate) queued: Cell<bool>,
    pub(crate) zeroed: Cell<bool>,
    /// Bytes carved, in whole pages.
    pub(crate) committed: Cell<u32>,
    list: Links<Span>,
    queue: Links<Span>,
}

/// The spans of one class that have free blocks.
pub(crate) struct PartialSpans;
impl Chain for PartialSpans {
    type Node = Span;
    fn links(node: &Span) -> &Links<Span> {
        &node.list
    }
}

/// Spans that a purge should look at.
pub(crate) struct SpanQueue;
impl Chain for SpanQueue {
    type Node = Span;
    fn links(node: &Span) -> &Links<Span> {
        &node.queue
    }
}

impl Span {
    #[inline(always)]
    fn free_word(&self, word: usize) -> &Cell<u64> {
        let outside = self.free.get();
        if outside.is_null() {
            &self.free_inline[word % INLINE_WORDS]
        } else {
            // SAFETY: `word` is below the number of words of this span, which lie at its start.
            unsafe { &*outside.add(word) }
        }
    }

    #[inline(always)]
    pub(crate) fn remote_word(&self, word: usize) -> &AtomicU64 {
        let outside = self.remote.get();
        if outside.is_null() {
            &self.remote_inline[word % INLINE_WORDS]
        } else {
            // SAFETY: as in `free_word`.
            unsafe { &*outside.add(word) }
        }
    }

    pub(crate) fn words(&self) -> usize {
        self.capacity.get().div_ceil(64) as usize
    }

    /// The index of the block at `address`, exact for the first byte of a block and for no other.
    #[inline(always)]
    pub(crate) fn index_of(&self, address: *mut u8) -> u32 {
        let offset = (address as usize - self.base.get()) as u64;
        ((offset * self.reciprocal.get() as u64) >> 32) as u32
    }

    /// Whether a block, live or not, begins at `address`; reads frozen cells only.
    pub(crate) fn begins_block(&self, address: *mut u8) -> bool {
        let Some(offset) = (address as usize).checked_sub(self.base.get()) else { return false };
        let index = self.index_of(address) as usize;
        index < self.capacity.get() as usize && index * self.size.get() as usize == offset
    }

    #[inline(always)]
    pub(crate) fn block(&self, index: usize) -> *mut u8 {
        (self.base.get() + index * self.size.get() as usize) as *mut u8
    }

    pub(crate) fn is_free(&self, index: usize) -> bool {
        self.free_word(index / 64).get() >> (index % 64) & 1 == 1
    }

    pub(crate) fn is_posted(&self, index: usize) -> bool {
        self.remote_word(index / 64).load(Ordering::Relaxed) >> (index % 64) & 1 == 1
    }

    pub(crate) fn live(&self) -> u32 {
        self.carved.get() - self.free_count.get()
    }

    /// Marks those blocks at the start of `blocks` free that lie in this span: how many, and whether all were live.
    #[inline]
    pub(crate) fn give(&self, blocks: &[Slot]) -> (usize, bool) {
        let extent = self.capacity.get() as usize * self.size.get() as usize;
        let (mut count, mut all_live) = (0, true);
        // What is to be marked in one word.
        let (mut at, mut bits) = (0, 0);
        for slot in blocks {
            let block = slot.load(Ordering::Relaxed);
            if (block as usize).wrapping_sub(self.base.get()) >= extent {
                break;
            }
            let index = self.index_of(block) as usize;
            if index / 64 != at {
                all_live &= self.give_word(at, bits);
                (at, bits) = (index / 64, 0);
            }
            let bit = 1 << (index % 64);
            all_live &= bits & bit == 0;
            bits |= bit;
            count += 1;
        }
        all_live &= self.give_word(at, bits);
        self.free_count.set(self.free_count.get() + count as u32);
        (count, all_live)
    }

    /// Marks all blocks of `bits` in word `at` free, which the caller counts; false if one was already.
    #[inline]
    pub(crate) fn give_word(&self, at: usize, bits: u64) -> bool {
        if bits == 0 {
            return true;
        }
        let word = self.free_word(at);
        let old = word.get();
        word.set(old | bits);
        self.hint.set(self.hint.get().min(at as u16));
        old & bits == 0
    }

    /// The blocks at the start of `blocks` that share a word of the bitmaps; the first lies in this span. Word, bits,
    /// and how many.
    pub(crate) fn word_of(&self, blocks: &[Slot]) -> (usize, u64, usize) {
        let (mut word, mut bits, mut count) = (0, 0u64, 0);
        let mut first = 0;
        for slot in blocks {
            let block = slot.load(Ordering::Relaxed);
            // In the same word, and so in the same span, if it lies within 64 blocks of its first.
            if count > 0 && (block as usize).wrapping_sub(first) >= 64 * self.size.get() as usize {
                break;
            }
            let index = self.index_of(block) as usize;
            if count == 0 {
                word = index / 64;
                first = self.block(word * 64) as usize;
            }
            let bit = 1 << (index % 64);
            if index / 64 != word || index >= self.capacity.get() as usize || bits & bit != 0 {
                break;
            }
            bits |= bit;
            count += 1;
        }
        (word, bits, count)
    }

    /// Takes up to `room` free blocks, lowest first.
    pub(crate) fn take(&self, room: usize, mut sink: impl FnMut(*mut u8)) -> usize {
        let want = room.min(self.free_count.get() as usize);
        let mut taken = 0;
        let mut at = self.hint.get() as usize;
        while taken < want {
            debug_assert!(at < self.words());
            let word = self.free_word(at);
            let mut bits = word.get();
            while bits != 0 && taken < want {
                let index = at * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                sink(self.block(index));
                taken += 1;
            }
            word.set(bits);
            if bits == 0 {
                at += 1;
            }
        }
        self.free_count.set(self.free_count.get() - taken as u32);
        self.hint.set(if self.free_count.get() == 0 { u16::MAX } else { at as u16 });
        taken
    }

    /// Calls `visit` with every maximal run [from, to) of free blocks.
    pub(super) fn for_each_free_run(&self, mut visit: impl FnMut(usize, usize)) {
        let carved = self.carved.get() as usize;
        let mut start = None;
        for at in 0..carved.div_ceil(64) {
            let bits = self.free_word(at).get();
            let mut position = 0;
            while position < 64 {
                let rest = bits >> position;
                let ahead = if start.is_some() { rest.trailing_ones() } else { rest.trailing_zeros() };
                position += ahead;
                if position >= 64 {
                    break;
                }
                let index = at * 64 + position as usize;
                match start.take() {
                    Some(from) => visit(from, index),
                    None => start = Some(index),
                }
            }
        }
        if let Some(from) = start {
            visit(from, carved);
        }
    }

    /// The blocks that are neither free nor posted.
    pub(crate) fn live_blocks(&self) -> impl Iterator<Item = *mut u8> {
        (0..self.carved.get() as usize)
            .filter(|&index| !self.is_free(index) && !self.is_posted(index))
            .map(|index| self.block(index))
    }

    /// Bits set among the free words, for the checker.
    pub(crate) fn counted_free(&self) -> u32 {
        (0..self.words()).map(|at| self.free_word(at).get().count_ones()).sum()
    }

    /// Whether a block is both free and posted, for the checker.
    pub(crate) fn doubly_free(&self) -> bool {
        (0..self.words())
            .any(|at| self.free_word(at).get() & self.remote_word(at).load(Ordering::Relaxed) != 0)
    }

    /// Free bytes that no purge has seen.
    pub(crate) fn unsettled(&self) -> usize {
        (self.free_count.get() - self.settled.get()) as usize * self.size.get() as usize
    }

    /// Bytes of memory this span holds.
    pub(crate) fn held(&self) -> u64 {
        (self.committed.get() as u64).saturating_sub(self.discarded.get() as u64 * MIN_PAGE as u64)
    }

    /// Free blocks that make the span worth a purge: a sixteenth of it, and a page.
    pub(crate) fn purge_step(&self) -> u32 {
        let bytes = (self.slices.get() as u32 * SLICE as u32 / 16).max(MIN_PAGE as u32);
        bytes.div_ceil(self.size.get())
    }

    /// Sets `notify_at` to the next count of free blocks that matters to the lists.
    pub(crate) fn rearm(&self) {
        let free = self.free_count.get();
        let next = if self.place.get() == Place::Full && free == 0 {
            1
        } else if self.queued.get() || free >= self.carved.get() {
            self.carved.get()
        } else {
            (self.settled.get() + self.purge_step()).clamp(free + 1, self.carved.get().max(free + 1))
        };
        self.notify_at.set(next.max(free + 1));
    }

    pub(crate) fn is_single(&self) -> bool {
        self.class.get() == SINGLE
    }
}

//! Memory for what a transaction will write: bumped, never moved, reused by the thread's next transaction.

use core::alloc::Layout;
use core::ptr::NonNull;
use std::alloc::{alloc, dealloc, handle_alloc_error};

/// What a transaction keeps for the next one.
const KEEP: usize = 64 << 10;
const FIRST: usize = 4 << 10;
const ALIGN: usize = 64;

/// Invariant: every block was allocated here with its length and [`ALIGN`]; the last is in use up to `used`.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    blocks: Vec<(NonNull<u8>, usize)>,
    used: usize,
}

impl Arena {
    /// `len` bytes, uninitialised, that stay where they are until [`clear`](Self::clear).
    #[inline]
    pub(crate) fn take(&mut self, len: usize, align: usize) -> NonNull<u8> {
        if let Some(&(start, size)) = self.blocks.last() {
            let at = (start.as_ptr() as usize + self.used).next_multiple_of(align.max(8));
            let offset = at - start.as_ptr() as usize;
            if offset.checked_add(len).is_some_and(|end| end <= size) {
                self.used = offset + len;
                // SAFETY: the block has the room, just checked.
                return unsafe { start.add(offset) };
            }
        }
        self.take_slow(len, align)
    }

    #[cold]
    #[inline(never)]
    fn take_slow(&mut self, len: usize, align: usize) -> NonNull<u8> {
        let last = self.blocks.last().map_or(FIRST / 2, |&(_, size)| size.min(1 << 20));
        let size = (last * 2).max(len.saturating_add(align)).next_multiple_of(ALIGN);
        let layout = Layout::from_size_align(size, ALIGN).unwrap_or(Layout::new::<u8>());
        assert_eq!(layout.size(), size, "more than the address space holds");
        // SAFETY: the size is not 0.
        let block = NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        self.blocks.push((block, size));
        self.used = 0;
        self.take(len, align)
    }

    /// Forgets everything; keeps one block unless it is large.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.used = 0;
        if self.blocks.len() > 1 || self.blocks.first().is_some_and(|&(_, size)| size > KEEP) {
            self.release();
        }
    }

    fn release(&mut self) {
        for (block, size) in self.blocks.drain(..) {
            // SAFETY: the invariant.
            unsafe { dealloc(block.as_ptr(), Layout::from_size_align_unchecked(size, ALIGN)) };
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_apart() {
        let mut arena = Arena::default();
        for _ in 0..3 {
            let mut pieces: Vec<(usize, usize)> = Vec::new();
            for (len, align) in [(1, 1), (100, 16), (5000, 4096), (3, 8), (100_000, 64), (8, 8)] {
                let piece = arena.take(len, align);
                // SAFETY: the piece is ours.
                unsafe { piece.write_bytes(1, len) };
                let start = piece.as_ptr() as usize;
                assert_eq!(start % align, 0);
                assert!(pieces.iter().all(|&(s, l)| start + len <= s || s + l <= start));
                pieces.push((start, len));
            }
            arena.clear();
        }
    }
}

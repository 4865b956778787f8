//! Where the books of a range lie: the one thing in which memory that the CPU may touch differs from memory
//! that it may not.

use core::fmt;

use crate::engine::Span;

/// A span as a store knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent<I> {
    /// The span as it was added.
    pub(super) span: Span,
    /// Its first block.
    pub(super) first: I,
    /// The mark behind its last block: live, of size 0.
    pub(super) end: I,
}

/// Where the books of [`Ranges`](super::Ranges) lie: [`InBlocks`](super::InBlocks) or
/// [`Beside`](super::Beside).
#[expect(private_bounds, reason = "what a store does is safe only as the engine does it")]
pub trait Store: Nodes {}

/// What a store does. It knows which blocks there are and how they lie; which of them are wanted is the
/// engine's concern.
///
/// An `Id` names a block: live, free, or the mark at a span's end. Stores alone make them, and the engine keeps
/// none beyond its block's end (a block ends when it is merged to the left, or its span is removed). On that
/// rests the soundness of every method here that takes one; hence the trait is private.
///
/// Sizes are whole sizes, a block's `HEAD` included, and multiples of the granule; starts are addresses of
/// the usable part. Between calls of the engine no two neighbours are free.
pub(crate) trait Nodes: Send + Sized + fmt::Debug {
    /// A block's name.
    type Id: Copy + Eq + fmt::Debug + Send;
    /// The name of no block.
    const NONE: Self::Id;
    /// Bytes of books in front of each block's usable part.
    const HEAD: usize;
    /// The smallest whole size of a block.
    const MIN: usize;
    /// Whole size from which on best fit cuts from the high end.
    const LARGE: usize;

    /// An empty store whose blocks start at multiples of `granule`.
    fn new(granule: usize) -> Self;

    /// Bytes in front of the first block of a span that is aligned to the granule.
    fn span_books(granule: usize) -> usize;
    /// Notes a span as one free block.
    ///
    /// # Safety
    /// As for `Engine::add`.
    unsafe fn add_span(&mut self, span: Span) -> Result<Self::Id, Span>;
    /// Forgets a span, of which `first` is the only block.
    fn remove_span(&mut self, extent: &Extent<Self::Id>);
    /// Makes all blocks of all spans one free block each; old ids are void. `visit` sees each.
    fn reset(&mut self, visit: impl FnMut(&mut Self, Self::Id));
    /// The span in which `address` lies.
    fn span_of(&self, address: usize) -> Option<Extent<Self::Id>>;
    /// The first span that starts at `address` or behind it.
    fn span_from(&self, address: usize) -> Option<Extent<Self::Id>>;

    /// Sees to it that the next two blocks can be cut; whether it could.
    fn prepare(&mut self) -> bool;

    /// The live block that starts at `start`; `None` where none does, as far as can be told without reading
    /// outside the spans.
    fn find(&self, start: usize) -> Option<Self::Id>;
    /// The live block that starts at `start`.
    ///
    /// # Safety
    /// There is one, and it was noted.
    unsafe fn at(&self, start: usize) -> Self::Id;
    /// Lets `find` and `at` find a live block.
    fn note(&mut self, id: Self::Id);
    /// The reverse of `note`; nothing if it was not noted.
    fn forget(&mut self, id: Self::Id);

    /// Address of the usable part.
    fn start(&self, id: Self::Id) -> usize;
    /// Whole size.
    fn size(&self, id: Self::Id) -> usize;
    /// Whether the block is free.
    fn is_free(&self, id: Self::Id) -> bool;
    /// The block, or end mark, to the right.
    fn next(&self, id: Self::Id) -> Self::Id;
    /// The block to the right of one of `size` bytes, and its size, if it is free.
    #[inline(always)]
    fn next_free(&self, id: Self::Id, size: usize) -> Option<(Self::Id, usize)> {
        let _ = size;
        let next = self.next(id);
        if self.is_free(next) { Some((next, self.size(next))) } else { None }
    }
    /// The block to the left and its size, if it is free.
    fn prev_free(&self, id: Self::Id) -> Option<(Self::Id, usize)>;

    /// Makes the free block `id` of `whole` bytes live; returns how many of its leading bytes may differ from
    /// zero.
    fn take(&mut self, id: Self::Id, whole: usize) -> usize;
    /// Like `take` with the lowest `size` bytes, `size` being less than `whole`; the rest is a free block. Returns
    /// that, too. `prepare` must have promised room.
    fn take_low(&mut self, id: Self::Id, whole: usize, size: usize) -> (Self::Id, usize);
    /// Divides the free block `id` of `whole` bytes at `low` bytes; returns the second, free too. One of them
    /// must be taken before anything else. `prepare` must have promised room.
    fn part(&mut self, id: Self::Id, whole: usize, low: usize) -> Self::Id;
    /// Makes one free block of the live `id` and those of its neighbours that are free, after calling `unlink`
    /// with each of them and its size; returns it with its size.
    fn give(
        &mut self,
        id: Self::Id,
        size: usize,
        unlink: impl FnMut(&mut Self, Self::Id, usize),
    ) -> (Self::Id, usize);

    /// Cuts a live block down to `size`; returns the rest, which is live too. `prepare` must have promised
    /// room.
    fn split(&mut self, id: Self::Id, size: usize) -> Self::Id;
    /// Adds the free right neighbour to the live block `id`.
    fn absorb(&mut self, id: Self::Id, right: Self::Id);
    /// Moves the border between the live block `id` and its free right neighbour by `by` bytes to the right,
    /// and returns that neighbour under its new name. It keeps at least `MIN` bytes.
    fn push_border(&mut self, id: Self::Id, right: Self::Id, by: usize) -> Self::Id;

    /// A link of a free block, for the free lists and trees.
    fn link(&self, id: Self::Id, side: usize) -> Self::Id;
    /// Sets a link of a free block.
    fn set_link(&mut self, id: Self::Id, side: usize, to: Self::Id);

    /// What the store itself must keep true of a block; for `check`.
    fn check(&self, id: Self::Id) -> Result<(), &'static str>;
}

//! Where bytes come from and go back to.
//!
//! A source hands out whole regions and takes them back; it never divides them. Pools call it with no lock
//! held, so a source may be slow, and it must be usable from several threads at once.

pub mod failing;
pub mod file;
pub mod os;
pub(crate) mod relocate;
pub mod slice;

use core::fmt;
use core::ptr::NonNull;

use crate::base::error::Result;

/// A region of host memory that a source handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its first byte.
    pub base: NonNull<u8>,
    /// Its length in bytes.
    pub len: usize,
    /// Whether every byte is known to be zero and no page has been touched.
    pub zeroed: bool,
}

// SAFETY: a region is a place, not an access; who may touch it is the pool's concern.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// The address of the first byte.
    pub fn start(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// The address behind the last byte.
    pub fn end(&self) -> usize {
        self.start() + self.len
    }
}

/// A supplier of host memory.
///
/// # Safety
/// A region returned by [`reserve`](Source::reserve) is readable and writable (unless the source was asked
/// for inaccessible memory), aligned as asked, at least as long as asked, overlaps no other region that was
/// not released, and stays valid until released. `zeroed` is true only if every byte is zero.
pub unsafe trait Source: Send + Sync + fmt::Debug {
    /// Lengths are rounded up to a multiple of this power of two.
    fn granularity(&self) -> usize;

    /// Bytes that the source could hand out at most, all regions together.
    fn limit(&self) -> usize {
        usize::MAX
    }

    /// A new region of at least `len` bytes, `len > 0`, aligned to `align`.
    fn reserve(&self, len: usize, align: usize) -> Result<Region>;

    /// Takes a region back. Never fails: there is nothing a caller could do.
    ///
    /// # Safety
    /// `region` came from `reserve` or `resize` of this source and is used no more.
    unsafe fn release(&self, region: Region);

    /// Drops the contents of a part of a region but keeps the place; returns whether the bytes read as zero
    /// from now on. Sources that cannot give parts back do nothing.
    ///
    /// # Safety
    /// `part` lies in a region of this source and nothing in it is needed.
    unsafe fn discard(&self, part: Region) -> bool {
        let _ = part;
        false
    }

    /// Grows or shrinks a region, moving it if `may_move`; `None` where the source cannot (the region is then
    /// as it was). `zeroed` of the result says whether what was gained is known to be zero.
    ///
    /// # Safety
    /// As for `release`; on success only the returned region is valid.
    unsafe fn resize(&self, region: Region, new_len: usize, may_move: bool) -> Option<Region> {
        let _ = (region, new_len, may_move);
        None
    }
}

// SAFETY: forwards to a source that keeps the contract.
unsafe impl<S: Source + ?Sized> Source for std::sync::Arc<S> {
    fn granularity(&self) -> usize {
        (**self).granularity()
    }
    fn limit(&self) -> usize {
        (**self).limit()
    }
    fn reserve(&self, len: usize, align: usize) -> Result<Region> {
        (**self).reserve(len, align)
    }
    unsafe fn release(&self, region: Region) {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).release(region) }
    }
    unsafe fn discard(&self, part: Region) -> bool {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).discard(part) }
    }
    unsafe fn resize(&self, region: Region, new_len: usize, may_move: bool) -> Option<Region> {
        // SAFETY: the caller's contract, passed on.
        unsafe { (**self).resize(region, new_len, may_move) }
    }
}

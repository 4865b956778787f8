//! Memory that the caller hands in: no call to the operating system, ever.
//!
//! The free extents of the slice form a list, sorted by address and kept in the extents themselves.
//!
//! Invariants:
//! 1. Every extent starts at a multiple of `GRANULE` inside the slice, is a multiple of it long, and begins
//!    with a valid `Extent` that nobody else touches.
//! 2. Extents neither overlap nor touch each other, and overlap no region that is handed out.
//!
//! One lock guards the list.

use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use super::{Region, Source};
use crate::base::bits::{round_down, round_up};
use crate::base::error::{Error, OomReason, Result};
use crate::base::sync::Lock;

/// Regions start at multiples of this and are multiples of it long.
const GRANULE: usize = 64;

/// A free extent, at its own start.
#[derive(Clone, Copy)]
struct Extent {
    len: usize,
    next: Option<NonNull<Extent>>,
}

struct FreeList {
    first: Option<NonNull<Extent>>,
}

// SAFETY: the extents belong to the list alone (invariant 1), wherever it is used from.
unsafe impl Send for FreeList {}

/// A [`Source`] over memory that the caller hands in.
///
/// ```
/// use core::mem::MaybeUninit;
/// use memory_pool::source::{Source, slice::Slice};
/// let mut memory = [MaybeUninit::uninit(); 4096];
/// let slice = Slice::new(&mut memory);
/// let region = slice.reserve(1000, 64)?;
/// assert!(region.len >= 1000);
/// assert!(slice.reserve(4096, 1).is_err()); // it never grows
/// // SAFETY: reserved above and not used after.
/// unsafe { slice.release(region) };
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub struct Slice<'a> {
    free: Lock<FreeList>,
    total: usize,
    /// The largest region that could ever be served.
    usable: usize,
    memory: PhantomData<&'a mut [MaybeUninit<u8>]>,
}

impl<'a> Slice<'a> {
    /// A source over `memory`; up to 126 bytes are lost to alignment.
    pub fn new(memory: &'a mut [MaybeUninit<u8>]) -> Self {
        let total = memory.len();
        let start = memory.as_mut_ptr() as usize;
        let first = round_up(start, GRANULE).unwrap_or(start);
        let usable = round_down((start + total).saturating_sub(first), GRANULE);
        let free = FreeList { first: None };
        let source = Self { free: Lock::new(free), total, usable, memory: PhantomData };
        if usable > 0 {
            // SAFETY: `first - start <= total`, as something usable is left behind it; the memory is ours
            // for 'a (invariant 1).
            unsafe {
                let extent = memory.as_mut_ptr().cast::<u8>().add(first - start).cast::<Extent>();
                extent.write(Extent { len: usable, next: None });
                source.free.lock().first = NonNull::new(extent);
            }
        }
        source
    }

    /// Bytes that one region can have at most.
    pub fn capacity(&self) -> usize {
        self.usable
    }
}

impl core::fmt::Debug for Slice<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Slice").field("total", &self.total).finish_non_exhaustive()
    }
}

// SAFETY: extents are parts of the slice, which is ours for 'a, and no region overlaps one (invariant 2).
unsafe impl Source for Slice<'_> {
    fn granularity(&self) -> usize {
        GRANULE
    }

    fn limit(&self) -> usize {
        self.usable
    }

    fn reserve(&self, len: usize, align: usize) -> Result<Region> {
        let overflow = Error::oom(len, OomReason::Overflow);
        let wanted = round_up(len.max(1), GRANULE).ok_or(overflow)?;
        let align = align.max(GRANULE);
        let mut list = self.free.lock();
        let mut before: Option<NonNull<Extent>> = None;
        let mut at = list.first;
        while let Some(place) = at {
            // SAFETY: invariant 1; the lock makes us the only one here.
            let extent = unsafe { place.read() };
            let start = place.as_ptr() as usize;
            let skip = start.wrapping_neg() & (align - 1);
            if skip <= extent.len && extent.len - skip >= wanted {
                let tail = extent.len - skip - wanted;
                // SAFETY: head, region and tail are consecutive multiples of GRANULE within the extent, so
                // both rests that are not empty hold an `Extent` (invariants 1 and 2).
                unsafe {
                    let base = place.cast::<u8>().add(skip);
                    let mut next = extent.next;
                    if tail > 0 {
                        let rest = base.add(wanted).cast::<Extent>();
                        rest.write(Extent { len: tail, next });
                        next = Some(rest);
                    }
                    if skip > 0 {
                        place.write(Extent { len: skip, next });
                        next = Some(place);
                    }
                    match before {
                        Some(before) => (*before.as_ptr()).next = next,
                        None => list.first = next,
                    }
                    return Ok(Region { base, len: wanted, zeroed: false });
                }
            }
            before = at;
            at = extent.next;
        }
        Err(Error::oom(len, OomReason::Fixed(self.total)))
    }

    unsafe fn release(&self, region: Region) {
        let place = region.base.cast::<Extent>();
        let mut list = self.free.lock();
        let mut before: Option<NonNull<Extent>> = None;
        let mut after = list.first;
        // SAFETY: invariant 1 for the extents of the list; the region is ours again and at least GRANULE long.
        unsafe {
            while let Some(extent) = after.filter(|extent| *extent < place) {
                before = Some(extent);
                after = extent.read().next;
            }
            let mut merged = Extent { len: region.len, next: after };
            if let Some(after) = after
                && after.as_ptr() as usize == region.end()
            {
                let after = after.read();
                merged = Extent { len: region.len + after.len, next: after.next };
            }
            match before {
                Some(before) if before.as_ptr() as usize + before.read().len == region.start() => {
                    before.write(Extent { len: before.read().len + merged.len, next: merged.next });
                }
                Some(before) => {
                    place.write(merged);
                    (*before.as_ptr()).next = Some(place);
                }
                None => {
                    place.write(merged);
                    list.first = Some(place);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_come_back_and_merge() {
        let mut memory = vec![MaybeUninit::uninit(); 1 << 16];
        let slice = Slice::new(&mut memory);
        let whole = slice.capacity();
        assert!(whole >= (1 << 16) - 126);
        // Every order of three releases leaves one extent.
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let regions = [100, 4096, 64].map(|len| slice.reserve(len, 64).unwrap());
            for (i, region) in regions.iter().enumerate() {
                // SAFETY: the region is ours until released.
                unsafe { region.base.write_bytes(i as u8, region.len) };
            }
            for i in order {
                // SAFETY: released once.
                unsafe { slice.release(regions[i]) };
            }
            let all = slice.reserve(whole, 1).unwrap();
            assert_eq!(all.len, whole);
            // SAFETY: released once.
            unsafe { slice.release(all) };
        }
    }

    #[test]
    fn alignment_is_kept_and_nothing_is_lost_to_it() {
        let mut memory = vec![MaybeUninit::uninit(); 1 << 16];
        let slice = Slice::new(&mut memory);
        let whole = slice.capacity();
        let region = slice.reserve(100, 8192).unwrap();
        assert_eq!(region.start() % 8192, 0);
        // SAFETY: released once.
        unsafe { slice.release(region) };
        assert!(slice.reserve(whole, 64).is_ok());
    }

    #[test]
    fn tiny_slices_serve_nothing_and_say_so() {
        for len in [0, 1, 63, 127] {
            let mut memory = vec![MaybeUninit::uninit(); len];
            let slice = Slice::new(&mut memory);
            assert_eq!(
                slice.reserve(128, 1),
                Err(Error::oom(128, OomReason::Fixed(len))),
                "a slice of {len} bytes"
            );
        }
        let mut memory = [MaybeUninit::uninit(); 256];
        assert!(Slice::new(&mut memory).reserve(usize::MAX, 1).is_err());
    }
}

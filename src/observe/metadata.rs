//! Memory for the layers' own books, straight from the operating system: a layer may watch the pool that the
//! rest of the program allocates from.

use core::alloc::Layout;
use core::ptr::NonNull;

use allocator_api2::alloc::{AllocError, Allocator};
use allocator_api2::vec::Vec;

use crate::base::bits::round_up;
use crate::base::host::dangling;
use crate::source::os::{self, Access, page_size};

/// Whole pages for each allocation; meant for few, growing tables.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Metadata;

/// A table of a layer.
pub(super) type Table<T> = Vec<T, Metadata>;

fn pages(layout: Layout) -> Option<usize> {
    round_up(layout.size(), page_size())
}

// SAFETY: every block is a mapping of its own, which stays until unmapped; `Metadata` has no state.
unsafe impl Allocator for Metadata {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if layout.size() == 0 {
            return Ok(dangling(layout));
        }
        let len = pages(layout).ok_or(AllocError)?;
        let base = os::map(len, layout.align(), Access::ReadWrite).map_err(|_| AllocError)?;
        Ok(NonNull::slice_from_raw_parts(base, len))
    }

    unsafe fn deallocate(&self, ptr: NonNull<u8>, layout: Layout) {
        if let Some(len) = pages(layout).filter(|&len| len > 0) {
            // SAFETY: `allocate` mapped that many pages for this layout, or for a smaller one that rounds to
            // as many.
            unsafe { os::unmap(ptr, len) }
        }
    }
}

/// Makes room for `more` elements, at least doubling; `false` where memory is short.
pub(super) fn make_room<T>(table: &mut Table<T>, more: usize) -> bool {
    table.capacity() - table.len() >= more || table.try_reserve(more.max(table.len())).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_grow_and_keep_their_contents() {
        let mut table = Table::new_in(Metadata);
        for value in 0..100_000u64 {
            assert!(make_room(&mut table, 1));
            table.push(value);
        }
        assert!(table.iter().copied().eq(0..100_000));
        assert!(!make_room(&mut table, usize::MAX / 16));
    }
}

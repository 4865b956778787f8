//! What copies between pools need to know of a container, wherever its memory is.

use core::ptr::NonNull;

use super::pool::MemoryPool;

/// Elements to copy from: slices, and buffers on devices.
///
/// # Safety
/// [`source`](CopySource::source) describes initialised elements that stay so while `self` is borrowed: in
/// host memory, or in memory of the pool it names.
pub unsafe trait CopySource<T> {
    /// The first element, their number, and the pool whose copies reach them where the CPU does not.
    fn source(&self) -> (NonNull<T>, usize, Option<&dyn MemoryPool>);
}

/// Elements to copy to: slices, and buffers on devices.
///
/// # Safety
/// As for [`CopySource`], and the elements may be overwritten while `self` is borrowed exclusively.
pub unsafe trait CopyTarget<T> {
    /// The first element, their number, and the pool whose copies reach them where the CPU does not.
    fn target(&mut self) -> (NonNull<T>, usize, Option<&dyn MemoryPool>);
}

// SAFETY: a borrowed slice.
unsafe impl<T> CopySource<T> for [T] {
    fn source(&self) -> (NonNull<T>, usize, Option<&dyn MemoryPool>) {
        (NonNull::from(self).cast(), self.len(), None)
    }
}

// SAFETY: an exclusively borrowed slice.
unsafe impl<T> CopyTarget<T> for [T] {
    fn target(&mut self) -> (NonNull<T>, usize, Option<&dyn MemoryPool>) {
        let len = self.len();
        (NonNull::from(self).cast(), len, None)
    }
}

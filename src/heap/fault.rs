//! The end of a program that damaged the heap: one line on stderr, written without allocating, then abort.

use super::stderr;

/// Writes `what` and the address to stderr and aborts.
#[cold]
#[inline(never)]
pub(super) fn die(what: &str, block: *mut u8) -> ! {
    stderr::line(format_args!("memory-pool: {what} at {:#x}", block.addr()));
    // SAFETY: abort has no preconditions.
    unsafe { libc::abort() }
}

/// A block was freed that is free already.
#[cold]
pub(crate) fn double_free(block: *mut u8) -> ! {
    die("double free", block)
}

/// A block was written to while it was free, or the one before it past its end.
#[cold]
pub(crate) fn written_after_free(block: *mut u8) -> ! {
    die("free block was written to,", block)
}

/// A block was written to past its end, or the one behind it before its start.
#[cold]
pub(crate) fn overflow(block: *mut u8) -> ! {
    die("block was written to past its end,", block)
}

/// The bytes before a block were written to: by it, or by the one that ends there.
#[cold]
pub(crate) fn underflow(block: *mut u8) -> ! {
    die("block was written to before its start, or the one before it past its end,", block)
}

/// A block was freed that is free already, or was zeroed past its end.
#[cold]
pub(crate) fn not_live(block: *mut u8) -> ! {
    die("double free, or a block zeroed past its end,", block)
}

/// An address was freed that was never allocated.
#[cold]
pub(crate) fn invalid_free(block: *mut u8) -> ! {
    die("free of what was not allocated here,", block)
}

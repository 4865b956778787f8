//! The end of a program that damaged the heap: one line on stderr, written without allocating, then abort.

/// Writes `what` and the address to stderr and aborts.
#[cold]
#[inline(never)]
fn die(what: &str, address: usize) -> ! {
    let mut line = [0u8; 160];
    let mut len = 0;
    let mut put = |text: &[u8]| {
        for &byte in text {
            if len < line.len() {
                line[len] = byte;
                len += 1;
            }
        }
    };
    put(b"memory-pool: ");
    put(what.as_bytes());
    put(b" at 0x");
    let digits = (usize::BITS - address.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        put(&[b"0123456789abcdef"[address >> (4 * digit) & 15]]);
    }
    put(b"\n");
    // SAFETY: the line outlives the call. Nothing can be done about a failure.
    unsafe {
        libc::write(2, line.as_ptr().cast(), len);
        libc::abort()
    }
}

/// A block was freed that is free already.
#[cold]
pub(crate) fn double_free(block: *mut u8) -> ! {
    die("double free", block as usize)
}

/// An address was freed that was never allocated.
#[cold]
pub(crate) fn invalid_free(block: *mut u8) -> ! {
    die("free of what was not allocated here,", block as usize)
}

//! Patterns in memory, and how to write and read them where the CPU cannot.

use core::fmt;

/// What surrounds a block.
pub(super) const CANARY: u8 = 0xb9;
/// What a block holds before its user wrote to it.
pub(super) const FRESH: u8 = 0xc9;
/// What a block holds after its free. Eight of them are no valid address.
pub(super) const FREED: u8 = 0xd9;

/// Access to the bytes that a pool hands out. Memory that the CPU cannot touch is read and written by copies.
///
/// # Safety
/// The methods write and read exactly the bytes they are given, and are done when they return.
pub unsafe trait Reach: Send + Sync + fmt::Debug + 'static {
    /// Whether single pages can be made inaccessible.
    const PAGES: bool = false;

    /// Fills `len` bytes at `at` with `byte`.
    ///
    /// # Safety
    /// They belong to the pool, and nobody else uses them.
    unsafe fn fill(&self, at: usize, len: usize, byte: u8);

    /// Copies the bytes at `at` into `out`.
    ///
    /// # Safety
    /// They belong to the pool.
    unsafe fn read(&self, at: usize, out: &mut [u8]);

    /// Whether all of `len` bytes at `at` are `byte`.
    ///
    /// # Safety
    /// They belong to the pool.
    unsafe fn holds(&self, at: usize, len: usize, byte: u8) -> bool {
        let mut chunk = [0; 4096];
        (0..len).step_by(chunk.len()).all(|start| {
            let part = &mut chunk[..(len - start).min(4096)];
            // SAFETY: a part of the caller's bytes.
            unsafe { self.read(at + start, part) };
            part.iter().all(|&found| found == byte)
        })
    }
}

/// Memory that the CPU may touch.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostReach;

// SAFETY: plain writes and reads.
unsafe impl Reach for HostReach {
    const PAGES: bool = true;

    #[inline]
    unsafe fn fill(&self, at: usize, len: usize, byte: u8) {
        /// Two pieces that overlap: no loop, and no call.
        ///
        /// # Safety
        /// `N <= len <= 2 * N` bytes at `at` are the caller's.
        #[inline(always)]
        unsafe fn ends<const N: usize>(at: *mut u8, len: usize, byte: u8) {
            // SAFETY: both pieces lie in the caller's bytes; arrays of bytes have no alignment.
            unsafe {
                at.cast::<[u8; N]>().write([byte; N]);
                at.add(len - N).cast::<[u8; N]>().write([byte; N]);
            }
        }
        let at = at as *mut u8;
        // SAFETY: the caller's contract.
        unsafe {
            match len {
                16..=32 => ends::<16>(at, len, byte),
                33..=64 => ends::<32>(at, len, byte),
                65..=128 => ends::<64>(at, len, byte),
                _ => at.write_bytes(byte, len),
            }
        }
    }

    #[inline]
    unsafe fn read(&self, at: usize, out: &mut [u8]) {
        // SAFETY: the caller's contract; `out` is the caller's own.
        unsafe { (at as *const u8).copy_to(out.as_mut_ptr(), out.len()) }
    }

    #[inline]
    unsafe fn holds(&self, at: usize, len: usize, byte: u8) -> bool {
        // SAFETY: the caller's contract. A program that still writes there has the error we look for; for the
        // compiler nobody does.
        let bytes = unsafe { core::slice::from_raw_parts(at as *const u8, len) };
        // Canaries first.
        if (16..=32).contains(&len) { ends_hold::<16>(bytes, byte) } else { all_hold(bytes, byte) }
    }
}

/// Whether all of `bytes` are `byte`, whatever their number.
fn all_hold(bytes: &[u8], byte: u8) -> bool {
    match bytes.len() {
        0..16 => bytes.iter().all(|&found| found == byte),
        16..=32 => ends_hold::<16>(bytes, byte),
        33..=64 => ends_hold::<32>(bytes, byte),
        // The last chunk may overlap the one before, so that no bytes are left over.
        _ => {
            bytes.as_chunks::<64>().0.iter().all(|chunk| clean(chunk, byte))
                && bytes.last_chunk::<64>().is_none_or(|last| clean(last, byte))
        }
    }
}

/// Whether the first and the last `N` of at least `N` bytes are `byte`.
#[inline(always)]
fn ends_hold<const N: usize>(bytes: &[u8], byte: u8) -> bool {
    let ends = (bytes.first_chunk::<N>(), bytes.last_chunk::<N>());
    matches!(ends, (Some(first), Some(last)) if clean(first, byte) && clean(last, byte))
}

/// Whether all of a chunk is `byte`, without a branch inside, which vectorises.
#[inline(always)]
fn clean<const N: usize>(chunk: &[u8; N], byte: u8) -> bool {
    let wide = u64::from_ne_bytes([byte; 8]);
    let words = chunk.as_chunks::<8>().0.iter();
    words.fold(0, |wrong, word| wrong | (u64::from_ne_bytes(*word) ^ wide)) == 0
}

/// Damaged bytes among `len` at `at` that should all be `byte`: the first one's address and their number.
///
/// # Safety
/// They belong to the pool.
#[cold]
pub(super) unsafe fn damage(reach: &impl Reach, at: usize, len: usize, byte: u8) -> (usize, usize) {
    let (mut first, mut count) = (at + len, 0);
    // SAFETY: the caller's bytes.
    if unsafe { reach.holds(at, len, byte) } {
        return (first, count);
    }
    let mut chunk = [0; 4096];
    for start in (0..len).step_by(chunk.len()) {
        let part = &mut chunk[..(len - start).min(4096)];
        // SAFETY: a part of the caller's bytes.
        unsafe { reach.read(at + start, part) };
        for (index, _) in part.iter().enumerate().filter(|(_, found)| **found != byte) {
            first = first.min(at + start + index);
            count += 1;
        }
    }
    (first, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reaches the same memory, but only by `read` and `fill`, as a device does.
    #[derive(Debug)]
    struct ByCopy;

    // SAFETY: forwards.
    unsafe impl Reach for ByCopy {
        unsafe fn fill(&self, at: usize, len: usize, byte: u8) {
            // SAFETY: the caller's contract.
            unsafe { HostReach.fill(at, len, byte) }
        }
        unsafe fn read(&self, at: usize, out: &mut [u8]) {
            // SAFETY: the caller's contract.
            unsafe { HostReach.read(at, out) }
        }
    }

    #[test]
    fn one_wrong_byte_is_seen_wherever_it_is() {
        let mut memory = vec![0u8; 10_000];
        for len in [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 4096, 9000] {
            for start in [1, 2, 5] {
                let at = memory.as_mut_ptr() as usize + start;
                // SAFETY: within `memory`, which nothing else uses meanwhile.
                unsafe {
                    HostReach.fill(at, len, FREED);
                    assert!(HostReach.holds(at, len, FREED) && ByCopy.holds(at, len, FREED));
                    let around = [at.wrapping_sub(1), at + len].map(|place| *(place as *const u8));
                    HostReach.fill(at, len, FREED);
                    assert_eq!(around, [at.wrapping_sub(1), at + len].map(|place| *(place as *const u8)));
                    for wrong in [0, len / 3, len / 2, len.saturating_sub(16), len.saturating_sub(1)] {
                        if wrong < len {
                            ((at + wrong) as *mut u8).write(1);
                            assert!(!HostReach.holds(at, len, FREED) && !ByCopy.holds(at, len, FREED));
                            assert_eq!(damage(&ByCopy, at, len, FREED), (at + wrong, 1));
                            ByCopy.fill(at + wrong, 1, FREED);
                        }
                    }
                    assert_eq!(damage(&HostReach, at, len, FREED), (at + len, 0));
                }
            }
        }
    }
}

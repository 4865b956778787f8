//! Secret words at the ends of live blocks, by which a hardened heap tells a live block from a free one and an intact
//! one from one that was written past its end.
//!
//! A word depends on the block's address and on numbers drawn when the process started, so it can neither be
//! guessed nor carried from one block to another. The word of a free block is no secret: who writes it to a live one
//! only ends the program.

use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a word: what a hardened block is larger than what it is used for.
pub(crate) const SEAL: usize = 8;

/// The last word of a free block, unless its page went back; no live word has a zero as its first byte.
pub(super) const FREE: u64 = 0xF4EE_D0F4_EED0_F400;

/// The numbers: one for addresses and an odd factor.
static SECRET: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Draws the numbers, once.
pub(super) fn draw() {
    if SECRET[1].load(Ordering::Relaxed) != 0 {
        return;
    }
    let mut numbers = [0u64; 2];
    fill_random(&mut numbers);
    numbers[1] |= 1;
    for (secret, number) in SECRET.iter().zip(numbers) {
        secret.store(number, Ordering::Relaxed);
    }
}

/// A number for a heap's own generator; never 0.
pub(super) fn random_seed() -> u64 {
    let mut number = [0u64];
    fill_random(&mut number);
    number[0] | 1
}

fn fill_random(numbers: &mut [u64]) {
    let len = size_of_val(numbers);
    // SAFETY: the buffer is that long. The system call and not the function, which could block before the
    // system has entropy; then and on other failures the numbers come from elsewhere.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let drawn = unsafe { libc::syscall(libc::SYS_getrandom, numbers.as_mut_ptr(), len, libc::GRND_NONBLOCK) };
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    // SAFETY: as above.
    let drawn = if unsafe { libc::getentropy(numbers.as_mut_ptr().cast(), len) } == 0 { len as _ } else { 0 };
    if drawn == len as libc::c_long {
        return;
    }
    let mut state = fallback();
    for number in numbers {
        state = mix(state.wrapping_add(0x9E37_79B9_7F4A_7C15));
        *number = state;
    }
}

/// The sixteen random bytes that the kernel hands every program, the clock, and where things lie.
fn fallback() -> u64 {
    let mut state = (&raw const SECRET).addr() as u64;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    // SAFETY: the kernel's pointer leads to sixteen bytes that stay.
    unsafe {
        let bytes = libc::getauxval(libc::AT_RANDOM) as *const u64;
        if !bytes.is_null() {
            state ^= mix(bytes.read_unaligned()) ^ bytes.add(1).read_unaligned();
        }
    }
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the buffer is the call's to fill.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    mix(state ^ (now.tv_nsec as u64) << 20 ^ now.tv_sec as u64)
}

/// Every bit of the result depends on every bit of `x`.
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x = (x ^ x >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x ^ x >> 32
}

/// The last word of a live block.
#[inline(always)]
pub(super) fn live(block: *mut u8) -> u64 {
    let (key, factor) = (SECRET[0].load(Ordering::Relaxed), SECRET[1].load(Ordering::Relaxed));
    // The product's upper half depends on all of the address; no word has a zero as its first byte.
    (block.addr() as u64 ^ key).wrapping_mul(factor).rotate_left(32) | 1
}

/// Where the last word of a block of `size` bytes is.
#[inline(always)]
pub(super) fn end(block: *mut u8, size: usize) -> *mut u64 {
    block.wrapping_add(size - SEAL).cast()
}

/// Reads a word of a block.
///
/// # Safety
/// The eight bytes are mapped.
#[inline(always)]
pub(super) unsafe fn read(at: *mut u64) -> u64 {
    // SAFETY: the caller's contract. What is said to be a block need not be aligned as one.
    unsafe { ptr::read_unaligned(at) }
}

/// Writes a word of a block.
///
/// # Safety
/// The eight bytes are mapped and belong to a block in the caller's hands.
#[inline(always)]
pub(super) unsafe fn write(at: *mut u64, word: u64) {
    // SAFETY: the caller's contract. Aligned: blocks are multiples of 16 bytes.
    unsafe { ptr::write(at, word) }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn words_differ_by_address() {
        draw();
        let mut seen = std::collections::HashSet::new();
        for at in 1..1000usize {
            let block = ptr::without_provenance_mut(at * 16);
            assert!(live(block) & 0xFF != 0 && seen.insert(live(block)), "{at}");
        }
        assert_ne!((random_seed(), fallback()), (1, 0));
        assert_ne!(random_seed(), random_seed());
    }
}

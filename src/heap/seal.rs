//! Secret words at the ends of blocks, by which a hardened heap tells a live block from a free one and an intact
//! one from one that was written past its end.
//!
//! A word depends on where it lies and on a number drawn when the process started, so it can neither be guessed nor
//! carried from one block to another. (Who can read one, and knows its address, knows them all: they are made against
//! errors and blind writes.) The word of a free block is the complement of a live one's, so that whoever knows nothing
//! of a block but its end can tell whether it is intact.

use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a word: what a hardened block is larger than what it is used for.
pub(crate) const SEAL: usize = 8;

/// The number. Its first bit makes a zero the first byte of no live word, on machines that store that byte first.
static SECRET: AtomicU64 = AtomicU64::new(0);

/// Draws the number, once.
pub(super) fn draw() {
    if SECRET.load(Ordering::Relaxed) == 0 {
        SECRET.store(random_seed(), Ordering::Relaxed);
    }
}

/// A random number; never 0.
pub(super) fn random_seed() -> u64 {
    let mut number = 0u64;
    let len = size_of_val(&number);
    // SAFETY: the buffer is that long. The system call and not the function, which could block before the
    // system has entropy; then and on other failures the number comes from elsewhere.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let drawn = unsafe { libc::syscall(libc::SYS_getrandom, &raw mut number, len, libc::GRND_NONBLOCK) };
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    // SAFETY: as above.
    let drawn = if unsafe { libc::getentropy((&raw mut number).cast(), len) } == 0 { len as _ } else { 0 };
    if drawn != len as libc::c_long {
        number = mix(fallback().wrapping_add(0x9E37_79B9_7F4A_7C15));
    }
    number | 1
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

/// Where the last word of a block of `size` bytes is.
#[inline(always)]
pub(super) fn end(block: *mut u8, size: usize) -> *mut u64 {
    block.wrapping_add(size).wrapping_sub(SEAL).cast()
}

/// What words are made with.
#[derive(Clone, Copy)]
pub(super) struct Key(u64);

impl Key {
    #[inline(always)]
    pub(super) fn get() -> Self {
        Self(SECRET.load(Ordering::Relaxed))
    }

    /// The word at `at` that ends a live block.
    #[inline(always)]
    pub(super) fn live(self, at: *mut u64) -> u64 {
        at.addr() as u64 ^ self.0
    }

    /// The word at `at` that ends a free block, unless its page went back.
    #[inline(always)]
    pub(super) fn free(self, at: *mut u64) -> u64 {
        !self.live(at)
    }

    /// Whether `found` is one of the two, at `at`.
    #[inline(always)]
    pub(super) fn made(self, found: u64, at: *mut u64) -> bool {
        // Nothing differs, or everything.
        (found ^ self.live(at)).wrapping_add(1) <= 1
    }
}

/// Reads a word of a block.
///
/// # Safety
/// The eight bytes are mapped.
#[inline(always)]
pub(super) unsafe fn read(at: *mut u64) -> u64 {
    // What is said to be a block need not be aligned as one. The word before it is read then, which is not the one for
    // its place.
    let aligned = at.map_addr(|address| address & !(SEAL - 1));
    // SAFETY: the caller's contract. Atomic, since a neighbour's owner may write its own word meanwhile.
    unsafe { AtomicU64::from_ptr(aligned) }.load(Ordering::Relaxed)
}

/// Writes a word of a block.
///
/// # Safety
/// The eight bytes are mapped and belong to a block in the caller's hands.
#[inline(always)]
pub(super) unsafe fn write(at: *mut u64, word: u64) {
    // SAFETY: the caller's contract. Aligned: blocks are multiples of 16 bytes. Atomic as in `read`.
    unsafe { AtomicU64::from_ptr(at) }.store(word, Ordering::Relaxed);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn words_differ_by_place_and_tell_live_from_free() {
        draw();
        let key = Key::get();
        let mut seen = std::collections::HashSet::new();
        for at in 1..1000usize {
            let place = std::ptr::without_provenance_mut(at * 8);
            let (live, free) = (key.live(place), key.free(place));
            assert!(live & 0xFF != 0 && seen.insert(live) && seen.insert(free), "{at}");
            assert!(key.made(live, place) && key.made(free, place));
            let others = [0, u64::MAX, free ^ 0x100, live ^ 1 << 63, key.live(place.wrapping_add(1))];
            assert!(others.iter().all(|&other| !key.made(other, place)), "{at}");
        }
        assert_ne!((random_seed(), fallback()), (1, 0));
        assert_ne!(random_seed(), random_seed());
    }
}

//! Pages that move to another address, for layers that keep their own books.
//!
//! `mremap` onto an address of the caller's choice (`MREMAP_FIXED`) takes away what is mapped there before it knows
//! whether the move will work, and a refusal does not tell how far it came: the place may be gone and have become
//! another thread's by the time the caller would clean up. So the address is a wish here and nothing more
//! (`MREMAP_DONTUNMAP` alone, Linux 5.7):
//!
//! 1. No mapping is ever replaced. The kernel moves the pages to the place wished for if that is free, or to another
//!    one, or refuses and has changed nothing. What it returns is fresh, so it is the caller's and nobody else's.
//! 2. The place that the pages left stays mapped, empty and the caller's, until the move is final. So a move can be
//!    undone with nothing of the kernel's but memory.
//! 3. Only ranges that are the caller's by 1 or 2 are unmapped.

use core::ptr::{self, NonNull};

use super::os;

/// Places that are wished for before a move is given up: other threads may map there first.
const TRIES: usize = 3;
/// Pages are copied back in pieces of so many bytes, each given back before the next.
const PIECE: usize = 1 << 20;

/// Pages on their way: at their new place, with the old one still there.
#[must_use]
pub(crate) struct Relocation {
    old: NonNull<u8>,
    now: NonNull<u8>,
    len: usize,
}

impl Relocation {
    /// Moves the pages of `[base, base + len)` to a multiple of `align` where at least `room` bytes were free a moment
    /// ago. `None` where the system refuses, and they are where they were.
    ///
    /// # Safety
    /// The range is whole pages of one mapping made here, and nobody uses it meanwhile.
    pub(crate) unsafe fn begin(base: NonNull<u8>, len: usize, room: usize, align: usize) -> Option<Self> {
        let mut relocation = Self { old: base, now: base, len };
        for _ in 0..TRIES {
            let Some(place) = free_place(room.max(len), align) else { break };
            // SAFETY: by 1 and the caller's contract the range is ours, one mapping, and used by nobody.
            let Some(next) = (unsafe { move_towards(relocation.now, len, place) }) else { break };
            // SAFETY: by 1; the pages just left it.
            unsafe { relocation.leave_the_way() };
            relocation.now = next;
            if (next.as_ptr() as usize).is_multiple_of(align) {
                return Some(relocation);
            }
        }
        // SAFETY: nobody knows the new place.
        unsafe { relocation.undo() };
        None
    }

    /// Where the pages are now.
    pub(crate) fn place(&self) -> NonNull<u8> {
        self.now
    }

    /// Makes the move final: the old place is gone.
    ///
    /// # Safety
    /// Nobody uses the old place any more.
    pub(crate) unsafe fn finish(self) {
        // SAFETY: by 2 it is still ours.
        unsafe { os::unmap(self.old, self.len) }
    }

    /// Brings what the pages hold back to the old place; the new one is gone.
    ///
    /// # Safety
    /// Nobody uses the new place, whose first bytes are as long as they were.
    pub(crate) unsafe fn undo(self) {
        if self.now == self.old {
            return;
        }
        let page = os::page_size();
        for at in (0..self.len).step_by(page) {
            // SAFETY: both places are ours (1, 2), mapped, and `len` bytes long, a multiple of the page size.
            unsafe {
                let from = self.now.add(at);
                // What was never written to is not written to now: the old place reads as zero.
                if !core::slice::from_raw_parts(from.as_ptr(), page).iter().all(|&byte| byte == 0) {
                    ptr::copy_nonoverlapping(from.as_ptr(), self.old.add(at).as_ptr(), page);
                }
                if (at + page).is_multiple_of(PIECE.max(page)) {
                    let piece = PIECE.max(page);
                    os::discard(self.now.add(at + page - piece), piece);
                }
            }
        }
        // SAFETY: the caller's contract.
        unsafe { self.leave_the_way() }
    }

    /// The old place is as it was but empty; the new one is gone with what the pages held.
    ///
    /// # Safety
    /// Nobody uses the new place, nor needs what it holds.
    pub(crate) unsafe fn give_up(self) {
        // SAFETY: the caller's contract.
        unsafe { self.leave_the_way() }
    }

    /// Unmaps the place that the pages are at, or were at before the last move, unless it is the first.
    ///
    /// # Safety
    /// Nobody uses it.
    unsafe fn leave_the_way(&self) {
        if self.now != self.old {
            // SAFETY: by 1 it is ours.
            unsafe { os::unmap(self.now, self.len) }
        }
    }
}

/// The address of a place of `len` bytes that is free by now, which it need not be for long.
fn free_place(len: usize, align: usize) -> Option<NonNull<u8>> {
    let page = os::page_size();
    let padded = len.checked_add(align.max(page) - page)?;
    let base = os::map(padded, page, os::Access::None).ok()?;
    // SAFETY: just mapped, and used by nobody.
    unsafe { os::unmap(base, padded) };
    NonNull::new((base.as_ptr() as usize).next_multiple_of(align.max(page)) as *mut u8)
}

/// Moves pages, if the system can, to `wish` or to another free place; where they were stays mapped and reads as zero.
///
/// # Safety
/// The range is whole pages of one mapping made here, and nobody uses it meanwhile.
unsafe fn move_towards(base: NonNull<u8>, len: usize, wish: NonNull<u8>) -> Option<NonNull<u8>> {
    #[cfg(target_os = "linux")]
    {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        // SAFETY: the caller's contract; without `MREMAP_FIXED` nothing else is touched.
        let moved = os::keeping_errno(|| unsafe {
            libc::mremap(base.as_ptr().cast(), len, len, flags, wish.as_ptr())
        });
        if moved == libc::MAP_FAILED { None } else { NonNull::new(moved.cast()) }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (base, len, wish);
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const LEN: usize = 3 << 20;
    const ALIGN: usize = 4 << 20;

    fn filled() -> NonNull<u8> {
        let base = os::map(LEN, os::page_size(), os::Access::ReadWrite).unwrap();
        // SAFETY: just mapped; the last page stays untouched.
        unsafe { base.as_ptr().write_bytes(7, LEN - os::page_size()) };
        base
    }

    fn holds(place: NonNull<u8>) -> bool {
        // SAFETY: mapped, by who asks.
        let bytes = unsafe { core::slice::from_raw_parts(place.as_ptr(), LEN) };
        let (written, rest) = bytes.split_at(LEN - os::page_size());
        written.iter().all(|&byte| byte == 7) && rest.iter().all(|&byte| byte == 0)
    }

    fn resident(place: NonNull<u8>) -> usize {
        let mut pages = vec![0u8; LEN / os::page_size()];
        // SAFETY: mapped, by who asks, and a byte a page.
        assert_eq!(unsafe { libc::mincore(place.as_ptr().cast(), LEN, pages.as_mut_ptr()) }, 0);
        pages.iter().filter(|&&page| page & 1 == 1).count() * os::page_size()
    }

    #[test]
    fn pages_move_and_can_grow_there() {
        let base = filled();
        // SAFETY: the mapping is the test's own, and what is used is where it is at that moment.
        unsafe {
            let moved = Relocation::begin(base, LEN, 2 * LEN, ALIGN).unwrap();
            let place = moved.place();
            assert!((place.as_ptr() as usize).is_multiple_of(ALIGN) && holds(place));
            assert_eq!(resident(base), 0, "still there, and empty");
            moved.finish();
            if os::remap(place, LEN, 2 * LEN, false).is_some() {
                assert!(holds(place) && place.add(2 * LEN - 1).read() == 0);
                os::unmap(place.add(LEN), LEN);
            }
            os::unmap(place, LEN);
        }
    }

    #[test]
    fn what_is_undone_is_as_it_was() {
        let base = filled();
        // SAFETY: as above.
        unsafe {
            Relocation::begin(base, LEN, LEN, ALIGN).unwrap().undo();
            assert!(holds(base));
            let untouched = base.add(LEN - os::page_size());
            Relocation::begin(base, LEN, LEN, ALIGN).unwrap().give_up();
            assert_eq!((base.read(), untouched.read()), (0, 0));
            os::unmap(base, LEN);
        }
    }

    /// Threads that map what just became free, and would notice if it were taken from them or written to.
    #[test]
    fn what_other_threads_map_meanwhile_is_left_alone() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for mark in 1..=3u8 {
                let is_over = &is_over;
                scope.spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        let len = LEN + ALIGN * usize::from(mark % 2);
                        let base = os::map(len, os::page_size(), os::Access::ReadWrite).unwrap();
                        // SAFETY: this thread's own mapping.
                        unsafe {
                            let ends = [base, base.add(len / 2), base.add(len - 1)];
                            assert!(ends.iter().all(|end| end.read() == 0));
                            ends.iter().for_each(|end| end.write(mark));
                            assert!(ends.iter().all(|end| end.read() == mark));
                            os::unmap(base, len);
                        }
                    }
                });
            }
            let (mut base, mut moves) = (filled(), 0);
            for _ in 0..300 {
                // SAFETY: the mapping is this thread's own.
                unsafe {
                    if let Some(moved) = Relocation::begin(base, LEN, LEN + ALIGN, ALIGN) {
                        base = moved.place();
                        moved.finish();
                        moves += 1;
                    }
                }
                assert!(holds(base));
            }
            is_over.store(true, Ordering::Relaxed);
            assert!(moves > 0);
            // SAFETY: as above.
            unsafe { os::unmap(base, LEN) };
        });
    }
}

//! Mappings of large blocks that were freed, kept with their pages for the next ones.
//!
//! What is kept beside the live large blocks is bounded twice. It is at most half of them, as all idle memory (or a
//! little in any case). And both together are at most what was live at the peak of late, and a 32nd part: where the
//! need swings, the pages of its troughs serve its crests, and the process grows by no more than that. The
//! oldest go first.
//!
//! A block takes the smallest mapping that holds it, of which the end stays for others; or else the largest one, which
//! grows. Pages are moved, never copied, where a mapping does not lie as a block has to.

use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use super::hub::Hub;
use super::segment::SEGMENT;
use super::settings::HUGE_PAGE;
use crate::source::os;
use crate::source::relocate::Relocation;

/// Mappings that are kept at most.
const COUNT: usize = 8;
/// An end of a mapping that is shorter is not worth a place.
const SHORTEST: usize = 256 << 10;

/// An address and a length, both multiples of a page.
type Place = (usize, usize);

/// The mappings kept, each charged, without guard pages, and known to nobody else.
pub(super) struct Spares {
    /// The oldest first.
    places: [Place; COUNT],
    count: usize,
    /// Most bytes of live large blocks of late.
    peak: usize,
}

impl Spares {
    pub(super) const fn new() -> Self {
        Self { places: [(0, 0); COUNT], count: 0, peak: 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        self.places[..self.count].iter().map(|(_, len)| len).sum()
    }

    /// Takes notice of `live` bytes of large blocks. The peak falls by a 256th a block, so that one that was
    /// reached once is not held for ever.
    fn note(&mut self, live: usize) {
        self.peak = (self.peak - self.peak / 256).max(live);
    }

    /// Bytes that may be kept beside `live` ones, where `most` may be in any case.
    fn budget(&self, live: usize, most: usize) -> usize {
        (self.peak + self.peak / 32).saturating_sub(live).min(most)
    }

    fn remove(&mut self, at: usize) -> Place {
        let place = self.places[at];
        self.places.copy_within(at + 1..self.count, at);
        self.count -= 1;
        place
    }

    /// The oldest, if more than `most` bytes are kept, or if there is no place for another.
    fn excess(&mut self, most: usize, another: bool) -> Option<Place> {
        let full = another && self.count == COUNT;
        (self.count > 0 && (full || self.bytes() > most)).then(|| self.remove(0))
    }

    fn put(&mut self, place: Place) {
        self.places[self.count] = place;
        self.count += 1;
    }

    /// The smallest that holds `len` bytes, or else the largest.
    fn take(&mut self, len: usize) -> Option<Place> {
        let by_fit = |&at: &usize| {
            let has = self.places[at].1;
            if has >= len { (0, has) } else { (1, usize::MAX - has) }
        };
        let best = (0..self.count).min_by_key(by_fit)?;
        Some(self.remove(best))
    }
}

impl Hub {
    /// Bytes of the mappings kept.
    pub(super) fn spare_bytes(&self) -> usize {
        self.spares.lock().bytes()
    }

    fn spare_budget(&self, spares: &Spares) -> usize {
        let live = self.counters.large_live.load(Ordering::Relaxed);
        spares.budget(live, self.settings.keep_alone(live))
    }

    /// Keeps a mapping that held a large block, and gives back those that are too much by now.
    ///
    /// # Safety
    /// The mapping is one of the hub's, charged, and known to nobody.
    pub(super) unsafe fn keep_spare(&self, base: usize, len: usize) {
        loop {
            let mut spares = self.spares.lock();
            let budget = self.spare_budget(&spares);
            let fits = len <= budget;
            let Some(old) = spares.excess(if fits { budget - len } else { budget }, fits) else {
                if fits {
                    return spares.put((base, len));
                }
                break;
            };
            drop(spares);
            self.unmap_spare(old);
        }
        self.unmap_spare((base, len));
    }

    /// A large block is there: gives back what would be too much beside it.
    pub(super) fn trim_spares(&self) {
        self.spares.lock().note(self.counters.large_live.load(Ordering::Relaxed));
        loop {
            let mut spares = self.spares.lock();
            let budget = self.spare_budget(&spares);
            let Some(old) = spares.excess(budget, false) else { return };
            drop(spares);
            self.unmap_spare(old);
        }
    }

    /// Gives all of them back; returns their bytes.
    pub(super) fn drop_spares(&self) -> usize {
        let mut given = 0;
        loop {
            // Apart, so that the lock is free while the system is asked.
            let old = self.spares.lock().excess(0, false);
            let Some(old) = old else { return given };
            given += old.1;
            self.unmap_spare(old);
        }
    }

    fn unmap_spare(&self, (base, len): Place) {
        // SAFETY: a mapping, or what is left of one, that nobody knows any more.
        unsafe { self.unmap(base as *mut u8, len) };
        self.refund(len);
    }

    /// A mapping of `len` bytes, or a little more, with pages in it, if one is kept; and its length.
    pub(super) fn take_spare(&self, len: usize) -> Option<(*mut u8, usize)> {
        let (base, old) = self.spares.lock().take(len)?;
        // Cut between huge pages, so that neither part has to be of small ones.
        let len = match self.settings.huge_large(len) {
            Some(true) if len < old => len.next_multiple_of(HUGE_PAGE).min(old),
            _ => len,
        };
        let (start, used) = (NonNull::new(base as *mut u8)?, old.min(len));
        if len > old && !self.charge(len - old) {
            self.unmap_spare((base, old));
            return None;
        }
        let Some(block) = self.place_spare(start, used, len) else {
            if len > old {
                self.refund(len - old);
            }
            self.unmap_spare((base, old));
            return None;
        };
        let rest = (base + used, old - used);
        let kept = rest.1 >= SHORTEST && {
            let mut spares = self.spares.lock();
            let free = spares.count < COUNT;
            if free {
                spares.put(rest);
            }
            free
        };
        if rest.1 > 0 && !kept {
            self.unmap_spare(rest);
        }
        Some((block, len))
    }

    /// Makes the first `used` bytes of a mapping the first of one of `len` bytes, where a block may lie.
    fn place_spare(&self, start: NonNull<u8>, used: usize, len: usize) -> Option<*mut u8> {
        if (start.as_ptr() as usize).is_multiple_of(SEGMENT) {
            if used == len {
                return Some(start.as_ptr());
            }
            self.count_call();
            // SAFETY: a mapping that nobody knows.
            if self.let_through() && unsafe { os::remap(start, used, len, false) }.is_some() {
                self.counters.reserved.fetch_add(len - used, Ordering::Relaxed);
                return Some(start.as_ptr());
            }
        }
        if !self.let_through() {
            return None;
        }
        self.count_call();
        // SAFETY: a mapping, or a part of one, that nobody knows.
        let moved = unsafe { Relocation::begin(start, used, len, SEGMENT) }?;
        let to = moved.place();
        // SAFETY: a mapping of ours that nobody knows, and of which nothing is needed.
        unsafe {
            if used < len {
                self.count_call();
                if !self.let_through() || os::remap(to, used, len, false).is_none() {
                    moved.give_up();
                    return None;
                }
            }
            moved.finish();
        }
        self.counters.reserved.fetch_add(len - used, Ordering::Relaxed);
        Some(to.as_ptr())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_best_fit_comes_first_and_then_the_largest() {
        let mut spares = Spares::new();
        for (at, len) in [4, 9, 6, 12].into_iter().enumerate() {
            spares.put((at + 1, len));
        }
        assert_eq!(spares.take(5), Some((3, 6)));
        assert_eq!(spares.take(10), Some((4, 12)));
        assert_eq!(spares.take(10), Some((2, 9)), "the largest, to be grown");
        assert_eq!((spares.take(1), spares.take(1)), (Some((1, 4)), None));
    }

    #[test]
    fn the_budget_is_half_of_what_is_live_and_never_passes_the_peak_by_more_than_a_32nd() {
        let mut spares = Spares::new();
        const M: usize = 1 << 20;
        spares.note(320 * M);
        assert_eq!(spares.budget(320 * M, 160 * M), 10 * M, "at the peak");
        assert_eq!(spares.budget(300 * M, 150 * M), 30 * M, "below it");
        assert_eq!(spares.budget(100 * M, 50 * M), 50 * M, "far below it");
        assert_eq!(spares.budget(0, 0), 0);
        for _ in 0..1000 {
            spares.note(64 * M);
        }
        assert!(spares.budget(64 * M, 1000 * M) <= 5 * M, "a peak of long ago");
    }

    #[test]
    fn the_oldest_goes_first() {
        let mut spares = Spares::new();
        for at in 1..=COUNT {
            spares.put((at, 10));
        }
        assert_eq!(spares.excess(usize::MAX, false), None);
        assert_eq!(spares.excess(usize::MAX, true), Some((1, 10)), "no place for another");
        assert_eq!(spares.excess(65, false), Some((2, 10)));
        assert_eq!(spares.excess(65, false), None);
        assert_eq!(spares.bytes(), 60);
    }
}

//! What a heap may hold and what it was asked to have ready: the limit, the peak, what is booked.

use core::mem;
use core::sync::atomic::Ordering;

use super::hub::{Hub, UNCOUNTED};
use super::segment::SEGMENT;

impl Hub {
    pub(crate) fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    pub(crate) fn booked(&self) -> usize {
        self.booked.load(Ordering::Relaxed)
    }

    /// Makes room for `bytes` more than are in use; false where there is none.
    pub(crate) fn book(&self, bytes: usize) -> bool {
        let Some(total) = self.snapshot().committed.checked_add(bytes).filter(|&sum| sum <= self.limit())
        else {
            return false;
        };
        let Some(len) = bytes.checked_add(bytes / 16 + SEGMENT).map(|len| len & !(SEGMENT - 1)) else {
            return false;
        };
        let (next, end) = self.shared.lock().fresh[0];
        if end - next < len {
            let Some(base) = self.map(len, SEGMENT) else { return false };
            let (next, end) =
                mem::replace(&mut self.shared.lock().fresh[0], (base as usize, base as usize + len));
            if next < end {
                // SAFETY: reserved and never handed out.
                unsafe { self.unmap(next as *mut u8, end - next) };
            }
        }
        self.booked.fetch_max(total, Ordering::Relaxed);
        self.peak_booked.fetch_max(total, Ordering::Relaxed);
        true
    }

    /// Keeps at most `keep` bytes booked beyond what is in use.
    pub(crate) fn unbook(&self, keep: usize) {
        let most = self.snapshot().committed.saturating_add(keep);
        self.booked.fetch_min(most, Ordering::Relaxed);
    }

    /// Lets the hub count what it holds even without a limit; before it is used.
    pub(crate) fn count_peak(&self) {
        self.peak.store(0, Ordering::Relaxed);
    }

    /// Bytes held, now and at most since the peak was last reset; for hubs that count their peak.
    pub(super) fn holdings(&self) -> (usize, usize) {
        (self.held.load(Ordering::Relaxed), self.peak.load(Ordering::Relaxed))
    }

    /// Most bytes ever booked since the peak was last reset.
    pub(super) fn peak_booked(&self) -> usize {
        self.peak_booked.load(Ordering::Relaxed)
    }

    /// Starts the peaks anew.
    pub(super) fn reset_holdings(&self) {
        self.peak.store(self.holdings().0, Ordering::Relaxed);
        self.peak_booked.store(self.booked(), Ordering::Relaxed);
    }

    fn counts(&self) -> bool {
        self.limit() != usize::MAX || self.peak.load(Ordering::Relaxed) != UNCOUNTED
    }

    /// Counts `bytes` towards the limit, or refuses.
    pub(super) fn charge(&self, bytes: usize) -> bool {
        if !self.counts() {
            return true;
        }
        let limit = self.limit();
        let before = self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            held.checked_add(bytes).filter(|&sum| sum <= limit)
        });
        if let Ok(held) = before
            && held + bytes > self.peak.load(Ordering::Relaxed)
        {
            self.peak.fetch_max(held + bytes, Ordering::Relaxed);
        }
        before.is_ok()
    }

    pub(super) fn refund(&self, bytes: usize) {
        if self.counts() {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

//! When a pool should hold more, rather than move its pieces again and again.
//!
//! Moving keeps what is reserved close to what is live, and costs some hundred microseconds a time. Where blocks
//! of all sizes come and go in any order nearly every request would pay that. So each move is a debt, which the time
//! between them works off; a pool deep in debt takes new memory instead, up to a part of what is live. A program that
//! waits for its device most of the time may so move pieces as often as it likes.
//!
//! What has more room lies in more pieces, and a piece moves only when it is wholly free, so that such a pool is further
//! from what is live for good. That is no way to go where memory is short: a pool may have half of its device like that.

#![forbid(unsafe_code)]

/// Nanoseconds that a move stands for. One of many pieces takes longer, but so would as much new memory.
const MOVE: u64 = 100_000;
/// The debt from which on the pool grows: a burst of moves is none of its business.
const DEEP: u64 = 64 * MOVE;
/// A request stands for so many nanoseconds at least; the clock of a simulated device stands still between calls.
const REQUEST: u64 = 250;
/// The pool grows to what is live and this part of it.
const PART: usize = 4;

/// A moment, in requests that the pool served and on the driver's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::gpu) struct Moment {
    pub(in crate::gpu) served: u64,
    pub(in crate::gpu) ns: u64,
}

#[derive(Debug)]
pub(in crate::gpu) struct Unrest {
    /// The pool may hold this much because of it.
    most: usize,
    /// Nanoseconds.
    debt: u64,
    /// When the debt was last reckoned.
    last: Moment,
    /// The driver refused memory that was asked for because of it, when this much was reserved.
    refused_at: Option<usize>,
}

impl Unrest {
    pub(in crate::gpu) fn new(device_memory: usize) -> Self {
        Self { most: device_memory / 2, debt: 0, last: Moment::default(), refused_at: None }
    }

    fn reckon(&mut self, now: Moment) {
        let served = now.served.saturating_sub(self.last.served);
        let passed = now.ns.saturating_sub(self.last.ns).max(served.saturating_mul(REQUEST));
        (self.debt, self.last) = (self.debt.saturating_sub(passed), now);
    }

    /// Pieces were moved in the time from `began` to `ended`.
    pub(super) fn moved(&mut self, began: Moment, ended: Moment) {
        self.reckon(began);
        (self.debt, self.last) = ((self.debt + MOVE).min(DEEP), ended);
    }

    /// How much the pool may hold so that fewer requests need moves; `None` while there is no unrest.
    pub(super) fn allows(&mut self, now: Moment, live: usize, reserved: usize) -> Option<usize> {
        self.reckon(now);
        if self.refused_at.is_some_and(|at| reserved < at) {
            self.refused_at = None;
        }
        (self.debt + MOVE >= DEEP && self.refused_at.is_none())
            .then(|| live.saturating_add(live / PART).min(self.most))
    }

    /// The driver has no memory for this; it is not asked again until the pool gave some back.
    pub(super) fn refused(&mut self, reserved: usize) {
        self.refused_at = Some(reserved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVE: usize = 1000;

    /// Moves of pieces, each so many requests and nanoseconds after the one before; whether the pool grows in the end.
    fn grows(moves: u64, requests: u64, ns: u64) -> bool {
        let mut unrest = Unrest::new(4 * LIVE);
        let mut now = Moment::default();
        for _ in 0..moves {
            now = Moment { served: now.served + requests, ns: now.ns + ns };
            let ended = Moment { ns: now.ns + MOVE, ..now };
            unrest.moved(now, ended);
            now = ended;
        }
        unrest.allows(now, LIVE, LIVE).is_some()
    }

    #[test]
    fn moves_at_nearly_every_request_make_the_pool_grow() {
        assert!(!grows(20, 2, 0), "a burst");
        assert!(grows(200, 2, 0));
        assert!(grows(10_000, 100, 20_000));
    }

    #[test]
    fn moves_with_much_between_them_do_not() {
        assert!(!grows(10_000, MOVE / REQUEST, 0), "requests");
        assert!(!grows(10_000, 1, MOVE), "or time");
    }

    #[test]
    fn the_pool_grows_by_a_quarter_and_rests_then() {
        let mut unrest = Unrest::new(4 * LIVE);
        let later = |ns| Moment { served: 1, ns };
        (0..64).for_each(|_| unrest.moved(later(0), later(0)));
        assert_eq!(unrest.allows(later(0), LIVE, LIVE), Some(LIVE + LIVE / PART));
        assert_eq!(
            unrest.allows(later(0), 2 * LIVE, LIVE),
            Some(2 * LIVE),
            "no more than half of the device"
        );
        assert_eq!(unrest.allows(later(2 * MOVE), LIVE, LIVE), None, "time works it off");
    }

    #[test]
    fn a_driver_that_refused_is_asked_again_when_the_pool_holds_less() {
        let mut unrest = Unrest::new(4 * LIVE);
        let now = Moment::default();
        (0..64).for_each(|_| unrest.moved(now, now));
        unrest.refused(LIVE);
        assert_eq!(unrest.allows(now, LIVE, LIVE), None);
        assert!(unrest.allows(now, LIVE, LIVE - 1).is_some());
    }
}

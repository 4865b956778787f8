//! When a pool should hold more, rather than move its pieces again and again.
//!
//! Moving keeps what is reserved close to what is live, and costs some hundred microseconds a time. Where blocks
//! of all sizes come and go in any order nearly every request would pay that. So moves run up a debt, which requests
//! that need none work off; a pool deep in debt takes new memory instead, up to a part of what is live.
//!
//! What has more room lies in more pieces, and a piece moves only when it is wholly free, so that such a pool is further
//! from what is live for good. That is no way to go where memory is short: a pool may have half of its device like that.

#![forbid(unsafe_code)]

/// Requests without a move that make up for one with it.
const PRICE: u64 = 64;
/// The debt from which on the pool grows: a burst of moves is none of its business.
const DEEP: u64 = 64 * PRICE;
/// The pool grows to what is live and this part of it.
const PART: usize = 4;

#[derive(Debug)]
pub(in crate::gpu) struct Unrest {
    /// The pool may hold this much because of it.
    most: usize,
    debt: u64,
    /// Requests served when the debt was last reckoned.
    served: u64,
    /// The driver refused memory that was asked for because of it, when this much was reserved.
    refused_at: Option<usize>,
}

impl Unrest {
    pub(in crate::gpu) fn new(device_memory: usize) -> Self {
        Self { most: device_memory / 2, debt: 0, served: 0, refused_at: None }
    }

    fn reckon(&mut self, served: u64) {
        let since = served.saturating_sub(self.served);
        (self.debt, self.served) = (self.debt.saturating_sub(since), served);
    }

    /// A request, after as many were served, is about to move pieces.
    pub(super) fn moves(&mut self, served: u64) {
        self.reckon(served);
        self.debt = (self.debt + PRICE).min(DEEP);
    }

    /// How much the pool may hold, after as many requests were served, so that fewer need moves; `None` while there is
    /// no unrest.
    pub(super) fn allows(&mut self, served: u64, live: usize, reserved: usize) -> Option<usize> {
        self.reckon(served);
        if self.refused_at.is_some_and(|at| reserved < at) {
            self.refused_at = None;
        }
        (self.debt + PRICE >= DEEP && self.refused_at.is_none())
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

    #[test]
    fn moves_at_nearly_every_request_make_the_pool_grow() {
        let mut unrest = Unrest::new(4 * LIVE);
        let mut served = 0;
        while unrest.allows(served, LIVE, LIVE).is_none() {
            served += 2;
            unrest.moves(served);
            assert!(served < 200);
        }
        assert_eq!(unrest.allows(served, LIVE, LIVE), Some(LIVE + LIVE / PART));
        assert_eq!(unrest.allows(served, 2 * LIVE, LIVE), Some(2 * LIVE), "no more than half of the device");
        assert_eq!(unrest.allows(served + 2 * PRICE, LIVE, LIVE), None, "requests work it off");
    }

    #[test]
    fn a_move_now_and_then_does_not() {
        let mut unrest = Unrest::new(4 * LIVE);
        for turn in 0..10_000 {
            assert_eq!(unrest.allows(turn * PRICE, LIVE, LIVE), None);
            unrest.moves(turn * PRICE);
        }
    }

    #[test]
    fn a_driver_that_refused_is_asked_again_when_the_pool_holds_less() {
        let mut unrest = Unrest::new(4 * LIVE);
        (0..100).for_each(|_| unrest.moves(0));
        unrest.refused(LIVE);
        assert_eq!(unrest.allows(0, LIVE, LIVE), None);
        assert!(unrest.allows(0, LIVE, LIVE - 1).is_some());
    }
}

//! Waiting for work in flight, a little: what is known to be complete can be moved, and the pool need not grow.

#![forbid(unsafe_code)]

use super::super::core::{Ask, Core};
use super::inner::Inner;
use crate::base::sync::LockGuard;

/// How often a request asks for work in flight before the pool takes more memory: two milliseconds on a card, which
/// brought what training reserves as far down as fifty do.
const ASKS: u32 = 16_000;
/// The part of a pool that must be in flight for that.
const WORTH_WAITING: usize = 64;

impl Inner {
    /// Where much of the pool is free but for work in flight on the request's own stream, waits a moment for that work:
    /// only then can pieces be moved, and a pool that took new ones instead would stay larger. The device is at work
    /// meanwhile, so that what is lost is the host's lead. Returns the books, settled. The caller holds `growth`.
    pub(super) fn settle_for_pieces(&self, ask: Ask) -> LockGuard<'_, Core> {
        let driver = &*self.device.0.driver;
        let mut asked = 0;
        loop {
            let mut core = self.core.lock();
            self.settle_patiently(&mut core);
            let in_flight = core.free_bytes() - core.clean_bytes();
            let event = core.order.last_event(ask.lane).filter(|_| asked < ASKS);
            let Some(event) = event.filter(|_| in_flight >= ask.bytes.max(core.reserved / WORTH_WAITING))
            else {
                return core;
            };
            drop(core);
            // Where the event is reused meanwhile, this waits for later work, and no longer than ever.
            loop {
                asked += 1;
                match driver.event_query(event) {
                    Ok(false) if asked < ASKS => {}
                    Ok(_) => break,
                    // It would not know better the next time.
                    Err(_) => {
                        asked = ASKS;
                        break;
                    }
                }
            }
        }
    }

    /// Learns what is complete. What was just recorded on an idle stream takes the device some microseconds, and a
    /// piece that can be moved saves more than that.
    pub(super) fn settle_patiently(&self, core: &mut Core) {
        const ASKED: usize = 100;
        let driver = &*self.device.0.driver;
        self.front.take_all_back(core, driver);
        core.seal_all(driver);
        for _ in 0..ASKED {
            core.settle(driver);
            if core.order.last_events().is_empty() {
                break;
            }
        }
    }
}

//! What the driver says is complete becomes free for everybody.

#![forbid(unsafe_code)]

use super::Core;
use crate::gpu::driver::Driver;
use crate::gpu::ranges::{HOLE, MIXED, Tag};

impl Core {
    /// Renews the batch numbers of lanes that run out of them.
    pub(super) fn renumber(&mut self, driver: &dyn Driver) {
        if !self.claimed.is_empty() {
            // A plan under way will free what it claimed under the numbers of now, if it fails.
            return;
        }
        let full = self.order.finish_full(driver);
        if !full.is_empty() {
            self.clean_done();
            full.into_iter().for_each(|lane| self.order.renumber(lane));
        }
    }

    /// Step 3: learns what is complete and makes it clean; returns whether anything was.
    pub(in crate::gpu) fn settle(&mut self, driver: &dyn Driver) -> bool {
        self.order.poll(driver) | self.clean_done()
    }

    /// Seals whatever is not, so that the events stand for all frees so far.
    pub(in crate::gpu) fn seal_all(&mut self, driver: &dyn Driver) {
        let zones = &self.zones;
        // A list of several lanes may stand for open batches of any of them.
        let mixed = zones.iter().any(|zone| zone.has_free(MIXED));
        self.order.seal_all(driver, |lane| mixed || zones.iter().any(|zone| zone.has_free(lane)));
    }

    /// Makes clean what the host knows to be complete.
    pub(in crate::gpu) fn clean_done(&mut self) -> bool {
        let mut moved = 0;
        for lane in MIXED..self.order.lanes() {
            if lane == HOLE || self.order.is_capture(lane) || lane != MIXED && !self.order.more_done(lane) {
                continue;
            }
            let lists = if lane == MIXED { self.order.mixed_done() } else { Vec::new() };
            for zone in self.zones.iter_mut().filter(|zone| zone.has_free(lane)) {
                let order = &self.order;
                moved += zone.retag(lane, |tag| order.is_done(tag), Tag::CLEAN);
            }
            for batch in lists {
                self.order.forget_mixed(Tag { lane, batch });
            }
        }
        moved != 0
    }
}

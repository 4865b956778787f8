//! Memory that goes back to the driver, and the end of a pool.

use core::sync::atomic::Ordering;

use super::inner::Inner;
use crate::base::error::{Error, Refusal, Result};
use crate::gpu::device::Member;
use crate::gpu::handle::{Shared, Users};

impl Inner {
    /// Waits until the work behind every free so far is complete.
    pub(super) fn wait_for_frees(&self) {
        let driver = &*self.device.0.driver;
        let events = {
            let mut core = self.core.lock();
            self.front.take_all_back(&mut core, driver);
            core.seal_all(driver);
            core.order.last_events()
        };
        for event in events {
            // An event that cannot be waited for is asked for again by `settle`.
            let _ = driver.event_sync(event);
        }
        self.core.lock().settle(driver);
    }

    /// Gives idle segments back until at most `keep` free bytes are left; returns the bytes given back.
    pub(super) fn release_idle(&self, keep: usize) -> usize {
        let driver = &*self.device.0.driver;
        let mut given = 0;
        {
            let mut core = self.core.lock();
            self.front.take_all_back(&mut core, driver);
            core.seal_all(driver);
            core.settle(driver);
            core.unnest();
            core.clean_done();
        }
        if self.source.reserved.is_some() {
            return self.release_pieces(keep);
        }
        loop {
            let segment = {
                let mut core = self.core.lock();
                let spare = core.free_bytes().saturating_sub(keep);
                core.remove_idle(spare)
            };
            let Some((start, len)) = segment else { return given };
            // SAFETY: a segment from `alloc` in which nothing is live and all work is known to be complete.
            if unsafe { self.source.give(driver, start) }.is_ok() {
                given += len;
            } else {
                // The driver kept it; so do we.
                self.core.lock().add(start, len);
                return given;
            }
        }
    }

    /// Gives idle pieces back until at most `keep` free bytes are left; returns the bytes given back.
    pub(super) fn release_pieces(&self, keep: usize) -> usize {
        let driver = &*self.device.0.driver;
        let _ticket = self.growth.lock();
        let idle = {
            let mut core = self.core.lock();
            let spare = core.idle_bytes().saturating_sub(keep);
            core.take_idle(spare)
        };
        if idle.is_empty() {
            return 0;
        }
        // SAFETY: pieces of this pool in which nothing is live and all work is known to be complete.
        let done = unsafe { self.source.release(driver, &idle) };
        let mut core = self.core.lock();
        let before = core.reserved;
        core.idle_given(done);
        before - core.reserved
    }

    /// Gives all memory back for good; an error while anything is live. What the driver keeps, or a graph still
    /// needs, goes with the last handle.
    pub(super) fn close(&self) -> Result<()> {
        // Dropped with no lock held.
        let seats;
        let ticket = self.growth.lock();
        {
            self.empty_quarantine();
            let mut core = self.core.lock();
            seats = self.front.shut(&mut core, &*self.device.0.driver);
            match core.live_blocks() {
                0 => self.closed.store(true, Ordering::Relaxed),
                live => return Err(Error::InvalidOperation(Refusal::StillLive(live))),
            }
        }
        drop(seats);
        self.wait_for_frees();
        drop(ticket);
        self.release_idle(0);
        Ok(())
    }

    /// Empties the pool, whatever is live.
    ///
    /// # Safety
    /// No block is used or freed after.
    pub(super) unsafe fn reset(&self) -> Result<()> {
        self.device.synchronize()?;
        self.forget_all();
        // No plan is under way then.
        let _ticket = self.growth.lock();
        let mut core = self.core.lock();
        self.front.forget();
        core.reset();
        Ok(())
    }
}

impl Member for Inner {
    fn stream_closes(&self, slot: u32) {
        let driver = &*self.device.0.driver;
        let mut core = self.core.lock();
        // No seat is left: each would keep the stream.
        let _none = self.front.shut_of(&mut core, driver, slot);
        core.order.close(driver, slot);
    }

    fn stream_unused(&self, slot: u32) {
        let mut core = self.core.lock();
        let seats = self.front.shut_of(&mut core, &*self.device.0.driver, slot);
        // The last of them closes the stream, which takes the lock.
        drop(core);
        drop(seats);
    }

    fn device_waits(&self) {
        let driver = &*self.device.0.driver;
        let mut core = self.core.lock();
        self.front.take_all_back(&mut core, driver);
        core.seal_all(driver);
    }

    fn capture_ends(&self, id: u64) {
        let mut core = self.core.lock();
        if core.order.end_capture(id) {
            core.clean_done();
        }
    }

    fn give_back(&self) -> usize {
        self.empty_quarantine();
        self.release_idle(0)
    }
}

impl Shared for Inner {
    fn users(&self) -> &Users {
        &self.users
    }

    fn unused(&self) {
        let mut core = self.core.lock();
        let seats = self.front.shut(&mut core, &*self.device.0.driver);
        drop(core);
        drop(seats);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let driver = self.device.0.driver.clone();
        // Work on freed blocks may be in flight still. If not even waiting works, the memory is lost.
        if driver.device_sync().is_err() && driver.device_sync().is_err() {
            return;
        }
        self.on_drop();
        let mut core = self.core.lock();
        for event in core.order.take_events() {
            // SAFETY: the pool's own events, used no more.
            let _ = unsafe { driver.event_destroy(event) };
        }
        if let Some(pieces) = &mut core.pieces {
            let all = pieces.drain();
            // SAFETY: every block keeps its pool alive, so none is left, and the device was idle after the last
            // use. A refusal is tried once more, then the memory leaks.
            unsafe {
                let left = self.source.release(&*driver, &all);
                pieces.keep(&left);
                self.source.release(&*driver, &pieces.drain());
                self.source.close(&*driver);
            }
            return;
        }
        for (start, _) in core.drain_segments() {
            // SAFETY: segments from `alloc`; every block keeps its pool alive, so none is left, and the
            // device was idle after the last use. A refusal is tried once more, then the segment leaks.
            if unsafe { self.source.give(&*driver, start) }.is_err() {
                // SAFETY: as above.
                let _ = unsafe { self.source.give(&*driver, start) };
            }
        }
    }
}

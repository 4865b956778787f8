//! All heaps of the process, and their locks around `fork`.

use core::ptr;
use core::sync::atomic::Ordering;

use super::hub::Hub;
use super::lock::SpinLock;
use super::registry;

/// All hubs, for `fork`.
struct Hubs(*const Hub);
// SAFETY: followed under the lock only; hubs delist before they go.
unsafe impl Send for Hubs {}
static HUBS: SpinLock<Hubs> = SpinLock::new(Hubs(ptr::null()));

impl Hub {
    /// Adds the hub to those that are locked around `fork`.
    pub(crate) fn enlist(&self) {
        let mut hubs = HUBS.lock();
        self.next_hub.store(hubs.0.cast_mut(), Ordering::Relaxed);
        hubs.0 = self;
    }

    pub(super) fn delist(&self) {
        let mut hubs = HUBS.lock();
        let next = self.next_hub.load(Ordering::Relaxed);
        if ptr::eq(hubs.0, self) {
            hubs.0 = next;
            return;
        }
        // SAFETY: hubs delist before they go, so all on the list are alive.
        let mut at = unsafe { hubs.0.as_ref() };
        while let Some(hub) = at {
            let after = hub.next_hub.load(Ordering::Relaxed);
            if ptr::eq(after, self) {
                hub.next_hub.store(next, Ordering::Relaxed);
                return;
            }
            // SAFETY: as above.
            at = unsafe { after.as_ref() };
        }
    }
}

fn each_hub(hubs: *const Hub, visit: impl Fn(&Hub)) {
    // SAFETY: called between the taking and the release of the lock of `HUBS`.
    let mut at = unsafe { hubs.as_ref() };
    while let Some(hub) = at {
        visit(hub);
        // SAFETY: as above.
        at = unsafe { hub.next_hub.load(Ordering::Relaxed).as_ref() };
    }
}

/// Takes every lock, so that the child finds them free and what they guard whole.
pub(super) extern "C" fn before_fork() {
    HUBS.lock_raw();
    each_hub(hubs_held(), |hub| {
        hub.late.lock_raw();
        hub.shared.lock_raw();
        hub.larges.lock_raw();
        hub.buried.lock_raw();
        hub.spares.lock_raw();
    });
    registry::GROWTH.lock_raw();
}

/// Lets go of them, in the parent and in the child.
pub(super) extern "C" fn after_fork() {
    // SAFETY: `before_fork` took them all.
    unsafe {
        registry::GROWTH.unlock_raw();
        each_hub(hubs_held(), |hub| {
            hub.spares.unlock_raw();
            hub.buried.unlock_raw();
            hub.larges.unlock_raw();
            hub.shared.unlock_raw();
            hub.late.unlock_raw();
        });
        HUBS.unlock_raw();
    }
}

fn hubs_held() -> *const Hub {
    // SAFETY: the lock is held by this thread, without a guard.
    unsafe { HUBS.value_held().0 }
}

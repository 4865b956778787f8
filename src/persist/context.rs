//! What the present thread is doing with which pool, so that nested calls find the outer one.
//!
//! Invariant: every frame in the list lies on this thread's stack, below the code that looks at it.

use core::cell::Cell;
use core::ptr;

use super::inner::Inner;
use super::tx::Transaction;

struct Frame {
    pool: *const Inner,
    /// Null for a read.
    tx: *const Transaction<'static>,
    outer: *const Frame,
}

thread_local!(static CURRENT: Cell<*const Frame> = const { Cell::new(ptr::null()) });

/// What this thread does with a pool right now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Current {
    /// It reads; the gate is held.
    pub(crate) reads: bool,
    /// Its open transaction.
    tx: Option<*const Transaction<'static>>,
}

impl Current {
    /// The open transaction of this thread on that pool.
    ///
    /// # Safety
    /// The reference is not used after the call that asked for it returns.
    pub(crate) unsafe fn transaction<'t>(self) -> Option<&'t Transaction<'t>> {
        // SAFETY: the frame is still on the stack, and with it the transaction; the shorter lifetime of what
        // it borrows is within the caller's.
        self.tx.map(|tx| unsafe { &*tx.cast::<Transaction<'t>>() })
    }
}

/// What this thread does with `pool`.
#[inline]
pub(crate) fn current(pool: &Inner) -> Current {
    let frame = CURRENT.get();
    if frame.is_null() { Current::default() } else { look(frame, pool) }
}

fn look(mut frame: *const Frame, pool: &Inner) -> Current {
    let mut found = Current::default();
    // SAFETY: the invariant.
    while let Some(this) = unsafe { frame.as_ref() } {
        if ptr::eq(this.pool, pool) {
            if this.tx.is_null() {
                found.reads = true;
            } else {
                found.tx = Some(this.tx);
            }
        }
        frame = this.outer;
    }
    found
}

/// Runs `work` inside a frame.
#[inline]
pub(crate) fn within<R>(pool: &Inner, tx: Option<&Transaction<'_>>, work: impl FnOnce() -> R) -> R {
    struct Leave(*const Frame);
    impl Drop for Leave {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let outer = CURRENT.get();
    let tx = tx.map_or(ptr::null(), |tx| ptr::from_ref(tx).cast::<Transaction<'static>>());
    let frame = Frame { pool, tx, outer };
    let _leave = Leave(outer);
    CURRENT.set(&raw const frame);
    work()
}

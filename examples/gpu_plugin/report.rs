//! Failures: kept for the thread that saw them, and the first few printed.

use core::ffi::{CStr, c_char};
use core::fmt::Display;
use std::cell::RefCell;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};

use memory_pool::Error;

/// Why a call failed, as text.
#[derive(Debug)]
pub struct Fault(pub String);

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self(error.to_string())
    }
}

/// How many failures are printed in a process: an out-of-memory loop must not flood the log.
const PRINTED: u32 = 10;

thread_local! {
    static LAST: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// Runs an entry point: what fails or panics is noted and answered with `failed`.
#[inline]
pub fn guard<R: Copy>(call: &str, failed: R, run: impl FnOnce() -> Result<R, Fault>) -> R {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(done)) => done,
        Ok(Err(Fault(why))) => {
            note(call, &why);
            failed
        }
        Err(_) => {
            note(call, &"a panic inside the library: please report it");
            failed
        }
    }
}

/// Keeps a failure for [`last`], and prints it while few were.
#[cold]
pub fn note(call: &str, why: &dyn Display) {
    static SEEN: AtomicU32 = AtomicU32::new(0);
    let text = format!("{call}: {why}");
    let seen = SEEN.load(Ordering::Relaxed);
    if seen < PRINTED {
        SEEN.store(seen + 1, Ordering::Relaxed);
        let end = if seen + 1 == PRINTED { " (further failures are not printed)" } else { "" };
        eprintln!("memory-pool: {text}{end}");
    }
    // At the end of a thread there may be nothing left to keep it in.
    let _ = LAST.try_with(|last| *last.borrow_mut() = CString::new(text).ok());
}

/// The calling thread's last failure; the pointer is good until its next one.
pub fn last() -> *const c_char {
    const NONE: &CStr = c"";
    LAST.try_with(|last| last.borrow().as_ref().map_or(NONE.as_ptr(), |text| text.as_ptr()))
        .unwrap_or(NONE.as_ptr())
}

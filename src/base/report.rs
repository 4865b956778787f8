//! Where messages go: to the `log` facade with feature `log`, and findings to stderr where nobody logs.
//!
//! Never called from inside an allocation: a logger may allocate.

use core::fmt;

/// A pool was made, emptied, destroyed.
#[inline]
pub(crate) fn event(message: fmt::Arguments<'_>) {
    #[cfg(feature = "log")]
    log::debug!(target: "memory_pool", "{message}");
    #[cfg(not(feature = "log"))]
    let _ = message;
}

/// Something that a person should look at: a finding, leaks.
#[cold]
pub(crate) fn alarm(message: fmt::Arguments<'_>) {
    #[cfg(feature = "log")]
    if log::log_enabled!(target: "memory_pool", log::Level::Error) {
        log::error!(target: "memory_pool", "{message}");
        return;
    }
    use std::io::Write;
    // One write, so that reports of several threads do not mix. Nothing can be done where stderr is closed.
    let text = format!("memory-pool: {message}\n");
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

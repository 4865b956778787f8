//! Text for stderr from where nothing may be allocated.

use core::fmt::{self, Write};

/// Writes `text` and the end of a line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    _ = writeln!(Stderr::new(), "{text}");
}

/// Collects text and writes it in as few calls as fit; what cannot be written is dropped.
pub(super) struct Stderr {
    text: [u8; 512],
    len: usize,
}

impl Stderr {
    pub(super) const fn new() -> Self {
        Self { text: [0; 512], len: 0 }
    }

    fn flush(&mut self) {
        // SAFETY: the text outlives the call. Nothing can be done about a failure.
        unsafe { libc::write(2, self.text.as_ptr().cast(), self.len) };
        self.len = 0;
    }
}

impl fmt::Write for Stderr {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.len == self.text.len() {
                self.flush();
            }
            self.text[self.len] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

impl Drop for Stderr {
    fn drop(&mut self) {
        self.flush();
    }
}

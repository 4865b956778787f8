//! A short text held in place, so that an error can name what it is about without allocating.

use core::fmt;

/// Bytes of text an error can carry; what is longer is cut at a character and marked with `…`.
const CAPACITY: usize = 38;

/// A text of at most 38 bytes, held in place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ShortText {
    // Invariant: `bytes[..len]` is UTF-8.
    bytes: [u8; CAPACITY],
    len: u8,
    cut: bool,
}

impl ShortText {
    /// As much of `text` as fits.
    pub fn new(text: &str) -> Self {
        let len = text.floor_char_boundary(CAPACITY);
        let mut bytes = [0; CAPACITY];
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        Self { bytes, len: len as u8, cut: len < text.len() }
    }

    /// What `value` displays as, as much of it as fits; rendered without allocating.
    pub(crate) fn from_display(value: &dyn fmt::Display) -> Self {
        struct Sink(ShortText);
        impl fmt::Write for Sink {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                let start = self.0.len as usize;
                let room = if self.0.cut { 0 } else { CAPACITY - start };
                let take = text.floor_char_boundary(room);
                self.0.bytes[start..start + take].copy_from_slice(&text.as_bytes()[..take]);
                self.0.len += take as u8;
                self.0.cut |= take < text.len();
                Ok(())
            }
        }
        let mut sink = Sink(Self::new(""));
        // A value whose Display fails leaves what it wrote so far, which is all that can be shown of it.
        let _ = fmt::Write::write_fmt(&mut sink, format_args!("{value}"));
        sink.0
    }

    /// The text, without the mark of a cut.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len as usize]).unwrap_or("")
    }
}

impl fmt::Display for ShortText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())?;
        if self.cut { f.write_str("…") } else { Ok(()) }
    }
}

impl fmt::Debug for ShortText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl From<&str> for ShortText {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_at_a_character() {
        assert_eq!(ShortText::new("frames").to_string(), "frames");
        let long = "ä".repeat(30);
        let short = ShortText::new(&long);
        assert_eq!(short.as_str(), "ä".repeat(19));
        assert_eq!(short.to_string(), "ä".repeat(19) + "…");
    }
}

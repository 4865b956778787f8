//! The log of RMM's logging resource: a line of CSV per call.

use super::{Builder, Trace, corrupt};
use crate::base::error::Result;

const HEADER: &str = "Thread,Time,Action,Pointer,Size,Stream";

pub(super) fn recognises(bytes: &[u8]) -> bool {
    bytes.starts_with(b"Thread,Time,Action")
}

pub(super) fn parse(bytes: &[u8]) -> Result<Trace> {
    let text = str::from_utf8(bytes).map_err(|error| corrupt(error.valid_up_to(), "text in UTF-8"))?;
    let mut builder = Builder::<u64>::new();
    let mut at = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let start = at;
        at += line.len();
        let line = line.trim_end();
        if index == 0 {
            if line != HEADER {
                return Err(corrupt(0, "the header Thread,Time,Action,Pointer,Size,Stream"));
            }
            continue;
        }
        if line.is_empty() {
            continue;
        }
        let mut fields = line.split(',').map(str::trim);
        let (action, pointer, size, stream) =
            match (fields.nth(2), fields.next(), fields.next(), fields.next(), fields.next()) {
                (Some(action), Some(pointer), Some(size), Some(stream), None) => {
                    (action, pointer, size, stream)
                }
                _ => return Err(corrupt(start, "six fields in a line")),
            };
        let number = |text| number(text).ok_or(corrupt(start, "numbers for pointer, size and stream"));
        match action {
            "allocate" => builder.alloc(number(pointer)?, number(size)?, number(stream)?, start)?,
            "free" | "deallocate" => {
                if !builder.free(&number(pointer)?, number(stream)?, start)? {
                    return Err(corrupt(start, "the pointer of a live allocation"));
                }
            }
            // What failed took nothing.
            "allocate failure" => {}
            _ => return Err(corrupt(start, "an action: allocate, free or allocate failure")),
        }
    }
    builder.finish()
}

/// A number in decimal, or in hexadecimal after `0x`; `(nil)` is how C prints a null pointer.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None if text == "(nil)" => Some(0),
        None => text.parse().ok(),
    }
}

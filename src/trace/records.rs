//! Records of 16 little-endian bytes:
//!
//! | offset | type | field |
//! |---|---|---|
//! | 0 | u8 | 0 allocates, 1 frees |
//! | 1 | u8 | stream |
//! | 2 | u16 | 0 |
//! | 4 | u32 | id of the allocation |
//! | 8 | u64 | bytes asked for |

use super::{Builder, Trace, corrupt};
use crate::base::error::Result;

pub(super) const RECORD: usize = 16;

pub(super) fn parse(bytes: &[u8]) -> Result<Trace> {
    let mut builder = Builder::<u32>::new();
    let (records, rest) = bytes.as_chunks::<RECORD>();
    for (index, record) in records.iter().enumerate() {
        let at = index * RECORD;
        let [kind, stream, zero0, zero1, i0, i1, i2, i3, size @ ..] = *record;
        if (zero0, zero1) != (0, 0) {
            return Err(corrupt(at + 2, "zero bytes here; is this a trace of 16-byte records?"));
        }
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let stream = u64::from(stream);
        match kind {
            0 => builder.alloc(id, u64::from_le_bytes(size), stream, at)?,
            1 if builder.free(&id, stream, at)? => {}
            1 => return Err(corrupt(at + 4, "the id of a live allocation")),
            _ => return Err(corrupt(at, "a record kind of 0 (allocate) or 1 (free)")),
        }
    }
    if !rest.is_empty() {
        return Err(corrupt(records.len() * RECORD, "a whole record of 16 bytes; the file is cut short"));
    }
    builder.finish()
}

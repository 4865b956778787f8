//! PyTorch's memory snapshot: a pickled dictionary whose `device_traces` has a list of events per device.
//!
//! The device with the most events is read. An event is a dictionary with `action`, `addr`, `size` and
//! `stream`; `alloc` and `free_requested` are what the program did, the rest is what the allocator did about
//! it. Frees of blocks that were live before the recording began are left out. Errors name the event, counted from 1.

use super::pickle::{Pickle, Value};
use super::{Builder, Trace, corrupt};
use crate::base::error::Result;

/// Protocols 2 to 5 begin with an opcode and their number.
pub(super) fn recognises(bytes: &[u8]) -> bool {
    matches!(bytes, [0x80, 2..=5, ..])
}

pub(super) fn parse(bytes: &[u8]) -> Result<Trace> {
    let snapshot = Pickle::parse(bytes).map_err(|expected| corrupt(0, expected))?;
    let missing = corrupt(0, "a snapshot of PyTorch's allocator with `device_traces`");
    let traces = snapshot.field(snapshot.root(), "device_traces").ok_or(missing)?;
    let devices = snapshot.items(traces).ok_or(missing)?;
    let events = devices
        .filter_map(|device| snapshot.items(device))
        .max_by_key(ExactSizeIterator::len)
        .ok_or(missing)?;

    let mut builder = Builder::<u64>::new();
    for (index, event) in (1..).zip(events) {
        if !matches!(event, Value::Dict(_)) {
            return Err(corrupt(index, "a dictionary as event"));
        }
        let number = |name| match snapshot.field(event, name) {
            Some(Value::Number(number)) => Ok(*number),
            _ => Err(corrupt(index, "addr, size and stream in the event")),
        };
        match snapshot.field(event, "action") {
            Some(Value::Text(b"alloc")) => {
                builder.alloc(number("addr")?, number("size")?, number("stream")?, index)?;
            }
            Some(Value::Text(b"free_requested")) => {
                builder.free(&number("addr")?, number("stream")?, index)?;
            }
            Some(Value::Text(_)) => {}
            _ => return Err(corrupt(index, "an action in the event")),
        }
    }
    builder.finish()
}

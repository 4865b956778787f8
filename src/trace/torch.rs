//! PyTorch's memory snapshot: a pickled dictionary whose `device_traces` has a list of events per device.
//!
//! The device with the most events is read. An event is a dictionary with `action`, `addr`, `size` and
//! `stream`; `alloc` and `free_requested` are what the program did, the rest is what the allocator did about
//! it. Frees of blocks that were live before the recording began are left out. Errors name the event, counted from 1.

use serde_pickle::value::{HashableValue, Value};

use super::{Builder, Trace, corrupt};
use crate::base::error::{Error, Result};

/// Protocols 2 to 5 begin with an opcode and their number.
pub(super) fn recognises(bytes: &[u8]) -> bool {
    matches!(bytes, [0x80, 2..=5, ..])
}

/// Stack for each byte of a file, within bounds: values are read and dropped by recursion, and a level of nesting takes
/// two bytes of a file at least.
const STACK: usize = 1 << 10;
const LEAST_STACK: usize = 16 << 20;
const MOST_STACK: usize = 2 << 30;

pub(super) fn parse(bytes: &[u8]) -> Result<Trace> {
    let stack = bytes.len().saturating_mul(STACK).clamp(LEAST_STACK, MOST_STACK);
    std::thread::scope(|scope| {
        let reader = std::thread::Builder::new().stack_size(stack).spawn_scoped(scope, || parse_here(bytes));
        let reader = reader.map_err(|error| Error::io("start a thread", &error))?;
        reader.join().unwrap_or(Err(corrupt(0, "an intact pickle")))
    })
}

fn parse_here(bytes: &[u8]) -> Result<Trace> {
    let options = serde_pickle::DeOptions::new().replace_unresolved_globals();
    let snapshot: Value =
        serde_pickle::value_from_slice(bytes, options).map_err(|_| corrupt(0, "an intact pickle"))?;
    let missing = corrupt(0, "a snapshot of PyTorch's allocator with `device_traces`");
    let Value::Dict(mut snapshot) = snapshot else { return Err(missing) };
    let traces = snapshot.remove(&HashableValue::String("device_traces".into()));
    let Some(Value::List(devices)) = traces else { return Err(missing) };
    let events = devices.iter().filter_map(|device| match device {
        Value::List(events) => Some(events),
        _ => None,
    });
    let events = events.max_by_key(|events| events.len()).ok_or(missing)?;

    let mut builder = Builder::<u64>::new();
    for (index, event) in (1..).zip(events) {
        let Value::Dict(event) = event else { return Err(corrupt(index, "a dictionary as event")) };
        let field = |name: &str| event.get(&HashableValue::String(name.into()));
        let number = |name| match field(name) {
            Some(Value::I64(value)) => u64::try_from(*value).ok(),
            Some(Value::Int(value)) => u64::try_from(value).ok(),
            _ => None,
        };
        let number = |name| number(name).ok_or(corrupt(index, "addr, size and stream in the event"));
        match field("action") {
            Some(Value::String(action)) if action == "alloc" => {
                builder.alloc(number("addr")?, number("size")?, number("stream")?, index)?;
            }
            Some(Value::String(action)) if action == "free_requested" => {
                builder.free(&number("addr")?, number("stream")?, index)?;
            }
            Some(Value::String(_)) => {}
            _ => return Err(corrupt(index, "an action in the event")),
        }
    }
    builder.finish()
}

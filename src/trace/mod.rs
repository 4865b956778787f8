//! Recorded allocations of real programs, read from three formats into one.
//!
//! | format | known by | module |
//! |---|---|---|
//! | records of 16 bytes, plain or gzip | neither of the others | `records` |
//! | RMM's log | its first line, `Thread,Time,Action,Pointer,Size,Stream` | `rmm` |
//! | PyTorch's memory snapshot | a pickle of protocol 2 or later | `torch` |
//!
//! Whatever the format, a [`Trace`] is checked: every free names an allocation that is live, ids run from 0
//! without gaps, and streams are numbered by first use. Nothing in a file is trusted; what is wrong with it is
//! an [`Error::Corrupt`] that says where and what was expected.

mod pickle;
mod records;
mod rmm;
mod torch;

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::Hash;
use std::io::Read;
use std::path::Path;

use crate::base::error::{Error, Result};

/// One step of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An allocation.
    Alloc {
        /// Its number, from 0 in the order of allocation.
        id: u32,
        /// The stream it was made on.
        stream: u16,
        /// Bytes asked for.
        bytes: u64,
    },
    /// The free of allocation `id` on a stream.
    Free {
        /// The allocation.
        id: u32,
        /// The stream of the free.
        stream: u16,
    },
}

/// The allocations of a program, in order.
///
/// ```
/// use memory_pool::trace::{Event, Trace};
/// let log = "Thread,Time,Action,Pointer,Size,Stream\n\
///            1,00:00:01,allocate,0x10,256,0x0\n\
///            1,00:00:02,free,0x10,256,0x0\n";
/// let trace = Trace::parse(log.as_bytes())?;
/// assert_eq!(trace.events()[1], Event::Free { id: 0, stream: 0 });
/// assert_eq!(trace.peak_live(), 256);
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    events: Vec<Event>,
    allocations: u32,
    streams: u16,
    peak_live: u64,
}

impl Trace {
    /// Reads a file of any of the formats, gzip or plain.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::io("read", &error))?;
        Self::parse(&bytes)
    }

    /// A trace from the contents of a file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        match unpacked(bytes) {
            None => Self::parse_plain(bytes),
            Some((plain, true)) => Self::parse_plain(&plain),
            Some((plain, false)) => Err(corrupt(plain.len(), "an intact gzip stream")),
        }
    }

    /// Where in a file's contents an error of [`parse`](Self::parse) lies, in the words of the format: a line, a record
    /// or an event, counted from 1. `None` for errors that are not about the contents.
    ///
    /// ```
    /// use memory_pool::trace::Trace;
    /// let log = b"Thread,Time,Action,Pointer,Size,Stream\n1,0,free,0x10,256,0x0\n";
    /// let error = Trace::parse(log).unwrap_err();
    /// assert_eq!(Trace::place(log, &error).as_deref(), Some("line 2"));
    /// ```
    pub fn place(bytes: &[u8], error: &Error) -> Option<String> {
        let &Error::Corrupt { at, .. } = error else { return None };
        let plain = match unpacked(bytes) {
            None => Cow::Borrowed(bytes),
            Some((plain, true)) => Cow::Owned(plain),
            Some((_, false)) => return Some(format!("after {at} unpacked bytes")),
        };
        Some(if rmm::recognises(&plain) {
            let before = plain.iter().take(at as usize);
            format!("line {}", before.filter(|&&byte| byte == b'\n').count() + 1)
        } else if torch::recognises(&plain) {
            if at == 0 { "the snapshot".into() } else { format!("event {at}") }
        } else {
            format!("record {}", at / records::RECORD as u64 + 1)
        })
    }

    fn parse_plain(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() {
            return Err(corrupt(0, "a trace; the file is empty"));
        }
        if rmm::recognises(bytes) {
            rmm::parse(bytes)
        } else if torch::recognises(bytes) {
            torch::parse(bytes)
        } else {
            records::parse(bytes)
        }
    }

    /// The steps, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Number of allocations; ids are below it.
    pub fn allocations(&self) -> usize {
        self.allocations as usize
    }

    /// Number of streams.
    pub fn streams(&self) -> usize {
        self.streams as usize
    }

    /// Most bytes live at once.
    pub fn peak_live(&self) -> u64 {
        self.peak_live
    }
}

/// Collects a trace from a format's own names of blocks and streams.
#[derive(Debug)]
struct Builder<Block> {
    trace: Trace,
    live: HashMap<Block, (u32, u64)>,
    streams: HashMap<u64, u16>,
    live_bytes: u64,
}

impl<Block: Hash + Eq> Builder<Block> {
    fn new() -> Self {
        Self {
            trace: Trace { events: Vec::new(), allocations: 0, streams: 0, peak_live: 0 },
            live: HashMap::new(),
            streams: HashMap::new(),
            live_bytes: 0,
        }
    }

    /// The number of a stream, a new one at its first use. `at` is where in the file it is named.
    fn stream(&mut self, name: u64, at: usize) -> Result<u16> {
        let next = self.streams.len();
        let number = *self.streams.entry(name).or_insert(next as u16);
        if self.streams.len() > usize::from(u16::MAX) {
            return Err(corrupt(at, "at most 65535 streams"));
        }
        self.trace.streams = self.streams.len() as u16;
        Ok(number)
    }

    /// An allocation; a size of 0 counts as 1.
    fn alloc(&mut self, block: Block, bytes: u64, stream: u64, at: usize) -> Result<()> {
        let stream = self.stream(stream, at)?;
        let bytes = bytes.max(1);
        let id = self.trace.allocations;
        self.trace.allocations = id.checked_add(1).ok_or(corrupt(at, "at most 2^32 - 1 allocations"))?;
        self.live_bytes =
            self.live_bytes.checked_add(bytes).ok_or(corrupt(at, "sizes whose sum is below 2^64"))?;
        if self.live.insert(block, (id, bytes)).is_some() {
            return Err(corrupt(at, "an allocation that is not live already"));
        }
        self.trace.peak_live = self.trace.peak_live.max(self.live_bytes);
        self.trace.events.push(Event::Alloc { id, stream, bytes });
        Ok(())
    }

    /// A free; `false` where the block is not live.
    fn free(&mut self, block: &Block, stream: u64, at: usize) -> Result<bool> {
        let Some((id, bytes)) = self.live.remove(block) else { return Ok(false) };
        self.live_bytes -= bytes;
        let stream = self.stream(stream, at)?;
        self.trace.events.push(Event::Free { id, stream });
        Ok(true)
    }

    fn finish(self) -> Result<Trace> {
        if self.trace.events.is_empty() {
            return Err(corrupt(0, "a trace with at least one allocation"));
        }
        Ok(self.trace)
    }
}

/// What a gzip file holds, and whether that is all of it; `None` for files that are none.
fn unpacked(bytes: &[u8]) -> Option<(Vec<u8>, bool)> {
    const GZIP: [u8; 2] = [0x1F, 0x8B];
    bytes.starts_with(&GZIP).then(|| {
        let mut plain = Vec::new();
        let whole = flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut plain).is_ok();
        (plain, whole)
    })
}

#[cold]
fn corrupt(at: usize, what: &'static str) -> Error {
    Error::Corrupt { at: at as u64, what, found: None }
}

#[cfg(test)]
mod tests;

//! What opening does with the log: finish what was committed, forget what was not.

#![forbid(unsafe_code)]

use super::format::{BITMAP, Checksum, Header, LANE_FIELDS, LANE_HEADER, LANE_SIZE, PAGE, SUPER, ShortHead};
use super::journal::{Op, header_sum, parse, short_sum, sum_of};
use crate::base::error::{Error, Result};

/// Where words are read from: a mapping, or the bytes of a file.
pub(crate) trait Words {
    /// Fills `words` from `offset` on, all of which lies in the file.
    fn read(&self, offset: u64, words: &mut [u64]);
}

impl Words for super::media::Media {
    fn read(&self, offset: u64, words: &mut [u64]) {
        self.load_words(offset, words);
    }
}

/// A whole record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) lane: u32,
    pub(crate) sequence: u64,
    pub(crate) settled: u64,
    pub(crate) group: u64,
    pub(crate) counters: [u64; 4],
    pub(crate) body: Vec<u64>,
}

/// What the log holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    /// Records to apply, in their order.
    pub(crate) records: Vec<Record>,
    /// Lanes with a record, to be cleared afterwards.
    pub(crate) used: Vec<u32>,
    /// Lanes whose record was not written to its end: their transactions never happened.
    pub(crate) torn: Vec<u32>,
    /// The counters as of the last record that has any.
    pub(crate) counters: Option<[u64; 4]>,
}

impl Log {
    /// The used lanes: those of the last group, and before them all others.
    pub(crate) fn lanes(&self) -> (Vec<u32>, Vec<u32>) {
        let last = self.records.iter().map(|record| record.group).max();
        let is_last = |lane: u32| self.records.iter().any(|r| r.lane == lane && Some(r.group) == last);
        let (last, earlier) = self.used.iter().partition(|&&lane| is_last(lane));
        (earlier, last)
    }
}

/// Reads every lane. A record that is not whole is no error, one that is whole and makes no sense is.
pub(crate) fn read_log(words: &impl Words, header: &Header) -> Result<Log> {
    let mut log = Log::default();
    for lane in 0..header.lanes {
        let at = header.lane(lane);
        let mut head = [0; 1 + LANE_FIELDS];
        words.read(at, &mut head);
        let [sum, fields @ ..] = head;
        let [sequence, settled, body_sum, bytes, block, group, counters @ ..] = fields;
        if sequence == 0 {
            continue;
        }
        log.used.push(lane);
        if let Some(short) = ShortHead::decode(sequence) {
            match read_short(words, header, lane, [sum, sequence], short)? {
                Some(record) => log.records.push(record),
                None => log.torn.push(lane),
            }
            continue;
        }
        if sum != header_sum(header.identity, lane, &fields) {
            log.torn.push(lane);
            continue;
        }
        let start = if block == 0 { at + LANE_HEADER } else { block };
        let limit = if block == 0 { at + LANE_SIZE } else { header.file_len() };
        let fits = start.checked_add(bytes).is_some_and(|end| end <= limit);
        if bytes == 0 || bytes % 8 != 0 || start % 8 != 0 || !fits || (block != 0 && block < header.log_end())
        {
            return Err(Error::corrupt(at, "a log record inside the file: run memory-pool check", bytes));
        }
        let mut body = vec![0; (bytes / 8) as usize];
        words.read(start, &mut body);
        if Checksum::of(header.identity, &body) != body_sum {
            log.torn.push(lane);
            continue;
        }
        check_operations(&body, header, start)?;
        log.records.push(Record { lane, sequence, settled, group, counters, body });
    }
    // The sync of the last group may not have come to its end.
    let last = log.records.iter().map(|record| record.group).max().unwrap_or(0);
    let Log { records, torn, .. } = &mut log;
    records.retain(|record| {
        let holds = |op| match op {
            Op::Check { at, len, sum } => sum_of(words, at, len) == sum,
            _ => true,
        };
        let whole = record.group < last || parse(&record.body).flatten().all(holds);
        if !whole {
            torn.push(record.lane);
        }
        whole
    });
    let counted = log.records.iter().filter(|record| record.group != 0);
    log.counters = counted.max_by_key(|record| record.sequence).map(|record| record.counters);
    let settled = log.records.iter().map(|record| record.settled).max().unwrap_or(0);
    log.records.retain(|record| record.sequence > settled);
    log.records.sort_by_key(|record| record.sequence);
    Ok(log)
}

/// A short record; `None` where it is not whole.
fn read_short(
    words: &impl Words,
    header: &Header,
    lane: u32,
    [sum, head]: [u64; 2],
    short: ShortHead,
) -> Result<Option<Record>> {
    if !short.fits() {
        return Ok(None);
    }
    let start = header.lane(lane) + ShortHead::BODY;
    let mut body = vec![0; short.words as usize];
    words.read(start, &mut body);
    if sum != short_sum(header.identity, lane, head, &body) {
        return Ok(None);
    }
    check_operations(&body, header, start)?;
    Ok(Some(Record { lane, sequence: short.sequence, settled: 0, group: 0, counters: [0; 4], body }))
}

/// A record that is whole and makes no sense is an error.
fn check_operations(body: &[u64], header: &Header, start: u64) -> Result<()> {
    if parse(body).all(|op| op.is_some_and(|op| is_inside(&op, header))) {
        return Ok(());
    }
    Err(Error::corrupt(start, "log operations inside the pool: run memory-pool check", 0))
}

/// Whether all that the operation changes lies where records may change something.
fn is_inside(op: &Op<'_>, header: &Header) -> bool {
    let inside = |at: u64, len: u64| {
        let end = at.checked_add(len);
        let within = |low: u64, high: u64| at >= low && end.is_some_and(|end| end <= high);
        at.is_multiple_of(8) && (within(SUPER, SUPER + PAGE) || within(header.log_end(), header.file_len()))
    };
    match *op {
        Op::Set { at, .. } | Op::SetBits { at, .. } | Op::ClearBits { at, .. } => inside(at, 8),
        Op::Write { at, words } => inside(at, words.len() as u64 * 8),
        Op::Check { at, len, .. } => inside(at, len),
        Op::Entry { at, bitmap, .. } => inside(at, 16) && inside(bitmap, BITMAP),
    }
}

//! The checker: walks header, log, tables, bitmaps, lists and every pointer of a file, says what is wrong and
//! what a repair would do, and does it when asked.

use core::fmt;
use std::path::Path;

use super::format::{BITMAP_WORDS, CHUNK, Entry, HEADER_AT, Header, Zone};
use super::media::{Access, Durability, Media, open_locked};
use super::pool::{PersistentPool, header_copies, header_words, read_header};
use super::recover::read_log;
use super::survey::Survey;
use crate::base::error::{Error, Result};

/// Something wrong in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// What contradicts what, and where.
    pub error: Error,
    /// What a repair would do about it; `None` where only a backup helps.
    pub repair: Option<&'static str>,
    /// Words that a repair would write, with their offsets.
    fix: Vec<(u64, u64)>,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Everything that is wrong.
    pub damages: Vec<Damage>,
    /// Live objects, and the bytes of their slots.
    pub objects: u64,
    /// Bytes of their slots.
    pub bytes: u64,
    /// Objects of the program's types that no root leads to. No damage: see `PersistentPool::reclaim`.
    pub leaked: u64,
    /// Live blocks without a type.
    pub raw: u64,
    /// Committed records that the next opening puts in place. No damage: the pool was not closed in order.
    pub pending: usize,
    /// Records that were not written to their end. No damage: their transactions never happened.
    pub torn: usize,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.damages.is_empty()
    }

    fn add(&mut self, error: Error, repair: Option<&'static str>, fix: Vec<(u64, u64)>) {
        self.damages.push(Damage { error, repair, fix });
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for damage in &self.damages {
            writeln!(f, "{}", damage.error)?;
            writeln!(f, "    repair: {}", damage.repair.unwrap_or("none; restore a backup"))?;
        }
        writeln!(f, "{} objects, {} bytes, {} raw blocks", self.objects, self.bytes, self.raw)?;
        writeln!(f, "{} not reachable from a root", self.leaked)?;
        writeln!(f, "{} records to finish, {} torn", self.pending, self.torn)?;
        match self.damages.len() {
            0 => write!(f, "whole"),
            count => write!(f, "{count} damages"),
        }
    }
}

/// Checks a pool's file. Nothing is written. An error where the file cannot be read, or is in use.
///
/// ```
/// use memory_pool::persist::{PersistentConfig, PersistentPool, check};
/// # let dir = std::env::temp_dir().join(format!("pcheck-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir).unwrap();
/// # let path = dir.join("pool");
/// PersistentPool::create(&path, PersistentConfig::new(1 << 20))?.close()?;
/// let report = check(&path)?;
/// assert!(report.is_whole(), "{report}");
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub fn check(path: impl AsRef<Path>) -> Result<CheckReport> {
    let path = path.as_ref();
    let file = open_locked(path, Access::Read)?;
    let mut report = CheckReport::default();
    let copies = header_copies(&file)?;
    let (header, _) = match Header::choose(copies[0].clone(), copies[1].clone()) {
        Ok(chosen) => chosen,
        Err(error) => {
            report.add(error, None, Vec::new());
            return Ok(report);
        }
    };
    for (copy, at) in copies.iter().zip(HEADER_AT) {
        let words = header_words(&header).into_iter().enumerate();
        let fix = || words.map(|(i, word)| (at + i as u64 * 8, word)).collect();
        match copy {
            Ok(found) if *found == header => {}
            Ok(found) => report.add(
                Error::corrupt(at + 80, "the same header as the other copy", found.generation),
                Some("the newer copy is written over it"),
                fix(),
            ),
            Err(error) => report.add(*error, Some("the whole copy is written over it"), fix()),
        }
    }
    let media = Media::map(file, header.file_len(), false, Durability::ProcessCrash)?;
    match read_log(&media, &header) {
        Ok(log) => {
            (report.pending, report.torn) = (log.records.len(), log.torn.len());
            // SAFETY: the mapping is private and ours alone.
            unsafe { super::journal::replay(&media, &log) };
        }
        Err(error) => {
            let lanes = (0..header.lanes).map(|lane| (header.lane(lane) + 8, 0)).collect();
            report.add(error, Some("all records are dropped: what they would finish is lost"), lanes);
        }
    }
    for zone in &header.zones {
        check_zone(&media, zone, &mut report);
    }
    let pool = PersistentPool::assemble_lenient(media, header, path)?;
    let survey = Survey::of(&pool.inner);
    for error in &survey.lists {
        let fix = match error {
            Error::Corrupt { at, .. } if at % 8 == 0 => vec![(*at, 0)],
            _ => Vec::new(),
        };
        report.add(*error, Some("the list ends there: the names or types behind are lost"), fix);
    }
    for &(at, target) in &survey.dangling {
        let error = Error::corrupt(at, "a pointer to a live object of its type", target);
        report.add(error, Some("the pointer becomes null"), vec![(at, 0)]);
    }
    (report.objects, report.bytes) = (survey.objects, survey.bytes);
    (report.leaked, report.raw) = (survey.leaked.len() as u64, survey.raw.len() as u64);
    Ok(report)
}

fn check_zone(media: &Media, zone: &Zone, report: &mut CheckReport) {
    let mut chunk = 0;
    while chunk < zone.chunks {
        let at = zone.entry(chunk);
        let word = media.load(at);
        let entry = Entry::decode(word, zone.chunks - chunk);
        if entry.is_none() {
            let error = Error::corrupt(at, "a table entry", word);
            report.add(error, Some("the chunk becomes free: its objects are lost"), vec![(at, 0)]);
        }
        if let Some(Entry::Run { chunks, slot }) = entry {
            let slots = u64::from(chunks) * CHUNK / u64::from(slot);
            for index in 0..BITMAP_WORDS as u64 {
                let place = zone.bitmap(chunk) + index * 8;
                let allowed = match slots.saturating_sub(index * 64) {
                    0 => 0,
                    left if left >= 64 => u64::MAX,
                    left => (1 << left) - 1,
                };
                let bits = media.load(place);
                // Words behind the last slot are never read, so only the one with slots in it counts.
                if allowed != 0 && bits & !allowed != 0 {
                    let error = Error::corrupt(place, "no bit behind the last slot", bits);
                    report.add(error, Some("the bits are cleared"), vec![(place, bits & allowed)]);
                }
            }
        }
        let covered = match entry {
            Some(Entry::Run { chunks, .. } | Entry::Large { chunks }) => chunks,
            _ => 1,
        };
        for rest in 1..covered {
            let at = zone.entry(chunk + rest);
            let word = media.load(at);
            if word != 0 {
                let error = Error::corrupt(at, "no entry inside a run or object", word);
                report.add(error, Some("the entry is cleared"), vec![(at, 0)]);
            }
        }
        chunk += covered;
    }
}

/// Checks a file and repairs what can be repaired; returns what was wrong. A file without damage is not
/// written to. Make a copy of the file before.
pub fn repair(path: impl AsRef<Path>) -> Result<CheckReport> {
    let path = path.as_ref();
    let report = check(path)?;
    if report.damages.iter().all(|damage| damage.fix.is_empty()) {
        return Ok(report);
    }
    let file = open_locked(path, Access::Write)?;
    let (header, _) = read_header(&file)?;
    let media = Media::map(file, header.file_len(), true, Durability::Power)?;
    // What is pending comes first: the fixes are for the file as the log leaves it.
    if let Ok(log) = read_log(&media, &header) {
        // SAFETY: the file is ours alone.
        unsafe { super::journal::replay(&media, &log) };
        media.sync()?;
        let (earlier, last) = log.lanes();
        let places = |lanes: Vec<u32>| lanes.into_iter().map(|lane| header.lane(lane));
        // SAFETY: the file is ours alone, and the records are in place for good.
        unsafe { super::journal::clear_lanes(&media, places(earlier), places(last))? };
    }
    for &(at, word) in report.damages.iter().flat_map(|damage| &damage.fix) {
        if at.checked_add(8).is_some_and(|end| end <= media.len()) {
            // SAFETY: the file is ours alone.
            unsafe { media.store(at, word) };
        }
    }
    media.sync()?;
    Ok(report)
}

/// What is in a file, for a person to read.
pub fn dump(path: impl AsRef<Path>, out: &mut impl fmt::Write) -> Result<()> {
    let path = path.as_ref();
    let (header, _) = read_header(&open_locked(path, Access::Read)?)?;
    let pool = PersistentPool::open_any_layout(path)?;
    let survey = Survey::of(&pool.inner);
    let mut counts = std::collections::BTreeMap::<u64, (u64, u64)>::new();
    pool.inner.table.for_each(&pool.inner.media, |object| {
        let count = counts.entry(object.fingerprint).or_default();
        *count = (count.0 + 1, count.1 + object.size);
        true
    });
    let mut write = || -> fmt::Result {
        writeln!(
            out,
            "layout \"{}\", identity {:#x}, created {}",
            header.layout, header.identity, header.created
        )?;
        writeln!(
            out,
            "{} bytes, {} lanes, header generation {}",
            header.file_len(),
            header.lanes,
            header.generation
        )?;
        for zone in &header.zones {
            writeln!(out, "zone at {:#x}: {} chunks of {} KiB", zone.start, zone.chunks, CHUNK >> 10)?;
        }
        for (name, target, kind) in &survey.roots {
            let kind = survey.types.get(kind).map_or("?", |info| info.name.as_str());
            writeln!(out, "root \"{name}\": {kind} at {target:#x}")?;
        }
        for (fingerprint, (count, bytes)) in &counts {
            let name = match fingerprint {
                1 => "raw block",
                2 => "root record",
                3 => "type record",
                _ => survey.types.get(fingerprint).map_or("?", |info| info.name.as_str()),
            };
            writeln!(out, "{count} of {name} ({fingerprint:#x}), {bytes} bytes")?;
        }
        writeln!(out, "{} not reachable from a root", survey.leaked.len())
    };
    write().map_err(|_| Error::refused("the text could not be written", "write it somewhere else"))
}

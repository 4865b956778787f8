//! Files of persistent pools for the fuzzer to change, with the checksums of the format written anew from its
//! description, so that the targets reach what lies behind them.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::OnceLock;

use memory_pool::persist::{
    Durability, PHashMap, PString, PVec, PersistentConfig, PersistentPool, check, dump, repair,
};

pub const PAGE: usize = 4096;
pub const SUPER: usize = 2 * PAGE;
pub const LOG: usize = 4 * PAGE;
const LANE: usize = 4096;

struct Made {
    path: PathBuf,
    bytes: Vec<u8>,
    identity: u64,
}

/// A pool with a vector, a map of texts and a large object, made once.
fn made() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| {
        let shm = PathBuf::from("/dev/shm");
        let folder = if shm.is_dir() { shm } else { std::env::temp_dir() };
        let path = folder.join(format!("memory-pool-fuzz-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let config = PersistentConfig::new(1500 << 10).layout("fuzz").durability(Durability::ProcessCrash);
        let pool = PersistentPool::create(&path, config).unwrap();
        let filled = pool.transaction(|tx| {
            let numbers = PVec::<u64>::new(tx)?;
            numbers.extend_from_slice(tx, &[1, 2, 3])?;
            tx.set_root("numbers", &numbers)?;
            let map = PHashMap::<u32, PString>::new(tx)?;
            for key in 0..20 {
                map.insert(tx, key, PString::new(tx, &"text".repeat(key as usize))?)?;
            }
            tx.set_root("map", &map)?;
            let large = tx.alloc([7u64; 9000])?;
            tx.set_root("large", &large)
        });
        filled.unwrap();
        let identity = pool.identity();
        pool.close().unwrap();
        Made { bytes: std::fs::read(&path).unwrap(), path, identity }
    })
}

/// A copy of that pool's file.
pub struct Image {
    bytes: Vec<u8>,
    pub identity: u64,
}

impl Image {
    pub fn whole() -> Self {
        Self { bytes: made().bytes.clone(), identity: made().identity }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    pub fn truncate(&mut self, len: usize) {
        self.bytes.truncate(len);
    }

    /// Checks, dumps and reads the file, which writes nothing; then opens it for writing and uses it; then
    /// repairs it.
    pub fn open_and_check(&self) {
        let path = &made().path;
        std::fs::write(path, &self.bytes).unwrap();
        if let Ok(report) = check(path) {
            assert!(!report.to_string().is_empty());
        }
        let _ = dump(path, &mut String::new());
        if let Ok(pool) = PersistentPool::open_any_layout(path) {
            read_all(&pool);
        }
        assert!(std::fs::read(path).unwrap() == self.bytes, "reading wrote to the file");
        if let Ok(pool) = PersistentPool::open(path, "fuzz") {
            read_all(&pool);
            let _ = pool.transaction(|tx| {
                tx.root_handle::<PVec<u64>>("numbers")?.push(tx, 9)?;
                tx.root_handle::<PHashMap<u32, PString>>("map")?.remove(tx, &3).map(drop)
            });
            let _ = pool.leaks().and_then(|leaks| pool.reclaim(&leaks));
            let _ = pool.stats();
        }
        std::fs::write(path, &self.bytes).unwrap();
        let _ = repair(path);
    }
}

/// Reads everything there is; errors are fine.
fn read_all(pool: &PersistentPool) {
    let _ = pool.read(|r| {
        for name in r.root_names() {
            if let Ok(numbers) = r.root_handle::<PVec<u64>>(&name) {
                let _ = numbers.as_slice(r).map(|all| all.iter().fold(0u64, |a, &b| a.wrapping_add(b)));
            }
            if let Ok(map) = r.root_handle::<PHashMap<u32, PString>>(&name) {
                let _ = map.for_each(r, |_, text| {
                    let _ = text.as_str(r).map(|text| text.len());
                    true
                });
                (0..20).for_each(|key| _ = map.get(r, &key).map(|found| found.is_some()));
            }
            let _ = r.root::<[u64; 9000]>(&name).map(|large| large[8999]);
        }
        r.for_each::<[u64; 9000]>(|_, _| true)
    });
}

/// Changes words of `range`: three bytes say which and by how much it moves, eight what it becomes.
pub fn patch(bytes: &mut [u8], range: Range<usize>, mut script: &[u8]) {
    while let Some((&[how, low, high], rest)) = script.split_first_chunk() {
        let Some((value, rest)) = rest.split_first_chunk::<8>() else { return };
        script = rest;
        let words = range.len() / 8;
        let near = usize::from(low) | usize::from(high) << 8;
        // Near the beginning, where most structures are, or anywhere.
        let word = if how & 1 == 0 { near % words.min(4096) } else { near * 31 % words };
        let at = range.start + word * 8;
        let old = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let value = u64::from_le_bytes(*value);
        let new = match how >> 1 & 3 {
            0 => value,
            1 => old ^ 1 << (value % 64),
            2 => old.wrapping_add(value as i8 as u64),
            _ => value % (bytes.len() as u64 + 64),
        };
        bytes[at..at + 8].copy_from_slice(&new.to_le_bytes());
    }
}

/// Operands from bytes: each begins with a byte that says whether it is a small kind, a place in the file, a
/// value of eight bytes, or a kind with a length.
pub fn words(mut script: &[u8], file_len: u64) -> Vec<u64> {
    let mut words = Vec::new();
    while let Some((&[how, a, b], rest)) = script.split_first_chunk() {
        script = rest;
        let small = u64::from(a) | u64::from(b) << 8;
        words.push(match how & 3 {
            0 => small % 8,
            1 => small * 8 % (file_len + 64),
            2 => 4 | (small % 64) << 35 | u64::from(how >> 7) << 1,
            _ => match rest.split_first_chunk::<8>() {
                Some((value, rest)) => {
                    script = rest;
                    u64::from_le_bytes(*value)
                }
                None => small << 48 | small,
            },
        });
    }
    words
}

/// The checksum that the format describes.
fn checksum(seed: u64, words: impl IntoIterator<Item = u64>) -> u64 {
    let (mut sum, mut place) = (0u64, seed ^ 0x6D70_6F6F_6C73_756D);
    for word in words {
        let mixed = (word ^ place).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        sum = sum.rotate_left(7).wrapping_add(mixed ^ mixed >> 32);
        place = place.wrapping_add(0xD1B5_4A32_D192_ED03);
    }
    let mixed = (sum ^ place >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (mixed ^ mixed >> 29).max(1)
}

/// Makes the checksum of the header at `at` right.
pub fn seal_header(bytes: &mut [u8], at: usize) {
    let words = bytes[at..at + 4088].chunks_exact(8);
    let sum = checksum(0, words.map(|word| u64::from_le_bytes(word.try_into().unwrap())));
    bytes[at + 4088..at + PAGE].copy_from_slice(&sum.to_le_bytes());
}

/// A record of the log.
pub struct Record {
    pub sequence: u64,
    pub settled: u64,
    pub group: u64,
    pub body: Vec<u64>,
}

impl Record {
    /// Writes it into a lane, with checksums that hold; `wrong_len`: its length is not that of its body. Some are short
    /// records.
    pub fn write(&self, log: &mut [u8], identity: u64, lane: usize, wrong_len: bool) {
        let mut put = |words: &mut dyn Iterator<Item = u64>| {
            for (i, word) in words.enumerate() {
                let at = lane * LANE + i * 8;
                log[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
        };
        if self.settled == 6 {
            let body = &self.body[..self.body.len().min(LANE / 8 - 2)];
            let len = body.len() as u64 + if wrong_len { self.group } else { 0 };
            let head = 1 << 63 | (len & 0x3FF) << 52 | self.sequence;
            let sum = checksum(identity ^ lane as u64, [head].into_iter().chain(body.iter().copied()));
            return put(&mut [sum, head].into_iter().chain(body.iter().copied()));
        }
        let body = &self.body[..self.body.len().min(LANE / 8 - 12)];
        let body_sum = checksum(identity, body.iter().copied());
        let len = body.len() as u64 * 8 + if wrong_len { self.group * 8 } else { 0 };
        let block = if self.settled == 7 { self.group << 12 } else { 0 };
        let fields = [self.sequence, self.settled, body_sum, len, block, self.group, self.sequence, len, 1, 2];
        let head = std::iter::once(checksum(identity ^ lane as u64, fields)).chain(fields);
        put(&mut head.chain(std::iter::once(0)).chain(body.iter().copied()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_hold_and_records_are_applied() {
        let mut image = Image::whole();
        let whole = image.bytes().to_vec();
        seal_header(image.bytes(), 0);
        assert_eq!(image.bytes(), whole);
        // The counter of recoveries, which only a whole record changes.
        let body = vec![1, SUPER as u64 + 24 + 8, 41];
        let record = Record { sequence: 5, settled: 0, group: 0, body };
        let identity = image.identity;
        record.write(&mut image.bytes()[LOG..], identity, 3, false);
        std::fs::write(&made().path, image.bytes()).unwrap();
        let pool = PersistentPool::open(&made().path, "fuzz").unwrap();
        assert_eq!(pool.recovered_records(), 1);
    }
}

//! Faults and damaged files: a failed sync, a full disk, and files with anything in them.

use std::fs;

use core::sync::atomic::Ordering;

use super::crash::{Folder, Random};
use super::format::{CHUNK, Checksum, ENTRY, LANE_HEADER, LANE_SIZE, LOG, PAGE, SUPER, ShortHead};
use super::journal::{header_sum, short_sum};
use super::*;
use crate::base::error::{Error, Refusal};

fn filled(folder: &Folder, durability: Durability) -> PersistentPool {
    let config = PersistentConfig::new(1500 << 10).layout("damage").durability(durability);
    let pool = PersistentPool::create(folder.0.join("pool"), config).unwrap();
    pool.transaction(|tx| {
        let numbers = PVec::<u64>::new(tx)?;
        numbers.extend_from_slice(tx, &[1, 2, 3])?;
        tx.set_root("numbers", &numbers)?;
        let map = PHashMap::<u32, PString>::new(tx)?;
        for key in 0..40 {
            map.insert(tx, key, PString::new(tx, &"text".repeat(key as usize % 20))?)?;
        }
        tx.set_root("map", &map)?;
        let flag = tx.alloc(true)?;
        tx.set_root("flag", &flag)?;
        let large = tx.alloc([7u64; 9000])?;
        tx.set_root("large", &large)
    })
    .unwrap();
    pool
}

/// Reads everything there is; errors are fine, anything else is not.
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
                for key in 0..40 {
                    let _ = map.get(r, &key).map(|found| found.is_some());
                }
            }
            let _ = r.root::<bool>(&name).map(|flag| u8::from(*flag));
            let _ = r.root::<[u64; 9000]>(&name).map(|large| large[8999]);
        }
        r.for_each::<bool>(|_, _| true)
    });
}

#[test]
fn a_failed_sync_poisons_and_the_next_opening_is_before_or_after() {
    for fail_at in 0..6 {
        let folder = Folder::new(&format!("poison-{fail_at}"));
        let pool = filled(&folder, Durability::Power);
        pool.inner.media.trace.fail_sync.store(fail_at, Ordering::Relaxed);
        let push = |n| pool.transaction(|tx| tx.root_handle::<PVec<u64>>("numbers")?.push(tx, n));
        let mut done = vec![1, 2, 3];
        let error = loop {
            match push(done.len() as u64 + 1) {
                Ok(()) => done.push(done.len() as u64 + 1),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::Io(_) | Error::InvalidOperation(Refusal::Poisoned)), "{error}");
        assert_eq!(push(99), Err(Error::InvalidOperation(Refusal::Poisoned)));
        assert_eq!(pool.grow(1), Err(Error::InvalidOperation(Refusal::Poisoned)));
        // What was committed can still be read.
        let read = |pool: &PersistentPool| {
            pool.read(|r| Ok(r.root_handle::<PVec<u64>>("numbers")?.as_slice(r)?.to_vec())).unwrap()
        };
        assert_eq!(read(&pool), done);
        let path = pool.path().to_owned();
        drop(pool);
        let found = read(&PersistentPool::open(&path, "damage").unwrap());
        let after = done.len() as u64 + 1;
        assert!(
            found == done || (found[..done.len()] == done && found[done.len()..] == [after]),
            "{found:?}"
        );
    }
}

#[test]
fn a_full_disk_is_an_error_and_costs_nothing() {
    let folder = Folder::new("full");
    let pool = filled(&folder, Durability::ProcessCrash);
    pool.inner.media.trace.fail_back.store(0, Ordering::Relaxed);
    let failed = pool.transaction(|tx| tx.alloc([1u64; 1000]));
    assert!(matches!(failed, Err(Error::OutOfMemory { .. })), "{failed:?}");
    pool.transaction(|tx| tx.alloc([1u64; 1000]).map(drop)).unwrap();
    read_all(&pool);
}

/// Damages of a file that keep its checksums right where there are any, so that what is behind them is
/// reached.
fn damage(bytes: &mut [u8], random: &mut Random, identity: u64) {
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let some = [0, 1, 8, 16, 0xFFFF_FFFF, u64::MAX, 1 << 63, CHUNK, SUPER];
    for _ in 0..1 + random.below(4) {
        let zone = (LOG + 16 * LANE_SIZE) as usize;
        let value = match random.below(3) {
            0 => some[random.below(some.len())],
            1 => random.below(bytes.len()) as u64,
            _ => (random.below(1 << 30) as u64) << random.below(34),
        };
        let at = match random.below(6) {
            0 => random.below(PAGE as usize / 8) * 8,
            1 => SUPER as usize + random.below(10) * 8,
            2 => LOG as usize + random.below(40) * 8,
            3 => zone + random.below(24 * ENTRY as usize / 8) * 8,
            4 => zone + random.below(6000 / 8) * 8,
            _ => random.below(bytes.len() / 8 - 1) * 8,
        };
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        if at < PAGE as usize {
            let sum = (0..511).fold(Checksum::new(0), |sum, i| sum.add(word(bytes, i * 8))).finish();
            bytes[4088..4096].copy_from_slice(&sum.to_le_bytes());
            let (first, second) = bytes.split_at_mut(PAGE as usize);
            second[..PAGE as usize].copy_from_slice(first);
        }
        // A record with checksums that hold.
        let lane = LOG as usize;
        let room = |header: u64| (LANE_SIZE - header) as usize / 8;
        let body = |bytes: &[u8], header: u64, words: usize| -> Vec<u64> {
            (0..words).map(|i| word(bytes, lane + header as usize + i * 8)).collect()
        };
        match random.below(4) {
            0 => {
                let body =
                    body(bytes, LANE_HEADER, 1 + random.below(room(LANE_HEADER)).min(random.below(64)));
                let (sum, len, last) =
                    (Checksum::of(identity, &body), body.len() as u64 * 8, random.below(2));
                let fields = [5, 0, sum, len, 0, last as u64, value, value, 1, 2];
                let words = [&[header_sum(identity, 0, &fields)], &fields[..]].concat();
                bytes[lane..][..words.len() * 8].copy_from_slice(bytemuck::cast_slice(&words));
            }
            1 => {
                let short = ShortHead { words: 1 + random.below(32) as u64, sequence: 5 };
                let body = body(bytes, ShortHead::BODY, short.words as usize);
                let head = short.encode().unwrap();
                let words = [short_sum(identity, 0, head, &body), head];
                bytes[lane..][..16].copy_from_slice(bytemuck::cast_slice(&words));
            }
            _ => {}
        }
    }
}

#[test]
fn files_with_anything_in_them_never_crash_open_or_check() {
    let folder = Folder::new("anything");
    let pool = filled(&folder, Durability::ProcessCrash);
    let (path, identity) = (pool.path().to_owned(), pool.identity());
    pool.close().unwrap();
    let whole = fs::read(&path).unwrap();
    let rounds = if std::env::var_os("MEMORY_POOL_LONG_TESTS").is_some() { 40_000 } else { 600 };
    let mut random = Random(4711);
    let (mut opened, mut whole_ones, mut repaired) = (0, 0, 0);
    for round in 0..rounds {
        let mut bytes = whole.clone();
        damage(&mut bytes, &mut random, identity);
        if random.below(20) == 0 {
            bytes.truncate(random.below(bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(report) = check(&path) {
            whole_ones += u32::from(report.is_whole());
            assert!(!report.to_string().is_empty());
        }
        if let Ok(pool) = PersistentPool::open_any_layout(&path) {
            read_all(&pool);
        }
        assert_eq!(fs::read(&path).unwrap(), bytes, "round {round}: reading wrote");
        if let Ok(pool) = PersistentPool::open(&path, "damage") {
            opened += 1;
            read_all(&pool);
            let _ = pool.transaction(|tx| {
                let numbers = tx.root_handle::<PVec<u64>>("numbers")?;
                numbers.push(tx, 9)?;
                tx.root_handle::<PHashMap<u32, PString>>("map")?.remove(tx, &3).map(drop)
            });
            let _ = pool.leaks().and_then(|leaks| pool.reclaim(&leaks));
        }
        fs::write(&path, &bytes).unwrap();
        if repair(&path).is_ok() {
            let after = check(&path);
            repaired += u32::from(after.is_ok_and(|report| report.is_whole()));
        }
    }
    assert!(
        opened > rounds / 10 && whole_ones > 10 && repaired > rounds / 10,
        "{opened} {whole_ones} {repaired}"
    );
}

#[test]
fn leaks_are_listed_and_reclaimed() {
    let folder = Folder::new("leaks");
    let pool = filled(&folder, Durability::ProcessCrash);
    assert_eq!(pool.leaks().unwrap(), []);
    let lost = pool.transaction(|tx| tx.alloc([1u64; 4])).unwrap();
    let leaks = pool.leaks().unwrap();
    assert_eq!((leaks.len(), leaks[0].offset), (1, lost.offset()));
    assert_eq!(pool.reclaim(&leaks).unwrap(), 1);
    assert_eq!(pool.reclaim(&leaks).unwrap(), 0);
    assert!(pool.leaks().unwrap().is_empty() && pool.read(|r| r.get(&lost).map(drop)).is_err());
    // A whole structure whose root is gone.
    pool.transaction(|tx| tx.remove_root("map")).unwrap();
    let leaks = pool.leaks().unwrap();
    assert!(leaks.len() >= 80, "{}", leaks.len());
    assert_eq!(pool.reclaim(&leaks).unwrap(), leaks.len());
    read_all(&pool);
}

#[test]
fn a_map_agrees_with_the_standard_one() {
    let folder = Folder::new("map");
    let config = PersistentConfig::new(4 << 20).durability(Durability::ProcessCrash);
    let pool = PersistentPool::create(folder.0.join("pool"), config).unwrap();
    let map = pool.transaction(PHashMap::<u64, u32>::new).unwrap();
    let mut model = std::collections::HashMap::new();
    let mut random = Random(99);
    for _ in 0..400 {
        pool.transaction(|tx| {
            for _ in 0..20 {
                let (key, value) = (random.below(300) as u64, random.below(1 << 20) as u32);
                match random.below(4) {
                    0 => assert_eq!(map.remove(tx, &key)?, model.remove(&key)),
                    1 => assert_eq!(map.get(tx, &key)?.map(|found| *found), model.get(&key).copied()),
                    2 => {
                        if let Some(mut found) = map.get_mut(tx, &key)? {
                            *found += 1;
                            *model.get_mut(&key).unwrap() += 1;
                        }
                    }
                    _ => assert_eq!(map.insert(tx, key, value)?, model.insert(key, value)),
                }
            }
            assert_eq!(map.len(tx)?, model.len());
            Ok(())
        })
        .unwrap();
        let mut seen = 0;
        pool.read(|r| {
            map.for_each(r, |key, value| {
                seen += 1;
                model.get(key) == Some(value)
            })
        })
        .unwrap();
        assert_eq!(seen, model.len());
    }
}

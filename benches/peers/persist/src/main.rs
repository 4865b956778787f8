//! Persistent pools beside libpmemobj, redb and LMDB: one operation a transaction, all systems in turn in each
//! round, medians of the rounds.
//!
//! `persist-peers [FOLDER [MiB]]`: the folder decides the file system, the size is that of the full pools. The
//! program runs itself twice: without syncs (libpmemobj flushes caches then, and calls no msync), and with them.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use heed::types::{Bytes, U64};
use heed::{EnvFlags, EnvOpenOptions};
use memory_pool::persist::{Durability, PBox, PersistentConfig, PersistentPool};
use redb::{Database, TableDefinition};

mod pmem;

type Object = [u64; 8];
type Ours = PBox<PBox<Object>>;
const TABLE: TableDefinition<u64, &[u8]> = TableDefinition::new("bench");

/// Rows in the order of their first appearance, with what each round took.
#[derive(Default)]
struct Rows(Vec<(String, Vec<f64>)>);

impl Rows {
    /// Times `count` calls.
    fn time(&mut self, name: &str, count: usize, mut work: impl FnMut(usize)) {
        let start = Instant::now();
        (0..count).for_each(&mut work);
        self.add(name, start.elapsed().as_nanos() as f64 / count as f64);
    }

    /// Times each of `count` calls and takes their median.
    fn each(&mut self, name: &str, count: usize, mut work: impl FnMut(usize)) {
        let took = (0..count).map(|i| {
            let start = Instant::now();
            work(i);
            start.elapsed().as_nanos() as f64
        });
        let middle = median(took.collect());
        self.add(name, middle);
    }

    fn add(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|row| row.0 == name) {
            Some(row) => row.1.push(value),
            None => self.0.push((name.to_owned(), vec![value])),
        }
    }

    fn print(self, unit: &str, scale: f64) {
        for (name, rounds) in self.0 {
            println!("{name:<66} {:>9.1} {unit}", median(rounds) / scale);
        }
    }
}

fn median(mut rounds: Vec<f64>) -> f64 {
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

fn fresh(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir_all(&path);
    path
}

fn ours(folder: &Path, mib: u64, durability: Durability) -> PersistentPool {
    let config = PersistentConfig::new(mib << 20).durability(durability);
    PersistentPool::create(fresh(folder, "ours"), config).unwrap()
}

fn our_slots(pool: &PersistentPool, count: usize) -> Vec<Ours> {
    pool.transaction(|tx| (0..count).map(|_| tx.alloc(PBox::null())).collect()).unwrap()
}

fn our_insert(pool: &PersistentPool, slot: &Ours, words: Object) {
    pool.transaction(|tx| {
        let mut object = tx.reserve::<Object>()?;
        object.write(words);
        *tx.get_mut(slot)? = tx.publish(object)?;
        Ok(())
    })
    .unwrap();
}

/// One put of 64 bytes a transaction.
fn lmdb(folder: &Path, flags: EnvFlags, mut run: impl FnMut(&mut dyn FnMut(usize))) {
    let path = fresh(folder, "lmdb");
    std::fs::create_dir(&path).unwrap();
    // SAFETY: the folder is ours; without syncs a crash may cost data, which is what is measured.
    let env = unsafe { EnvOpenOptions::new().map_size(256 << 20).flags(flags).open(&path) }.unwrap();
    let mut tx = env.write_txn().unwrap();
    let table: heed::Database<U64<heed::byteorder::LE>, Bytes> = env.create_database(&mut tx, None).unwrap();
    tx.commit().unwrap();
    run(&mut |i| {
        let mut tx = env.write_txn().unwrap();
        table.put(&mut tx, &(i as u64), &[i as u8; 64]).unwrap();
        tx.commit().unwrap();
    });
}

/// The same.
fn redb(folder: &Path, durability: redb::Durability, mut run: impl FnMut(&mut dyn FnMut(usize))) {
    let database = Database::create(fresh(folder, "redb")).unwrap();
    run(&mut |i| {
        let mut tx = database.begin_write().unwrap();
        tx.set_durability(durability).unwrap();
        tx.open_table(TABLE).unwrap().insert(i as u64, &[i as u8; 64][..]).unwrap();
        tx.commit().unwrap();
    });
}

fn without_syncs(folder: &Path) {
    const COUNT: usize = 20_000;
    const FEWER: usize = 4_000;
    let mut rows = Rows::default();
    for _ in 0..7 {
        let pool = ours(folder, 64, Durability::ProcessCrash);
        let slots = our_slots(&pool, COUNT);
        let words = |i: usize| [i as u64 + 1; 8];
        rows.time("linked insert, 64 B: ours, new file", COUNT, |i| our_insert(&pool, &slots[i], words(i)));
        // Freed in a few transactions, then again where the file has its pages.
        for some in slots.chunks(1000) {
            let unlinked = pool.transaction(|tx| {
                some.iter().try_for_each(|slot| tx.free(std::mem::take(&mut *tx.get_mut(slot)?)))
            });
            unlinked.unwrap();
        }
        rows.time("linked insert, 64 B: ours, in used pages", COUNT, |i| our_insert(&pool, &slots[i], words(i)));
        let pm = pmem::Pool::create(&fresh(folder, "pmem"), 64 << 20);
        let roots = pm.slots(COUNT);
        // SAFETY: the root has so many slots.
        let slot = |i: usize| unsafe { roots.add(i) };
        let clear = || (0..FEWER).for_each(|i| pm.free(slot(i)));
        rows.time("linked insert, 64 B: libpmemobj, alloc", FEWER, |i| pm.insert(slot(i), &words(i)));
        clear();
        rows.time("linked insert, 64 B: libpmemobj, reserve + publish", FEWER, |i| pm.publish(slot(i), &words(i)));
        clear();
        rows.time("linked insert, 64 B: libpmemobj, transaction", FEWER, |i| pm.transaction(slot(i), &words(i)));
        clear();
        lmdb(folder, EnvFlags::NO_SYNC, |put| rows.time("insert, 64 B: LMDB, no sync", FEWER, put));
        let mapped = EnvFlags::NO_SYNC | EnvFlags::WRITE_MAP;
        lmdb(folder, mapped, |put| rows.time("insert, 64 B: LMDB, no sync, writable map", FEWER, put));
        redb(folder, redb::Durability::None, |put| rows.time("insert, 64 B: redb, no durability", FEWER, put));
        rows.time("alloc + free: ours, typed, a transaction each", COUNT, |i| {
            let object = pool.transaction(|tx| tx.alloc(words(i))).unwrap();
            pool.transaction(|tx| tx.free(object)).unwrap();
        });
        rows.time("alloc + free: ours, raw", COUNT, |_| {
            let block = pool.allocate(std::alloc::Layout::new::<Object>()).unwrap();
            // SAFETY: just allocated, and not used after.
            unsafe { pool.deallocate(block.cast()) };
        });
        rows.time("alloc + free: libpmemobj", FEWER, |_| pm.pair(slot(0)));
    }
    println!("no sync (libpmemobj: flush instructions)");
    rows.print("ns", 1.0);
}

fn with_syncs(folder: &Path) {
    const COUNT: usize = 150;
    let mut rows = Rows::default();
    let (mut syncs, mut records) = (0, 0);
    for round in 0..5 {
        let path = fresh(folder, "bare");
        let mut file = File::create(&path).unwrap();
        (0..1024).for_each(|_| file.write_all(&[1; 4096]).unwrap());
        file.sync_all().unwrap();
        rows.each("bare fdatasync of one dirty page", COUNT, |i| {
            file.write_all_at(&i.to_le_bytes(), (i as u64 * 37 % 1024) * 4096).unwrap();
            file.sync_data().unwrap();
        });
        let pool = ours(folder, 64, Durability::Power);
        let slots = our_slots(&pool, COUNT);
        let before = (pool.sync_count(), pool.record_count());
        rows.each("linked insert, 64 B: ours", COUNT, |i| our_insert(&pool, &slots[i], [i as u64 + 1; 8]));
        rows.each("change of one word: ours", COUNT, |i| {
            pool.transaction(|tx| tx.set(&slots[i], PBox::null())).unwrap();
        });
        (syncs, records) = (syncs + pool.sync_count() - before.0, records + pool.record_count() - before.1);
        let pm = pmem::Pool::create(&fresh(folder, "pmem"), 64 << 20);
        let roots = pm.slots(COUNT);
        // SAFETY: the root has so many slots.
        let slot = |i: usize| unsafe { roots.add(i) };
        let words = |i: usize| [i as u64 + round; 8];
        rows.each("linked insert, 64 B: libpmemobj, alloc", COUNT, |i| pm.insert(slot(i), &words(i)));
        rows.each("linked insert, 64 B: libpmemobj, transaction", COUNT, |i| pm.transaction(slot(i), &words(i)));
        drop(pm);
        lmdb(folder, EnvFlags::empty(), |put| rows.each("insert, 64 B: LMDB", COUNT, put));
        redb(folder, redb::Durability::Immediate, |put| rows.each("insert, 64 B: redb, immediate", COUNT, put));
    }
    println!("\nsync at each commit");
    rows.print("µs", 1e3);
    println!("ours: {:.2} syncs a transaction", syncs as f64 / records as f64);
}

fn full(folder: &Path, mib: u64) {
    let mut rows = Rows::default();
    let pool = ours(folder, mib, Durability::ProcessCrash);
    let (mut count, mut last) = (0u64, PBox::null());
    for batch in [1000, 1] {
        let fill = || pool.transaction(|tx| (0..batch).try_fold(PBox::null(), |_, i| tx.alloc([i; 8])));
        while let Ok(made) = fill() {
            (count, last) = (count + batch, made);
        }
    }
    println!("\nfull pools of {mib} MiB, 64-byte objects");
    let overhead = |count: u64| ((mib << 20) as f64 / count as f64 / 64.0 - 1.0) * 100.0;
    println!("ours: {count} objects, {:.2} % overhead", overhead(count));
    pool.close().unwrap();
    let path = fresh(folder, "pmem");
    let pm = pmem::Pool::create(&path, (mib << 20) as usize);
    let pm_count = pm.fill(pm.class());
    println!("libpmemobj: {pm_count} objects, {:.2} % overhead", overhead(pm_count));
    drop(pm);
    for _ in 0..5 {
        let start = Instant::now();
        let pool = PersistentPool::open(folder.join("ours"), "").unwrap();
        rows.add("open: ours", start.elapsed().as_nanos() as f64);
        pool.transaction(|tx| tx.free(last)).unwrap();
        last = pool.transaction(|tx| tx.alloc([1; 8])).unwrap();
        rows.add("open, first free, first allocation: ours", start.elapsed().as_nanos() as f64);
        let start = Instant::now();
        let mut sum = 0u64;
        let walked = pool.read(|r| {
            r.for_each::<Object>(|_, object| {
                sum = sum.wrapping_add(object[0]);
                true
            })
        });
        walked.unwrap();
        // Scaled so that the unit is the same: ns an object, printed as ms.
        rows.add("iterate (ns an object): ours", start.elapsed().as_nanos() as f64 / count as f64 * 1e6);
        assert!(sum > 0);
        pool.close().unwrap();
        let start = Instant::now();
        let pm = pmem::Pool::open(&path);
        rows.add("open: libpmemobj", start.elapsed().as_nanos() as f64);
        pm.first();
        rows.add("open, first free, first allocation: libpmemobj", start.elapsed().as_nanos() as f64);
        let start = Instant::now();
        assert!(pm.iterate() > 0);
        let each = start.elapsed().as_nanos() as f64 / pm_count as f64;
        rows.add("iterate (ns an object): libpmemobj", each * 1e6);
    }
    rows.print("ms", 1e6);
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let mib: u64 = arguments.next().map_or(256, |mib| mib.parse().expect("a number of MiB"));
    let own = folder.join(format!("persist-peers-{}", std::process::id()));
    if let Some(part) = arguments.next() {
        match part.as_str() {
            "without" => without_syncs(&folder),
            "with" => with_syncs(&folder),
            _ => full(&folder, mib),
        }
        return;
    }
    std::fs::create_dir_all(&own).unwrap();
    // The library looks at its environment when it is loaded.
    for (part, forced) in [("without", "1"), ("with", "0"), ("full", "1")] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.arg(&own).arg(mib.to_string()).arg(part).env("PMEM_IS_PMEM_FORCE", forced);
        assert!(child.status().unwrap().success(), "{part} failed");
    }
    std::fs::remove_dir_all(&own).unwrap();
}

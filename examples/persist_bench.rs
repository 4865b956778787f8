//! Figures of persistent pools: `cargo run --release --example persist_bench [FOLDER] [MiB]`.
//!
//! Medians of several rounds. The folder decides the file system; the default pool is small, so that the
//! example ends in seconds, and 1024 gives the figures of `benches/RESULTS.md`.

use std::alloc::Layout;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use memory_pool::persist::{Durability, PBox, PersistentConfig, PersistentPool};

type Object = [u64; 8];

fn median(mut rounds: Vec<f64>) -> f64 {
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

fn per(count: usize, took: Duration) -> f64 {
    took.as_nanos() as f64 / count as f64
}

fn create(path: &Path, mib: u64, durability: Durability) -> memory_pool::Result<PersistentPool> {
    let _ = std::fs::remove_file(path);
    PersistentPool::create(path, PersistentConfig::new(mib << 20).durability(durability))
}

fn process_crash(path: &Path) -> memory_pool::Result<()> {
    const COUNT: usize = 20_000;
    let (mut linked, mut rooted, mut typed, mut raw) = (vec![], vec![], vec![], vec![]);
    for _ in 0..7 {
        let pool = create(path, 64, Durability::ProcessCrash)?;
        let start = Instant::now();
        for i in 0..COUNT as u64 {
            pool.transaction(|tx| {
                let object = tx.alloc([i; 8])?;
                tx.set_root("latest", &object)
            })?;
        }
        rooted.push(per(COUNT, start.elapsed()));
        let slots: Vec<PBox<PBox<Object>>> =
            pool.transaction(|tx| (0..COUNT).map(|_| tx.alloc(PBox::<Object>::null())).collect())?;
        let start = Instant::now();
        for (i, slot) in slots.iter().enumerate() {
            pool.transaction(|tx| {
                let mut object = tx.reserve::<Object>()?;
                object.write([i as u64; 8]);
                *tx.get_mut(slot)? = tx.publish(object)?;
                Ok(())
            })?;
        }
        linked.push(per(COUNT, start.elapsed()));
        let start = Instant::now();
        for i in 0..COUNT as u64 {
            let object = pool.transaction(|tx| tx.alloc([i; 8]))?;
            pool.transaction(|tx| tx.free(object))?;
        }
        typed.push(per(COUNT, start.elapsed()));
        let start = Instant::now();
        for _ in 0..COUNT {
            let block = pool.allocate(Layout::new::<Object>())?;
            // SAFETY: just allocated, and not used after.
            unsafe { pool.deallocate(block.cast()) };
        }
        raw.push(per(COUNT, start.elapsed()));
    }
    println!("process crash: reserve + write + publish, linked from an object  {:8.0} ns", median(linked));
    println!("               the same, linked from a named root               {:8.0} ns", median(rooted));
    println!("               typed alloc + free, a transaction each           {:8.0} ns", median(typed));
    println!("               raw allocate + deallocate                        {:8.0} ns", median(raw));
    Ok(())
}

fn bare_fdatasync(path: &Path) -> std::io::Result<f64> {
    let mut file = File::options().create(true).truncate(true).read(true).write(true).open(path)?;
    for _ in 0..1024 {
        file.write_all(&[1; 4096])?;
    }
    file.sync_all()?;
    let mut rounds = Vec::new();
    for i in 0..200u64 {
        let start = Instant::now();
        file.write_all_at(&i.to_le_bytes(), i * 37 % 1024 * 4096)?;
        file.sync_data()?;
        rounds.push(start.elapsed().as_nanos() as f64);
    }
    Ok(median(rounds))
}

fn power(path: &Path) -> memory_pool::Result<()> {
    let bare_path = path.with_extension("bare");
    let pool = create(path, 64, Durability::Power)?;
    let number = pool.transaction(|tx| tx.alloc(0u64))?;
    let (mut bare, mut changes, mut inserts) = (vec![], vec![], vec![]);
    let before = (pool.sync_count(), pool.record_count());
    for round in 0..5 {
        bare.push(bare_fdatasync(&bare_path).unwrap_or(f64::NAN));
        let mut took = Vec::new();
        for i in 0..200u64 {
            let start = Instant::now();
            pool.transaction(|tx| tx.set(&number, 1 + i + round * 200))?;
            took.push(start.elapsed().as_nanos() as f64);
        }
        changes.push(median(took));
        let mut took = Vec::new();
        for i in 0..200u64 {
            let start = Instant::now();
            pool.transaction(|tx| {
                let object = tx.alloc([i; 8])?;
                tx.set_root("latest", &object)
            })?;
            took.push(start.elapsed().as_nanos() as f64);
        }
        inserts.push(median(took));
    }
    let (syncs, records) = (pool.sync_count() - before.0, pool.record_count() - before.1);
    let bare = median(bare);
    println!("power:         bare fdatasync of one dirty page                 {:8.1} µs", bare / 1e3);
    for (what, took) in
        [("change of one word    ", median(changes)), ("64-byte insert, linked", median(inserts))]
    {
        println!(
            "               {what}                           {:8.1} µs ({:.2} × bare)",
            took / 1e3,
            took / bare
        );
    }
    println!(
        "               syncs a transaction                              {:8.2}",
        syncs as f64 / records as f64
    );
    const THREADS: u64 = 8;
    const EACH: u64 = 300;
    let before = (pool.sync_count(), pool.record_count());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let pool = &pool;
            scope.spawn(move || {
                let own = pool.transaction(|tx| tx.alloc(0u64)).unwrap_or_default();
                (1..EACH).for_each(|i| {
                    pool.transaction(|tx| tx.set(&own, i * 8 + thread)).unwrap_or_default();
                });
            });
        }
    });
    let commits = pool.record_count() - before.1;
    println!(
        "               8 threads: {:.1} commits a sync, {:.1} µs a commit",
        commits as f64 / (pool.sync_count() - before.0) as f64,
        start.elapsed().as_nanos() as f64 / 1e3 / commits as f64
    );
    drop(pool);
    let _ = std::fs::remove_file(bare_path);
    Ok(())
}

fn full_pool(path: &Path, mib: u64) -> memory_pool::Result<()> {
    let pool = create(path, mib, Durability::ProcessCrash)?;
    let mut count = 0u64;
    let mut last = PBox::null();
    // In batches, and one by one when a batch no longer fits.
    for batch in [1000, 1] {
        let fill =
            |count| pool.transaction(|tx| (0..batch).try_fold(PBox::null(), |_, i| tx.alloc([count + i; 8])));
        while let Ok(made) = fill(count) {
            last = made;
            count += batch;
        }
    }
    let size = pool.size();
    pool.close()?;
    let each = size as f64 / count as f64;
    println!(
        "full pool:     {count} objects of 64 bytes in {mib} MiB: {each:.2} bytes each, {:.2} % overhead",
        (each / 64.0 - 1.0) * 100.0
    );
    let (mut opens, mut firsts, mut iterates) = (vec![], vec![], vec![]);
    for _ in 0..5 {
        let start = Instant::now();
        let pool = PersistentPool::open(path, "")?;
        opens.push(start.elapsed().as_nanos() as f64);
        pool.transaction(|tx| tx.free(last))?;
        last = pool.transaction(|tx| tx.alloc([count; 8]))?;
        firsts.push(start.elapsed().as_nanos() as f64);
        let start = Instant::now();
        let mut sum = 0;
        pool.read(|r| {
            r.for_each::<Object>(|_, object| {
                sum += object[0];
                true
            })
        })?;
        iterates.push(per(count as usize, start.elapsed()));
        assert!(sum > 0);
        pool.close()?;
    }
    println!(
        "               open                                             {:8.2} ms",
        median(opens) / 1e6
    );
    println!(
        "               open, first free and first allocation            {:8.2} ms",
        median(firsts) / 1e6
    );
    println!("               iterate, reading each                            {:8.2} ns", median(iterates));
    Ok(())
}

fn main() -> memory_pool::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let own = std::env::temp_dir().join(format!("persist-bench-{}", std::process::id()));
    let folder = arguments.next().map_or_else(|| own.clone(), Into::into);
    let mib = arguments.next().and_then(|mib| mib.parse().ok()).unwrap_or(64);
    // If this fails, creating the pool says why.
    let _ = std::fs::create_dir_all(&folder);
    let path = folder.join("bench.pool");
    process_crash(&path)?;
    power(&path)?;
    full_pool(&path, mib)?;
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&own);
    Ok(())
}

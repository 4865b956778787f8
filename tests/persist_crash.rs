//! A real process, killed at random while it works on a pool, again and again: after each kill the pool must
//! open, be whole to the checker, and hold what the process had been told was committed, and nothing torn.
//!
//! The short form makes 25 kills; `MEMORY_POOL_KILLS=1000 cargo test --release --test persist_crash` the
//! long one.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use memory_pool::persist::{Durability, PBox, PString, PVec, PersistentConfig, PersistentPool, check};

const CHILD: &str = "MEMORY_POOL_CRASH_CHILD";

memory_pool::persist_struct! {
    /// Eight words that always say the same, and the one before.
    struct Item {
        words: [u64; 8],
        next: PBox<Item>,
    }
}

/// One step: pushes an item, drops the oldest ones, notes the number everywhere.
fn step(pool: &PersistentPool, number: u64) -> memory_pool::Result<()> {
    pool.transaction(|tx| {
        let next = tx.root_handle("list").unwrap_or_default();
        let item = tx.alloc(Item { words: [number; 8], next })?;
        tx.set_root("list", &item)?;
        if number.is_multiple_of(16) {
            // Keeps the first four.
            let mut at = item;
            for _ in 0..3 {
                let next = tx.get(&at)?.next;
                if next.is_null() {
                    break;
                }
                at = next;
            }
            let mut rest = core::mem::take(&mut tx.get_mut(&at)?.next);
            while !rest.is_null() {
                let next = tx.get(&rest)?.next;
                tx.free(rest)?;
                rest = next;
            }
        }
        let numbers = tx.root_handle::<PVec<u64>>("numbers")?;
        if numbers.len(tx)? > 500 {
            numbers.truncate(tx, 3)?;
        }
        numbers.push(tx, number)?;
        let text = tx.root_handle::<PString>("text")?;
        text.set(tx, &format!("step {number} {}", "x".repeat((number % 300) as usize)))
    })
}

/// What the child does: steps until it is killed, saying which one it has done.
fn work(path: &Path) {
    let pool = PersistentPool::open(path, "kill").unwrap();
    let first = last(&pool) + 1;
    for number in first.. {
        step(&pool, number).unwrap();
        let stats = pool.stats();
        println!("done {number} {} {}", stats.allocation_count, stats.deallocation_count);
    }
}

/// The last step in a pool, which must have happened whole.
fn last(pool: &PersistentPool) -> u64 {
    pool.read(|r| {
        let numbers = r.root_handle::<PVec<u64>>("numbers")?;
        let last = numbers.as_slice(r)?.last().copied().unwrap_or(0);
        let mut at = r.root_handle::<PBox<Item>>("list").unwrap_or_default();
        let (mut expected, mut count) = (last, 0);
        while !at.is_null() {
            let item = r.get(&at)?;
            assert_eq!(item.words, [expected; 8], "a torn or lost item");
            (at, expected, count) = (item.next, expected.wrapping_sub(1), count + 1);
        }
        let items = 4 + last % 16;
        assert_eq!(count, if last < 16 { last } else { items }, "after step {last}");
        let mut live = 0;
        r.for_each::<Item>(|_, _| {
            live += 1;
            true
        })?;
        assert_eq!(live, count, "leaked or lost items");
        if last > 0 {
            let text = format!("step {last} {}", "x".repeat((last % 300) as usize));
            assert_eq!(*r.root_handle::<PString>("text")?.as_str(r)?, *text);
        }
        Ok(last)
    })
    .unwrap()
}

#[test]
fn kills_lose_nothing_that_was_committed() {
    if let Some(path) = std::env::var_os(CHILD) {
        return work(&PathBuf::from(path));
    }
    let rounds = std::env::var("MEMORY_POOL_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(25);
    let dir = std::env::temp_dir().join(format!("memory-pool-kill-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for durability in [Durability::ProcessCrash, Durability::Power] {
        let path = dir.join(format!("{durability:?}"));
        let config = PersistentConfig::new(4 << 20).layout("kill").durability(durability);
        let pool = PersistentPool::create(&path, config).unwrap();
        pool.transaction(|tx| {
            tx.set_root("numbers", &PVec::<u64>::new(tx)?)?;
            tx.set_root("text", &PString::new(tx, "")?)
        })
        .unwrap();
        let before = pool.stats();
        pool.close().unwrap();
        let (mut reached, mut recovered, mut seen) =
            (0, 0, [before.allocation_count, before.deallocation_count]);
        for round in 0..rounds / 2 + 1 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["kills_lose_nothing_that_was_committed", "--exact", "--nocapture"])
                .env(CHILD, &path)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let output = BufReader::new(child.stdout.take().unwrap());
            let (begun, begins) = std::sync::mpsc::channel();
            let reader = std::thread::spawn(move || {
                let done = |line: String| {
                    let mut numbers =
                        line.strip_prefix("done ")?.split(' ').map_while(|word| word.parse().ok());
                    Some([numbers.next()?, numbers.next()?, numbers.next()?])
                };
                let told = |_: &[u64; 3]| _ = begun.send(());
                output.lines().map_while(Result::ok).filter_map(done).inspect(told).last()
            });
            // Most are killed while they work, some while they open the pool.
            if round % 5 != 0 {
                let _ = begins.recv_timeout(Duration::from_secs(10));
            }
            std::thread::sleep(Duration::from_micros(3000 + round * 7919 % 23_000));
            child.kill().unwrap();
            child.wait().unwrap();
            let told = reader.join().unwrap();
            let [told, allocs, frees] = told.unwrap_or([0, 0, 0]);
            let report = check(&path).unwrap();
            assert!(report.is_whole() && report.leaked == 0, "round {round}\n{report}");
            let pool = PersistentPool::open(&path, "kill").unwrap();
            recovered += pool.recovered_records();
            let found = last(&pool);
            assert!(found >= told && found <= told.max(reached) + 1, "told {told}, found {found}");
            // All that had returned is counted; of the step under way all, some or nothing.
            let stats = pool.stats();
            let counted = [stats.allocation_count, stats.deallocation_count];
            let least = if told > 0 { [allocs, frees] } else { seen };
            for (counted, least) in counted.into_iter().zip(least) {
                assert!((least..=least + 24).contains(&counted), "told {told}: {counted}, {least} at least");
            }
            (reached, seen) = (found, counted);
            pool.close().unwrap();
        }
        assert!(reached > rounds, "the child did only {reached} steps");
        println!("{durability:?}: {} kills, {reached} steps, {recovered} records recovered", rounds / 2 + 1);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

//! Crashes at every point: the stores of a workload are recorded, images of the file as a crash could have
//! left it are built from them, and each is opened. What it then holds must be what the pool held before or
//! after the operation that was under way, never anything else.
//!
//! For a killed process a crash leaves a prefix of the stores. For a power failure it leaves everything up to
//! the last sync, and of what came after, each block of 8, 64, 512 or 4096 bytes as it was at any later time.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use super::format::{Counter, LANE_HEADER, LANE_SIZE, LOG, ShortHead};
use super::trace::Event;
use super::*;

/// A folder that goes away.
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    pub(super) fn new(name: &str) -> Self {
        let shm = PathBuf::from("/dev/shm");
        let base = if shm.is_dir() { shm } else { std::env::temp_dir() };
        let dir = base.join(format!("memory-pool-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Node {
    value: u64,
    pad: [u64; 5],
    next: PBox<Node>,
}

// SAFETY: words and a pointer, no padding.
unsafe impl Persist for Node {
    fn pointers(visit: &mut Pointers) {
        visit.field::<PBox<Node>>(core::mem::offset_of!(Node, next));
    }
}

const LARGE: usize = 200 << 10;
type Big = [u64; 700];
type Huge = [u8; LARGE];

/// What a pool holds: the list, the other roots, and how many objects of which type are live.
type State = (Vec<u64>, Vec<(String, u64)>, BTreeMap<u64, usize>);

fn state(pool: &PersistentPool) -> State {
    pool.read(|r| {
        let mut list = Vec::new();
        if let Ok(first) = r.root_handle::<PBox<Node>>("list") {
            let mut at = first;
            while !at.is_null() {
                let node = r.get(&at)?;
                list.push(node.value);
                at = node.next;
            }
        }
        let mut others = Vec::new();
        for name in r.root_names() {
            if let Ok(big) = r.root::<Big>(&name) {
                others.push((name, big.iter().sum()));
            } else if let Ok(huge) = r.root::<Huge>(&name) {
                others.push((name, huge.iter().map(|&byte| u64::from(byte)).sum()));
            } else if let Ok(number) = r.root::<u64>(&name) {
                others.push((name, *number));
            } else if let Ok(link) = r.root::<PBox<u64>>(&name) {
                let linked = if link.is_null() { 0 } else { *r.get(&link)? };
                others.push((name, linked));
            } else if let Ok(text) = r.root_handle::<PString>(&name) {
                others.push((text.as_str(r)?.to_owned(), 0));
            } else if let Ok(numbers) = r.root_handle::<PVec<u64>>(&name) {
                others.extend(numbers.as_slice(r)?.iter().map(|&number| (name.clone(), number)));
            }
        }
        let mut live = BTreeMap::new();
        r.for_each_object(|object| {
            *live.entry(object.fingerprint).or_default() += 1;
            true
        });
        Ok((list, others, live))
    })
    .unwrap()
}

fn push(tx: &Transaction<'_>, value: u64) -> crate::base::error::Result<()> {
    let next = tx.root_handle("list").unwrap_or_default();
    let node = tx.alloc(Node { value, pad: [value; 5], next })?;
    tx.set_root("list", &node)
}

fn pop(tx: &Transaction<'_>) -> crate::base::error::Result<()> {
    let first = tx.root_handle::<PBox<Node>>("list")?;
    let next = tx.get(&first)?.next;
    tx.free(first)?;
    if next.is_null() { tx.remove_root("list") } else { tx.set_root("list", &next) }
}

type Step = fn(&PersistentPool) -> crate::base::error::Result<()>;

/// Operations of every kind; each is one transaction, or none.
const STEPS: &[Step] = &[
    |pool| pool.transaction(|tx| push(tx, 1)),
    |pool| pool.transaction(|tx| push(tx, 2)),
    |pool| pool.transaction(|tx| (10..20).try_for_each(|n| push(tx, n))),
    |pool| pool.transaction(pop),
    // Every node changes at once.
    |pool| {
        pool.transaction(|tx| {
            let mut at = tx.root_handle::<PBox<Node>>("list")?;
            while !at.is_null() {
                let mut node = tx.get_mut(&at)?;
                node.value += 100;
                node.pad = [node.value; 5];
                at = node.next;
            }
            Ok(())
        })
    },
    // A failed one leaves nothing.
    |pool| {
        let failed = pool.transaction(|tx| {
            push(tx, 99)?;
            pop(tx)?;
            pop(tx)?;
            tx.alloc([1u64; 4])?;
            Err::<(), _>(crate::base::error::Error::refused("a test", "none"))
        });
        assert!(failed.is_err());
        Ok(())
    },
    |pool| {
        pool.transaction(|tx| {
            let number = tx.alloc(5u64)?;
            tx.set_root("number", &number)
        })
    },
    |pool| pool.transaction(|tx| tx.root_mut::<u64>("number").map(|mut number| *number = 6)),
    // Short transactions: an object alone; a link alone; an object and a link to it, or the end of both.
    |pool| pool.transaction(|tx| tx.alloc([5u16; 50]).map(drop)),
    |pool| {
        let mut found = None;
        pool.read(|r| r.for_each::<[u16; 50]>(|pointer, _| found.replace(pointer).is_some()))?;
        pool.transaction(|tx| tx.free(found.unwrap()))
    },
    |pool| {
        pool.transaction(|tx| {
            let link = tx.alloc(PBox::<u64>::null())?;
            tx.set_root("link", &link)
        })
    },
    |pool| {
        pool.transaction(|tx| {
            let link = tx.root_handle::<PBox<PBox<u64>>>("link")?;
            *tx.get_mut(&link)? = tx.alloc(77u64)?;
            Ok(())
        })
    },
    |pool| {
        pool.transaction(|tx| {
            let number = tx.root_handle::<PBox<u64>>("number")?;
            *tx.root_mut::<PBox<u64>>("link")? = number;
            Ok(())
        })
    },
    |pool| {
        pool.transaction(|tx| {
            let link = tx.root_handle::<PBox<PBox<u64>>>("link")?;
            *tx.get_mut(&link)? = tx.alloc(78u64)?;
            Ok(())
        })
    },
    |pool| {
        pool.transaction(|tx| {
            let mut link = tx.root_mut::<PBox<u64>>("link")?;
            tx.free(core::mem::take(&mut *link))
        })
    },
    // An object larger than a lane, then a change of all of it: the record goes outside the log.
    |pool| {
        pool.transaction(|tx| {
            let big = tx.alloc([7u64; 700])?;
            tx.set_root("big", &big)
        })
    },
    |pool| pool.transaction(|tx| tx.root_mut::<Big>("big").map(|mut big| *big = [9; 700])),
    |pool| {
        pool.transaction(|tx| {
            let mut huge = tx.reserve::<Huge>()?;
            huge.write([3; LARGE]);
            let huge = tx.publish(huge)?;
            tx.set_root("huge", &huge)
        })
    },
    |pool| {
        pool.transaction(|tx| {
            tx.free(tx.root_handle::<PBox<Huge>>("huge")?)?;
            tx.free(tx.root_handle::<PBox<Big>>("big")?)?;
            tx.remove_root("huge")?;
            tx.remove_root("big")
        })
    },
    |pool| {
        pool.transaction(|tx| {
            let text = PString::new(tx, "a text")?;
            tx.set_root("text", &text)?;
            let numbers = PVec::<u64>::with_capacity(tx, 20)?;
            numbers.extend_from_slice(tx, &[1, 2, 3])?;
            tx.set_root("numbers", &numbers)
        })
    },
    // Texts and vectors grow in place, behind what they hold, and elsewhere.
    |pool| pool.transaction(|tx| tx.root_handle::<PString>("text")?.push_str(tx, " that grows")),
    |pool| pool.transaction(|tx| tx.root_handle::<PString>("text")?.push_str(tx, "!")),
    |pool| {
        pool.transaction(|tx| tx.root_handle::<PVec<u64>>("numbers")?.extend_from_slice(tx, &[4, 5, 6, 7]))
    },
    |pool| {
        pool.transaction(|tx| {
            let numbers = tx.root_handle::<PVec<u64>>("numbers")?;
            numbers.push(tx, 8)?;
            numbers.set(tx, 1, 20)?;
            numbers.set(tx, 7, 80)?;
            assert_eq!((numbers.pop(tx)?, numbers.pop(tx)?), (Some(80), Some(7)));
            numbers.push(tx, 70)
        })
    },
    |pool| {
        pool.transaction(|tx| {
            let numbers = tx.root_handle::<PVec<u64>>("numbers")?;
            numbers.push(tx, 9)?;
            if let Some(mut all) = numbers.as_mut_slice(tx)? {
                all.iter_mut().for_each(|number| *number *= 2);
            }
            numbers.push(tx, 10)
        })
    },
    |pool| {
        pool.transaction(|tx| {
            tx.root_handle::<PVec<u64>>("numbers")?.truncate(tx, 2)?;
            tx.root_handle::<PString>("text")?.set(tx, "another text, and a longer one than before by far")
        })
    },
    |pool| pool.transaction(|tx| tx.root_handle::<PVec<u64>>("numbers")?.extend_from_slice(tx, &[31; 40])),
    |pool| {
        pool.transaction(|tx| {
            tx.root_handle::<PVec<u64>>("numbers")?.free(tx)?;
            tx.remove_root("numbers")
        })
    },
    // What was freed is used again.
    |pool| pool.transaction(|tx| (30..40).try_for_each(|n| push(tx, n))),
    |pool| pool.transaction(|tx| (0..15).try_for_each(|_| pop(tx))),
    |pool| {
        pool.transaction(|tx| {
            let other = tx.alloc([8u64; 700])?;
            tx.set_root("big", &other)?;
            push(tx, 41)
        })
    },
];

/// A recorded run.
struct Run {
    base: Vec<u8>,
    events: Vec<Event>,
    /// Events that had happened when each step had returned.
    ends: Vec<usize>,
    /// What the pool held before the first step and after each.
    states: Vec<State>,
    /// What it had counted by then.
    counts: Vec<[u64; 4]>,
}

const COUNTERS: [Counter; 4] = [Counter::Transactions, Counter::Allocations, Counter::Frees, Counter::Bytes];

/// What it has counted.
fn counts(pool: &PersistentPool) -> [u64; 4] {
    pool.inner.heap.lock().tally.counters()
}

fn record(folder: &Folder, durability: Durability) -> Run {
    let path = folder.0.join("recorded");
    let config = PersistentConfig::new(1500 << 10).layout("crash").durability(durability);
    let pool = PersistentPool::create(&path, config).unwrap();
    let base = fs::read(&path).unwrap();
    let (states, counts_before) = (vec![state(&pool)], vec![counts(&pool)]);
    let mut run = Run { base, events: Vec::new(), ends: Vec::new(), states, counts: counts_before };
    let trace = &pool.inner.media.trace;
    trace.start();
    for step in STEPS {
        step(&pool).unwrap();
        run.ends.push(trace.count());
        run.states.push(state(&pool));
        run.counts.push(counts(&pool));
    }
    // The last state holds while the pool is closed, too.
    super::pool::shut(&pool.inner).unwrap();
    run.events = trace.stop();
    assert!(run.events.len() > 100, "{} events", run.events.len());
    run
}

impl Run {
    /// Numbers of the states allowed when the first `happened` events had happened.
    fn allowed(&self, happened: usize) -> (usize, usize) {
        let done = self.ends.partition_point(|&end| end <= happened);
        (done, (done + 1).min(self.states.len() - 1))
    }

    fn apply(&self, image: &mut [u8], events: core::ops::Range<usize>) {
        for event in &self.events[events] {
            if let Event::Store { at, bytes } = event {
                image[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
            }
        }
    }

    /// Opens an image; what it holds must be an allowed state, and it must be usable.
    fn check(&self, folder: &Folder, image: &[u8], happened: usize, what: &str) {
        let path = folder.0.join("image");
        fs::write(&path, image).unwrap();
        let pool = PersistentPool::open_with(&path, "crash", Durability::ProcessCrash)
            .unwrap_or_else(|error| panic!("{what}, event {happened}: {error}"));
        let found = state(&pool);
        let (before, after) = self.allowed(happened);
        assert!(
            found == self.states[before] || found == self.states[after],
            "{what}, event {happened}: neither state {before} nor {after}\n{found:?}\n{:?}\n{:?}",
            self.states[before],
            self.states[after]
        );
        // All that had returned is counted, and of what was under way all, some or nothing.
        for (i, found) in counts(&pool).into_iter().enumerate() {
            let allowed = [self.counts[before][i], self.counts[after][i]];
            assert!(allowed.contains(&found), "{what}, event {happened}: {:?} {found}", COUNTERS[i]);
        }
        pool.transaction(|tx| push(tx, 1000)).unwrap();
        assert_eq!(state(&pool).0[0], 1000);
        pool.close().unwrap();
        fs::remove_file(&path).unwrap();
    }
}

/// A small generator, so that runs repeat.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }
}

/// More in the long form.
fn rounds(short: usize) -> usize {
    if std::env::var_os("MEMORY_POOL_LONG_TESTS").is_some() { short * 20 } else { short }
}

#[test]
fn a_killed_process_leaves_before_or_after_at_every_store() {
    let folder = Folder::new("kill");
    let run = record(&folder, Durability::ProcessCrash);
    let mut image = run.base.clone();
    for happened in 0..run.events.len() {
        run.check(&folder, &image, happened, "prefix");
        if let Event::Store { at, bytes } = &run.events[happened]
            && bytes.len() > 8
        {
            // Killed in the middle of a row of stores.
            let mut torn = image.clone();
            for cut in [8, bytes.len() / 16 * 8, (bytes.len() - 1) / 8 * 8] {
                torn[*at as usize..*at as usize + cut].copy_from_slice(&bytes[..cut]);
                run.check(&folder, &torn, happened, "torn store");
            }
        }
        run.apply(&mut image, happened..happened + 1);
    }
    run.check(&folder, &image, run.events.len(), "whole");
}

#[test]
fn a_power_failure_leaves_before_or_after_in_any_order_of_writing_back() {
    let folder = Folder::new("power");
    let run = record(&folder, Durability::Power);
    run.survives_power_failures(&folder, &mut Random(0x9E37_79B9_7F4A_7C15), rounds(2));
}

/// Opening finishes what the crash left and clears the log; the power may fail again meanwhile.
/// What persistent memory may hold after a power failure.
#[derive(Default)]
struct Lines {
    /// Words that were stored and are not known to have arrived, and what was stored there since they had.
    pending: BTreeMap<u64, Vec<(usize, [u8; 8])>>,
    /// When words were flushed last, since the last fence.
    flushed: BTreeMap<u64, usize>,
}

impl Lines {
    fn event(&mut self, durable: &mut [u8], number: usize, event: &Event) {
        match event {
            Event::Store { at, bytes } => {
                for (i, word) in bytes.chunks(8).enumerate() {
                    let place = at / 8 * 8 + i as u64 * 8;
                    let mut value = [0; 8];
                    value[..word.len()].copy_from_slice(word);
                    self.pending.entry(place).or_default().push((number, value));
                }
            }
            Event::Flush { at, len } => {
                let lines = at / 64 * 64..(at + *len as u64).next_multiple_of(64);
                for (&place, _) in self.pending.range(lines) {
                    self.flushed.insert(place, number);
                }
            }
            Event::Fence => {
                for (place, flush) in core::mem::take(&mut self.flushed) {
                    let Some(stores) = self.pending.get_mut(&place) else { continue };
                    let arrived = stores.partition_point(|&(store, _)| store < flush);
                    if let Some((_, value)) = stores[..arrived].last() {
                        durable[place as usize..][..8].copy_from_slice(value);
                    }
                    stores.drain(..arrived);
                    if stores.is_empty() {
                        self.pending.remove(&place);
                    }
                }
            }
            Event::Sync => {}
        }
    }

    /// Each word as it was after any of the stores that may have arrived.
    fn crash(&self, durable: &[u8], mut choose: impl FnMut(usize) -> usize) -> Vec<u8> {
        let mut image = durable.to_vec();
        for (&place, stores) in &self.pending {
            if let Some(store) = choose(stores.len() + 1).checked_sub(1) {
                image[place as usize..][..8].copy_from_slice(&stores[store].1);
            }
        }
        image
    }
}

#[test]
fn a_power_failure_on_persistent_memory_leaves_before_or_after() {
    let folder = Folder::new("dax");
    super::trace::ANY_FILE_FOR_DAX.set(true);
    let run = record(&folder, Durability::Dax);
    super::trace::ANY_FILE_FOR_DAX.set(false);
    let mut random = Random(0xA24B_AED4_963E_E407);
    let (mut durable, mut lines) = (run.base.clone(), Lines::default());
    for (number, event) in run.events.iter().enumerate() {
        // Between fences what is pending only grows.
        if *event == Event::Fence {
            run.check(&folder, &durable, number, "none");
            run.check(&folder, &lines.crash(&durable, |all| all - 1), number, "all");
            for _ in 0..rounds(2) {
                let image = lines.crash(&durable, |all| random.below(all));
                run.check(&folder, &image, number, "random words");
            }
        }
        lines.event(&mut durable, number, event);
    }
    // Nothing was forgotten: what is pending at the end is no more than the last commit's clearing.
    assert!(lines.pending.len() < 32, "{} words never flushed", lines.pending.len());
}

#[test]
fn a_power_failure_during_recovery_is_recovered() {
    let folder = Folder::new("power-again");
    let run = record(&folder, Durability::Power);
    let mut random = Random(0xD1B5_4A32_D192_ED03);
    let mut image = run.base.clone();
    let (mut last, mut recovered) = (0, 0);
    let syncs = (0..run.events.len()).filter(|&i| run.events[i] == Event::Sync);
    for sync in syncs {
        run.apply(&mut image, last..sync);
        last = sync;
        let path = folder.0.join("crashed");
        fs::write(&path, &image).unwrap();
        super::trace::RECORD.set(true);
        let pool = PersistentPool::open(&path, "crash").unwrap();
        super::trace::RECORD.set(false);
        let found = state(&pool);
        let (before, after) = run.allowed(sync + 1);
        assert!(found == run.states[before] || found == run.states[after], "event {sync}");
        recovered += usize::from(pool.recovered_records() > 0);
        let mut again = Run {
            base: image.clone(),
            events: pool.inner.media.trace.stop(),
            ends: Vec::new(),
            states: vec![found],
            counts: vec![counts(&pool)],
        };
        // What follows the last sync of the opening.
        again.events.push(Event::Fence);
        drop(pool);
        again.survives_power_failures(&folder, &mut random, 1);
        fs::remove_file(&path).unwrap();
    }
    assert!(recovered > 10, "{recovered}");
}

impl Run {
    /// Crashes right before each sync, right after it, and at some stores between this sync and the next.
    fn survives_power_failures(&self, folder: &Folder, random: &mut Random, mixes: usize) {
        let run = self;
        let syncs: Vec<usize> = (0..run.events.len()).filter(|&i| run.events[i] == Event::Sync).collect();
        let mut durable = run.base.clone();
        let mut last = 0;
        for &sync in syncs.iter().chain([&run.events.len()]) {
            let mut points = vec![sync];
            points.extend((0..3).map(|_| last + random.below(sync - last + 1)));
            for happened in points {
                let stores: Vec<usize> =
                    (last..happened).filter(|&i| matches!(run.events[i], Event::Store { .. })).collect();
                run.check(folder, &durable, happened, "none");
                let mut image = durable.clone();
                run.apply(&mut image, last..happened);
                run.check(folder, &image, happened, "accumulative");
                for block in [8, 64, 512, 4096] {
                    for _ in 0..mixes {
                        let mixed = mix(run, &durable, &stores, block, random);
                        run.check(folder, &mixed, happened, "random blocks");
                    }
                }
                // Each store alone at the end of an otherwise unwritten stretch, and the others without it.
                for &only in stores.iter().rev().take(mixes + 1) {
                    let mut image = durable.clone();
                    run.apply(&mut image, only..only + 1);
                    run.check(folder, &image, happened, "reverse");
                    let mut image = durable.clone();
                    for &store in stores.iter().filter(|&&store| store != only) {
                        run.apply(&mut image, store..store + 1);
                    }
                    run.check(folder, &image, happened, "all but one");
                }
            }
            run.apply(&mut durable, last..sync);
            last = sync;
        }
    }
}

/// Every block of the file as it was after some of the stores, each block after others.
fn mix(run: &Run, durable: &[u8], stores: &[usize], block: usize, random: &mut Random) -> Vec<u8> {
    let mut image = durable.to_vec();
    let mut upto: BTreeMap<usize, usize> = BTreeMap::new();
    for (i, &store) in stores.iter().enumerate() {
        let Event::Store { at, bytes } = &run.events[store] else { continue };
        let mut from = 0;
        while from < bytes.len() {
            let place = *at as usize + from;
            let len = (block - place % block).min(bytes.len() - from);
            let limit = *upto.entry(place / block).or_insert_with(|| random.below(stores.len() + 1));
            if i < limit {
                image[place..place + len].copy_from_slice(&bytes[from..from + len]);
            }
            from += len;
        }
    }
    image
}

#[test]
fn flipped_bits_and_torn_records_in_the_log_are_seen() {
    for durability in [Durability::ProcessCrash, Durability::Power] {
        let folder = Folder::new(&format!("flip-{durability:?}"));
        let run = record(&folder, durability);
        let mut random = Random(77);
        let mut image = run.base.clone();
        let mut tried = 0;
        for happened in 0..run.events.len() {
            run.apply(&mut image, happened..happened + 1);
            // A record is complete and not applied when the header of its lane was just written.
            let Event::Store { at, bytes } = &run.events[happened] else { continue };
            let lane = (at.wrapping_sub(LOG) / LANE_SIZE) as usize;
            if lane >= 16 || at % LANE_SIZE != 0 || bytes.len() < 16 {
                continue;
            }
            let start = *at as usize;
            let word = |i: usize| u64::from_le_bytes(bytes[i * 8..][..8].try_into().unwrap());
            let len = match ShortHead::decode(word(1)) {
                Some(short) => ShortHead::BODY + short.words * 8,
                None => LANE_HEADER + word(4).min(LANE_SIZE - LANE_HEADER),
            } as usize;
            for _ in 0..rounds(6) {
                let bit = random.below(len * 8);
                let mut flipped = image.clone();
                flipped[start + bit / 8] ^= 1 << (bit % 8);
                run.check(&folder, &flipped, happened, "flipped bit");
                tried += 1;
            }
            for piece in [8, 64, 512] {
                let from = random.below(len.div_ceil(piece)) * piece;
                let mut torn = image.clone();
                let end = (start + from + piece).min(start + LANE_SIZE as usize);
                torn[start + from..end].copy_from_slice(&run.base[start + from..end]);
                run.check(&folder, &torn, happened, "torn record");
                tried += 1;
            }
        }
        assert!(tried > 80, "{tried}");
    }
}

#[test]
fn recovery_that_crashes_is_recovered() {
    let folder = Folder::new("again");
    let run = record(&folder, Durability::ProcessCrash);
    let mut image = run.base.clone();
    let mut recovered = 0;
    for happened in 0..run.events.len() {
        run.apply(&mut image, happened..happened + 1);
        let path = folder.0.join("first");
        fs::write(&path, &image).unwrap();
        let read_only = PersistentPool::open_read_only(&path, "crash").unwrap();
        let (before, after) = run.allowed(happened + 1);
        let found = state(&read_only);
        assert!(found == run.states[before] || found == run.states[after], "event {happened}");
        let replayed = read_only.recovered_records();
        drop(read_only);
        assert_eq!(fs::read(&path).unwrap(), image, "reading wrote to the file");
        if replayed == 0 {
            continue;
        }
        recovered += 1;
        // Apply half of the record by hand, as an interrupted recovery would.
        let mut half = image.clone();
        let end = run.ends[run.ends.partition_point(|&end| end <= happened + 1).min(run.ends.len() - 1)];
        run.apply(&mut half, happened + 1..(happened + 1 + end) / 2);
        run.check(&folder, &half, happened + 1, "interrupted recovery");
    }
    assert!(recovered > 10, "{recovered}");
}

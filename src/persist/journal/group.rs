//! Commits under power: those who commit at the same time share one sync.

use super::super::gate::Gate;
use super::super::inner::{Books, Tally};
use super::super::media::Media;
use super::{Journal, Ops, Overflow, apply, clear_lanes};
use crate::base::error::Result;
use crate::base::sync::MutexGuard;

/// A record that waits for its sync.
pub(super) struct Waiting {
    ticket: u64,
    lane: u32,
    body: Vec<u64>,
    body_sum: u64,
    overflow: u64,
    tally: Tally,
}

#[derive(Default)]
pub(super) struct Group {
    sequence: u64,
    /// Up to here every record is in place for good.
    settled: u64,
    free: Vec<u32>,
    waiting: Vec<Waiting>,
    /// Lanes and overflow blocks of records applied since the last sync began.
    applied: Vec<(u32, u64)>,
    leading: bool,
    next_ticket: u64,
    /// Tickets below this one were served.
    served: u64,
    spare: Vec<Vec<u64>>,
}

impl Group {
    /// Of a log of so many lanes, all empty.
    pub(super) fn new(lanes: u32) -> Self {
        Self { sequence: 1, free: (0..lanes).rev().collect(), ..Self::default() }
    }

    /// Records since then.
    pub(super) fn records(&self) -> u64 {
        self.sequence - 1
    }
}

impl Journal {
    pub(super) fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'a>(&self, group: MutexGuard<'a, Group>) -> MutexGuard<'a, Group> {
        self.wake.wait(group).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Makes the operations happen under power, all or none; on return they have and are durable. `ops` is
    /// empty afterwards.
    ///
    /// # Safety
    /// The operations lie in the file, and what they change is locked by the caller, so that only readers
    /// inside the gate look at it.
    pub(crate) unsafe fn commit(
        &self,
        media: &Media,
        gate: &Gate<Books>,
        overflow: &dyn Overflow,
        ops: &mut Ops,
        tally: Tally,
    ) -> Result<()> {
        media.check_usable()?;
        let mut group = self.lock();
        let lane = loop {
            if let Some(lane) = group.free.pop() {
                break lane;
            }
            // All lanes wait for the sync that makes their changes durable, or are being written; who writes one is
            // going to lead, or says that it gave up.
            let nothing = group.waiting.is_empty() && group.applied.is_empty();
            group = if group.leading || nothing {
                self.wait(group)
            } else {
                self.lead(group, media, gate, overflow)
            };
            media.check_usable()?;
        };
        drop(group);
        let written = self.write_body(media, &self.lanes[lane as usize], overflow, &ops.words);
        let mut group = self.lock();
        let (body_sum, block) = match written {
            Ok(written) => written,
            Err(error) => {
                group.free.push(lane);
                self.wake.notify_all();
                return Err(error);
            }
        };
        let ticket = group.next_ticket;
        group.next_ticket += 1;
        let spare = group.spare.pop().unwrap_or_default();
        let body = core::mem::replace(&mut ops.words, spare);
        ops.clear();
        group.waiting.push(Waiting { ticket, lane, body, body_sum, overflow: block, tally });
        while group.served <= ticket {
            group = if group.leading { self.wait(group) } else { self.lead(group, media, gate, overflow) };
            if group.served <= ticket {
                media.check_usable()?;
            }
        }
        Ok(())
    }

    /// Syncs for all that wait, and applies their records.
    fn lead<'a>(
        &'a self,
        mut group: MutexGuard<'a, Group>,
        media: &Media,
        gate: &Gate<Books>,
        overflow: &dyn Overflow,
    ) -> MutexGuard<'a, Group> {
        group.leading = true;
        let batch = core::mem::take(&mut group.waiting);
        let before = core::mem::take(&mut group.applied);
        let (first, settled) = (group.sequence, group.settled);
        group.sequence += batch.len() as u64;
        drop(group);
        // The counters become durable with the records.
        let [a, b, c, d] = gate.lock().foretell(batch.iter().map(|record| &record.tally));
        for (i, record) in batch.iter().enumerate() {
            let bytes = record.body.len() as u64 * 8;
            let number = first + i as u64;
            let words = [number, settled, record.body_sum, bytes, record.overflow, first, a, b, c, d];
            self.write_header(media, record.lane, words);
        }
        let synced = media.sync();
        if synced.is_ok() {
            let mut books = gate.alone();
            for record in &batch {
                // SAFETY: every committer of the batch locked what its record changes and waits for us; the
                // gate keeps readers out.
                unsafe { apply(media, &record.body) };
                books.count(&record.tally);
            }
        }
        let mut group = self.lock();
        group.leading = false;
        if synced.is_ok() {
            group.settled = first - 1;
            for (lane, block) in before {
                group.free.push(lane);
                if block != 0 {
                    overflow.release(block);
                }
            }
            for mut record in batch {
                group.served = record.ticket + 1;
                group.applied.push((record.lane, record.overflow));
                record.body.clear();
                group.spare.push(record.body);
            }
        }
        // After a failure the pool is poisoned; those who wait find that out themselves.
        self.wake.notify_all();
        group
    }

    /// Makes every record that was applied durable in place, and clears the log: by invariant 4 the records of the
    /// last group after all others.
    pub(crate) fn settle(&self, media: &Media, overflow: &dyn Overflow) -> Result<()> {
        let mut group = self.lock();
        while group.leading {
            group = self.wait(group);
        }
        media.sync()?;
        if group.applied.is_empty() {
            return Ok(());
        }
        group.settled = group.sequence - 1;
        let last = core::mem::take(&mut group.applied);
        let earlier = group.free.iter().map(|&lane| self.lanes[lane as usize].at);
        // SAFETY: applied and durable, so nobody needs the records; nobody leads.
        unsafe { clear_lanes(media, earlier, last.iter().map(|&(lane, _)| self.lanes[lane as usize].at))? };
        for (lane, block) in last {
            group.free.push(lane);
            if block != 0 {
                overflow.release(block);
            }
        }
        Ok(())
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use std::fs::File;
    use std::sync::Arc;

    use super::super::super::format::{Header, LANE_SIZE, LOG, PAGE};
    use super::super::super::heap::Heap;
    use super::super::super::media::{Backing, Durability};
    use super::super::super::table::Table;
    use super::super::super::trace::Event;
    use super::*;
    use loom::thread;

    struct NoBlocks;
    impl Overflow for NoBlocks {
        fn reserve(&self, _: usize) -> Result<u64> {
            unreachable!("records of one word")
        }
        fn release(&self, _: u64) {
            unreachable!("none was reserved")
        }
    }

    struct Shared {
        journal: Journal,
        media: Media,
        gate: Gate<Books>,
    }

    /// A log of so many lanes in a file that is mapped anew.
    fn shared(file: &File, lanes: u32) -> Shared {
        let header = Header {
            compat: 0,
            incompat: 0,
            ro_compat: 0,
            identity: 7,
            created: 0,
            lanes,
            generation: 1,
            layout: String::new(),
            zones: Vec::new(),
            minor: 0,
            durability: 0,
        };
        let len = header.log_end() + PAGE;
        file.set_len(len).unwrap();
        let media = Media::map(file.try_clone().unwrap(), len, true, Durability::Power).unwrap();
        let table = Table::new(&[]);
        let heap = Heap::new(&media, &table, &[], Backing::Reserved, false).unwrap();
        media.trace.start();
        Shared { journal: Journal::new(&header), gate: Gate::new(Books::new(heap, &media)), media }
    }

    /// Where the transaction of that number writes.
    fn word(shared: &Shared, number: u64) -> u64 {
        shared.media.len() - PAGE + number * 8
    }

    fn commit(shared: &Shared, number: u64) {
        let mut ops = Ops::default();
        ops.set(word(shared, number), number);
        let tally = Tally { transactions: 1, ..Tally::default() };
        // SAFETY: the word is behind the log, and nobody else's.
        let done = unsafe { shared.journal.commit(&shared.media, &shared.gate, &NoBlocks, &mut ops, tally) };
        done.unwrap();
        assert_eq!(shared.media.load(word(shared, number)), number, "it returned and has not happened");
    }

    /// Every change came after a sync that came after its record was complete.
    fn check(shared: &Shared, commits: u64) {
        let events = shared.media.trace.stop();
        let stores = |from: u64, to: u64| {
            events.iter().enumerate().filter_map(move |(i, event)| match event {
                Event::Store { at, bytes } if (from..to).contains(at) => Some((i, bytes.len())),
                _ => None,
            })
        };
        let log_end = shared.media.len() - PAGE;
        for number in 1..=commits {
            let (applied, _) = stores(word(shared, number), word(shared, number) + 8).next().unwrap();
            let synced = events[..applied].iter().rposition(|event| *event == Event::Sync).unwrap();
            let header = |&(i, len): &(usize, usize)| i < synced && len == 88;
            let headers = stores(LOG, log_end).filter(header).count();
            assert!(headers >= 1, "applied before its record was safe");
            assert!(synced < applied);
        }
        let headers = stores(LOG, log_end).filter(|&(_, len)| len == 88).count() as u64;
        assert_eq!((headers, shared.journal.records()), (commits, commits));
        assert_eq!(shared.gate.lock().tally.transactions, commits);
        let syncs = events.iter().filter(|event| **event == Event::Sync).count() as u64;
        assert!(syncs >= 1 && syncs <= 2 * commits + 1, "{syncs} syncs");
    }

    fn model(lanes: u32) {
        let path = std::env::temp_dir().join(format!("memory-pool-loom-{}-{lanes}", std::process::id()));
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        loom::model(move || {
            file.set_len(0).unwrap();
            assert_eq!(LOG % LANE_SIZE, 0);
            let shared = Arc::new(shared(&file, lanes));
            let other = shared.clone();
            let thread = thread::spawn(move || commit(&other, 2));
            commit(&shared, 1);
            thread.join().unwrap();
            check(&shared, 2);
        });
    }

    #[test]
    fn loom_group_two_commits_share_syncs() {
        model(2);
    }

    #[test]
    fn loom_group_two_commits_share_a_lane() {
        model(1);
    }
}

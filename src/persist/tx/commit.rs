//! The end of a transaction: its record is built and committed, and the index learns of it.

use super::Transaction;
use super::small::Small;
use super::work::{Entry, Image, State, Whole, Work};
use crate::base::error::{Error, Result};
use crate::persist::inner::{Books, Inner, Tally};
use crate::persist::journal::{Ops, Safe, apply};
use crate::persist::media::{Durability, Media};
use crate::persist::table::Mark;

impl Transaction<'_> {
    /// Makes everything happen.
    #[inline]
    pub(crate) fn commit(mut self) -> Result<()> {
        if self.doomed.get() {
            return Err(doomed());
        }
        let pool = self.pool;
        let work = &mut **self.work.get_mut();
        if let Some(small) = Small::of(pool, work) {
            small.commit(pool, work)?;
            self.committed.set(true);
            return Ok(());
        }
        let tally = build(pool, work);
        if work.ops.is_empty() {
            return Ok(());
        }
        if pool.durability == Durability::Power {
            commit_power(pool, work, tally)?;
        } else {
            let media = &pool.media;
            media.check_usable()?;
            // What was written in place comes before what makes it reachable.
            media.fence();
            let record = if work.ops.is_one_word() {
                Safe::None
            } else {
                pool.journal.write(media, pool, work.id(), work.ops.body())?
            };
            let mut books = pool.heap.alone();
            // SAFETY: the operations were built from slots and objects of the file; by invariant 1 those are
            // locked; readers are out.
            unsafe { apply(&pool.media, work.ops.body()) };
            // Before the record goes, so that what returned is counted, whatever happens next.
            books.count_in_file(&pool.media, &tally);
            if let Some(block) = pool.journal.clear(&pool.media, &record) {
                books.release(&pool.table, block);
            }
            settle(pool, &mut books, work);
        }
        let roots = &work.rare().roots;
        if !roots.is_empty() {
            pool.add_roots(roots);
        }
        self.committed.set(true);
        Ok(())
    }
}

#[inline(never)]
fn commit_power(pool: &Inner, work: &mut Work, tally: Tally) -> Result<()> {
    prepare(pool, work);
    // SAFETY: the operations were built from slots and objects of the file; by invariant 1 those are locked.
    unsafe { pool.journal.commit(&pool.media, &pool.heap, pool, &mut work.ops, tally)? };
    settle(pool, &mut pool.heap.lock(), work);
    Ok(())
}

#[cold]
fn doomed() -> Error {
    Error::refused(
        "a transaction inside this one failed, so none of it happened",
        "return the error of the inner one from the outer one",
    )
}

/// The record of the transaction, and what it adds to the counters.
#[inline]
fn build(pool: &Inner, work: &mut Work) -> Tally {
    let media = &pool.media;
    if work.new_runs {
        log_new_runs(pool, &work.entries, &mut work.ops);
    }
    let mut tally = Tally { transactions: 1, ..Tally::default() };
    let Work { entries, parts, ops, .. } = work;
    for entry in entries.iter() {
        match entry.state {
            State::Published => {
                tally.allocations += 1;
                tally.bytes += entry.size;
            }
            State::Freed => {
                tally.frees += 1;
                tally.freed_bytes += entry.size;
            }
            State::Live | State::Reserved | State::Dropped => {}
        }
        match (entry.state, entry.mark) {
            (State::Published, mark) => {
                cover(pool, entry.offset, entry.used, ops);
                if let Mark::Bit { word, mask } = mark {
                    ops.set_bits(word, mask);
                }
            }
            (State::Freed, Mark::Bit { word, mask }) => ops.clear_bits(word, mask),
            (State::Freed, Mark::Entry { at }) => ops.set(at, 0),
            (State::Live, _) => {
                if let Some(Whole { image, all_from }) = &entry.whole {
                    log_changes(media, image, entry.offset.saturating_add(*all_from), ops);
                }
            }
            (State::Reserved | State::Dropped, _) => {}
        }
    }
    for (entry, part) in parts {
        let entry = &entries[*entry as usize];
        if entry.whole.is_none() && entry.state == State::Live {
            log_changes(media, part, u64::MAX, ops);
        }
    }
    if work.uses_rare {
        build_rare(pool, work);
    }
    tally
}

#[cold]
fn build_rare(pool: &Inner, work: &mut Work) {
    let Work { entries, rare, ops, .. } = work;
    for &(entry, at, len) in &rare.appended {
        cover(pool, entries[entry as usize].offset + at, len, ops);
    }
    for &(at, value) in &rare.heads {
        ops.set(at, value);
    }
}

/// Logs the entries of runs and large objects that are not in the file yet.
#[cold]
fn log_new_runs(pool: &Inner, entries: &[Entry], ops: &mut Ops) {
    let heap = pool.heap.lock();
    let mut logged = Vec::new();
    for entry in entries.iter().filter(|entry| entry.new_run && entry.state == State::Published) {
        heap.log_fresh(entry.offset, &mut logged, ops);
    }
}

/// Sees to it that bytes written in place are as safe as the record.
#[inline]
fn cover(pool: &Inner, at: u64, len: u64, ops: &mut Ops) {
    match pool.durability {
        Durability::ProcessCrash => {}
        Durability::Dax => pool.media.flush(at, len as usize),
        Durability::Power => ops.check(&pool.media, at, len),
    }
}

/// Reads the bitmaps of runs in which objects will be freed while the lock of the heap is not held.
fn prepare(pool: &Inner, work: &Work) {
    let mut freed = work.entries.iter().filter(|entry| entry.state == State::Freed).peekable();
    if freed.peek().is_some() {
        let mut heap = pool.heap.lock();
        freed.for_each(|entry| heap.prepare_free(&pool.media, entry.offset));
    }
}

/// Tells the index what happened.
#[inline]
fn settle(pool: &Inner, books: &mut Books, work: &Work) {
    for entry in &work.entries {
        match entry.state {
            State::Published if entry.new_run => books.confirm(entry.offset),
            State::Freed => pool.release(work.id(), books, entry.fingerprint, entry.offset, entry.mark),
            State::Reserved | State::Dropped => _ = books.release(&pool.table, entry.offset),
            State::Published | State::Live => {}
        }
    }
    for &fingerprint in &work.rare().types {
        books.set_registered(fingerprint);
    }
}

/// Logs the words of an image that differ from the file, and all from offset `all_from` on.
#[inline]
fn log_changes(media: &Media, image: &Image, all_from: u64, ops: &mut Ops) {
    // SAFETY: the image's words were initialised when it was made; no reference to them is left.
    let words = unsafe { core::slice::from_raw_parts(image.copy.as_ptr(), image.words) };
    let end = words.len();
    let differs = |i: usize| {
        let at = image.at + i as u64 * 8;
        words[i] != media.load(at) || at >= all_from
    };
    let mut next = 0;
    while let Some(first) = (next..end).find(|&i| differs(i)) {
        next = (first + 1..end).find(|&i| !differs(i)).unwrap_or(end);
        ops.write(image.at + first as u64 * 8, &words[first..next]);
    }
}

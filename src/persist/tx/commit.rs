//! The end of a transaction: its record is built and committed, and the index learns of it.

use super::Transaction;
use super::work::{Entry, Image, State, Whole, Work};
use crate::base::error::{Error, Result};
use crate::persist::inner::{Books, Inner, Tally};
use crate::persist::journal::{Ops, apply};
use crate::persist::media::{Durability, Media};
use crate::persist::table::Mark;

impl Transaction<'_> {
    /// Makes everything happen.
    pub(crate) fn commit(self) -> Result<()> {
        if self.doomed.get() {
            return Err(Error::refused(
                "a transaction inside this one failed, so none of it happened",
                "return the error of the inner one from the outer one",
            ));
        }
        let mut work = self.work.borrow_mut();
        let work = &mut **work;
        let pool = self.pool;
        build(pool, work);
        if work.ops.is_empty() {
            return Ok(());
        }
        if pool.durability == Durability::Power {
            prepare(pool, work);
            // SAFETY: the operations were built from slots and objects of the file; by invariant 1 those are
            // locked.
            unsafe { pool.journal.commit(&pool.media, &pool.heap, pool, &mut work.ops)? };
            settle(pool, &mut pool.heap.lock(), work);
        } else {
            let record = pool.journal.write(&pool.media, pool, work.id(), &work.ops)?;
            let mut books = pool.heap.alone();
            // SAFETY: as above; readers are out.
            unsafe { apply(&pool.media, work.ops.body()) };
            if let Some(block) = pool.journal.clear(&pool.media, &record) {
                books.release(&pool.table, block);
            }
            settle(pool, &mut books, work);
            drop(books);
        }
        self.committed.set(true);
        if !work.roots.is_empty() {
            pool.add_roots(&work.roots);
        }
        Ok(())
    }
}

/// The record of the transaction.
#[inline]
fn build(pool: &Inner, work: &mut Work) {
    let Work { entries, parts, appended, heads, ops, .. } = work;
    let media = &pool.media;
    if entries.iter().any(|entry| entry.new_run && entry.state == State::Published) {
        log_new_runs(pool, entries, ops);
    }
    for entry in entries.iter() {
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
    for &(entry, at, len) in appended.iter() {
        cover(pool, entries[entry as usize].offset + at, len, ops);
    }
    for (entry, part) in parts {
        let entry = &entries[*entry as usize];
        if entry.whole.is_none() && entry.state == State::Live {
            log_changes(media, part, u64::MAX, ops);
        }
    }
    for &(at, value) in heads.iter() {
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
    let mut tally = Tally { transactions: 1, ..Default::default() };
    for entry in &work.entries {
        match entry.state {
            State::Published => {
                if entry.new_run {
                    books.confirm(entry.offset);
                }
                tally.allocations += 1;
                tally.bytes += entry.size;
            }
            State::Freed => {
                tally.freed_bytes += books.release(&pool.table, entry.offset);
                tally.frees += 1;
            }
            State::Reserved | State::Dropped => _ = books.release(&pool.table, entry.offset),
            State::Live => {}
        }
    }
    for &fingerprint in &work.types {
        books.set_registered(fingerprint);
    }
    pool.count(books, tally);
}

/// Logs the words of an image that differ from the file, and all from offset `all_from` on.
#[inline]
fn log_changes(media: &Media, image: &Image, all_from: u64, ops: &mut Ops) {
    // SAFETY: the image's words were initialised when it was made; no reference to them is left.
    let words = unsafe { core::slice::from_raw_parts(image.copy.as_ptr(), image.words) };
    let mut at = image.at;
    // Since when words differ.
    let mut since = None;
    for (i, &word) in words.iter().enumerate() {
        let differs = word != media.load(at) || at >= all_from;
        at += 8;
        match since {
            None if differs => since = Some(i),
            Some(first) if !differs => {
                ops.write(image.at + first as u64 * 8, &words[first..i]);
                since = None;
            }
            _ => {}
        }
    }
    if let Some(first) = since {
        ops.write(image.at + first as u64 * 8, &words[first..]);
    }
}

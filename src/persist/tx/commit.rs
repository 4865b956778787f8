//! The end of a transaction: its record is built and committed, and the index learns of it.

use super::{Fate, Image, Transaction, Work};
use crate::base::error::{Error, Result};
use crate::persist::heap::SlotMark;
use crate::persist::inner::Tally;
use crate::persist::journal::Ops;
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
        self.build(work);
        if work.ops.is_empty() {
            return Ok(());
        }
        // SAFETY: the operations were built from slots and objects of the file; by invariant 1 those are
        // locked.
        unsafe { self.pool.journal.commit(&self.pool.media, &self.pool.gate, self.pool, &mut work.ops)? };
        self.settle(work);
        Ok(())
    }

    /// The record of the transaction.
    fn build(&self, work: &mut Work) {
        let Work { entries, parts, fresh, appended, heads, ops, .. } = work;
        let media = &self.pool.media;
        let published = || fresh.iter().filter(|fresh| fresh.fate == Fate::Published);
        if published().any(|fresh| fresh.slot.fresh) {
            let heap = self.pool.heap.lock();
            let mut logged = Vec::new();
            for slot in published().map(|fresh| fresh.slot).filter(|slot| slot.fresh) {
                if !logged.contains(&slot.run()) {
                    logged.push(slot.run());
                    heap.log_fresh(&slot, ops);
                }
            }
        }
        let written = published()
            .map(|fresh| (fresh.slot.offset, fresh.used))
            .chain(appended.iter().map(|&(entry, at, len)| (entries[entry as usize].offset + at, len)));
        for (at, len) in written {
            match self.pool.durability {
                Durability::ProcessCrash => break,
                Durability::Dax => media.flush(at, len as usize),
                Durability::Power => ops.check(media, at, len),
            }
        }
        for slot in published().map(|fresh| fresh.slot) {
            if let SlotMark::Bit { word, mask } = slot.mark {
                ops.set_bits(word, mask);
            }
        }
        for entry in entries.iter().filter(|entry| entry.fresh.is_none()) {
            if !entry.freed {
                if let Some(whole) = &entry.whole {
                    log_changes(media, whole, entry.offset.saturating_add(entry.all_from), ops);
                }
                continue;
            }
            match entry.mark {
                Some(Mark::Bit { word, mask }) => ops.clear_bits(word, mask),
                Some(Mark::Entry { at }) => ops.set(at, 0),
                None => {}
            }
        }
        for (entry, part) in parts {
            let entry = &entries[*entry as usize];
            if entry.whole.is_none() && !entry.freed {
                log_changes(media, part, u64::MAX, ops);
            }
        }
        for &(at, value) in heads.iter() {
            ops.set(at, value);
        }
    }

    /// Tells the index what happened.
    fn settle(&self, work: &Work) {
        let pool = self.pool;
        let mut heap = pool.heap.lock();
        let mut tally = Tally { transactions: 1, ..Default::default() };
        for fresh in work.fresh.iter().filter(|fresh| fresh.fate == Fate::Published) {
            if fresh.slot.fresh {
                heap.confirm(&fresh.slot);
            }
            tally.allocations += 1;
            tally.bytes += fresh.slot.size;
        }
        for entry in work.entries.iter().filter(|entry| entry.freed && entry.fresh.is_none()) {
            tally.freed_bytes += heap.release(&pool.table, entry.offset);
            tally.frees += 1;
        }
        for &fingerprint in &work.types {
            heap.set_registered(fingerprint);
        }
        pool.count(&mut heap, tally);
        drop(heap);
        if !work.roots.is_empty() {
            pool.add_roots(&work.roots);
        }
        self.committed.set(true);
    }
}

/// Logs the words of an image that differ from the file, and all from offset `all_from` on.
fn log_changes(media: &Media, image: &Image, all_from: u64, ops: &mut Ops) {
    // SAFETY: the image's words were initialised when it was made; no reference to them is left.
    let words = unsafe { core::slice::from_raw_parts(image.copy.as_ptr(), image.words) };
    let differs = |i: usize| {
        let at = image.at + i as u64 * 8;
        at >= all_from || words[i] != media.load(at)
    };
    let mut i = 0;
    while i < words.len() {
        if !differs(i) {
            i += 1;
            continue;
        }
        let start = i;
        while i < words.len() && differs(i) {
            i += 1;
        }
        ops.write(image.at + start as u64 * 8, &words[start..i]);
    }
}

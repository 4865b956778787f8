//! Short transactions where no sync is waited for: one object that becomes live or free, a few words of another that
//! change (the link to it), or both. They are most of what programs do, and need neither a list of operations nor a pass
//! over it.
//!
//! What reaches the log is what the long way would write, so recovery knows no difference: a record where more than one
//! word changes, else none.

use super::work::{Entry, State, Work};
use crate::base::error::Result;
use crate::persist::inner::{Inner, Tally};
use crate::persist::journal::{Safe, bits_op, write_op};
use crate::persist::media::{Durability, Media};
use crate::persist::table::Mark;

/// Most words that change beside the bit.
const WORDS: usize = 6;

/// What such a transaction does.
#[derive(Debug)]
pub(super) struct Small<'w> {
    /// What becomes live or free.
    object: Option<Marked<'w>>,
    /// What changes of another object: its words from `at` on.
    words: &'w [u64],
    at: u64,
}

/// An object whose mark is a bit.
#[derive(Clone, Copy, Debug)]
struct Marked<'w> {
    entry: &'w Entry,
    word: u64,
    mask: u64,
}

impl<'w> Small<'w> {
    /// `None` where the transaction is of another kind, or does nothing.
    #[inline]
    pub(super) fn of(pool: &Inner, work: &'w Work) -> Option<Self> {
        if pool.durability == Durability::Power || work.new_runs || work.uses_rare {
            return None;
        }
        let mut object = None;
        for entry in &work.entries {
            match (entry.state, entry.mark) {
                _ if entry.whole.is_some() => return None,
                (State::Live, _) => {}
                (State::Published | State::Freed, Mark::Bit { word, mask }) if object.is_none() => {
                    object = Some(Marked { entry, word, mask });
                }
                _ => return None,
            }
        }
        let (mut words, mut at): (&[u64], u64) = (&[], 0);
        match work.parts[..] {
            [] => {}
            [(entry, part)] if part.words <= WORDS && work.entries[entry as usize].state == State::Live => {
                // SAFETY: the image's words were initialised when it was made; no reference to them is left.
                let image = unsafe { core::slice::from_raw_parts(part.copy.as_ptr(), part.words) };
                (words, at) = changed(&pool.media, image, part.at);
            }
            _ => return None,
        }
        (object.is_some() || !words.is_empty()).then_some(Self { object, words, at })
    }

    /// Makes it happen.
    #[inline]
    pub(super) fn commit(self, pool: &Inner, work: &Work) -> Result<()> {
        let media = &pool.media;
        media.check_usable()?;
        let mut tally = Tally { transactions: 1, ..Tally::default() };
        if let Some(Marked { entry, .. }) = &self.object {
            if entry.state == State::Published {
                media.flush(entry.offset, entry.used as usize);
                (tally.allocations, tally.bytes) = (1, entry.size);
            } else {
                (tally.frees, tally.freed_bytes) = (1, entry.size);
            }
        }
        // What was written in place comes before what makes it reachable.
        media.fence();
        let words_changed = self.words.len() + usize::from(self.object.is_some());
        let record = if words_changed > 1 { self.write_record(pool, work)? } else { Safe::None };
        let Self { object, words, at } = self;
        let mut books = pool.heap.alone();
        // SAFETY: the operations are on a bitmap, where bits change under the lock of the heap only, and on words of
        // an object that the transaction has locked; readers are out.
        unsafe {
            if let Some(Marked { entry, word, mask }) = object {
                let bits = media.load(word);
                let bits = if entry.state == State::Published { bits | mask } else { bits & !mask };
                media.store(word, bits);
                media.flush(word, 8);
            }
            if !words.is_empty() {
                media.store_words(at, words);
                media.flush(at, words.len() * 8);
            }
        }
        // Before the record goes, so that what returned is counted, whatever happens next.
        books.count_in_file(media, &tally);
        if words_changed > 1 {
            pool.journal.clear(media, &record);
        } else {
            media.fence();
        }
        if let Some(Marked { entry, .. }) = object
            && entry.state == State::Freed
        {
            pool.release(work.id(), &mut books, entry.fingerprint, entry.offset, entry.mark);
        }
        Ok(())
    }
}

impl Small<'_> {
    /// The bit of the object and the words, as a record.
    #[inline]
    fn write_record(&self, pool: &Inner, work: &Work) -> Result<Safe> {
        let mut body = [0; 5 + WORDS];
        let mut len = 0;
        if let Some(Marked { entry, word, mask }) = self.object {
            body[..3].copy_from_slice(&bits_op(entry.state == State::Published, word, mask));
            len = 3;
        }
        if !self.words.is_empty() {
            body[len..len + 2].copy_from_slice(&write_op(self.at, self.words.len()));
            body[len + 2..][..self.words.len()].copy_from_slice(self.words);
            len += 2 + self.words.len();
        }
        pool.journal.write(&pool.media, pool, work.id(), &body[..len])
    }
}

/// The words of an image from the first to the last that differs from the file, and where the first is.
#[inline]
fn changed<'w>(media: &Media, image: &'w [u64], at: u64) -> (&'w [u64], u64) {
    let differs = |i: usize| image[i] != media.load(at + i as u64 * 8);
    let (mut first, mut end) = (0, image.len());
    while first < end && !differs(first) {
        first += 1;
    }
    while first < end && !differs(end - 1) {
        end -= 1;
    }
    (&image[first..end], at + first as u64 * 8)
}

//! What a transaction reads and writes of its objects: images of those that exist, places of new ones.

use core::ptr::NonNull;

use super::work::{Image, Whole, Work};
use super::{Opened, Transaction, borrowed};
use crate::base::error::Result;
use crate::persist::arena::Arena;
use crate::persist::ptr::Guard;

impl Transaction<'_> {
    /// Borrows the object and gives the place of `len` bytes at `at`, to be read. `exact`: images of the
    /// object, if any, are of just these bytes or of others altogether.
    pub(crate) fn view(
        &self,
        opened: Opened,
        at: u64,
        len: usize,
        exact: bool,
    ) -> Result<(NonNull<u8>, Guard<'_>)> {
        let mut work = self.work.borrow_mut();
        let entry = &work.entries[opened.entry as usize];
        if entry.borrows < 0 {
            return Err(borrowed());
        }
        let offset = entry.offset;
        let split = |work: &Work| work.parts.iter().any(|&(entry, _)| entry == opened.entry);
        let place = match self.existing(&work, opened.entry, at, len) {
            Some(place) => place,
            None if !exact && split(&work) => {
                // Some words have images, and a reference must see one piece of memory. Making the image
                // moves nothing that is borrowed: borrows are shared ones, and what they see stays.
                let whole = self.make_whole(&mut work, opened);
                // SAFETY: `at` lies in the object, so in its image.
                unsafe { whole.copy.cast::<u8>().add(at as usize) }
            }
            None => self.pool.media.at(offset + at, len),
        };
        work.entries[opened.entry as usize].borrows += 1;
        drop(work);
        Ok((place, Guard(Some((self.brief(), opened.entry)))))
    }

    /// `self` with the lifetime that guards carry.
    pub(super) fn brief(&self) -> &Transaction<'_> {
        self
    }

    /// Where `len` bytes at `at` of an entry have an image, or lie if the object is new.
    #[inline]
    fn existing(&self, work: &Work, number: u32, at: u64, len: usize) -> Option<NonNull<u8>> {
        let entry = &work.entries[number as usize];
        if entry.is_new() {
            return Some(self.pool.media.at(entry.offset + at, len));
        }
        if let Some(whole) = entry.whole {
            // SAFETY: `at` lies in the object, so in its image.
            return Some(unsafe { whole.image.copy.cast::<u8>().add(at as usize) });
        }
        let found = work.find_part(entry.offset + at)?;
        let part = work.parts[found as usize].1;
        (len <= part.words * 8).then(|| part.copy.cast())
    }

    /// An image of `len` bytes at `at` (both multiples of 8), or the place itself if the object is new. The
    /// entry is borrowed for the only reference to it.
    #[inline]
    pub(crate) fn image(&self, opened: Opened, at: u64, len: usize) -> Result<NonNull<u8>> {
        debug_assert!(at.is_multiple_of(8) && len.is_multiple_of(8) && at + len as u64 <= opened.size);
        let mut work = self.work.borrow_mut();
        let entry = &work.entries[opened.entry as usize];
        debug_assert!(entry.exclusive || entry.is_new());
        if entry.borrows != 0 {
            return Err(borrowed());
        }
        let (offset, known) = (entry.offset, entry.has_images || entry.is_new());
        work.entries[opened.entry as usize].borrows = -1;
        if known {
            if let Some(Whole { image, .. }) = &mut work.entries[opened.entry as usize].whole {
                // It may have been cut by `forget_parts`.
                image.words = image.words.max((at as usize + len) / 8);
            }
            if let Some(place) = self.existing(&work, opened.entry, at, len) {
                return Ok(place);
            }
        }
        if at == 0 && len as u64 == opened.size {
            return Ok(self.make_whole(&mut work, opened).copy.cast());
        }
        let image = self.copy_in(&mut work.arena, offset + at, len / 8);
        work.add_part(opened.entry, image);
        Ok(image.copy.cast())
    }

    /// An image of words of the file.
    #[inline]
    fn copy_in(&self, arena: &mut Arena, at: u64, words: usize) -> Image {
        // Aligned as the place is, up to a page, and no more than its size asks for: whatever may lie there may lie
        // in the image.
        let align = if words <= 8 {
            64
        } else {
            (1usize << at.trailing_zeros().min(12)).min(words.next_power_of_two() * 8)
        };
        let copy = arena.take(words * 8, align).cast::<u64>();
        // SAFETY: the arena gave that many words, aligned to 8.
        unsafe { self.pool.media.copy_words(at, copy, words) };
        Image { at, words, copy }
    }

    #[cold]
    fn make_whole(&self, work: &mut Work, opened: Opened) -> Image {
        let entry = &mut work.entries[opened.entry as usize];
        entry.has_images = true;
        let offset = entry.offset;
        let image = self.copy_in(&mut work.arena, offset, opened.size as usize / 8);
        for (_, part) in work.parts.iter().filter(|(entry, _)| *entry == opened.entry) {
            let inside = (part.at - offset) as usize / 8;
            // SAFETY: both are images in the arena, apart from each other; the part lies in the object.
            unsafe { image.copy.add(inside).copy_from_nonoverlapping(part.copy, part.words) };
        }
        // What was appended in place may change in the image: then the record writes it, and does not check it.
        let appended = work.rare().appended.iter().position(|known| known.0 == opened.entry);
        let all_from = appended.map_or(u64::MAX, |known| work.rare_mut().appended.swap_remove(known).1);
        work.entries[opened.entry as usize].whole = Some(Whole { image, all_from });
        image
    }

    /// Forgets what is known of bytes of the object from `at` on, which count no more.
    pub(crate) fn forget_parts(&self, opened: Opened, at: u64) {
        let mut work = self.work.borrow_mut();
        let from = work.entries[opened.entry as usize].offset + at;
        for (entry, part) in &mut work.parts {
            if *entry == opened.entry && part.at >= from {
                part.words = 0;
            }
        }
        // The next transaction may write there in place, so the record must not depend on it either.
        for (_, from, len) in work.rare_mut().appended.iter_mut().filter(|known| known.0 == opened.entry) {
            *len = (*len).min(at.saturating_sub(*from));
        }
        if let Some(Whole { image, .. }) = &mut work.entries[opened.entry as usize].whole {
            image.words = image.words.min((at as usize).div_ceil(8));
        }
    }

    #[inline]
    pub(crate) fn unborrow(&self, number: u32, exclusive: bool) {
        // A guard that outlives a panic inside a call here finds the borrow taken; the transaction is lost
        // then anyway.
        let Ok(mut work) = self.work.try_borrow_mut() else { return };
        let entry = &mut work.entries[number as usize];
        if exclusive {
            entry.borrows = 0;
            let (offset, size, fresh) = (entry.offset, entry.size, entry.is_new());
            if fresh {
                self.pool.media.touched(offset, size as usize);
            } else if let Some(&(_, at, len)) = work.rare().appended.iter().find(|known| known.0 == number) {
                self.pool.media.touched(offset + at, len as usize);
            }
        } else {
            entry.borrows -= 1;
        }
    }

    /// Whether bytes of the object are to be written in place: it is new, or they are `unreached` and no image
    /// stands for all of it.
    pub(crate) fn writes_in_place(&self, opened: Opened, unreached: bool) -> bool {
        let work = self.work.borrow();
        let entry = &work.entries[opened.entry as usize];
        entry.is_new() || (unreached && entry.whole.is_none())
    }

    /// The place of bytes of the object that nothing reaches yet, borrowed to be written.
    pub(crate) fn place_mut(&self, opened: Opened, at: u64, len: usize) -> Result<NonNull<u8>> {
        let mut work = self.work.borrow_mut();
        let entry = &mut work.entries[opened.entry as usize];
        if entry.borrows != 0 {
            return Err(borrowed());
        }
        entry.borrows = -1;
        if !entry.is_new() {
            let appended = &mut work.rare_mut().appended;
            match appended.iter_mut().find(|known| known.0 == opened.entry) {
                // One stretch an object: vectors grow at their end.
                Some((_, from, bytes)) => {
                    let end = (*from + *bytes).max(at + len as u64);
                    *from = (*from).min(at);
                    *bytes = end - *from;
                }
                None => appended.push((opened.entry, at, len as u64)),
            }
        }
        Ok(self.pool.media.at(opened.offset + at, len))
    }

    /// How much of a new object counts; the rest of its slot is not looked at before it is written.
    pub(crate) fn set_used(&self, opened: Opened, used: u64) {
        self.work.borrow_mut().entries[opened.entry as usize].used = used;
    }
}

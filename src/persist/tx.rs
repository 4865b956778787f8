//! A transaction: what it has locked, borrowed, reserved and will change.
//!
//! Nothing that others can see changes before the commit. Existing objects are changed in *images*, copies
//! in memory, whose differences become the record; new objects are written in place, where nothing points
//! to them yet. Giving up is forgetting.
//!
//! Invariants
//! 1. Every entry's object is locked in the pool's lock table for this transaction (exclusively if
//!    `exclusive`), or is new and known to nobody else. So it stays live, of its type, and unchanged in place
//!    until the transaction ends.
//! 2. `borrows` counts the [`PRef`]s to an object, or is -1 while a [`PRefMut`] exists. Images are made,
//!    written and freed objects dropped only while it allows that.
//! 3. An image lies in the arena and stays there until the transaction ends; images of one object do not
//!    overlap, except that `whole`, once there, replaces the others.
//! 4. A value belongs to one thread: it is neither `Send` nor `Sync`.

mod commit;

use core::cell::{Cell, RefCell};
use core::ptr::NonNull;

use super::arena::Arena;
use super::context;
use super::format::{ROOTS_HEAD, TYPES_HEAD};
use super::heap::{FoldMap, Slot};
use super::inner::Inner;
use super::journal::Ops;
use super::ptr::{Guard, PRefMut};
use super::table::Mark;
use super::types::{Persist, TypeInfo};
use crate::base::error::{Error, PointerFault, Refusal, Result};

/// An object as a transaction knows it.
#[derive(Debug)]
struct Entry {
    offset: u64,
    size: u64,
    fingerprint: u64,
    exclusive: bool,
    /// Index of the new object's slot.
    fresh: Option<u32>,
    freed: bool,
    borrows: i32,
    mark: Option<Mark>,
    whole: Option<Image>,
    /// From here on the file need not have what the image was made from.
    all_from: u64,
}

/// A copy of words of an object.
#[derive(Clone, Copy, Debug)]
struct Image {
    at: u64,
    words: usize,
    copy: NonNull<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Reserved,
    Published,
    Dropped,
}

#[derive(Debug)]
struct Fresh {
    slot: Slot,
    fate: Fate,
    fingerprint: u64,
    /// Bytes that count; the rest of the slot is not looked at before it is written.
    used: u64,
}

/// Finds a number by an offset: by looking through a few, by hashing many.
#[derive(Debug, Default)]
struct Index {
    map: FoldMap<u64, u32>,
}

impl Index {
    const FEW: usize = 12;

    fn find(&self, all: impl ExactSizeIterator<Item = u64> + DoubleEndedIterator, key: u64) -> Option<u32> {
        let len = all.len();
        if len <= Self::FEW {
            return all.rev().position(|at| at == key).map(|back| (len - 1 - back) as u32);
        }
        self.map.get(&key).copied()
    }

    /// Notes the last of `all`, which was just added.
    fn added(&mut self, all: impl ExactSizeIterator<Item = u64>) {
        let len = all.len();
        if len == Self::FEW + 1 {
            self.map.extend(all.zip(0..));
        } else if len > Self::FEW
            && let Some((key, number)) = all.zip(0..).nth(len - 1)
        {
            self.map.insert(key, number);
        }
    }
}

/// What a transaction holds; kept by the thread for its next one.
#[derive(Debug, Default)]
pub(crate) struct Work {
    arena: Arena,
    entries: Vec<Entry>,
    entry_index: Index,
    parts: Vec<(u32, Image)>,
    part_index: Index,
    fresh: Vec<Fresh>,
    /// Where existing objects were written in place, behind what they hold.
    appended: Vec<(u32, u64, u64)>,
    /// Words outside objects: heads of lists.
    heads: Vec<(u64, u64)>,
    head_locks: Vec<u64>,
    types: Vec<u64>,
    roots: Vec<(String, u64)>,
    ops: Ops,
}

impl Work {
    fn clear(&mut self) {
        self.arena.clear();
        self.entries.clear();
        self.entry_index.map.clear();
        self.parts.clear();
        self.part_index.map.clear();
        self.fresh.clear();
        self.appended.clear();
        self.heads.clear();
        self.head_locks.clear();
        self.types.clear();
        self.roots.clear();
        self.ops.clear();
    }

    fn find(&self, offset: u64) -> Option<u32> {
        self.entry_index.find(self.entries.iter().map(|entry| entry.offset), offset)
    }

    fn add(&mut self, entry: Entry) -> u32 {
        self.entries.push(entry);
        self.entry_index.added(self.entries.iter().map(|entry| entry.offset));
        self.entries.len() as u32 - 1
    }
}

thread_local!(static SPARE: Cell<Option<Box<Work>>> = const { Cell::new(None) });

/// An open transaction; see [`PersistentPool::transaction`](super::PersistentPool::transaction).
pub struct Transaction<'p> {
    pub(crate) pool: &'p Inner,
    id: u64,
    work: RefCell<Box<Work>>,
    doomed: Cell<bool>,
    committed: Cell<bool>,
    /// Invariant 4.
    _one_thread: core::marker::PhantomData<*const ()>,
}

impl core::fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Transaction").field("id", &self.id).finish_non_exhaustive()
    }
}

/// An object opened in a transaction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opened {
    pub(crate) entry: u32,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

impl<'p> Transaction<'p> {
    pub(crate) fn begin(pool: &'p Inner) -> Result<Self> {
        pool.media.check_usable()?;
        if !pool.media.is_writable() {
            return Err(Error::refused("this pool was opened read-only", "open it for writing"));
        }
        Ok(Self {
            pool,
            id: pool.next_transaction(),
            work: RefCell::new(SPARE.take().unwrap_or_default()),
            doomed: Cell::new(false),
            committed: Cell::new(false),
            _one_thread: core::marker::PhantomData,
        })
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Nothing of it shall happen, whatever its caller says.
    pub(crate) fn doom(&self) {
        self.doomed.set(true);
    }

    fn lock(&self, object: u64, exclusive: bool) -> Result<()> {
        let may_wait = !context::current(self.pool).reads;
        self.pool.locks.acquire(self.id, object, exclusive, may_wait)
    }

    /// Locks the object at `offset`, which is live and of that type.
    pub(crate) fn open(
        &self,
        identity: u64,
        offset: u64,
        fingerprint: u64,
        exclusive: bool,
    ) -> Result<Opened> {
        let known = self.work.borrow().find(offset);
        if let Some(number) = known {
            let work = self.work.borrow();
            let entry = &work.entries[number as usize];
            let (size, locked) = (entry.size, entry.exclusive);
            self.pool.check_pointer(identity, offset)?;
            if entry.freed {
                return Err(Error::pointer(offset as usize, PointerFault::NotLive));
            }
            if entry.fingerprint != fingerprint {
                return Err(Error::pointer(offset as usize, PointerFault::WrongType));
            }
            drop(work);
            if exclusive && !locked {
                self.lock(offset, true)?;
                self.work.borrow_mut().entries[number as usize].exclusive = true;
            }
            return Ok(Opened { entry: number, offset, size });
        }
        self.pool.check_pointer(identity, offset)?;
        self.lock(offset, exclusive)?;
        match self.pool.live(offset, fingerprint) {
            Ok((object, mark)) => {
                let entry = self.work.borrow_mut().add(Entry {
                    offset,
                    size: object.size,
                    fingerprint,
                    exclusive,
                    fresh: None,
                    freed: false,
                    borrows: 0,
                    mark: Some(mark),
                    whole: None,
                    all_from: u64::MAX,
                });
                Ok(Opened { entry, offset, size: object.size })
            }
            Err(error) => {
                self.pool.locks.release(self.id, core::iter::once(offset));
                Err(error)
            }
        }
    }

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
    fn brief(&self) -> &Transaction<'_> {
        self
    }

    /// Where `len` bytes at `at` of an entry have an image, or lie if the object is new.
    fn existing(&self, work: &Work, number: u32, at: u64, len: usize) -> Option<NonNull<u8>> {
        let entry = &work.entries[number as usize];
        if entry.fresh.is_some() {
            return Some(self.pool.media.at(entry.offset + at, len));
        }
        if let Some(whole) = entry.whole {
            // SAFETY: `at` lies in the object, so in its image.
            return Some(unsafe { whole.copy.cast::<u8>().add(at as usize) });
        }
        let found = work.part_index.find(work.parts.iter().map(|(_, part)| part.at), entry.offset + at)?;
        let part = work.parts[found as usize].1;
        (len <= part.words * 8).then(|| part.copy.cast())
    }

    /// An image of `len` bytes at `at` (both multiples of 8), or the place itself if the object is new. The
    /// entry is borrowed for the only reference to it.
    pub(crate) fn image(&self, opened: Opened, at: u64, len: usize) -> Result<NonNull<u8>> {
        debug_assert!(at.is_multiple_of(8) && len.is_multiple_of(8) && at + len as u64 <= opened.size);
        let mut work = self.work.borrow_mut();
        let entry = &work.entries[opened.entry as usize];
        debug_assert!(entry.exclusive || entry.fresh.is_some());
        if entry.borrows != 0 {
            return Err(borrowed());
        }
        let (offset, whole) = (entry.offset, at == 0 && len as u64 == opened.size);
        if let Some(image) = &mut work.entries[opened.entry as usize].whole {
            // It may have been cut by `forget_parts`.
            image.words = image.words.max((at as usize + len) / 8);
        }
        let place = match self.existing(&work, opened.entry, at, len) {
            Some(place) => place,
            None if whole => self.make_whole(&mut work, opened).copy.cast(),
            None => {
                let image = self.copy_in(&mut work.arena, offset + at, len / 8);
                work.parts.push((opened.entry, image));
                let Work { parts, part_index, .. } = &mut **work;
                part_index.added(parts.iter().map(|(_, part)| part.at));
                image.copy.cast()
            }
        };
        work.entries[opened.entry as usize].borrows = -1;
        Ok(place)
    }

    /// An image of words of the file.
    fn copy_in(&self, arena: &mut Arena, at: u64, words: usize) -> Image {
        // Aligned as the place is, up to a page: whatever may lie there may lie in the image.
        let align = 1usize << at.trailing_zeros().min(12);
        let copy = arena.take(words * 8, align.min(words.next_power_of_two() * 8)).cast::<u64>();
        // SAFETY: the arena gave that many words, aligned to 8.
        let fill = unsafe {
            copy.write_bytes(0, words);
            core::slice::from_raw_parts_mut(copy.as_ptr(), words)
        };
        self.pool.media.load_words(at, fill);
        Image { at, words, copy }
    }

    #[cold]
    fn make_whole(&self, work: &mut Work, opened: Opened) -> Image {
        let offset = work.entries[opened.entry as usize].offset;
        let image = self.copy_in(&mut work.arena, offset, opened.size as usize / 8);
        for (_, part) in work.parts.iter().filter(|(entry, _)| *entry == opened.entry) {
            let inside = (part.at - offset) as usize / 8;
            // SAFETY: both are images in the arena, apart from each other; the part lies in the object.
            unsafe { image.copy.add(inside).copy_from_nonoverlapping(part.copy, part.words) };
        }
        work.entries[opened.entry as usize].whole = Some(image);
        // What was appended in place may change in the image: then the record writes it, and does not check it.
        if let Some(known) = work.appended.iter().position(|known| known.0 == opened.entry) {
            let (_, at, _) = work.appended.swap_remove(known);
            work.entries[opened.entry as usize].all_from = at;
        }
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
        for (_, from, len) in work.appended.iter_mut().filter(|known| known.0 == opened.entry) {
            *len = (*len).min(at.saturating_sub(*from));
        }
        if let Some(whole) = &mut work.entries[opened.entry as usize].whole {
            whole.words = whole.words.min((at as usize).div_ceil(8));
        }
    }

    pub(crate) fn unborrow(&self, number: u32, exclusive: bool) {
        // A guard that outlives a panic inside a call here finds the borrow taken; the transaction is lost
        // then anyway.
        let Ok(mut work) = self.work.try_borrow_mut() else { return };
        let entry = &mut work.entries[number as usize];
        if exclusive {
            entry.borrows = 0;
            let (offset, size, fresh) = (entry.offset, entry.size, entry.fresh.is_some());
            if fresh {
                self.pool.media.touched(offset, size as usize);
            } else if let Some(&(_, at, len)) = work.appended.iter().find(|known| known.0 == number) {
                self.pool.media.touched(offset + at, len as usize);
            }
        } else {
            entry.borrows -= 1;
        }
    }

    /// Reserves room for a new object. Its bytes are what was there before.
    pub(crate) fn reserve_bytes(
        &self,
        fingerprint: u64,
        size: usize,
        align: usize,
        exact: bool,
        info: impl FnOnce() -> TypeInfo,
    ) -> Result<(u32, Slot)> {
        self.pool.media.check_usable()?;
        let slot = {
            let mut books = self.pool.heap.lock();
            let (media, table) = (&self.pool.media, &self.pool.table);
            let reserved = books.heap.reserve(media, table, fingerprint, size, align, exact);
            reserved.inspect_err(|_| books.failures += 1)?
        };
        let mut work = self.work.borrow_mut();
        let used = size.next_multiple_of(8) as u64;
        work.fresh.push(Fresh { slot, fate: Fate::Reserved, fingerprint, used });
        let number = work.fresh.len() as u32 - 1;
        let known = slot.registered || work.types.contains(&fingerprint);
        drop(work);
        if !known {
            self.register(&info())?;
        }
        Ok((number, slot))
    }

    /// Makes a reserved object one of this transaction's objects.
    pub(crate) fn publish_slot(&self, number: u32) -> Opened {
        let mut work = self.work.borrow_mut();
        let fresh = &mut work.fresh[number as usize];
        fresh.fate = Fate::Published;
        let (slot, fingerprint) = (fresh.slot, fresh.fingerprint);
        let entry = work.add(Entry {
            offset: slot.offset,
            size: slot.size,
            fingerprint,
            exclusive: true,
            fresh: Some(number),
            freed: false,
            borrows: 0,
            mark: None,
            whole: None,
            all_from: u64::MAX,
        });
        Opened { entry, offset: slot.offset, size: slot.size }
    }

    /// Whether bytes of the object are to be written in place: it is new, or they are `unreached` and no image
    /// stands for all of it.
    pub(crate) fn writes_in_place(&self, opened: Opened, unreached: bool) -> bool {
        let work = self.work.borrow();
        let entry = &work.entries[opened.entry as usize];
        entry.fresh.is_some() || (unreached && entry.whole.is_none())
    }

    /// The place of bytes of the object that nothing reaches yet, borrowed to be written.
    pub(crate) fn place_mut(&self, opened: Opened, at: u64, len: usize) -> Result<NonNull<u8>> {
        let mut work = self.work.borrow_mut();
        let Work { entries, appended, .. } = &mut **work;
        let entry = &mut entries[opened.entry as usize];
        if entry.borrows != 0 {
            return Err(borrowed());
        }
        entry.borrows = -1;
        if entry.fresh.is_none() {
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
        let mut work = self.work.borrow_mut();
        let Work { entries, fresh, .. } = &mut **work;
        if let Some(number) = entries[opened.entry as usize].fresh {
            fresh[number as usize].used = used;
        }
    }

    /// Frees an opened object.
    pub(crate) fn free_opened(&self, opened: Opened) -> Result<()> {
        let mut work = self.work.borrow_mut();
        let entry = &mut work.entries[opened.entry as usize];
        debug_assert!(entry.exclusive);
        if entry.borrows != 0 {
            return Err(borrowed());
        }
        entry.freed = true;
        entry.whole = None;
        let (offset, fresh) = (entry.offset, entry.fresh);
        match fresh {
            Some(number) => work.fresh[number as usize].fate = Fate::Dropped,
            None => self.pool.heap.lock().prepare_free(&self.pool.media, offset),
        }
        Ok(())
    }

    /// The word at the head of a list, as this transaction sees it, locked for it.
    pub(crate) fn head(&self, at: u64) -> Result<u64> {
        debug_assert!(at == ROOTS_HEAD || at == TYPES_HEAD);
        if !self.work.borrow().head_locks.contains(&at) {
            self.lock(at, true)?;
            self.work.borrow_mut().head_locks.push(at);
        }
        let set = self.work.borrow().heads.iter().find(|head| head.0 == at).map(|head| head.1);
        Ok(set.unwrap_or_else(|| self.pool.media.load(at)))
    }

    /// Puts a record at the head of a list; `words[0]` links to the next.
    pub(crate) fn link_record(&self, head: u64, fingerprint: u64, words: &[u64]) -> Result<u64> {
        let info = || TypeInfo::of::<u64>();
        // Few different sizes: each takes a run of its own.
        let size = (words.len() * 8).next_multiple_of(256);
        let (number, slot) = self.reserve_bytes(fingerprint, size, 8, false, info)?;
        let mut padded = words.to_vec();
        padded.resize(slot.size as usize / 8, 0);
        // SAFETY: the slot is reserved for this transaction.
        unsafe { self.pool.media.store_words(slot.offset, &padded) };
        self.publish_slot(number);
        let mut work = self.work.borrow_mut();
        match work.heads.iter_mut().find(|known| known.0 == head) {
            Some(known) => known.1 = slot.offset,
            None => work.heads.push((head, slot.offset)),
        }
        Ok(slot.offset)
    }

    /// Adds a type to the file's list, unless another transaction did meanwhile.
    #[cold]
    fn register(&self, info: &TypeInfo) -> Result<()> {
        let next = self.head(TYPES_HEAD)?;
        if self.pool.heap.lock().is_registered(info.fingerprint) {
            return Ok(());
        }
        self.work.borrow_mut().types.push(info.fingerprint);
        self.link_record(TYPES_HEAD, super::format::internal::TYPE, &info.encode(next)).map(drop)
    }

    /// A root this transaction made.
    pub(crate) fn new_root(&self, name: &str) -> Option<u64> {
        self.work.borrow().roots.iter().find(|root| root.0 == name).map(|root| root.1)
    }

    pub(crate) fn note_root(&self, name: &str, record: u64) {
        self.work.borrow_mut().roots.push((name.to_owned(), record));
    }

    /// The only reference to a `T` that starts the object.
    pub(crate) fn reference_mut<T: Persist>(&self, opened: Opened) -> Result<PRefMut<'_, T>> {
        let words = size_of::<T>().next_multiple_of(8);
        let place = self.image(opened, 0, words)?;
        // From here on its drop unborrows.
        let guard = Unborrow(self, opened.entry);
        let value = check_value::<T>(place)?;
        core::mem::forget(guard);
        // SAFETY: the value was checked, and invariant 2 makes this the only reference.
        Ok(unsafe { PRefMut::new(value, self.brief(), opened.entry) })
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        let committed = self.committed.get();
        let work = self.work.get_mut();
        let unused = |fresh: &&Fresh| !committed || fresh.fate != Fate::Published;
        if work.fresh.iter().any(|fresh| unused(&fresh)) {
            let mut heap = self.pool.heap.lock();
            for fresh in work.fresh.iter().filter(unused) {
                heap.release(&self.pool.table, fresh.slot.offset);
            }
        }
        let locked = work.entries.iter().filter(|entry| entry.fresh.is_none()).map(|entry| entry.offset);
        let mut locked = locked.chain(work.head_locks.iter().copied()).peekable();
        if locked.peek().is_some() {
            self.pool.locks.release(self.id, locked);
        }
        work.clear();
        SPARE.set(Some(core::mem::take(work)));
    }
}

/// Takes a borrow back if what follows fails.
struct Unborrow<'a, 'p>(&'a Transaction<'p>, u32);

impl Drop for Unborrow<'_, '_> {
    fn drop(&mut self) {
        self.0.unborrow(self.1, true);
    }
}

/// The `T` at `place`, if its bytes are one.
pub(crate) fn check_value<T: Persist>(place: NonNull<u8>) -> Result<NonNull<T>> {
    let value = place.cast::<T>();
    if !value.is_aligned() {
        return Err(Error::pointer(place.as_ptr() as usize, PointerFault::WrongType));
    }
    // SAFETY: callers hold what keeps the place in the object and unchanged; file memory is initialised.
    if !unsafe { T::is_valid(place.as_ptr()) } {
        return Err(Error::corrupt(
            place.as_ptr() as u64,
            "bits that are a value of the type stored there",
            0,
        ));
    }
    Ok(value)
}

#[cold]
fn borrowed() -> Error {
    Error::InvalidOperation(Refusal::Other(
        "this object is borrowed in this transaction",
        "drop the PRef or PRefMut first",
    ))
}

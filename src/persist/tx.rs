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
mod image;
mod small;
mod work;

use core::cell::{Cell, RefCell};
use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use super::context;
use super::format::{ROOTS_HEAD, TYPES_HEAD};
use super::heap::Slot;
use super::inner::Inner;
use super::ptr::PRefMut;
use super::types::{Persist, TypeInfo};
use crate::base::error::{Error, PointerFault, Refusal, Result};
use work::{Entry, State, Work};

/// An open transaction; see [`PersistentPool::transaction`](super::PersistentPool::transaction).
pub struct Transaction<'p> {
    pub(crate) pool: &'p Inner,
    /// Taken out when it is dropped.
    work: ManuallyDrop<RefCell<Box<Work>>>,
    doomed: Cell<bool>,
    committed: Cell<bool>,
    /// Invariant 4.
    _one_thread: core::marker::PhantomData<*const ()>,
}

impl core::fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Transaction").field("pool", &self.pool.path).finish_non_exhaustive()
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
    #[inline(always)]
    pub(crate) fn begin(pool: &'p Inner) -> Result<Self> {
        pool.media.check_usable()?;
        if !pool.media.is_writable() {
            return Err(read_only());
        }
        Ok(Self {
            pool,
            work: ManuallyDrop::new(RefCell::new(Work::take())),
            doomed: Cell::new(false),
            committed: Cell::new(false),
            _one_thread: core::marker::PhantomData,
        })
    }

    /// Nothing of it shall happen, whatever its caller says.
    pub(crate) fn doom(&self) {
        self.doomed.set(true);
    }

    #[inline]
    fn lock(&self, object: u64, exclusive: bool) -> Result<()> {
        let id = self.work.borrow().id();
        // Waiting inside a read could be waiting for a commit that waits for that read.
        self.pool.locks.acquire(id, object, exclusive, || !context::current(self.pool).reads)
    }

    /// Locks the object at `offset`, which is live and of that type.
    #[inline]
    pub(crate) fn open(
        &self,
        identity: u64,
        offset: u64,
        fingerprint: u64,
        exclusive: bool,
    ) -> Result<Opened> {
        self.pool.check_pointer(identity, offset)?;
        let known = self.work.borrow().find(offset);
        if let Some(number) = known {
            return self.open_again(number, fingerprint, exclusive);
        }
        self.lock(offset, exclusive)?;
        match self.pool.live(offset, fingerprint) {
            Ok((object, mark)) => {
                let entry = self.work.borrow_mut().add(Entry::existing(object, mark, exclusive));
                Ok(Opened { entry, offset, size: object.size })
            }
            Err(error) => {
                let id = self.work.borrow().id();
                self.pool.locks.release(id, offset, exclusive);
                Err(error)
            }
        }
    }

    #[inline(never)]
    fn open_again(&self, number: u32, fingerprint: u64, exclusive: bool) -> Result<Opened> {
        let work = self.work.borrow();
        let entry = &work.entries[number as usize];
        let (offset, size, locked) = (entry.offset, entry.size, entry.exclusive);
        if !matches!(entry.state, State::Live | State::Published) {
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
        Ok(Opened { entry: number, offset, size })
    }

    /// Reserves room for a new object. Its bytes are what was there before.
    #[inline]
    pub(crate) fn reserve_bytes(
        &self,
        fingerprint: u64,
        size: usize,
        align: usize,
        exact: bool,
        info: impl FnOnce() -> TypeInfo,
    ) -> Result<(u32, Slot)> {
        let mut work = self.work.borrow_mut();
        let slot = self.pool.reserve_slot(work.id(), fingerprint, size, align, exact)?;
        work.new_runs |= slot.fresh;
        let number = work.add(Entry::reserved(&slot, fingerprint, size.next_multiple_of(8) as u64));
        let known = slot.registered || work.rare().types.contains(&fingerprint);
        drop(work);
        if !known {
            self.register(&info())?;
        }
        Ok((number, slot))
    }

    /// Makes a reserved object one of this transaction's objects.
    #[inline]
    pub(crate) fn publish_slot(&self, number: u32) -> Opened {
        let entry = &mut self.work.borrow_mut().entries[number as usize];
        entry.state = State::Published;
        Opened { entry: number, offset: entry.offset, size: entry.size }
    }

    /// Frees an opened object.
    #[inline]
    pub(crate) fn free_opened(&self, opened: Opened) -> Result<()> {
        let mut work = self.work.borrow_mut();
        let entry = &mut work.entries[opened.entry as usize];
        debug_assert!(entry.exclusive);
        if entry.borrows != 0 {
            return Err(borrowed());
        }
        entry.whole = None;
        entry.state = if entry.is_new() { State::Dropped } else { State::Freed };
        Ok(())
    }

    /// The word at the head of a list, as this transaction sees it, locked for it.
    pub(crate) fn head(&self, at: u64) -> Result<u64> {
        debug_assert!(at == ROOTS_HEAD || at == TYPES_HEAD);
        if !self.work.borrow().rare().head_locks.contains(&at) {
            self.lock(at, true)?;
            self.work.borrow_mut().rare_mut().head_locks.push(at);
        }
        let set = self.work.borrow().rare().heads.iter().find(|head| head.0 == at).map(|head| head.1);
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
        let heads = &mut work.rare_mut().heads;
        match heads.iter_mut().find(|known| known.0 == head) {
            Some(known) => known.1 = slot.offset,
            None => heads.push((head, slot.offset)),
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
        self.work.borrow_mut().rare_mut().types.push(info.fingerprint);
        self.link_record(TYPES_HEAD, super::format::internal::TYPE, &info.encode(next)).map(drop)
    }

    /// A root this transaction made.
    pub(crate) fn new_root(&self, name: &str) -> Option<u64> {
        self.work.borrow().rare().roots.iter().find(|root| root.0 == name).map(|root| root.1)
    }

    pub(crate) fn note_root(&self, name: &str, record: u64) {
        self.work.borrow_mut().rare_mut().roots.push((name.to_owned(), record));
    }

    /// The only reference to a `T` that starts the object.
    #[inline]
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
    #[inline]
    fn drop(&mut self) {
        // SAFETY: taken once, here, and not used after.
        let work = unsafe { ManuallyDrop::take(&mut self.work) }.into_inner();
        if !self.committed.get() && work.entries.iter().any(Entry::is_new) {
            let mut books = self.pool.heap.lock();
            for entry in work.entries.iter().filter(|entry| entry.is_new()) {
                books.release(&self.pool.table, entry.offset);
            }
        }
        work.unlock(&self.pool.locks);
        work.keep();
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
#[inline]
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
fn read_only() -> Error {
    Error::refused("this pool was opened read-only", "open it for writing")
}

#[cold]
fn borrowed() -> Error {
    Error::InvalidOperation(Refusal::Other(
        "this object is borrowed in this transaction",
        "drop the PRef or PRefMut first",
    ))
}

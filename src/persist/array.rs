//! The block behind vectors, strings and maps: a count, then elements of one size.
//!
//! A change of an element is logged as an image of its *group*, the fewest elements that fill whole words.
//! Elements in groups wholly behind the count in the file are reachable from nothing, so they are written in
//! place, and the record carries a checksum of them.

use core::marker::PhantomData;
use core::ptr::NonNull;

use super::ptr::Guard;
use super::read::Place;
use super::tx::{Opened, Transaction};
use super::types::{Persist, Pointers, TypeInfo, cached, fingerprint_of, short_name};
use crate::base::error::{Error, OomReason, PointerFault, Result};

/// How elements of one kind lie in a block.
pub(crate) trait Element: 'static {
    const SIZE: usize;
    const ALIGN: usize;
    fn name() -> String;
    fn pointers(visit: &mut Pointers);
}

/// An element that is a `T`.
#[derive(Debug)]
pub(crate) struct One<T>(PhantomData<T>);

impl<T: Persist> Element for One<T> {
    const SIZE: usize = size_of::<T>();
    const ALIGN: usize = align_of::<T>();
    fn name() -> String {
        short_name(T::type_name())
    }
    fn pointers(visit: &mut Pointers) {
        T::pointers(visit);
    }
}

/// A block of elements `E`, opened.
#[derive(Debug)]
pub(crate) struct Block<E> {
    pub(crate) opened: Opened,
    pub(crate) len: usize,
    pub(crate) capacity: usize,
    _elements: PhantomData<E>,
}

impl<E> Clone for Block<E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for Block<E> {}

const fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl<E: Element> Block<E> {
    /// Where the first element lies.
    pub(crate) const FIRST: usize = if E::ALIGN > 16 { E::ALIGN } else { 16 };
    /// Elements of a group.
    const GROUP: usize = {
        assert!(E::SIZE > 0, "elements of size 0 are not stored");
        8 / gcd(E::SIZE, 8)
    };

    pub(crate) fn fingerprint() -> u64 {
        cached::<Block<E>>(|| fingerprint_of(&format!("[{}]", E::name()), E::SIZE, E::ALIGN))
    }

    fn info() -> TypeInfo {
        let mut visit = Pointers::default();
        E::pointers(&mut visit);
        TypeInfo {
            fingerprint: Self::fingerprint(),
            name: format!("[{}]", E::name()),
            size: 16,
            align: E::ALIGN as u32,
            stride: E::SIZE as u32,
            first: Self::FIRST as u32,
            pointers: visit.into_found(),
        }
    }

    /// A new block for at least `capacity` elements, with none in it.
    pub(crate) fn new(tx: &Transaction<'_>, capacity: usize) -> Result<Self> {
        let too_large = Error::oom(usize::MAX, OomReason::Overflow);
        let groups = capacity.checked_next_multiple_of(Self::GROUP).ok_or(too_large)?;
        let bytes = groups.checked_mul(E::SIZE).and_then(|n| n.checked_add(Self::FIRST)).ok_or(too_large)?;
        let align = E::ALIGN.max(8);
        let (number, slot) = tx.reserve_bytes(Self::fingerprint(), bytes, align, false, Self::info)?;
        let opened = tx.publish_slot(number);
        // SAFETY: the slot is new, and this transaction's.
        unsafe { tx.pool.media.store_words(opened.offset, &[0, 0]) };
        tx.set_used(opened, 16);
        let capacity = (slot.size as usize - Self::FIRST) / E::SIZE / Self::GROUP * Self::GROUP;
        Ok(Self { opened, len: 0, capacity, _elements: PhantomData })
    }

    fn around(opened: Opened, len: u64) -> Result<Self> {
        let room = (opened.size as usize).saturating_sub(Self::FIRST);
        let capacity = room / E::SIZE / Self::GROUP * Self::GROUP;
        if opened.size < Self::FIRST as u64 || len > capacity as u64 {
            return Err(Error::corrupt(opened.offset, "a count of elements that fit their block", len));
        }
        Ok(Self { opened, len: len as usize, capacity, _elements: PhantomData })
    }

    /// The block at `offset`, to be read.
    pub(crate) fn open(place: Place<'_>, offset: u64) -> Result<Self> {
        let opened = place.open(place.inner().identity, offset, Self::fingerprint())?;
        let (count, _guard) = place.view(opened, 0, 16, true)?;
        // SAFETY: a word of the block, borrowed.
        Self::around(opened, unsafe { count.cast::<u64>().read() })
    }

    /// The block at `offset`, to be changed.
    pub(crate) fn open_mut(tx: &Transaction<'_>, offset: u64) -> Result<Self> {
        let opened = tx.open(tx.pool.identity, offset, Self::fingerprint(), true)?;
        let (count, _guard) = tx.view(opened, 0, 16, true)?;
        // SAFETY: a word of the block, borrowed.
        Self::around(opened, unsafe { count.cast::<u64>().read() })
    }

    fn check(&self, index: usize) -> Result<()> {
        if index < self.len {
            return Ok(());
        }
        Err(Error::pointer(index, PointerFault::OutOfRange))
    }

    fn group(index: usize) -> (usize, usize) {
        let first = index / Self::GROUP * Self::GROUP;
        (first, Self::FIRST + first * E::SIZE)
    }

    /// Element `index`, to be read.
    pub(crate) fn element<'a>(&self, place: Place<'a>, index: usize) -> Result<(NonNull<u8>, Guard<'a>)> {
        self.check(index)?;
        let (first, at) = Self::group(index);
        let (group, guard) = place.view(self.opened, at as u64, Self::GROUP * E::SIZE, true)?;
        // SAFETY: the element lies in its group.
        Ok((unsafe { group.add((index - first) * E::SIZE) }, guard))
    }

    /// All elements, to be read.
    pub(crate) fn all<'a>(&self, place: Place<'a>) -> Result<(NonNull<u8>, Guard<'a>)> {
        place.view(self.opened, Self::FIRST as u64, self.len * E::SIZE, false)
    }

    /// Element `index`, or one behind the last, to be written; the block is borrowed for it.
    pub(crate) fn element_mut(&self, tx: &Transaction<'_>, index: usize) -> Result<NonNull<u8>> {
        debug_assert!(index < self.capacity);
        let (first, at) = Self::group(index);
        let bytes = Self::GROUP * E::SIZE;
        let stored = tx.pool.media.load(self.opened.offset) as usize;
        let group = if tx.writes_in_place(self.opened, first >= stored) {
            tx.place_mut(self.opened, at as u64, bytes)?
        } else {
            tx.image(self.opened, at as u64, bytes)?
        };
        // SAFETY: the element lies in its group.
        Ok(unsafe { group.add((index - first) * E::SIZE) })
    }

    /// All elements, to be written; the block is borrowed for it.
    pub(crate) fn all_mut(&self, tx: &Transaction<'_>) -> Result<NonNull<u8>> {
        let whole = tx.image(self.opened, 0, self.opened.size as usize)?;
        // SAFETY: elements begin there.
        Ok(unsafe { whole.add(Self::FIRST) })
    }

    /// Sets the count of elements. Those behind it count no more.
    pub(crate) fn set_len(&mut self, tx: &Transaction<'_>, len: usize) -> Result<()> {
        debug_assert!(len <= self.capacity);
        if len < self.len {
            tx.forget_parts(self.opened, Self::group(len + Self::GROUP - 1).1 as u64);
        }
        let count = tx.image(self.opened, 0, 16)?;
        // SAFETY: the word of the count, borrowed for us.
        unsafe { count.cast::<u64>().write(len as u64) };
        let used = Self::FIRST + len.next_multiple_of(Self::GROUP) * E::SIZE;
        tx.set_used(self.opened, used as u64);
        tx.unborrow(self.opened.entry, true);
        self.len = len;
        Ok(())
    }

    /// A block with the same elements and more room; this one is freed.
    pub(crate) fn grown(&self, tx: &Transaction<'_>, capacity: usize) -> Result<Self> {
        let mut new = Self::new(tx, capacity)?;
        let (from, guard) = self.all(Place::Transaction(tx))?;
        let to = tx.pool.media.at(new.opened.offset + Self::FIRST as u64, self.len * E::SIZE);
        // SAFETY: the new block is new and has the room; the old one is borrowed.
        unsafe { to.copy_from_nonoverlapping(from, self.len * E::SIZE) };
        drop(guard);
        new.set_len(tx, self.len)?;
        tx.free_opened(self.opened)?;
        Ok(new)
    }
}

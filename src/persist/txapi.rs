//! What a program does in a transaction.

use core::mem::MaybeUninit;

use super::ptr::{PBox, PRef, PRefMut};
use super::read::reference;
use super::tx::Transaction;
use super::types::{Persist, TypeInfo, fingerprint};
use crate::base::error::{Error, Result};

/// Room for a new object, until it is published or the transaction ends. Nothing points to it, so it is
/// written in place, at no cost to the log.
#[derive(Debug)]
pub struct Reserved<'t, T: Persist> {
    tx: &'t Transaction<'t>,
    number: u32,
    place: &'t mut MaybeUninit<T>,
    offset: u64,
    written: bool,
}

impl<T: Persist> Reserved<'_, T> {
    /// Writes the object.
    pub fn write(&mut self, value: T) -> &mut T {
        self.written = true;
        let written = self.place.write(value);
        self.tx.pool.media.touched(self.offset, size_of::<T>());
        written
    }

    /// The pointer it will have once published.
    pub fn as_box(&self) -> PBox<T> {
        PBox::new(self.tx.pool.identity, self.offset)
    }
}

impl Transaction<'_> {
    /// Reserves room for a `T`, to be written and [published](Self::publish) in this transaction.
    pub fn reserve<T: Persist>(&self) -> Result<Reserved<'_, T>> {
        let kind = fingerprint::<T>();
        let (number, slot) =
            self.reserve_bytes(kind, size_of::<T>(), align_of::<T>(), true, TypeInfo::of::<T>)?;
        let place = self.pool.media.at(slot.offset, size_of::<T>()).cast::<MaybeUninit<T>>();
        // SAFETY: the slot has the size and alignment of `T`, is reserved for this transaction and known to
        // nobody else; it stays so until published, which takes this value.
        let place = unsafe { &mut *place.as_ptr() };
        Ok(Reserved { tx: self, number, place, offset: slot.offset, written: false })
    }

    /// Makes a reserved and written object one that lives on if the transaction commits.
    pub fn publish<T: Persist>(&self, reserved: Reserved<'_, T>) -> Result<PBox<T>> {
        if !core::ptr::addr_eq(reserved.tx, self) {
            return Err(Error::refused(
                "this object was reserved in another transaction",
                "publish it in the one that reserved it",
            ));
        }
        if !reserved.written {
            return Err(Error::refused("this object was reserved and not written", "call write first"));
        }
        self.publish_slot(reserved.number);
        Ok(PBox::new(self.pool.identity, reserved.offset))
    }

    /// A new object: reserves, writes and publishes. Link it from a root or another object in the same
    /// transaction, or it will be found as a leak.
    pub fn alloc<T: Persist>(&self, value: T) -> Result<PBox<T>> {
        let mut reserved = self.reserve()?;
        reserved.write(value);
        self.publish(reserved)
    }

    /// Frees an object, once the transaction commits and no reader is left. What it points to stays.
    pub fn free<T: Persist>(&self, pointer: PBox<T>) -> Result<()> {
        let opened = self.open(pointer.pool_identity(), pointer.offset(), fingerprint::<T>(), true)?;
        self.free_opened(opened)
    }

    /// What `pointer` points to, as this transaction has made it so far. Other transactions may read it,
    /// too, but not change it until this one ends.
    pub fn get<T: Persist>(&self, pointer: &PBox<T>) -> Result<PRef<'_, T>> {
        reference(self, pointer)
    }

    /// What `pointer` points to, to be changed. Other transactions wait for this one to end.
    pub fn get_mut<T: Persist>(&self, pointer: &PBox<T>) -> Result<PRefMut<'_, T>> {
        let opened = self.open(pointer.pool_identity(), pointer.offset(), fingerprint::<T>(), true)?;
        if opened.size < size_of::<T>().next_multiple_of(8) as u64 {
            return Err(Error::corrupt(opened.offset, "a slot as large as its type", opened.size));
        }
        self.reference_mut(opened)
    }

    /// Replaces what `pointer` points to.
    pub fn set<T: Persist>(&self, pointer: &PBox<T>, value: T) -> Result<()> {
        *self.get_mut(pointer)? = value;
        Ok(())
    }

    /// What the root of that name points to.
    pub fn root<T: Persist>(&self, name: &str) -> Result<PRef<'_, T>> {
        let pointer = self.root_handle::<PBox<T>>(name)?;
        reference(self, &pointer)
    }

    /// What the root of that name points to, to be changed.
    pub fn root_mut<T: Persist>(&self, name: &str) -> Result<PRefMut<'_, T>> {
        let pointer = self.root_handle::<PBox<T>>(name)?;
        self.get_mut(&pointer)
    }
}

//! A vector in a pool.

use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;

use super::array::{Block, One};
use super::ptr::{Handle, PBox, PRef, PRefMut, sealed};
use super::read::{Access, Place, reference};
use super::tx::{Transaction, check_value};
use super::types::{Persist, Pointers};
use crate::base::error::Result;

/// Where a vector's elements are; what a [`PVec`] points to.
#[repr(C)]
#[derive(Debug)]
pub struct VecHead<T> {
    block: u64,
    reserved: u64,
    _elements: PhantomData<fn() -> T>,
}

// SAFETY: two words, every bit pattern valid: the offset is checked when it is followed.
unsafe impl<T: Persist> Persist for VecHead<T> {
    fn pointers(visit: &mut Pointers) {
        visit.pointer(0, Block::<One<T>>::fingerprint());
    }
}

/// A handle on a growing array of `T` in a pool. Copies of the handle are the same vector.
///
/// ```
/// use memory_pool::persist::{Durability, PVec, PersistentConfig, PersistentPool};
/// # let dir = std::env::temp_dir().join(format!("pvec-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir).unwrap();
/// # let path = dir.join("pool");
/// # let config = PersistentConfig::new(1 << 20).durability(Durability::ProcessCrash);
/// let pool = PersistentPool::create(&path, config)?;
/// let primes = pool.transaction(|tx| {
///     let primes = PVec::<u32>::new(tx)?;
///     primes.extend_from_slice(tx, &[2, 3, 5, 7])?;
///     tx.set_root("primes", &primes)?;
///     Ok(primes)
/// })?;
/// assert_eq!(pool.read(|r| Ok(primes.as_slice(r)?.iter().sum::<u32>()))?, 17);
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[repr(transparent)]
pub struct PVec<T>(PBox<VecHead<T>>);

impl<T> Clone for PVec<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for PVec<T> {}

impl<T> PartialEq for PVec<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<T> Eq for PVec<T> {}

impl<T> Default for PVec<T> {
    fn default() -> Self {
        Self::null()
    }
}

impl<T> fmt::Debug for PVec<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PVec({:#x})", self.0.offset())
    }
}

// SAFETY: a pointer.
unsafe impl<T: Persist> Persist for PVec<T> {
    fn pointers(visit: &mut Pointers) {
        PBox::<VecHead<T>>::pointers(visit);
    }
}

impl<T> sealed::Sealed for PVec<T> {}

impl<T: Persist> Handle for PVec<T> {
    type Target = VecHead<T>;
    fn as_box(&self) -> PBox<VecHead<T>> {
        self.0
    }
    fn from_box(pointer: PBox<VecHead<T>>) -> Self {
        Self(pointer)
    }
}

impl<T> PVec<T> {
    /// A handle on no vector.
    pub const fn null() -> Self {
        Self(PBox::null())
    }
}

impl<T: Persist> PVec<T> {
    /// A new, empty vector.
    pub fn new(tx: &Transaction<'_>) -> Result<Self> {
        tx.alloc(VecHead { block: 0, reserved: 0, _elements: PhantomData }).map(Self)
    }

    /// A new, empty vector with room for `capacity` elements.
    pub fn with_capacity(tx: &Transaction<'_>, capacity: usize) -> Result<Self> {
        let new = Self::new(tx)?;
        new.reserve(tx, capacity)?;
        Ok(new)
    }

    fn open(&self, place: Place<'_>) -> Result<Option<Block<One<T>>>> {
        let block = match place {
            Place::Reader(reader) => reference(reader, &self.0)?.block,
            Place::Transaction(tx) => reference(tx, &self.0)?.block,
        };
        if block == 0 { Ok(None) } else { Block::open(place, block).map(Some) }
    }

    fn open_mut(&self, tx: &Transaction<'_>) -> Result<Option<Block<One<T>>>> {
        let block = reference(tx, &self.0)?.block;
        if block == 0 { Ok(None) } else { Block::open_mut(tx, block).map(Some) }
    }

    /// The block, with room for `more` elements.
    fn room(&self, tx: &Transaction<'_>, more: usize) -> Result<Block<One<T>>> {
        let block = self.open_mut(tx)?;
        let len = block.as_ref().map_or(0, |block| block.len);
        let needed = len.saturating_add(more);
        if let Some(block) = block
            && needed <= block.capacity
        {
            return Ok(block);
        }
        let capacity = needed.max(len * 2).max(4);
        let new = match block {
            Some(block) => block.grown(tx, capacity)?,
            None => Block::new(tx, capacity)?,
        };
        tx.get_mut(&self.0)?.block = new.opened.offset;
        Ok(new)
    }

    /// Makes room for `more` elements.
    pub fn reserve(&self, tx: &Transaction<'_>, more: usize) -> Result<()> {
        self.room(tx, more).map(drop)
    }

    /// How many elements it has.
    pub fn len(&self, access: &impl Access) -> Result<usize> {
        Ok(self.open(access.place())?.map_or(0, |block| block.len))
    }

    /// Whether it has none.
    pub fn is_empty(&self, access: &impl Access) -> Result<bool> {
        self.len(access).map(|len| len == 0)
    }

    /// Element `index`; an error where there is none.
    pub fn get<'a>(&self, access: &'a impl Access, index: usize) -> Result<PRef<'a, T>> {
        let place = access.place();
        let block = self.open(place)?.ok_or_else(|| no_element(index))?;
        let (element, guard) = block.element(place, index)?;
        let value = check_value::<T>(element)?;
        // SAFETY: checked; the transaction has the block locked and counts the borrow, or the gate is held.
        Ok(unsafe { PRef::new(value, guard) })
    }

    /// All elements.
    pub fn as_slice<'a>(&self, access: &'a impl Access) -> Result<PRef<'a, [T]>> {
        let place = access.place();
        let Some(block) = self.open(place)? else {
            let empty = NonNull::slice_from_raw_parts(NonNull::dangling(), 0);
            // SAFETY: an empty slice is nobody's memory.
            return Ok(unsafe { PRef::new(empty, super::ptr::Guard(None)) });
        };
        let (first, guard) = block.all(place)?;
        let slice = check_all::<T>(first, block.len)?;
        // SAFETY: as in `get`.
        Ok(unsafe { PRef::new(slice, guard) })
    }

    /// Adds an element at the end.
    pub fn push(&self, tx: &Transaction<'_>, value: T) -> Result<()> {
        let mut block = self.room(tx, 1)?;
        let index = block.len;
        let place = block.element_mut(tx, index)?;
        // SAFETY: the element is in the block and borrowed for us.
        unsafe { place.cast::<T>().write(value) };
        tx.unborrow(block.opened.entry, true);
        block.set_len(tx, index + 1)
    }

    /// Adds copies of all of `values` at the end.
    pub fn extend_from_slice(&self, tx: &Transaction<'_>, values: &[T]) -> Result<()>
    where
        T: Copy,
    {
        self.reserve(tx, values.len())?;
        values.iter().try_for_each(|value| self.push(tx, *value))
    }

    /// Takes the last element off.
    pub fn pop(&self, tx: &Transaction<'_>) -> Result<Option<T>> {
        let Some(mut block) = self.open_mut(tx)?.filter(|block| block.len > 0) else { return Ok(None) };
        let (place, guard) = block.element(Place::Transaction(tx), block.len - 1)?;
        let value = check_value::<T>(place)?;
        // SAFETY: checked, and borrowed; the element counts no more after, so this is its only copy.
        let value = unsafe { value.read() };
        drop(guard);
        block.set_len(tx, block.len - 1)?;
        Ok(Some(value))
    }

    /// Element `index`, to be changed.
    pub fn get_mut<'a>(&self, tx: &'a Transaction<'a>, index: usize) -> Result<PRefMut<'a, T>> {
        let block = self.open_mut(tx)?.filter(|block| index < block.len).ok_or_else(|| no_element(index))?;
        let place = block.element_mut(tx, index)?;
        let value = check_value::<T>(place).inspect_err(|_| tx.unborrow(block.opened.entry, true))?;
        // SAFETY: checked, and borrowed for this reference.
        Ok(unsafe { PRefMut::new(value, tx, block.opened.entry) })
    }

    /// All elements, to be changed. The whole vector is copied for it.
    pub fn as_mut_slice<'a>(&self, tx: &'a Transaction<'a>) -> Result<Option<PRefMut<'a, [T]>>> {
        let Some(block) = self.open_mut(tx)? else { return Ok(None) };
        let first = block.all_mut(tx)?;
        let slice =
            check_all::<T>(first, block.len).inspect_err(|_| tx.unborrow(block.opened.entry, true))?;
        // SAFETY: as in `get_mut`.
        Ok(Some(unsafe { PRefMut::new(slice, tx, block.opened.entry) }))
    }

    /// Replaces element `index`.
    pub fn set(&self, tx: &Transaction<'_>, index: usize, value: T) -> Result<()> {
        let block = self.open_mut(tx)?.filter(|block| index < block.len).ok_or_else(|| no_element(index))?;
        let place = block.element_mut(tx, index)?;
        // SAFETY: the element is in the block and borrowed for us.
        unsafe { place.cast::<T>().write(value) };
        tx.unborrow(block.opened.entry, true);
        Ok(())
    }

    /// Keeps the first `len` elements at most.
    pub fn truncate(&self, tx: &Transaction<'_>, len: usize) -> Result<()> {
        match self.open_mut(tx)? {
            Some(mut block) if len < block.len => block.set_len(tx, len),
            _ => Ok(()),
        }
    }

    /// Frees the vector; handles on it lead nowhere after. What elements point to stays.
    pub fn free(self, tx: &Transaction<'_>) -> Result<()> {
        if let Some(block) = self.open_mut(tx)? {
            tx.free_opened(block.opened)?;
        }
        tx.free(self.0)
    }
}

/// `len` elements of `T` from `first` on, if their bytes are such.
fn check_all<T: Persist>(first: NonNull<u8>, len: usize) -> Result<NonNull<[T]>> {
    for index in 0..len {
        // SAFETY: the element lies in the slice that the caller has borrowed.
        check_value::<T>(unsafe { first.add(index * size_of::<T>()) })?;
    }
    Ok(NonNull::slice_from_raw_parts(first.cast(), len))
}

#[cold]
fn no_element(index: usize) -> crate::base::error::Error {
    crate::base::error::Error::pointer(index, crate::base::error::PointerFault::OutOfRange)
}

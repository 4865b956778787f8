//! Pointers into a pool and the references they lead to.
//!
//! A pointer is a pool's identity and an offset, never an address. It may be stored, copied, and outlive what
//! it points to; following it checks the pool, the occupancy and the type, so a stale one is an error, or
//! leads to a newer object of the same type in the same place.

use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use super::tx::Transaction;
use super::types::{Persist, Pointers, fingerprint};

/// A pointer to a `T` in a pool; null where all bytes are zero.
///
/// ```
/// use memory_pool::persist::{Durability, PBox, PersistentConfig, PersistentPool};
/// # let dir = std::env::temp_dir().join(format!("pbox-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir).unwrap();
/// # let path = dir.join("pool");
/// let config = PersistentConfig::new(1 << 20).durability(Durability::ProcessCrash);
/// let pool = PersistentPool::create(&path, config)?;
/// let number: PBox<u64> = pool.transaction(|tx| tx.alloc(42))?;
/// assert_eq!(pool.read(|r| Ok(*r.get(&number)?))?, 42);
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[repr(C)]
pub struct PBox<T> {
    pool: u64,
    offset: u64,
    _target: PhantomData<fn() -> T>,
}

impl<T> PBox<T> {
    /// A pointer to nothing.
    pub const fn null() -> Self {
        Self { pool: 0, offset: 0, _target: PhantomData }
    }

    pub(crate) const fn new(pool: u64, offset: u64) -> Self {
        Self { pool, offset, _target: PhantomData }
    }

    /// Whether it points to nothing.
    pub const fn is_null(&self) -> bool {
        self.offset == 0
    }

    /// The offset in the pool's file; 0 for a null pointer.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// The identity of the pool it points into.
    pub const fn pool_identity(&self) -> u64 {
        self.pool
    }
}

impl<T> Clone for PBox<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for PBox<T> {}

impl<T> PartialEq for PBox<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.pool, self.offset) == (other.pool, other.offset)
    }
}

impl<T> Eq for PBox<T> {}

impl<T> core::hash::Hash for PBox<T> {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        (self.pool, self.offset).hash(state);
    }
}

impl<T> Default for PBox<T> {
    fn default() -> Self {
        Self::null()
    }
}

impl<T> fmt::Debug for PBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PBox({:#x} in {:#x})", self.offset, self.pool)
    }
}

// SAFETY: two words, no padding, every bit pattern valid: what they mean is checked when they are followed.
unsafe impl<T: Persist> Persist for PBox<T> {
    fn pointers(visit: &mut Pointers) {
        visit.pointer(core::mem::offset_of!(Self, offset), fingerprint::<T>());
    }
}

/// What can be a named root: a typed pointer into a pool.
pub trait Handle: Copy + sealed::Sealed {
    /// The type of what it points to.
    type Target: Persist;
    /// The plain pointer.
    fn as_box(&self) -> PBox<Self::Target>;
    /// The handle around a plain pointer.
    fn from_box(pointer: PBox<Self::Target>) -> Self;
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

impl<T> sealed::Sealed for PBox<T> {}

impl<T: Persist> Handle for PBox<T> {
    type Target = T;
    fn as_box(&self) -> PBox<T> {
        *self
    }
    fn from_box(pointer: PBox<T>) -> Self {
        pointer
    }
}

/// Notes in a transaction that an object is borrowed, until dropped. Readers outside one need no note: the
/// gate keeps the object.
#[derive(Debug)]
pub(crate) struct Guard<'a>(pub(crate) Option<(&'a Transaction<'a>, u32)>);

/// A shared reference to something in a pool, good for as long as the `read` or the transaction it is from.
pub struct PRef<'a, T: ?Sized> {
    value: NonNull<T>,
    guard: Guard<'a>,
}

impl<'a, T: ?Sized> PRef<'a, T> {
    /// # Safety
    /// `value` is valid, and nobody writes to it while `guard` lives, nor before `'a` ends if it is empty.
    pub(crate) unsafe fn new(value: NonNull<T>, guard: Guard<'a>) -> Self {
        Self { value, guard }
    }

    /// A reference to a part of the same object.
    pub fn map<U: ?Sized>(self, part: impl FnOnce(&T) -> &U) -> PRef<'a, U> {
        let value = NonNull::from(part(&self));
        let this = core::mem::ManuallyDrop::new(self);
        PRef { value, guard: Guard(this.guard.0) }
    }
}

impl<T: ?Sized> Deref for PRef<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the contract of `new`.
        unsafe { self.value.as_ref() }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some((tx, entry)) = self.0 {
            tx.unborrow(entry, false);
        }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for PRef<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized + fmt::Display> fmt::Display for PRef<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// The only reference to something in a pool, within a transaction. What is written through it happens when
/// the transaction commits, or never.
pub struct PRefMut<'a, T: ?Sized> {
    value: NonNull<T>,
    tx: &'a Transaction<'a>,
    entry: u32,
    _value: PhantomData<&'a mut T>,
}

impl<'a, T: ?Sized> PRefMut<'a, T> {
    /// # Safety
    /// `value` is valid, and nobody else reads or writes it until this is dropped, which unborrows `entry`.
    pub(crate) unsafe fn new(value: NonNull<T>, tx: &'a Transaction<'a>, entry: u32) -> Self {
        Self { value, tx, entry, _value: PhantomData }
    }
}

impl<T: ?Sized> Deref for PRefMut<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the contract of `new`.
        unsafe { self.value.as_ref() }
    }
}

impl<T: ?Sized> DerefMut for PRefMut<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the contract of `new`.
        unsafe { self.value.as_mut() }
    }
}

impl<T: ?Sized> Drop for PRefMut<'_, T> {
    fn drop(&mut self) {
        self.tx.unborrow(self.entry, true);
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for PRefMut<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

//! Reading what was committed.

use core::marker::PhantomData;
use core::ptr::NonNull;

pub(crate) use sealed::Place;

use super::inner::Inner;
use super::ptr::{Guard, Handle, PBox, PRef};
use super::roots;
use super::tx::{Opened, Transaction, check_value};
use super::types::{Persist, fingerprint};
use crate::base::error::{Error, Refusal, Result};

/// A view of everything that was committed, which does not change while it exists; see
/// [`PersistentPool::read`](super::PersistentPool::read).
#[derive(Debug)]
pub struct Reader<'r> {
    pub(crate) pool: &'r Inner,
    /// Calls inside a read must know that they are: it stays on its thread.
    _one_thread: PhantomData<*const ()>,
}

/// Where objects can be read: a [`Reader`] or a [`Transaction`].
///
/// The types of this module take either, so `vec.get(r, 3)` and `vec.get(tx, 3)` both work; the latter sees
/// what the transaction did so far.
pub trait Access: sealed::Access {}

impl Access for Reader<'_> {}
impl Access for Transaction<'_> {}

pub(crate) mod sealed {
    use super::{Reader, Transaction};

    /// The two places where objects can be read.
    #[derive(Clone, Copy, Debug)]
    pub enum Place<'a> {
        Reader(&'a Reader<'a>),
        Transaction(&'a Transaction<'a>),
    }

    pub trait Access {
        #[doc(hidden)]
        fn place(&self) -> Place<'_>;
    }
}

impl sealed::Access for Reader<'_> {
    #[inline]
    fn place(&self) -> Place<'_> {
        Place::Reader(self)
    }
}

impl sealed::Access for Transaction<'_> {
    #[inline]
    fn place(&self) -> Place<'_> {
        Place::Transaction(self)
    }
}

impl<'a> Place<'a> {
    pub(crate) fn inner(self) -> &'a Inner {
        match self {
            Self::Reader(reader) => reader.pool,
            Self::Transaction(tx) => tx.pool,
        }
    }

    /// The object of that type at `offset`, to be read.
    #[inline]
    pub(crate) fn open(self, identity: u64, offset: u64, fingerprint: u64) -> Result<Opened> {
        match self {
            Self::Reader(Reader { pool, .. }) => {
                pool.check_pointer(identity, offset)?;
                let (object, _) = pool.live(offset, fingerprint)?;
                Ok(Opened { entry: 0, offset, size: object.size })
            }
            Self::Transaction(tx) => tx.open(identity, offset, fingerprint, false),
        }
    }

    /// The place of `len` bytes at `at` in an opened object; see [`Transaction::view`].
    #[inline]
    pub(crate) fn view(
        self,
        opened: Opened,
        at: u64,
        len: usize,
        exact: bool,
    ) -> Result<(NonNull<u8>, Guard<'a>)> {
        match self {
            Self::Reader(reader) => Ok((reader.pool.media.at(opened.offset + at, len), Guard(None))),
            Self::Transaction(tx) => tx.view(opened, at, len, exact),
        }
    }
}

/// The object behind a pointer.
pub(crate) fn reference<'a, T: Persist>(access: &'a impl Access, pointer: &PBox<T>) -> Result<PRef<'a, T>> {
    let access = access.place();
    let opened = access.open(pointer.pool_identity(), pointer.offset(), fingerprint::<T>())?;
    // The slot is one of this type, whose size is part of the fingerprint; a forged file may lie about it.
    if opened.size < size_of::<T>() as u64 {
        return Err(Error::corrupt(opened.offset, "a slot as large as its type", opened.size));
    }
    let (place, guard) = access.view(opened, 0, size_of::<T>(), true)?;
    let value = check_value::<T>(place)?;
    // SAFETY: the value was checked. A transaction has the object locked and counts the borrow; a reader
    // holds the gate, without which nothing that is live changes.
    Ok(unsafe { PRef::new(value, guard) })
}

impl<'r> Reader<'r> {
    pub(crate) fn new(pool: &'r Inner) -> Self {
        Self { pool, _one_thread: PhantomData }
    }

    /// What `pointer` points to.
    pub fn get<T: Persist>(&self, pointer: &PBox<T>) -> Result<PRef<'_, T>> {
        reference(self, pointer)
    }

    /// What the root of that name points to.
    pub fn root<T: Persist>(&self, name: &str) -> Result<PRef<'_, T>> {
        self.get(&self.root_handle::<PBox<T>>(name)?)
    }

    /// The pointer that is the root of that name.
    pub fn root_handle<H: Handle>(&self, name: &str) -> Result<H> {
        let record = self.pool.root_record(name).ok_or_else(|| roots::unknown(name))?;
        roots::target(self, record, name).map(H::from_box)
    }

    /// The names of all roots.
    pub fn root_names(&self) -> Vec<String> {
        roots::names(self)
    }

    /// Calls `visit` with every live object, reachable or not; stops when it says `false`.
    pub fn for_each_object(&self, mut visit: impl FnMut(ObjectInfo) -> bool) {
        self.pool.table.for_each(&self.pool.media, |object| visit(object.into()));
    }

    /// Calls `visit` with every live object of type `T`.
    pub fn for_each<T: Persist>(&self, mut visit: impl FnMut(PBox<T>, &T) -> bool) -> Result<()> {
        let wanted = fingerprint::<T>();
        let mut outcome = Ok(());
        self.pool.table.for_each(&self.pool.media, |object| {
            if object.fingerprint != wanted || object.size < size_of::<T>() as u64 {
                return true;
            }
            match check_value::<T>(self.pool.media.at(object.offset, size_of::<T>())) {
                // SAFETY: as in `reference`: checked, and the gate is held.
                Ok(value) => visit(PBox::new(self.pool.identity, object.offset), unsafe { value.as_ref() }),
                Err(error) => {
                    outcome = Err(error);
                    false
                }
            }
        });
        outcome
    }

    /// The pointer to the live object of type `T` at `offset`, as [`for_each_object`](Self::for_each_object)
    /// gives it.
    pub fn object_at<T: Persist>(&self, offset: u64) -> Result<PBox<T>> {
        let pointer = PBox::new(self.pool.identity, offset);
        self.get(&pointer).map(|_| pointer)
    }
}

/// A live object, as iteration shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectInfo {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes of its slot.
    pub size: u64,
    /// Fingerprint of its type; small numbers are what the pool stores itself.
    pub fingerprint: u64,
}

impl From<super::table::Object> for ObjectInfo {
    fn from(object: super::table::Object) -> Self {
        Self { offset: object.offset, size: object.size, fingerprint: object.fingerprint }
    }
}

/// The error for a root that points to nothing.
pub(crate) fn no_such_root(name: &str) -> Error {
    Error::InvalidOperation(Refusal::RootUnknown(crate::base::text::ShortText::new(name)))
}

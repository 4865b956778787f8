//! An owning pointer into a pool, with the pool's own errors.

use core::alloc::Layout;
use core::borrow::{Borrow, BorrowMut};
use core::cmp::Ordering;
use core::fmt;
use core::hash::{Hash, Hasher};
use core::marker::PhantomData;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ops::{Deref, DerefMut};
use core::pin::Pin;
use core::ptr::NonNull;

use bytemuck::Zeroable;

use super::allocator::{allocate, deallocate};
use crate::base::error::{Error, OomReason, Result};
use crate::base::host::HostPool;

/// A value or slice in a pool, freed when dropped. Unlike a `Box`, it is always made fallibly, and what went
/// wrong is the pool's own [`Error`](crate::Error).
///
/// The pool is held by value: a handle keeps it alive, a reference borrows it.
///
/// ```
/// use memory_pool::{PoolBox, PoolConfig, VariablePool};
/// let pool = VariablePool::new(PoolConfig::default_cpu())?;
/// let mut samples = PoolBox::<[f32]>::new_zeroed_slice_in(1024, &pool)?;
/// samples[0] = 1.5;
/// let name = PoolBox::new_in(String::from("left channel"), pool.clone())?;
/// assert_eq!((samples[0], samples[1], name.len()), (1.5, 0.0, 12));
/// # Ok::<(), memory_pool::Error>(())
/// ```
// The default parameter is never used by a constructor; it lets `PoolBox::<T>::new_in` name the type alone.
pub struct PoolBox<T: ?Sized, P: HostPool = Nowhere> {
    // Invariants:
    // 1. `ptr` points to a live block of `pool` made for the layout of `*ptr` (dangling for a size of 0).
    // 2. `*ptr` is an initialised value that this box owns.
    ptr: NonNull<T>,
    pool: P,
    owns: PhantomData<T>,
}

/// The pool of a `PoolBox` whose type is only named, never made.
#[derive(Clone, Copy, Debug)]
pub enum Nowhere {}

// SAFETY: there is no such pool.
unsafe impl HostPool for Nowhere {
    fn obtain(&self, _: Layout, _: bool) -> Result<NonNull<[u8]>> {
        match *self {}
    }
    unsafe fn give_back(&self, _: NonNull<u8>, _: Layout) {
        match *self {}
    }
}

// SAFETY: the box owns its value and its pool, so it may go where both may (invariants 1 and 2).
unsafe impl<T: ?Sized + Send, P: HostPool + Send> Send for PoolBox<T, P> {}
// SAFETY: a shared box gives shared access to the value alone.
unsafe impl<T: ?Sized + Sync, P: HostPool + Sync> Sync for PoolBox<T, P> {}

impl<T> PoolBox<T> {
    /// Moves `value` into `pool`. On failure the value is dropped; [`try_new_in`](Self::try_new_in) gives it
    /// back.
    pub fn new_in<P: HostPool>(value: T, pool: P) -> Result<PoolBox<T, P>> {
        Self::try_new_in(value, pool).map_err(|(error, _)| error)
    }

    /// Moves `value` into `pool`, or gives it back together with the error.
    pub fn try_new_in<P: HostPool>(value: T, pool: P) -> Result<PoolBox<T, P>, (Error, T)> {
        match PoolBox::<T>::new_uninit_in(pool) {
            Ok(space) => Ok(space.write(value)),
            Err(error) => Err((error, value)),
        }
    }

    /// Space for a `T`.
    pub fn new_uninit_in<P: HostPool>(pool: P) -> Result<PoolBox<MaybeUninit<T>, P>> {
        let block = allocate(&pool, Layout::new::<T>(), false)?;
        Ok(PoolBox { ptr: block.cast(), pool, owns: PhantomData })
    }

    /// A `T` of zeros.
    pub fn new_zeroed_in<P: HostPool>(pool: P) -> Result<PoolBox<T, P>>
    where
        T: Zeroable,
    {
        let block = allocate(&pool, Layout::new::<T>(), true)?;
        Ok(PoolBox { ptr: block.cast(), pool, owns: PhantomData })
    }
}

impl<T> PoolBox<[T]> {
    /// `len` elements of zeros; fresh pages are not touched.
    pub fn new_zeroed_slice_in<P: HostPool>(len: usize, pool: P) -> Result<PoolBox<[T], P>>
    where
        T: Zeroable,
    {
        Self::slice(len, pool, true)
    }

    /// Space for `len` elements.
    pub fn new_uninit_slice_in<P: HostPool>(len: usize, pool: P) -> Result<PoolBox<[MaybeUninit<T>], P>> {
        PoolBox::<[MaybeUninit<T>]>::slice(len, pool, false)
    }

    /// `len` elements, the `i`-th of them `element(i)`. If `element` panics, those made are dropped and the
    /// block is freed.
    pub fn from_fn_in<P: HostPool>(
        len: usize,
        pool: P,
        mut element: impl FnMut(usize) -> T,
    ) -> Result<PoolBox<[T], P>> {
        let mut partial = Partial { slots: Self::new_uninit_slice_in(len, pool)?, made: 0 };
        for index in 0..len {
            partial.slots[index].write(element(index));
            partial.made += 1;
        }
        Ok(partial.finish())
    }

    /// A copy of `source`.
    pub fn from_slice_in<P: HostPool>(source: &[T], pool: P) -> Result<PoolBox<[T], P>>
    where
        T: Clone,
    {
        Self::from_fn_in(source.len(), pool, |index| source[index].clone())
    }

    /// A slice whose elements are zero or may be uninitialised, as `T` allows.
    fn slice<P: HostPool>(len: usize, pool: P, zeroed: bool) -> Result<PoolBox<[T], P>> {
        let overflow = Error::oom(len.saturating_mul(size_of::<T>()), OomReason::Overflow);
        let layout = Layout::array::<T>(len).map_err(|_| overflow)?;
        let block = allocate(&pool, layout, zeroed)?;
        Ok(PoolBox { ptr: NonNull::slice_from_raw_parts(block.cast(), len), pool, owns: PhantomData })
    }
}

/// A slice under construction; drops what is made of it.
struct Partial<T, P: HostPool> {
    // Invariant: the first `made` slots are initialised.
    slots: PoolBox<[MaybeUninit<T>], P>,
    made: usize,
}

impl<T, P: HostPool> Partial<T, P> {
    fn finish(mut self) -> PoolBox<[T], P> {
        debug_assert_eq!(self.made, self.slots.len());
        self.made = 0;
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is never used again, and every slot was initialised.
        unsafe { core::ptr::read(&this.slots).assume_init() }
    }
}

impl<T, P: HostPool> Drop for Partial<T, P> {
    fn drop(&mut self) {
        for slot in &mut self.slots[..self.made] {
            // SAFETY: initialised, and dropped only here.
            unsafe { slot.assume_init_drop() }
        }
    }
}

impl<T, P: HostPool> PoolBox<MaybeUninit<T>, P> {
    /// Fills the space.
    pub fn write(mut self, value: T) -> PoolBox<T, P> {
        MaybeUninit::write(&mut self, value);
        // SAFETY: just written.
        unsafe { self.assume_init() }
    }

    /// Takes the space for initialised.
    ///
    /// # Safety
    /// It holds a valid `T`.
    pub unsafe fn assume_init(self) -> PoolBox<T, P> {
        let (ptr, pool) = Self::into_raw_parts(self);
        PoolBox { ptr: ptr.cast(), pool, owns: PhantomData }
    }
}

impl<T, P: HostPool> PoolBox<[MaybeUninit<T>], P> {
    /// Takes the space for initialised.
    ///
    /// # Safety
    /// Every element holds a valid `T`.
    pub unsafe fn assume_init(self) -> PoolBox<[T], P> {
        let (ptr, pool) = Self::into_raw_parts(self);
        let ptr = NonNull::slice_from_raw_parts(ptr.cast(), ptr.len());
        PoolBox { ptr, pool, owns: PhantomData }
    }
}

impl<T, P: HostPool> PoolBox<T, P> {
    /// Moves the value out and frees its block.
    pub fn into_inner(this: Self) -> T {
        let (ptr, pool) = Self::into_raw_parts(this);
        // SAFETY: the value is initialised and ours (invariant 2); reading it moves it out, after which its
        // block is freed as space for one (invariant 1).
        unsafe {
            let value = ptr.read();
            deallocate(&pool, ptr.cast(), Layout::new::<T>());
            value
        }
    }
}

impl<T: ?Sized, P: HostPool> PoolBox<T, P> {
    /// The pointer and the pool; the value is neither dropped nor freed until given to
    /// [`from_raw_parts`](Self::from_raw_parts).
    pub fn into_raw_parts(this: Self) -> (NonNull<T>, P) {
        let this = ManuallyDrop::new(this);
        // SAFETY: `this` is never dropped nor used again, so the pool is moved out once.
        (this.ptr, unsafe { core::ptr::read(&this.pool) })
    }

    /// A box from its parts, for instance with the pointer made into one to a trait object.
    ///
    /// # Safety
    /// `ptr` came from [`into_raw_parts`](Self::into_raw_parts) of a box in `pool` (or a clone of it), points
    /// to the same value, and is not in any other box.
    pub unsafe fn from_raw_parts(ptr: NonNull<T>, pool: P) -> Self {
        Self { ptr, pool, owns: PhantomData }
    }

    /// Gives the value up for the rest of the program.
    pub fn leak<'a>(this: Self) -> &'a mut T
    where
        P: 'a,
    {
        // The pool is never dropped, so the block stays.
        let mut this = ManuallyDrop::new(this);
        // SAFETY: the value is initialised (invariant 2), never freed, and reachable only from here.
        unsafe { this.ptr.as_mut() }
    }

    /// Pins the value; it does not move when the box does.
    pub fn into_pin(this: Self) -> Pin<Self>
    where
        P: 'static,
    {
        // SAFETY: the block neither moves nor is reused before the value is dropped; `P: 'static` rules out a
        // borrowed pool, whose owner could otherwise free the block of a leaked box.
        unsafe { Pin::new_unchecked(this) }
    }

    /// The pool.
    pub fn pool(this: &Self) -> &P {
        &this.pool
    }
}

impl<T: ?Sized, P: HostPool> Drop for PoolBox<T, P> {
    fn drop(&mut self) {
        /// Frees the block even if dropping the value panics.
        struct Free<'a, P: HostPool>(&'a P, NonNull<u8>, Layout);
        impl<P: HostPool> Drop for Free<'_, P> {
            fn drop(&mut self) {
                // SAFETY: invariant 1, and the box is being dropped.
                unsafe { deallocate(self.0, self.1, self.2) }
            }
        }
        // SAFETY: invariants 1 and 2; neither block nor value is used after.
        unsafe {
            let layout = Layout::for_value(self.ptr.as_ref());
            let _free = Free(&self.pool, self.ptr.cast(), layout);
            self.ptr.drop_in_place();
        }
    }
}

impl<T: ?Sized, P: HostPool> Deref for PoolBox<T, P> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: invariant 2.
        unsafe { self.ptr.as_ref() }
    }
}

impl<T: ?Sized, P: HostPool> DerefMut for PoolBox<T, P> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: invariant 2, and the box is borrowed exclusively.
        unsafe { self.ptr.as_mut() }
    }
}

impl<T: ?Sized, P: HostPool> AsRef<T> for PoolBox<T, P> {
    fn as_ref(&self) -> &T {
        self
    }
}

impl<T: ?Sized, P: HostPool> AsMut<T> for PoolBox<T, P> {
    fn as_mut(&mut self) -> &mut T {
        self
    }
}

impl<T: ?Sized, P: HostPool> Borrow<T> for PoolBox<T, P> {
    fn borrow(&self) -> &T {
        self
    }
}

impl<T: ?Sized, P: HostPool> BorrowMut<T> for PoolBox<T, P> {
    fn borrow_mut(&mut self) -> &mut T {
        self
    }
}

impl<T: ?Sized + fmt::Debug, P: HostPool> fmt::Debug for PoolBox<T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized + fmt::Display, P: HostPool> fmt::Display for PoolBox<T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized + PartialEq, P: HostPool> PartialEq for PoolBox<T, P> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: ?Sized + Eq, P: HostPool> Eq for PoolBox<T, P> {}

impl<T: ?Sized + PartialOrd, P: HostPool> PartialOrd for PoolBox<T, P> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        (**self).partial_cmp(&**other)
    }
}

impl<T: ?Sized + Ord, P: HostPool> Ord for PoolBox<T, P> {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl<T: ?Sized + Hash, P: HostPool> Hash for PoolBox<T, P> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state)
    }
}

// The value stands behind a pointer, so moving the box does not move it.
impl<T: ?Sized, P: HostPool> Unpin for PoolBox<T, P> {}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::rc::Rc;

    use super::*;

    /// std's allocator with a count of what is live and a budget.
    #[derive(Debug)]
    struct Counting {
        live: RefCell<Vec<(usize, Layout)>>,
        budget: Cell<usize>,
    }

    impl Counting {
        fn new(budget: usize) -> Self {
            Self { live: RefCell::default(), budget: Cell::new(budget) }
        }
        fn live(&self) -> usize {
            self.live.borrow().len()
        }
    }

    // SAFETY: std's allocator keeps the contract.
    unsafe impl HostPool for Counting {
        fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
            let left =
                self.budget.get().checked_sub(1).ok_or(Error::oom(layout.size(), OomReason::Source))?;
            self.budget.set(left);
            // SAFETY: the size is not 0.
            let ptr =
                unsafe { if zeroed { std::alloc::alloc_zeroed(layout) } else { std::alloc::alloc(layout) } };
            self.live.borrow_mut().push((ptr as usize, layout));
            Ok(NonNull::slice_from_raw_parts(NonNull::new(ptr).unwrap(), layout.size()))
        }
        unsafe fn give_back(&self, ptr: NonNull<u8>, layout: Layout) {
            let mut live = self.live.borrow_mut();
            let at = live.iter().position(|entry| *entry == (ptr.as_ptr() as usize, layout));
            live.remove(at.expect("freed what was not live, or with another layout"));
            // SAFETY: allocated above with this layout, and freed once.
            unsafe { std::alloc::dealloc(ptr.as_ptr(), layout) }
        }
    }

    #[test]
    fn values_are_dropped_once_and_blocks_freed() {
        let pool = Counting::new(usize::MAX);
        let count = Rc::new(());
        {
            let one = PoolBox::new_in(Rc::clone(&count), &pool).unwrap();
            let many = PoolBox::<[_]>::from_fn_in(5, &pool, |_| Rc::clone(&count)).unwrap();
            assert_eq!((Rc::strong_count(&count), pool.live(), many.len()), (7, 2, 5));
            let inner = PoolBox::into_inner(one);
            assert_eq!((Rc::strong_count(&inner), pool.live()), (7, 1));
        }
        assert_eq!((Rc::strong_count(&count), pool.live()), (1, 0));
    }

    #[test]
    fn empty_and_zeroed_slices() {
        let pool = Counting::new(usize::MAX);
        let empty = PoolBox::<[u64]>::new_zeroed_slice_in(0, &pool).unwrap();
        let units = PoolBox::<[()]>::from_slice_in(&[(); 9], &pool).unwrap();
        assert_eq!((empty.len(), units.len(), pool.live()), (0, 9, 0));
        let zeros = PoolBox::<[u64]>::new_zeroed_slice_in(100, &pool).unwrap();
        assert!(zeros.iter().all(|&x| x == 0));
        assert!(matches!(
            PoolBox::<[u64]>::new_zeroed_slice_in(usize::MAX, &pool),
            Err(Error::OutOfMemory { reason: OomReason::Overflow, .. })
        ));
    }

    #[test]
    fn a_panic_while_filling_leaks_nothing() {
        let pool = Counting::new(usize::MAX);
        let count = Rc::new(());
        let caught = catch_unwind(AssertUnwindSafe(|| {
            PoolBox::<[_]>::from_fn_in(5, &pool, |index| {
                assert_ne!(index, 3, "planted");
                Rc::clone(&count)
            })
        }));
        assert!(caught.is_err());
        assert_eq!((Rc::strong_count(&count), pool.live()), (1, 0));
    }

    #[test]
    fn a_failure_gives_the_value_back() {
        let pool = Counting::new(0);
        let (error, value) = PoolBox::try_new_in(String::from("kept"), &pool).unwrap_err();
        assert_eq!((error.code(), value.as_str()), (101, "kept"));
    }

    #[test]
    fn raw_parts_can_become_a_trait_object() {
        let pool = Counting::new(usize::MAX);
        let (ptr, pool_again) = PoolBox::into_raw_parts(PoolBox::new_in(5u32, &pool).unwrap());
        let ptr = NonNull::new(ptr.as_ptr() as *mut dyn fmt::Display).unwrap();
        // SAFETY: the parts of one box, put together once.
        let shown = unsafe { PoolBox::from_raw_parts(ptr, pool_again) };
        assert_eq!(shown.to_string(), "5");
        drop(shown);
        assert_eq!(pool.live(), 0);
    }
}

//! `operator new` and `operator delete`, under the names that C++ compilers give them (`m` is `size_t`, `Pv`
//! a pointer, `St11align_val_t` an alignment, `RKSt9nothrow_t` the form that returns null).
//!
//! What cannot be had is left to the C++ library, found at that moment: its own operator tries again, through
//! our `malloc`, calls the program's new-handler as often as the standard wants, and at last throws
//! `std::bad_alloc` (or returns null), which this library could not. A program without a C++ library has
//! nobody to catch: it ends with a line on stderr.

use std::ffi::{CStr, c_void};
use std::ptr;

use crate::heap;
use crate::report;

/// C++ libraries by the names that programs know them by. An interpreter may have loaded one for an extension alone,
/// where a search by symbol does not come.
const LIBRARIES: [&CStr; 3] = [c"libstdc++.so.6", c"libc++.so.1", c"libc++abi.so.1"];

/// The operator `name` of the C++ library; null where none is loaded.
fn next(name: &CStr) -> *mut c_void {
    // SAFETY: terminated names. A library that is loaded already stays as it is; it is counted as used once more, for
    // ever, which keeps what is found.
    unsafe {
        let behind = libc::dlsym(libc::RTLD_NEXT, name.as_ptr());
        if !behind.is_null() {
            return behind;
        }
        let loaded = LIBRARIES
            .iter()
            .map(|library| libc::dlopen(library.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD));
        let operators =
            loaded.filter(|handle| !handle.is_null()).map(|handle| libc::dlsym(handle, name.as_ptr()));
        operators.into_iter().find(|operator| !operator.is_null()).unwrap_or(ptr::null_mut())
    }
}

/// What the C++ library is asked for instead of `size` bytes, which are not to be had: no more than it can round up to
/// an alignment, since some round to zero, and have that.
fn within_reason(size: usize) -> usize {
    size.min(1 << (usize::BITS - 1))
}

/// The two ways to ask.
macro_rules! obtain {
    ($size:expr) => {
        heap::allocate($size)
    };
    ($size:expr, $align:expr) => {
        heap::allocate_aligned($size, $align)
    };
}

/// Throwing forms unwind: `C-unwind`. No frame here has anything to drop.
macro_rules! throwing {
    ($($name:ident $text:literal ($($align:ident)?);)*) => {$(
        #[unsafe(no_mangle)]
        extern "C-unwind" fn $name(size: usize $(, $align: usize)?) -> *mut c_void {
            let block = obtain!(size $(, $align)?);
            if !block.is_null() {
                return block;
            }
            #[cold]
            #[inline(never)]
            extern "C-unwind" fn fail(size: usize $(, $align: usize)?) -> *mut c_void {
                let next = next($text);
                if next.is_null() {
                    report::die(b"memory-pool: operator new has no memory, and there is no C++ library to say so\n");
                }
                type Operator = extern "C-unwind" fn(usize $(, throwing!(@usize $align))?) -> *mut c_void;
                // SAFETY: the symbol's name is its signature.
                unsafe { std::mem::transmute::<*mut c_void, Operator>(next)(within_reason(size) $(, $align)?) }
            }
            fail(size $(, $align)?)
        }
    )*};
    (@usize $align:ident) => { usize };
}

macro_rules! nothrow {
    ($($name:ident $text:literal ($($align:ident)?);)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(size: usize, $($align: usize,)? tag: *const c_void) -> *mut c_void {
            let block = obtain!(size $(, $align)?);
            if !block.is_null() {
                return block;
            }
            let next = next($text);
            if next.is_null() {
                return next;
            }
            type Operator = extern "C" fn(usize, $(throwing!(@usize $align),)? *const c_void) -> *mut c_void;
            // SAFETY: the symbol's name is its signature.
            unsafe { std::mem::transmute::<*mut c_void, Operator>(next)(within_reason(size), $($align,)? tag) }
        }
    )*};
}

macro_rules! deleting {
    ($($name:ident ($($more:ty),*);)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(block: *mut c_void $(, _: $more)*) {
            // SAFETY: the caller's contract.
            unsafe { heap::release(block) }
        }
    )*};
}

#[cfg(target_pointer_width = "64")]
throwing! {
    _Znwm c"_Znwm" ();
    _Znam c"_Znam" ();
    _ZnwmSt11align_val_t c"_ZnwmSt11align_val_t" (align);
    _ZnamSt11align_val_t c"_ZnamSt11align_val_t" (align);
}

#[cfg(target_pointer_width = "64")]
nothrow! {
    _ZnwmRKSt9nothrow_t c"_ZnwmRKSt9nothrow_t" ();
    _ZnamRKSt9nothrow_t c"_ZnamRKSt9nothrow_t" ();
    _ZnwmSt11align_val_tRKSt9nothrow_t c"_ZnwmSt11align_val_tRKSt9nothrow_t" (align);
    _ZnamSt11align_val_tRKSt9nothrow_t c"_ZnamSt11align_val_tRKSt9nothrow_t" (align);
}

// Sizes and alignments are the caller's word, and wrong in programs that delete through a base class without
// a virtual destructor; what the heap knows of the block counts.
#[cfg(target_pointer_width = "64")]
deleting! {
    _ZdlPv ();
    _ZdaPv ();
    _ZdlPvm (usize);
    _ZdaPvm (usize);
    _ZdlPvSt11align_val_t (usize);
    _ZdaPvSt11align_val_t (usize);
    _ZdlPvmSt11align_val_t (usize, usize);
    _ZdaPvmSt11align_val_t (usize, usize);
    _ZdlPvRKSt9nothrow_t (*const c_void);
    _ZdaPvRKSt9nothrow_t (*const c_void);
    _ZdlPvSt11align_val_tRKSt9nothrow_t (usize, *const c_void);
    _ZdaPvSt11align_val_tRKSt9nothrow_t (usize, *const c_void);
}

//! The functions of C.
//!
//! Where POSIX leaves a choice, this does as glibc: `malloc(0)` is a block, `realloc(block, 0)` frees, `memalign`
//! rounds an odd alignment up. `aligned_alloc` insists on a power of two, as C23 says. A block has no less than
//! 16 bytes of alignment. What fails sets `errno`; `free` keeps it.

use std::ffi::{c_int, c_void};
use std::ptr;

use crate::heap::{self, ALIGN};

pub(crate) fn set_errno(code: c_int) {
    // SAFETY: this thread's errno.
    unsafe { *libc::__errno_location() = code }
}

fn errno() -> c_int {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() }
}

/// A block, or null and `ENOMEM`.
#[inline(always)]
fn or_no_memory(block: *mut c_void) -> *mut c_void {
    if block.is_null() { no_memory() } else { block }
}

#[cold]
#[inline(never)]
fn no_memory() -> *mut c_void {
    set_errno(libc::ENOMEM);
    ptr::null_mut()
}

#[cold]
fn invalid() -> *mut c_void {
    set_errno(libc::EINVAL);
    ptr::null_mut()
}

fn page() -> usize {
    memory_pool::source::os::page_size()
}

/// Exports functions under the names of C. They are never called from here by those names: in a program that
/// opened this library late, the names belong to somebody else.
macro_rules! exported {
    ($($(#[$doc:meta])* $($name:ident),+ = $function:ident($($argument:ident: $type:ty),*) $(-> $answer:ty)?;)*) => {
        $(exported!(@each $(#[$doc])* [$($name)+] $function ($($argument: $type),*) ($($answer)?));)*
    };
    (@each $(#[$doc:meta])* [$first:ident $($more:ident)*] $function:ident $arguments:tt $answer:tt) => {
        exported!(@one $(#[$doc])* $first $function $arguments $answer);
        exported!(@each $(#[$doc])* [$($more)*] $function $arguments $answer);
    };
    (@each $(#[$doc:meta])* [] $function:ident $arguments:tt $answer:tt) => {};
    (@one $(#[$doc:meta])* $name:ident $function:ident
        ($($argument:ident: $type:ty),*) ($($answer:ty)?)) => {
        $(#[$doc])*
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) $(-> $answer)? {
            // SAFETY: the caller's contract: that of the function of C.
            unsafe { $function($($argument),*) }
        }
    };
}

// The names with underscores are those by which glibc's own functions are called where somebody wants to be
// sure to get them: a block from there must not meet our `free`, nor ours theirs.
exported! {
    malloc, __libc_malloc = obtain(size: usize) -> *mut c_void;
    calloc, __libc_calloc = obtain_zeroed(count: usize, size: usize) -> *mut c_void;
    realloc, __libc_realloc = resize(block: *mut c_void, size: usize) -> *mut c_void;
    reallocarray, __libc_reallocarray = resize_array(block: *mut c_void, count: usize, size: usize) -> *mut c_void;
    free, cfree, __libc_free = release(block: *mut c_void);
    /// C23. The size is the caller's word; what the heap knows of the block counts.
    free_sized = release_sized(block: *mut c_void, size: usize);
    /// C23.
    free_aligned_sized = release_aligned_sized(block: *mut c_void, align: usize, size: usize);
    memalign, __libc_memalign = obtain_aligned(align: usize, size: usize) -> *mut c_void;
    aligned_alloc = obtain_aligned_strictly(align: usize, size: usize) -> *mut c_void;
    posix_memalign, __posix_memalign = obtain_into(out: *mut *mut c_void, align: usize, size: usize) -> c_int;
    valloc, __libc_valloc = obtain_page_aligned(size: usize) -> *mut c_void;
    pvalloc, __libc_pvalloc = obtain_pages(size: usize) -> *mut c_void;
    malloc_usable_size = usable(block: *mut c_void) -> usize;
}

#[inline(always)]
unsafe fn obtain(size: usize) -> *mut c_void {
    or_no_memory(heap::allocate(size))
}

#[inline(always)]
unsafe fn obtain_zeroed(count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size) {
        Some(total) => or_no_memory(heap::allocate_zeroed(total)),
        None => no_memory(),
    }
}

#[inline(always)]
unsafe fn release(block: *mut c_void) {
    // SAFETY: the caller's contract.
    unsafe { heap::release(block) }
}

#[inline(always)]
unsafe fn release_sized(block: *mut c_void, _size: usize) {
    // SAFETY: the caller's contract.
    unsafe { heap::release(block) }
}

#[inline(always)]
unsafe fn release_aligned_sized(block: *mut c_void, _align: usize, _size: usize) {
    // SAFETY: the caller's contract.
    unsafe { heap::release(block) }
}

unsafe fn resize(block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: the caller's contract.
    unsafe {
        if block.is_null() {
            return obtain(size);
        }
        if size == 0 {
            heap::release(block);
            return ptr::null_mut();
        }
        or_no_memory(heap::resize(block, size))
    }
}

unsafe fn resize_array(block: *mut c_void, count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: the caller's contract.
        Some(total) => unsafe { resize(block, total) },
        None => no_memory(),
    }
}

fn aligned(align: usize, size: usize) -> *mut c_void {
    match align.max(ALIGN).checked_next_power_of_two() {
        Some(align) => or_no_memory(heap::allocate_aligned(size, align)),
        None => invalid(),
    }
}

unsafe fn obtain_aligned(align: usize, size: usize) -> *mut c_void {
    aligned(align, size)
}

unsafe fn obtain_aligned_strictly(align: usize, size: usize) -> *mut c_void {
    if align.is_power_of_two() { aligned(align, size) } else { invalid() }
}

unsafe fn obtain_into(out: *mut *mut c_void, align: usize, size: usize) -> c_int {
    if !align.is_power_of_two() || !align.is_multiple_of(size_of::<*mut c_void>()) {
        return libc::EINVAL;
    }
    let before = errno();
    let block = heap::allocate_aligned(size, align);
    if block.is_null() {
        set_errno(before);
        return libc::ENOMEM;
    }
    // SAFETY: the caller's contract.
    unsafe { out.write(block) };
    0
}

unsafe fn obtain_page_aligned(size: usize) -> *mut c_void {
    aligned(page(), size)
}

unsafe fn obtain_pages(size: usize) -> *mut c_void {
    match size.max(1).checked_next_multiple_of(page()) {
        Some(whole) => aligned(page(), whole),
        None => no_memory(),
    }
}

unsafe fn usable(block: *mut c_void) -> usize {
    // SAFETY: the caller's contract.
    if block.is_null() { 0 } else { unsafe { heap::usable(block) } }
}

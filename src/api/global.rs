//! The process heap as a program sees it.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, NonNull};

use crate::base::error::{Error, OomReason, Result};
use crate::base::heap_config::HeapConfig;
use crate::base::host::{HostPool, Resized};
use crate::heap::stats::HeapStats;
use crate::heap::{self, process, process::Asker};

/// A handle on the one heap of the process, for `#[global_allocator]` and for containers, which hold a reference to
/// one in less room than a copy of it.
///
/// ```
/// use memory_pool::GlobalPool;
/// #[global_allocator]
/// static POOL: GlobalPool = GlobalPool::new();
/// let numbers: Vec<u64> = (0..1000).collect();
/// assert!(GlobalPool::owns(numbers.as_ptr().cast()));
/// ```
///
/// The heap is configured once: by the configuration of the `#[global_allocator]`, or where that is another
/// allocator, of the handle used first, in both cases with what the environment adds ([`HeapConfig`]).
#[derive(Clone, Copy, Debug, Default)]
pub struct GlobalPool {
    config: HeapConfig,
}

impl GlobalPool {
    /// The process heap, with its defaults.
    pub const fn new() -> Self {
        Self::with_config(HeapConfig::new())
    }

    /// The process heap, configured. The environment's word counts more: see [`HeapConfig`].
    pub const fn with_config(config: HeapConfig) -> Self {
        Self { config }
    }

    /// The configuration in force.
    pub fn config() -> HeapConfig {
        process::with_heap(|_| ());
        heap::settings::in_force().unwrap_or_default()
    }

    /// Whether `ptr` lies in memory of the process heap. Any address may be asked about; none is read.
    pub fn owns(ptr: *const u8) -> bool {
        heap::owns(&process::HUB, ptr.addr())
    }

    /// Bytes that may be used at `ptr`; `None` where no block of the process heap begins there.
    pub fn usable_size(ptr: *const u8) -> Option<usize> {
        heap::block_size_at(&process::HUB, ptr.cast_mut())
    }

    /// What the heap did and holds.
    ///
    /// ```
    /// use memory_pool::GlobalPool;
    /// println!("{}", GlobalPool::stats());
    /// ```
    pub fn stats() -> HeapStats {
        process::HUB.snapshot()
    }

    /// [`stats`](Self::stats) as a table for people.
    pub fn report() -> String {
        Self::stats().to_string()
    }

    /// The same on stderr, written without allocating: for places where that must not be.
    pub fn print_report() {
        heap::stderr::line(format_args!("{}", Self::stats()));
    }

    /// Gives idle memory back to the system now: this thread's and what nobody owns at once, that of other
    /// threads when they next need memory. Returns the bytes given back so far.
    pub fn trim() -> usize {
        let own = process::with_heap(heap::ThreadHeap::purge_all).unwrap_or(0);
        own + process::HUB.trim()
    }
}

/// What a C library needs: blocks are freed and resized without telling their size again.
impl GlobalPool {
    /// A block of `size` bytes (of one, if that is 0) at a multiple of `align`; null where there is no memory, or
    /// where `align` is no power of two.
    ///
    /// ```
    /// use memory_pool::GlobalPool;
    /// static POOL: GlobalPool = GlobalPool::new();
    /// let block = POOL.alloc_unsized(100, 64);
    /// assert!(block.addr() % 64 == 0 && GlobalPool::usable_size(block).is_some_and(|size| size >= 100));
    /// // SAFETY: the block came from this pool and is used no more.
    /// unsafe { POOL.free_unsized(block) };
    /// ```
    #[inline]
    pub fn alloc_unsized(&self, size: usize, align: usize) -> *mut u8 {
        if !align.is_power_of_two() {
            return ptr::null_mut();
        }
        // A block of no bytes is aligned as well.
        let size = if align > heap::MIN_ALIGN { size.max(1) } else { size };
        match heap::of_small(size, align) {
            Some(class) => process::alloc_unsized(class, size, align, Asker::Program(&self.config)),
            None => obtain_other(size, align, Asker::Program(&self.config)),
        }
    }

    /// [`alloc_unsized`](Self::alloc_unsized), zeroed.
    #[inline]
    pub fn alloc_unsized_zeroed(&self, size: usize, align: usize) -> *mut u8 {
        match Layout::from_size_align(size.max(1), align) {
            // SAFETY: the size is not 0.
            Ok(layout) => unsafe { self.alloc_zeroed(layout) },
            Err(_) => ptr::null_mut(),
        }
    }

    /// Frees a block, however it was allocated; null is nothing to free. An address that no block of the process
    /// heap begins at ends the program with a line on stderr where the heap can tell, which it cannot for blocks
    /// of the calling thread's own.
    ///
    /// # Safety
    /// `ptr` is null or a live block of the process heap, and is used no more.
    #[inline]
    pub unsafe fn free_unsized(&self, ptr: *mut u8) {
        if !ptr.is_null() {
            // SAFETY: the caller's contract.
            unsafe { process::free_unsized(ptr) }
        }
    }

    /// Bytes that may be used of a block, however it was allocated: as [`usable_size`](Self::usable_size) and
    /// faster, since it believes the caller.
    ///
    /// # Safety
    /// `ptr` is a live block of the process heap. An address that no block begins at ends the program with a line
    /// on stderr.
    #[inline]
    pub unsafe fn usable_size_of_live(&self, ptr: *mut u8) -> usize {
        // SAFETY: the caller's contract.
        unsafe { process::usable_size(ptr) }
    }

    /// Resizes a block, however it was allocated, in place where that is possible; a block that moves is aligned
    /// to 16 bytes. Null where there is no memory, and the block is then as it was. With null in `ptr` this is
    /// [`alloc_unsized`](Self::alloc_unsized). An address that no block begins at ends the program with a line on
    /// stderr.
    ///
    /// # Safety
    /// `ptr` is null or a live block of the process heap; unless null is returned, it is used no more.
    pub unsafe fn realloc_unsized(&self, ptr: *mut u8, size: usize) -> *mut u8 {
        const ALIGN: usize = 16;
        if ptr.is_null() {
            return self.alloc_unsized(size, ALIGN);
        }
        // SAFETY: the caller's contract; the new block holds what is copied.
        unsafe {
            let usable = process::usable_size(ptr);
            if size <= usable && size >= usable / 2 {
                return ptr;
            }
            if usable > heap::CLASS_MAX
                && let Some((block, _)) = heap::resize_big(ptr, size, true)
            {
                return block;
            }
            let mut block = self.alloc_unsized(size.max(least_when_grown(usable, size)), ALIGN);
            if block.is_null() {
                block = self.alloc_unsized(size, ALIGN);
            }
            if !block.is_null() {
                ptr::copy_nonoverlapping(ptr, block, usable.min(size));
                self.free_unsized(ptr);
            }
            block
        }
    }
}

/// Bytes to ask for when a block of `usable` bytes grows to `size`: a quarter more than it had at least, since who grows
/// by small steps would have it copied at each class, and above the classes at each page. Of a small block that would
/// be more memory than the copies are worth; of larger ones, pages that are not used are not touched.
fn least_when_grown(usable: usize, size: usize) -> usize {
    const SMALL: usize = 4096;
    if size > usable.max(SMALL) { usable.saturating_add(usable / 4) } else { 0 }
}

// SAFETY: blocks are as large and aligned as asked (classes hold their sizes; larger blocks are cut by size),
// and the heap never unwinds.
unsafe impl GlobalAlloc for GlobalPool {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        obtain(layout, Asker::Program(&self.config))
    }

    #[inline]
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract: a live block of this layout, whose class is that of the layout.
        unsafe {
            match heap::of_small(layout.size(), layout.align()) {
                Some(class) => process::free(class, ptr),
                None => dealloc_other(ptr, layout.size(), layout.align()),
            }
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        obtain_zeroed(layout, Asker::Program(&self.config))
    }

    #[inline]
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let (old_class, new_class) =
            (heap::of_small(layout.size(), layout.align()), heap::of_small(new_size, layout.align()));
        if old_class.is_some() && old_class == new_class {
            return ptr;
        }
        // SAFETY: the caller's contract.
        unsafe { realloc_slow(self, ptr, layout, new_size) }
    }
}

/// # Safety
/// As for `GlobalAlloc::dealloc`.
#[inline(never)]
unsafe fn dealloc_other(ptr: *mut u8, size: usize, align: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        match heap::of_layout(size, align) {
            Some(class) => process::free(class, ptr),
            None => process::free_big(ptr),
        }
    }
}

/// # Safety
/// As for `GlobalAlloc::realloc`.
#[inline(never)]
unsafe fn realloc_slow(pool: &GlobalPool, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
    // SAFETY: the caller's contract; the new block holds what is copied.
    unsafe {
        match (heap::of_layout(layout.size(), layout.align()), heap::of_layout(new_size, layout.align())) {
            (Some(old), Some(new)) if old == new => return ptr,
            (None, None) => {
                if let Some((block, _)) = heap::resize_big(ptr, new_size, true) {
                    return block;
                }
            }
            _ => {}
        }
        let block = pool.alloc(Layout::from_size_align_unchecked(new_size, layout.align()));
        if !block.is_null() {
            ptr::copy_nonoverlapping(ptr, block, layout.size().min(new_size));
            pool.dealloc(ptr, layout);
        }
        block
    }
}

#[inline(always)]
fn obtain(layout: Layout, asker: Asker<'_>) -> *mut u8 {
    match heap::of_small(layout.size(), layout.align()) {
        Some(class) => process::alloc(class, layout.align(), asker),
        None => obtain_other(layout.size(), layout.align(), asker),
    }
}

/// Larger blocks and unusual alignments: apart, so that the path of the small ones is short.
#[inline(never)]
fn obtain_other(size: usize, align: usize, asker: Asker<'_>) -> *mut u8 {
    match heap::of_layout(size, align) {
        Some(class) => process::alloc(class, align, asker),
        None => process::alloc_big(size, align, asker).0,
    }
}

#[inline(always)]
fn obtain_zeroed(layout: Layout, asker: Asker<'_>) -> *mut u8 {
    let (block, zeroed) = match heap::of_layout(layout.size(), layout.align()) {
        Some(class) => (process::alloc(class, layout.align(), asker), false),
        None => process::alloc_big(layout.size(), layout.align(), asker),
    };
    if !block.is_null() && !zeroed {
        // SAFETY: a fresh block of that size.
        unsafe { block.write_bytes(0, layout.size()) };
    }
    block
}

fn usable(block: NonNull<u8>, layout: Layout) -> NonNull<[u8]> {
    let size = match heap::of_layout(layout.size(), layout.align()) {
        Some(class) => heap::class_size(class),
        // SAFETY: a block just handed out.
        None => unsafe { heap::usable_size(block.as_ptr()) },
    };
    NonNull::slice_from_raw_parts(block, size)
}

// SAFETY: blocks live until freed, whatever becomes of handles; see `GlobalAlloc` above.
unsafe impl HostPool for GlobalPool {
    #[inline]
    fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
        let asker = Asker::Handle(&self.config);
        let block = if zeroed { obtain_zeroed(layout, asker) } else { obtain(layout, asker) };
        match NonNull::new(block) {
            Some(block) if zeroed => Ok(NonNull::slice_from_raw_parts(block, layout.size())),
            Some(block) => Ok(usable(block, layout)),
            None => Err(Error::oom(layout.size(), OomReason::Source)),
        }
    }

    #[inline]
    unsafe fn give_back(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's contract; all fitting layouts lead to the same class.
        unsafe { self.dealloc(ptr.as_ptr(), layout) }
    }

    unsafe fn grow_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        // SAFETY: the caller's contract.
        unsafe { heap::resize_in_place(ptr, old, new, false) }
    }

    unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        // SAFETY: the caller's contract.
        unsafe { heap::resize_in_place(ptr, old, new, false) }.map(|resized| resized.block)
    }

    unsafe fn relocate(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        // SAFETY: the caller's contract.
        unsafe { heap::resize_in_place(ptr, old, new, true) }
    }
}

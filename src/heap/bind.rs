//! The process heap: one hub, and a heap bound to each thread.
//!
//! A thread's slot is a plain pointer without a destructor, so that it can be read at any time: it points to
//! `UNBOUND` at first, to the thread's heap once it allocated or freed, and to `ENDED` after the exit hook (a
//! pthread key, which runs after Rust's own destructors) took the heap away. From then on the thread uses the
//! hub's `late` heap under its lock. Binding may be entered again by what it calls (some systems allocate in
//! `pthread_setspecific`), so the slot is set first.
//!
//! The heap may be part of a library that is unloaded while threads that used it live on. The key goes with the
//! library, so that no thread calls the hook after its code is gone; what was allocated stays mapped, since the
//! program may still hold it.

use core::alloc::Layout;
use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::foreign::post_one;
use super::fork;
use super::hub::Hub;
use super::large;
use super::registry;
use super::segment::segment_of;
use super::settings::{self, Part};
use super::slot;
use super::span::SINGLE;
use super::stderr;
use super::thread::{ENDED, Front, ThreadHeap, UNBOUND};
use crate::base::heap_config::HeapConfig;
use process::Asker;

#[inline(always)]
fn front() -> &'static Front {
    // SAFETY: the slot always points to a static front or to this thread's heap, which lives for ever.
    unsafe { &*slot::get() }
}

/// The heap of the process: what `#[global_allocator]` uses.
pub(crate) mod process {
    use super::*;
    use crate::heap::guard::{self, Guard};
    use crate::heap::{self, begins_block, fault};

    pub(crate) static HUB: Hub = Hub::new(usize::MAX);

    /// Who asks, which decides on the configuration when the first asks.
    #[derive(Clone, Copy)]
    pub(crate) enum Asker<'a> {
        /// The program's allocator, or the C library's functions.
        Program(&'a HeapConfig),
        /// A handle, which may be another one than the program's allocator.
        Handle(&'a HeapConfig),
    }

    const NOBODY: Asker<'static> = Asker::Handle(&HeapConfig::new());

    /// A block for a layout whose class is known.
    #[inline(always)]
    pub(crate) fn alloc(class: usize, align: usize, asker: Asker<'_>) -> *mut u8 {
        // SAFETY: the front is this thread's, and classes are in range.
        let block = unsafe { front().pop(class) };
        if block.is_null() { alloc_slow(class, align, asker) } else { block }
    }

    #[cold]
    #[inline(never)]
    fn alloc_slow(class: usize, align: usize, asker: Asker<'_>) -> *mut u8 {
        if let Some(guard) = front().guard() {
            let block = guard::alloc_cached(guard, class, align);
            if !block.is_null() {
                return block;
            }
        }
        alloc_uncached(class, align, asker)
    }

    /// Apart, so that the path of a hardened heap saves no registers for it.
    #[cold]
    #[inline(never)]
    fn alloc_uncached(class: usize, align: usize, asker: Asker<'_>) -> *mut u8 {
        with_heap_for(asker, |heap| heap.alloc_aligned(class, align)).unwrap_or(ptr::null_mut())
    }

    /// A block of `class` for a request of `size` bytes, if it will not be freed by its layout.
    #[inline(always)]
    pub(crate) fn alloc_unsized(class: usize, size: usize, align: usize, asker: Asker<'_>) -> *mut u8 {
        // SAFETY: as in `alloc`.
        let block = unsafe { front().pop(class) };
        if block.is_null() { alloc_unsized_slow(class, size, align, asker) } else { block }
    }

    #[cold]
    #[inline(never)]
    fn alloc_unsized_slow(class: usize, size: usize, align: usize, asker: Asker<'_>) -> *mut u8 {
        if let Some(guard) = front().guard() {
            let block = guard::alloc_cached_exact(guard, class, size, align);
            if !block.is_null() {
                return block;
            }
        }
        alloc_unsized_uncached(class, size, align, asker)
    }

    /// Apart, as above.
    #[cold]
    #[inline(never)]
    fn alloc_unsized_uncached(class: usize, size: usize, align: usize, asker: Asker<'_>) -> *mut u8 {
        with_heap_for(asker, |heap| heap.alloc_unsized(class, size, align)).unwrap_or(ptr::null_mut())
    }

    /// A block for a layout without a class. The flag says whether it is zero.
    #[cold]
    #[inline(never)]
    pub(crate) fn alloc_big(size: usize, align: usize, asker: Asker<'_>) -> (*mut u8, bool) {
        with_heap_for(asker, |heap| heap.alloc_big(size, align)).unwrap_or((ptr::null_mut(), false))
    }

    /// Frees a block of `class`.
    ///
    /// # Safety
    /// `block` is a live block of the process heap, of that class.
    #[inline(always)]
    pub(crate) unsafe fn free(class: usize, block: *mut u8) {
        // SAFETY: the front is this thread's, the class in range, and the block the caller's. A hardened heap has no
        // room, so that nothing is believed of what may be no block.
        if !unsafe { front().push(class, block) } {
            free_slow(block, class);
        }
    }

    #[inline(never)]
    fn free_slow(block: *mut u8, class: usize) {
        if let Some((heap, guard)) = hardened() {
            return heap.guarded_free(guard, block);
        }
        free_uncached(block, class);
    }

    /// Apart, as above.
    #[cold]
    #[inline(never)]
    fn free_uncached(block: *mut u8, class: usize) {
        match bound() {
            Some(heap) if heap.guard().is_some() => free_checked(block),
            Some(heap) => heap.flush(class, block),
            None => free_late(block),
        }
    }

    /// This thread's heap and its guard, if it is bound and hardened.
    #[inline(always)]
    fn hardened() -> Option<(&'static ThreadHeap, &'static Guard)> {
        let front = front();
        // SAFETY: a front with a guard is the first field of a heap.
        front.guard().map(|guard| (unsafe { &*ptr::from_ref(front).cast::<ThreadHeap>() }, guard))
    }

    /// Frees what a program says is a block, where the heap is hardened.
    #[cold]
    #[inline(never)]
    fn free_checked(block: *mut u8) {
        // A thread without memory for a heap of its own leaves the block where it is.
        _ = with_heap(|heap| heap.guard().map(|guard| heap.guarded_free(guard, block)));
    }

    /// Frees a block smaller than a large one, on a thread that has no heap any more.
    fn free_late(block: *mut u8) {
        if HUB.settings.has(Part::Checks) {
            free_checked(block);
        } else {
            // SAFETY: the block is live, so its segment is there.
            post_one(unsafe { &*segment_of(block) }, block);
        }
    }

    /// Frees a block larger than any class, or aligned more than blocks are.
    ///
    /// # Safety
    /// `block` is such a live block of the process heap.
    #[cold]
    #[inline(never)]
    pub(crate) unsafe fn free_big(block: *mut u8) {
        if HUB.settings.has(Part::Checks) {
            return free_checked(block);
        }
        // SAFETY: a live block has books before it.
        let segment = unsafe { &*segment_of(block) };
        match (large::Large::at(segment), bound()) {
            (Some(large), _) => large::free(large),
            (None, Some(heap)) => heap.free_single(segment, block),
            (None, None) => post_one(segment, block),
        }
    }

    /// Frees a block of which nothing is known. The registry is asked before anything is read: C programs free
    /// addresses where nothing is mapped.
    ///
    /// # Safety
    /// `block` is a live block of the process heap. An address that is not is found out as far as that goes.
    #[inline]
    pub(crate) unsafe fn free_unsized(block: *mut u8) {
        if registry::in_segment(block.addr().wrapping_sub(1), &HUB) {
            // SAFETY: the registry says that there is a segment.
            let segment = unsafe { &*segment_of(block) };
            let class = segment.class_at(block);
            if class < SINGLE {
                // SAFETY: the block is the caller's, and of that class.
                unsafe {
                    if !front().push(class as usize, block) {
                        free_small(class as usize, block);
                    }
                }
                return;
            }
        }
        // SAFETY: the caller's contract.
        unsafe { free_unsized_slow(block) };
    }

    /// The same of what lies in a span of `class`.
    ///
    /// # Safety
    /// As for [`free_unsized`].
    #[inline(never)]
    unsafe fn free_small(class: usize, block: *mut u8) {
        if let Some((heap, guard)) = hardened() {
            return heap.guarded_free_small(guard, class, block);
        }
        // SAFETY: the caller's contract.
        unsafe { free_unsized_slow(block) };
    }

    #[inline(never)]
    unsafe fn free_unsized_slow(block: *mut u8) {
        // SAFETY: the caller's contract. What follows the mistake that is looked for here is best effort.
        if !unsafe { begins_block(&HUB, block) } {
            fault::invalid_free(block);
        }
        if let Some(heap) = bound() {
            // SAFETY: the caller's contract.
            unsafe { heap.free_unsized(block) };
            return;
        }
        // SAFETY: a live block has books before it.
        match large::Large::at(unsafe { &*segment_of(block) }) {
            Some(large) if !HUB.settings.has(Part::Checks) => large::free(large),
            _ => free_late(block),
        }
    }

    /// Usable bytes of the block at `block`.
    ///
    /// # Safety
    /// `block` is a live block of the process heap. An address that is not is found out as far as that goes.
    #[inline]
    pub(crate) unsafe fn usable_size(block: *mut u8) -> usize {
        if registry::in_segment(block.addr().wrapping_sub(1), &HUB) {
            // SAFETY: the registry says that there is a segment.
            let segment = unsafe { &*segment_of(block) };
            let is_small = segment.class_at(block) < SINGLE;
            if is_small && segment.span_at(block).begins_block(block) && !HUB.settings.has(Part::Checks) {
                return segment.span_at(block).size.get() as usize;
            }
        }
        // SAFETY: the caller's contract.
        unsafe { usable_size_slow(block) }
    }

    #[inline(never)]
    unsafe fn usable_size_slow(block: *mut u8) -> usize {
        // SAFETY: the caller's contract, for both.
        unsafe {
            if !begins_block(&HUB, block) {
                fault::invalid_free(block);
            }
            if HUB.settings.has(Part::Checks) {
                guard::expect_block(block);
            }
            heap::usable_size(block)
        }
    }

    /// This thread's heap, bound now if it was not; `None` after the thread's exit hook or without memory.
    fn bound() -> Option<&'static ThreadHeap> {
        bound_for(NOBODY)
    }

    pub(super) fn bound_for(asker: Asker<'_>) -> Option<&'static ThreadHeap> {
        let front = front();
        if ptr::eq(front, &UNBOUND) {
            bind(asker)
        } else if ptr::eq(front, &ENDED) {
            None
        } else {
            // SAFETY: every other front is the first field of a heap.
            Some(unsafe { &*ptr::from_ref(front).cast::<ThreadHeap>() })
        }
    }

    /// Runs `work` on this thread's heap, or on the one for threads that have none any more.
    pub(crate) fn with_heap<R>(work: impl FnOnce(&ThreadHeap) -> R) -> Option<R> {
        with_heap_for(NOBODY, work)
    }

    fn with_heap_for<R>(asker: Asker<'_>, work: impl FnOnce(&ThreadHeap) -> R) -> Option<R> {
        match bound_for(asker) {
            Some(heap) => Some(work(heap)),
            None => HUB.with_late(work),
        }
    }
}

#[cold]
fn bind(asker: Asker<'_>) -> Option<&'static ThreadHeap> {
    let is_first = match asker {
        Asker::Program(config) => settings::settle(&process::HUB, config),
        Asker::Handle(config) => {
            if settings::in_force().is_none() {
                ask_as_program();
                if !ptr::eq(front(), &UNBOUND) {
                    return process::bound_for(asker);
                }
            }
            settings::settle(&process::HUB, config)
        }
    };
    let heap = process::HUB.take_heap()?;
    slot::set(&heap.front);
    prepare();
    let key = KEY.load(Ordering::Acquire);
    if key != NO_KEY {
        // SAFETY: the key was made by `prepare`.
        unsafe { libc::pthread_setspecific(key as libc::pthread_key_t, ptr::from_ref(heap).cast()) };
    }
    if is_first && settings::in_force().is_some_and(|config| config.report_at_exit) {
        // SAFETY: a function that never unwinds.
        unsafe { libc::atexit(report_at_exit) };
    }
    Some(heap)
}

/// Allocates as the program does, so that the configuration of its allocator, if that is this heap, comes first.
fn ask_as_program() {
    let layout = Layout::new::<u64>();
    // SAFETY: the layout has a size, and the block is freed with it.
    unsafe {
        let block = core::hint::black_box(std::alloc::alloc(layout));
        if !block.is_null() {
            std::alloc::dealloc(block, layout);
        }
    }
}

extern "C" fn report_at_exit() {
    stderr::line(format_args!("memory-pool, at exit:\n{}", process::HUB.snapshot()));
}

const NO_KEY: u64 = u64::MAX;
static KEY: AtomicU64 = AtomicU64::new(NO_KEY);
static PREPARED: AtomicU32 = AtomicU32::new(0);

/// Once a process: the key whose destructor ends a thread's heap, and the handlers around `fork`.
pub(crate) fn prepare() {
    if PREPARED.swap(1, Ordering::AcqRel) != 0 {
        // The first thread is about to set the key; without it only that thread's heap would be left over.
        while PREPARED.load(Ordering::Acquire) == 1 && KEY.load(Ordering::Acquire) == NO_KEY {
            core::hint::spin_loop();
        }
        return;
    }
    process::HUB.enlist();
    let mut key = 0;
    // SAFETY: plain calls of the C library with functions that never unwind.
    unsafe {
        if libc::pthread_key_create(&mut key, Some(on_thread_end)) == 0 {
            KEY.store(key as u64, Ordering::Release);
        }
        PREPARED.store(2, Ordering::Release);
        libc::pthread_atfork(Some(fork::before_fork), Some(fork::after_fork), Some(fork::after_fork));
    }
}

/// Runs when the library (or program) that holds this code is about to go.
#[cfg(all(unix, not(target_vendor = "apple")))]
extern "C" fn on_unload() {
    let key = KEY.swap(NO_KEY, Ordering::AcqRel);
    if key != NO_KEY {
        // SAFETY: the key was made by `prepare`, and is deleted once. Threads that are in the hook at this moment
        // belong to somebody who unloads a library that runs.
        unsafe { libc::pthread_key_delete(key as libc::pthread_key_t) };
    }
}

#[cfg(all(unix, not(target_vendor = "apple")))]
#[used]
// SAFETY: the linker's table of functions without arguments to run at unloading.
#[unsafe(link_section = ".fini_array")]
static ON_UNLOAD: extern "C" fn() = on_unload;

extern "C" fn on_thread_end(heap: *mut c_void) {
    slot::set(&ENDED);
    // SAFETY: the key's value is this thread's heap, which lives for ever.
    let heap = unsafe { &*heap.cast::<ThreadHeap>() };
    heap.end();
    process::HUB.put_heap(heap);
}

//! The process heap under a debug layer, for programs that say no layouts at a free: those of C.
//!
//! 1. The layer's books are mappings of their own, and what this crate allocates for reports comes from the heap
//!    itself, past the layer: nothing is recorded about recording.
//! 2. Work of the layer that makes the C library allocate (unwinding, names of functions) is served by the heap
//!    itself too: `Busy` marks the thread meanwhile.
//! 3. So the heap has blocks that the layer does not know. Their frees are told apart by the heap's own books.
//! 4. A thread that forks holds the layer's books (`HELD`). What it then allocates (in handlers of others around the
//!    same `fork`) goes past the layer, and a block of the layer's that it frees is kept for ever.

use core::alloc::Layout;
use core::cell::Cell;
use core::mem::ManuallyDrop;
use core::ptr;
use std::sync::OnceLock;

use super::GlobalPool;
use crate::base::config::{DebugConfig, OnFinding, PoolConfig};
use crate::base::diagnostics::Diagnostics;
use crate::base::error::Result;
use crate::base::finding::LeakReport;
use crate::engine::Block;
use crate::observe::{DebugLayer, HeldBooks, Known, Observer};

/// Alignment of every block.
const ALIGN: usize = 16;

/// The process heap with every block watched: canaries, a quarantine, leaks by stack and the rest of
/// [`DebugConfig`], for programs that free without a layout. `examples/malloc_preload` puts it under any program where
/// `MEMORY_POOL_DEBUG` asks for it.
///
/// ```
/// use memory_pool::{DebugConfig, Diagnostics, FindingKind, OnFinding, WatchedHeap};
/// let mut debug = DebugConfig::FULL;
/// debug.on_finding = OnFinding::Collect;
/// let heap = WatchedHeap::new(debug)?;
/// let block = heap.alloc(10, 16);
/// // SAFETY: not at all: the eleventh byte is the bug. The layer keeps a canary there.
/// unsafe { block.add(10).write(1) };
/// // SAFETY: live, freed once.
/// unsafe { heap.free(block) };
/// assert_eq!(heap.diagnostics().findings()[0].kind, FindingKind::Overflow);
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Debug)]
pub struct WatchedHeap {
    layer: DebugLayer,
    heap: GlobalPool,
    config: DebugConfig,
}

thread_local! {
    static BUSY: Cell<bool> = const { Cell::new(false) };
    // Without a destructor, whose registration would allocate.
    static HELD: Cell<Option<ManuallyDrop<(HeldBooks<'static>, Busy)>>> = const { Cell::new(None) };
}

/// While it lives, this thread's requests go past the layer (2).
struct Busy;

impl Busy {
    fn begin() -> Option<Self> {
        // A thread whose slots are gone is left unwatched.
        let idle = !BUSY.try_with(|busy| busy.replace(true)).unwrap_or(true);
        // Only who began may end it: no value is made otherwise.
        idle.then(|| Self)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        BUSY.set(false);
    }
}

/// Looks into the books, if this thread holds them (4).
fn forking<A>(look: impl FnOnce(&HeldBooks<'static>) -> A) -> Option<A> {
    HELD.try_with(|cell| {
        let held = cell.take()?;
        let answer = look(&held.0);
        cell.set(Some(held));
        Some(answer)
    })
    .ok()?
}

impl WatchedHeap {
    /// Watches as `config` says.
    pub fn new(config: DebugConfig) -> Result<Self> {
        let pool = PoolConfig { debug: config, ..PoolConfig::default_cpu() };
        crate::base::stack::unwind_always();
        Ok(Self { layer: DebugLayer::new("", &pool)?, heap: GlobalPool::new(), config })
    }

    /// As `MEMORY_POOL_DEBUG` and `MEMORY_POOL_ON_FINDING` say, in the words of
    /// [`PoolConfig::from_env`](crate::PoolConfig::from_env); `None` where they ask for nothing. Leaks are told by
    /// stack, so `leaks` brings `stacks`. A finding cannot unwind out of C: `panic` means `abort`.
    pub fn from_env() -> Result<Option<Self>> {
        let mut config = PoolConfig::from_env()?.debug;
        if !config.is_on() {
            return Ok(None);
        }
        config.stacks |= config.leaks;
        if config.on_finding == OnFinding::Panic {
            config.on_finding = OnFinding::Abort;
        }
        Self::new(config).map(Some)
    }

    /// The debugging side.
    pub fn diagnostics(&self) -> &dyn Diagnostics {
        &self.layer
    }

    /// A block of `size` bytes at a multiple of `align`, and of 16 in any case; null where there is no memory, or
    /// where `align` is no power of two.
    pub fn alloc(&self, size: usize, align: usize) -> *mut u8 {
        let Ok(asked) = Layout::from_size_align(size, align.max(ALIGN)) else { return ptr::null_mut() };
        let Some(_busy) = Busy::begin() else { return self.heap.alloc_unsized(size, asked.align()) };
        let Some(inner) = self.layer.inflate(asked) else { return ptr::null_mut() };
        let mut block = self.heap.alloc_unsized(inner.size(), inner.align());
        if block.is_null() {
            // What is held back may be what is missing.
            self.evict(true);
            block = self.heap.alloc_unsized(inner.size(), inner.align());
            if block.is_null() {
                return block;
            }
        }
        let size = inner.size();
        // SAFETY: just allocated, of that size and alignment, and this thread's alone.
        let outer = unsafe { self.layer.on_alloc(asked, Block { start: block.addr(), size, dirty: size }) };
        block.with_addr(outer.start)
    }

    /// Frees a block; null is nothing to free. What is wrong with it is a finding; a block that the layer does not
    /// know goes back to the heap if it is one of the heap's.
    ///
    /// # Safety
    /// `ptr` is null, or a block of [`alloc`](Self::alloc) or of the process heap; it is used no more.
    pub unsafe fn free(&self, ptr: *mut u8) {
        if ptr.is_null() {
            return;
        }
        let busy = Busy::begin();
        let known = match forking(|books| books.known(ptr.addr())) {
            Some(Known::Live(_) | Known::Freed) => return,
            Some(Known::Nothing) => Known::Nothing,
            None => self.layer.known(ptr.addr()),
        };
        if known == Known::Nothing && (busy.is_none() || GlobalPool::usable_size(ptr).is_some()) {
            // SAFETY: the caller's contract (3).
            return unsafe { self.heap.free_unsized(ptr) };
        }
        // SAFETY: as far as the caller knows a live block; the layer finds out. What it returns is a block of the
        // heap's that the layer keeps no more.
        unsafe {
            if let Some(inner) = self.layer.on_free(ptr.addr(), None) {
                self.heap.free_unsized(ptr.with_addr(inner));
            }
        }
        self.evict(false);
    }

    fn evict(&self, all: bool) {
        while let Some(inner) = self.layer.evict(all) {
            // SAFETY: a block of the heap's that the layer keeps no more.
            unsafe { self.heap.free_unsized(ptr::with_exposed_provenance_mut(inner)) };
        }
    }

    /// Resizes a block, always by moving it, so that what is used of the old one is found; null where there is no
    /// memory, and the block is then as it was.
    ///
    /// # Safety
    /// `ptr` is a live block of [`alloc`](Self::alloc) or of the process heap; unless null is returned, it is used no
    /// more.
    pub unsafe fn realloc(&self, ptr: *mut u8, size: usize) -> *mut u8 {
        let Some(old) = self.usable_size(ptr) else {
            // SAFETY: none: the layer or the heap says what this is.
            unsafe { self.free(ptr) };
            return ptr::null_mut();
        };
        let moved = self.alloc(size, ALIGN);
        if !moved.is_null() {
            // SAFETY: two live blocks, of these sizes.
            unsafe {
                ptr::copy_nonoverlapping(ptr, moved, old.min(size));
                self.free(ptr);
            }
        }
        moved
    }

    /// Bytes of the live block at `ptr`: as many as were asked for.
    pub fn usable_size(&self, ptr: *mut u8) -> Option<usize> {
        let known = forking(|books| books.known(ptr.addr())).unwrap_or_else(|| self.layer.known(ptr.addr()));
        match known {
            Known::Live(size) => Some(size),
            Known::Freed => None,
            Known::Nothing => GlobalPool::usable_size(ptr),
        }
    }

    /// Tells what is to be told at the end of the program: damage that nobody freed, leaks by stack where they were
    /// asked for, and the last operations where a history is kept. Returns the number of findings.
    pub fn finish(&self) -> usize {
        /// Operations that are shown.
        const SHOWN: usize = 32;
        let Some(_busy) = Busy::begin() else { return 0 };
        let mut count = self.layer.check();
        if self.config.leaks {
            let leaks = LeakReport::new(self.layer.leaks());
            count += leaks.blocks();
            if leaks.blocks() > 0 {
                crate::base::report::alarm(format_args!("{leaks}"));
            }
        }
        let history = self.layer.history();
        if !history.is_empty() {
            let last: String = history[history.len().saturating_sub(SHOWN)..]
                .iter()
                .map(|entry| format!("\n{entry}"))
                .collect();
            crate::base::report::alarm(format_args!("the last operations:{last}"));
        }
        count
    }

    /// Keeps the layer's books whole across `fork`: call once, for a heap that lives for ever.
    pub fn protect_forks(&'static self) {
        static WATCHED: OnceLock<&'static WatchedHeap> = OnceLock::new();
        extern "C" fn before() {
            if let (Some(heap), Some(busy)) = (WATCHED.get(), Busy::begin()) {
                HELD.set(Some(ManuallyDrop::new((heap.layer.hold_books(), busy))));
            }
        }
        extern "C" fn after() {
            // In the child as well this is the thread that forked.
            drop(HELD.take().map(ManuallyDrop::into_inner));
        }
        if WATCHED.set(self).is_err() {
            return;
        }
        #[cfg(unix)]
        // SAFETY: plain functions that never unwind.
        unsafe {
            libc::pthread_atfork(Some(before), Some(after), Some(after));
        }
    }
}

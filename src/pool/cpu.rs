//! The process heap's machinery as a pool of its own: size classes and a cache per thread.
//!
//! 1. A thread finds its heap of a pool by the pool's number, which is never used twice: in `LAST` if it used
//!    that pool last, else in its `Table`. Both die with the thread; later uses go to the pool's shared heap.
//! 2. When a thread ends, its table lets go of each heap of a pool that still lives: what is cached goes
//!    back, what is live stays for others to adopt. Holding the pool meanwhile (through `Weak::upgrade`)
//!    keeps the memory from going away underneath.
//! 3. When the last handle goes, all memory is unmapped, also that of threads that live on: their tables
//!    hold dangling heaps under a number that nobody asks for any more.

use core::alloc::Layout;
use core::cell::{Cell, RefCell};
use core::fmt;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, ThreadId};

use crate::base::config::{AllocatorType, PoolConfig};
use crate::base::error::{Error, OomReason, Refusal, Result};
use crate::base::host::{HostPool, Resized, dangling};
use crate::base::pool::{
    ActiveAllocation, AllocFlags, MemoryType, forward, memory_pool, refuse_device_flags,
};
use crate::base::stats::MemoryStats;
use crate::base::tracking::{Counts, Tracking};
use crate::engine::Broken;
use crate::heap::{self, Hub, ThreadHeap};

/// Size classes with a cache per thread, in an instance of its own; clones share it.
///
/// Dropping the last handle gives all memory back at once, whatever threads used the pool.
///
/// ```
/// use allocator_api2::vec::Vec;
/// use memory_pool::{CpuPool, PoolConfig};
/// let pool = CpuPool::new(PoolConfig::default_cpu())?;
/// let mut squares = Vec::new_in(&pool);
/// squares.extend((0..100u64).map(|n| n * n));
/// assert_eq!(pool.active_allocations().len(), 1);
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone)]
pub struct CpuPool(Arc<Inner>);

struct Inner {
    hub: Hub,
    number: u64,
    name: Box<str>,
    config: PoolConfig,
    tracking: Tracking,
    /// The only thread that may use the pool, where there is only one.
    bound_to: Option<ThreadId>,
    closed: AtomicBool,
    /// Whether a request must ask `admit` and `open`: the pool is bound to a thread, or closed.
    guarded: AtomicBool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: no handle is left, and threads that end use a heap only while they hold one (2).
        unsafe { self.hub.demolish() };
    }
}

thread_local! {
    /// The pool this thread used last, and its heap there.
    static LAST: Cell<(u64, *const ThreadHeap)> = const { Cell::new((0, ptr::null())) };
    static TABLE: Table = const { Table(RefCell::new(Vec::new())) };
}

struct Entry {
    number: u64,
    pool: Weak<Inner>,
    heap: *const ThreadHeap,
}

/// A thread's heaps, one for each pool it uses.
struct Table(RefCell<Vec<Entry>>);

impl Drop for Table {
    fn drop(&mut self) {
        LAST.set((0, ptr::null()));
        for entry in self.0.get_mut().drain(..) {
            if let Some(pool) = entry.pool.upgrade() {
                // SAFETY: the pool is alive, so its heaps are.
                let heap = unsafe { &*entry.heap };
                heap.end();
                pool.hub.put_heap(heap);
            }
        }
    }
}

impl Inner {
    /// Runs `work` on this thread's heap.
    #[inline]
    fn with<R>(&self, work: impl FnOnce(&ThreadHeap) -> R) -> Option<R> {
        let (number, heap) = LAST.get();
        if number == self.number {
            // SAFETY: the pool is alive (we are in it), so the thread's heap of it is.
            return Some(work(unsafe { &*heap }));
        }
        self.with_slow(work)
    }

    #[cold]
    fn with_slow<R>(&self, work: impl FnOnce(&ThreadHeap) -> R) -> Option<R> {
        match TABLE.try_with(|table| self.look_up(table)) {
            // SAFETY: as in `with`.
            Ok(heap) => heap.map(|heap| work(unsafe { &*heap })),
            // The thread is past its end.
            Err(_) => self.hub.with_late(work),
        }
    }

    fn look_up(&self, table: &Table) -> Option<*const ThreadHeap> {
        let entries = table.0.borrow();
        let heap = entries.iter().find(|entry| entry.number == self.number)?.heap;
        LAST.set((self.number, heap));
        Some(heap)
    }
}

impl CpuPool {
    /// A pool as `config` describes it.
    pub fn new(config: PoolConfig) -> Result<Self> {
        Self::named("", config)
    }

    /// A pool with a name, which reports and the manager show.
    pub fn named(name: &str, config: PoolConfig) -> Result<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let config = super::checked(config, AllocatorType::SizeClass)?;
        super::no_debug(&config)?;
        let pool = Self(Arc::new(Inner {
            hub: Hub::new(config.max_size),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            name: name.into(),
            tracking: Tracking::new(config.track_stats),
            bound_to: (!config.thread_safe).then(|| thread::current().id()),
            closed: AtomicBool::new(false),
            guarded: AtomicBool::new(!config.thread_safe),
            config,
        }));
        pool.0.hub.count_peak();
        // The hub has its final place now.
        pool.0.hub.enlist();
        heap::prepare_process();
        let initial = pool.0.config.initial_size;
        if initial > 0 {
            pool.reserve(initial)?;
        }
        Ok(pool)
    }

    /// Runs `work` on this thread's heap, making one if there is none.
    #[inline]
    fn with<R>(&self, mut work: impl FnMut(&ThreadHeap) -> R) -> Result<R> {
        match self.0.with(&mut work) {
            Some(done) => Ok(done),
            None => {
                self.join()?;
                self.0.with(&mut work).ok_or(Error::oom(size_of::<ThreadHeap>(), OomReason::Source))
            }
        }
    }

    /// Makes a heap for this thread and notes it.
    #[cold]
    fn join(&self) -> Result<()> {
        let oom = Error::oom(size_of::<ThreadHeap>(), OomReason::Source);
        let heap = self.0.hub.take_heap().ok_or(oom)?;
        let entry = Entry { number: self.0.number, pool: Arc::downgrade(&self.0), heap };
        let noted = TABLE.try_with(|table| {
            let mut entries = table.0.borrow_mut();
            entries.retain(|entry| entry.pool.strong_count() > 0);
            entries.try_reserve(1).map(|()| entries.push(entry)).is_ok()
        });
        if noted == Ok(true) {
            return Ok(());
        }
        self.0.hub.put_heap(heap);
        Err(oom)
    }

    /// Says no to threads that the pool does not belong to.
    fn admit(&self) -> Result<()> {
        match self.0.bound_to {
            Some(owner) if owner != thread::current().id() => {
                Err(Error::InvalidOperation(Refusal::WrongThread))
            }
            _ => Ok(()),
        }
    }

    /// Says no where the thread may not allocate, or the pool was closed.
    #[cold]
    fn open(&self) -> Result<()> {
        self.admit()?;
        if self.0.closed.load(Ordering::Acquire) {
            return Err(Error::InvalidOperation(Refusal::Destroyed));
        }
        Ok(())
    }

    /// The class of a layout in this pool.
    #[inline]
    fn class(&self, layout: Layout) -> Option<usize> {
        heap::of_layout(layout.size(), layout.align().max(self.0.config.alignment))
    }

    #[inline]
    fn serve(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
        if self.0.guarded.load(Ordering::Relaxed) {
            self.open()?;
        }
        let class = self.class(layout);
        let block = self.with(|heap| {
            let (block, clean) = match class {
                Some(class) => (heap.alloc(class), false),
                None => heap.alloc_big(layout.size(), layout.align().max(self.0.config.alignment)),
            };
            let Some(block) = NonNull::new(block) else {
                heap.requests.on_failure();
                return None;
            };
            let size = match class {
                Some(class) => heap::class_size(class),
                // SAFETY: a block just handed out.
                None => unsafe { heap::usable_size(block.as_ptr()) },
            };
            heap.requests.on_alloc(class, size);
            if zeroed && !clean {
                // SAFETY: a fresh block of that size.
                unsafe { block.write_bytes(0, size) };
            }
            Some(NonNull::slice_from_raw_parts(block, size))
        })?;
        block.ok_or_else(|| self.out_of_memory(layout.size()))
    }

    #[cold]
    fn out_of_memory(&self, size: usize) -> Error {
        let limit = self.0.hub.limit();
        Error::oom(size, if limit == usize::MAX { OomReason::Source } else { OomReason::Limit(limit) })
    }

    /// A block for `layout`; see [`MemoryPool::allocate`](crate::MemoryPool::allocate).
    pub fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>> {
        if layout.size() == 0 { Ok(dangling(layout)) } else { self.serve(layout, false) }
    }

    /// [`allocate`](Self::allocate) with wishes.
    pub fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>> {
        refuse_device_flags(flags)?;
        if layout.size() == 0 {
            return Ok(dangling(layout));
        }
        let zeroed = flags.contains(AllocFlags::ZEROED);
        if !flags.contains(AllocFlags::NO_GROW) {
            return self.serve(layout, zeroed);
        }
        self.with(|heap| heap.without_growth(|_| self.serve(layout, zeroed)))?
    }

    /// Frees the block at `ptr`.
    ///
    /// # Safety
    /// `ptr` came from this pool, is live, and is not used after.
    pub unsafe fn deallocate(&self, ptr: NonNull<u8>) {
        if !self.owns(ptr) {
            // The empty block of a request for 0 bytes.
            return;
        }
        let freed = self.with(|heap| {
            // SAFETY: the caller's contract: a live block.
            let size = unsafe { heap.free_unsized(ptr.as_ptr()) };
            heap.requests.on_free(size);
        });
        debug_assert!(freed.is_ok(), "a thread that frees needs a heap");
    }

    /// Whether `ptr` lies in memory of this pool; any address may be asked about.
    pub fn owns(&self, ptr: NonNull<u8>) -> bool {
        heap::owns(&self.0.hub, ptr.addr().get())
    }

    /// Bytes that may be used at `ptr`, where a block of this pool begins there.
    pub fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize> {
        heap::block_size_at(&self.0.hub, ptr.as_ptr())
    }

    /// Makes room for `bytes` more than are in use.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        self.open()?;
        if self.0.hub.book(bytes) { Ok(()) } else { Err(self.out_of_memory(bytes)) }
    }

    /// Gives idle memory back until `keep` idle bytes are left; that of other threads follows when they next
    /// need memory. Returns the bytes given back so far.
    pub fn trim(&self, keep: usize) -> Result<usize> {
        self.admit()?;
        let own = self.with(|heap| if keep == 0 { heap.purge_all() } else { heap.purge(keep) })?;
        let given = if keep == 0 { own + self.0.hub.trim() } else { own };
        self.0.hub.unbook(keep);
        Ok(given)
    }

    /// Gives all memory back; an error while anything is live.
    pub fn reset(&self) -> Result<()> {
        match self.live() {
            0 => self.trim(0).map(|_| ()),
            live => Err(Error::InvalidOperation(Refusal::StillLive(live))),
        }
    }

    /// Gives all memory back for good: every later allocation is refused with
    /// [`Refusal::Destroyed`]. An error while anything is live, and the pool is then as it was. An allocation
    /// that another thread has under way meanwhile may still succeed; its block stays valid until freed.
    pub fn close(&self) -> Result<()> {
        self.admit()?;
        let still_live = |live| Err(Error::InvalidOperation(Refusal::StillLive(live)));
        // Looked at before, too, so that a pool in use refuses nobody even for a moment.
        match self.live() {
            0 => {}
            live => return still_live(live),
        }
        self.0.closed.store(true, Ordering::Release);
        self.0.guarded.store(true, Ordering::Release);
        match self.live() {
            0 => self.trim(0).map(|_| ()),
            live => {
                self.0.closed.store(false, Ordering::Release);
                self.0.guarded.store(self.0.bound_to.is_some(), Ordering::Release);
                still_live(live)
            }
        }
    }

    /// Frees every block of this thread and of threads that ended, then gives the memory back.
    ///
    /// # Safety
    /// Nothing that was allocated from this pool is used or freed after.
    pub unsafe fn reset_unchecked(&self) -> Result<()> {
        self.admit()?;
        for block in self.active_allocations() {
            if let Some(ptr) = NonNull::new(block.address as *mut u8) {
                // SAFETY: a live block, which the caller uses no more.
                unsafe { self.deallocate(ptr) };
            }
        }
        self.trim(0).map(|_| ())
    }

    /// What the pool did and holds.
    pub fn stats(&self) -> MemoryStats {
        let mut stats = self.0.hub.memory_stats();
        self.0.tracking.show(&mut stats);
        stats.largest_free = stats.free;
        stats
    }

    /// Starts the peaks anew from what is current.
    pub fn reset_peak(&self) {
        self.0.hub.reset_peak();
    }

    /// Switches the counting of requests on or off.
    pub fn set_tracking(&self, on: bool) {
        self.0.tracking.switch(on, Counts::of(&self.0.hub.memory_stats()));
    }

    /// Whether requests are counted.
    pub fn is_tracking(&self) -> bool {
        self.0.tracking.is_on()
    }

    /// The live blocks of this thread and of threads that ended. Those of other threads cannot be listed
    /// while they run.
    pub fn active_allocations(&self) -> Vec<ActiveAllocation> {
        let mut list = Vec::with_capacity(self.0.hub.live_count());
        // Without a heap there is nothing to list.
        _ = self.with(|heap| {
            heap.for_each_live(|block, size| list.push(ActiveAllocation::new(block.addr(), size)));
        });
        list
    }

    /// How many blocks are live, whoever allocated them.
    pub(super) fn live(&self) -> usize {
        self.0.hub.live_count()
    }

    /// Whether anything is live.
    pub fn has_leaks(&self) -> bool {
        self.live() > 0
    }

    /// The pool's name; empty where it was given none.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What the pool was made with.
    pub fn config(&self) -> &PoolConfig {
        &self.0.config
    }

    /// Whose memory this is.
    pub fn memory_type(&self) -> MemoryType {
        MemoryType::Cpu
    }

    /// Walks every invariant of this thread's part.
    pub fn check(&self) -> Result<(), Broken> {
        self.with(ThreadHeap::check).unwrap_or(Ok(()))
    }
}

impl fmt::Debug for CpuPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuPool")
            .field("name", &self.name())
            .field("live", &self.0.hub.live_count())
            .finish_non_exhaustive()
    }
}

// SAFETY: blocks stay until the last handle goes; classes hold their sizes at their alignment, and all
// fitting layouts lead to the same class.
unsafe impl HostPool for CpuPool {
    #[inline]
    fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
        self.serve(layout, zeroed)
    }

    #[inline]
    unsafe fn give_back(&self, ptr: NonNull<u8>, layout: Layout) {
        let Some(class) = self.class(layout) else {
            // SAFETY: the caller's contract.
            return unsafe { self.deallocate(ptr) };
        };
        let freed = self.with(|heap| {
            heap.requests.on_free(heap::class_size(class));
            // SAFETY: the caller's contract; fitting layouts have the block's class.
            unsafe { heap.free(class, ptr.as_ptr()) }
        });
        debug_assert!(freed.is_ok(), "a thread that frees needs a heap");
    }

    unsafe fn grow_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        // SAFETY: the caller's contract.
        unsafe { self.resize(ptr, old, new, false) }
    }

    unsafe fn shrink_in_place(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        // SAFETY: the caller's contract.
        unsafe { self.resize(ptr, old, new, false) }.map(|resized| resized.block)
    }

    unsafe fn relocate(&self, ptr: NonNull<u8>, old: Layout, new: Layout) -> Option<Resized> {
        // SAFETY: the caller's contract.
        unsafe { self.resize(ptr, old, new, true) }
    }
}

impl CpuPool {
    /// # Safety
    /// `ptr` is a live block that `old` fits.
    unsafe fn resize(&self, ptr: NonNull<u8>, old: Layout, new: Layout, may_move: bool) -> Option<Resized> {
        let least = self.0.config.alignment;
        let (old, new) = (old.align_to(least).ok()?, new.align_to(least).ok()?);
        // SAFETY: the caller's contract.
        let before = unsafe { heap::usable_size(ptr.as_ptr()) };
        // SAFETY: as above.
        let resized = unsafe { heap::resize_in_place(ptr, old, new, may_move) }?;
        if resized.block.len() != before {
            _ = self.with(|heap| heap.requests.on_resize(before, resized.block.len()));
        }
        Some(resized)
    }
}

memory_pool! {
    [] CpuPool {
        forward! {
            fn close(&self) -> Result<()>;
        }
    }
}

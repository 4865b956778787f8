//! Blocks without a type: `allocate` as in every other pool, and scratch memory for the `Allocator` traits.
//!
//! A raw block is live in the file until it is freed. A scratch block is only ever reserved: it is gone when
//! the pool is opened again, as are the containers that were in it.
//!
//! Neither takes part in transactions: a block allocated inside one stays, even if the transaction fails.

use core::alloc::Layout;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use super::context;
use super::format::internal::{RAW, SCRATCH};
use super::inner::{Inner, Tally};
use super::media::Durability;
use super::pool::PersistentPool;
use super::table::Mark;
use super::tx::Transaction;
use super::types::TypeInfo;
use crate::base::config::PoolConfig;
use crate::base::error::{Error, PointerFault, Refusal, Result};
use crate::base::host::{HostPool, dangling};
use crate::base::pool::{ActiveAllocation, AllocFlags, MemoryType, memory_pool, refuse_device_flags};
use crate::base::stats::MemoryStats;

impl Inner {
    /// The offset of an address in the mapping.
    fn offset_of(&self, ptr: NonNull<u8>) -> Option<u64> {
        let offset = (ptr.as_ptr() as usize).checked_sub(self.media.base().as_ptr() as usize)? as u64;
        (offset < self.media.len()).then_some(offset)
    }

    fn block(&self, offset: u64, size: u64) -> NonNull<[u8]> {
        NonNull::slice_from_raw_parts(self.media.at(offset, size as usize), size as usize)
    }

    fn allocate_raw(&self, layout: Layout) -> Result<(u64, u64)> {
        self.open()?;
        if context::current(self).reads {
            return Err(Error::refused(
                "allocating inside a read of the same thread would wait for that read",
                "allocate before it, or after",
            ));
        }
        if self.durability == Durability::ProcessCrash && self.media.is_writable() {
            let mut books = self.heap.lock();
            let slot = self.reserve(&mut books, RAW, layout.size(), layout.align(), false)?;
            if let Mark::Bit { word, mask } = slot.mark
                && !slot.fresh
            {
                let tally = Tally { allocations: 1, bytes: slot.size, ..Tally::default() };
                books.count_in_file(&self.media, &tally);
                // One bit makes it live. No reader has references to raw blocks, so the gate is not needed.
                // SAFETY: words of bitmaps change under the lock of the heap only.
                unsafe { self.media.set_bits(word, mask) };
                return Ok((slot.offset, slot.size));
            }
            books.heap.release(&self.table, slot.offset);
        }
        let tx = Transaction::begin(self)?;
        let info = TypeInfo::of::<u64>;
        let (number, slot) = tx.reserve_bytes(RAW, layout.size(), layout.align(), false, info)?;
        tx.publish_slot(number);
        tx.commit()?;
        Ok((slot.offset, slot.size))
    }

    /// Frees a live raw block.
    fn free_raw(&self, offset: u64) -> Result<()> {
        let (object, mark) = self.live(offset, RAW)?;
        if let (Durability::ProcessCrash, Mark::Bit { word, mask }) = (self.durability, mark) {
            self.media.check_usable()?;
            let mut books = self.heap.lock();
            // SAFETY: as in `allocate_raw`.
            unsafe { self.media.clear_bits(word, mask) };
            books.heap.release(&self.table, offset);
            books.count_in_file(
                &self.media,
                &Tally { frees: 1, freed_bytes: object.size, ..Tally::default() },
            );
            return Ok(());
        }
        let tx = Transaction::begin(self)?;
        let opened = tx.open(self.identity, offset, RAW, true)?;
        tx.free_opened(opened)?;
        tx.commit()
    }

    /// Frees a raw or scratch block. What cannot be freed now (the pool is poisoned) stays, and is listed
    /// among the leaks when it is opened again.
    fn free_any(&self, offset: u64) {
        if !self.media.is_ours() {
            return;
        }
        if self.live(offset, RAW).is_err() {
            let mut books = self.heap.lock();
            if books.held(offset, SCRATCH).is_some() {
                books.heap.release(&self.table, offset);
            }
        } else if context::current(self).reads {
            let mut books = self.heap.lock();
            books.deferred.push(offset);
            self.defers.store(true, Ordering::Relaxed);
        } else {
            let _ = self.free_raw(offset);
        }
    }

    /// Frees what was freed during a read.
    #[inline]
    pub(crate) fn free_deferred(&self) {
        // Whoever deferred one sees that here itself, at the latest.
        if self.defers.load(Ordering::Relaxed) {
            self.free_deferred_now();
        }
    }

    #[cold]
    fn free_deferred_now(&self) {
        let mut books = self.heap.lock();
        self.defers.store(false, Ordering::Relaxed);
        let deferred = core::mem::take(&mut books.deferred);
        drop(books);
        for offset in deferred {
            let _ = self.free_raw(offset);
        }
    }

    fn each_raw(&self, mut visit: impl FnMut(u64, u64)) {
        self.table.for_each(&self.media, |object| {
            if object.fingerprint == RAW {
                visit(object.offset, object.size);
            }
            true
        });
        self.heap.lock().for_each_held(SCRATCH, visit);
    }
}

impl PersistentPool {
    /// A block that stays live in the file until it is freed, also after the pool was closed and opened
    /// again; [`offset_of`](Self::offset_of) and [`address_of`](Self::address_of) find it again. Its bytes are
    /// what was there before.
    ///
    /// ```
    /// use memory_pool::persist::{Durability, PersistentConfig, PersistentPool};
    /// use std::alloc::Layout;
    /// # let dir = std::env::temp_dir().join(format!("praw-{}", std::process::id()));
    /// # std::fs::create_dir_all(&dir).unwrap();
    /// # let path = dir.join("pool");
    /// let config = PersistentConfig::new(1 << 20).durability(Durability::ProcessCrash);
    /// let pool = PersistentPool::create(&path, config)?;
    /// let block = pool.allocate(Layout::new::<[u64; 4]>())?.cast::<u64>();
    /// // SAFETY: the block is ours and large enough.
    /// unsafe { block.write(7) };
    /// pool.persist(block.as_ptr().cast(), 8)?;
    /// // SAFETY: live, and not used after.
    /// unsafe { pool.deallocate(block.cast()) };
    /// # std::fs::remove_dir_all(&dir).unwrap();
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>> {
        if layout.size() == 0 {
            return Ok(dangling(layout));
        }
        let (offset, size) = self.inner.allocate_raw(layout)?;
        Ok(self.inner.block(offset, size))
    }

    /// [`allocate`](Self::allocate) with wishes. `NO_GROW` changes nothing: the file grows only when asked.
    pub fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>> {
        refuse_device_flags(flags)?;
        let block = self.allocate(layout)?;
        if flags.contains(AllocFlags::ZEROED) {
            // SAFETY: the block is fresh and ours.
            unsafe { block.cast::<u8>().write_bytes(0, block.len()) };
        }
        Ok(block)
    }

    /// Frees a block of this pool.
    ///
    /// # Safety
    /// As for [`MemoryPool::deallocate`](crate::MemoryPool::deallocate).
    pub unsafe fn deallocate(&self, ptr: NonNull<u8>) {
        if let Some(offset) = self.inner.offset_of(ptr) {
            self.inner.free_any(offset);
        }
    }

    /// Makes `len` bytes at `ptr`, all in this pool, as safe as the pool's durability says: written through
    /// raw pointers, they are no part of any transaction.
    pub fn persist(&self, ptr: *const u8, len: usize) -> Result<()> {
        let media = &self.inner.media;
        self.inner.open()?;
        let range = NonNull::new(ptr.cast_mut()).and_then(|ptr| self.inner.offset_of(ptr));
        let inside = |offset: &u64| offset.checked_add(len as u64).is_some_and(|end| end <= media.len());
        let Some(offset) = range.filter(inside) else {
            return Err(Error::pointer(ptr as usize, PointerFault::OutOfRange));
        };
        match self.inner.durability {
            Durability::ProcessCrash => Ok(()),
            Durability::Power => media.sync(),
            Durability::Dax => {
                media.flush(offset, len);
                media.fence();
                Ok(())
            }
        }
    }

    /// The offset in the file of an address in this pool.
    pub fn offset_of(&self, ptr: NonNull<u8>) -> Option<u64> {
        self.inner.offset_of(ptr)
    }

    /// The address of the live raw block at `offset`.
    pub fn address_of(&self, offset: u64) -> Option<NonNull<[u8]>> {
        let (object, _) = self.inner.live(offset, RAW).ok()?;
        Some(self.inner.block(offset, object.size))
    }

    /// Whether `ptr` lies in the pool's mapping. Any address may be asked about.
    pub fn owns(&self, ptr: NonNull<u8>) -> bool {
        self.inner.offset_of(ptr).is_some()
    }

    /// Bytes that may be used at `ptr`, if a raw or scratch block begins there.
    pub fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize> {
        let offset = self.inner.offset_of(ptr)?;
        if let Ok((object, _)) = self.inner.live(offset, RAW) {
            return Some(object.size as usize);
        }
        self.inner.heap.lock().held(offset, SCRATCH).map(|size| size as usize)
    }

    /// Grows the file where its free chunks hold less than `bytes`.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        self.inner.open()?;
        let free = self.inner.heap.lock().free_space().0;
        match (bytes as u64).checked_sub(free) {
            None | Some(0) => Ok(()),
            Some(missing) => self.grow(missing),
        }
    }

    /// Gives the disk space of free chunks back until `keep` bytes of them are left; the file keeps its
    /// length. Returns the bytes given back.
    pub fn trim(&self, keep: usize) -> Result<usize> {
        self.inner.media.check_usable()?;
        if !self.inner.media.is_writable() {
            return Ok(0);
        }
        let before = self.inner.media.disk_bytes();
        let mut books = self.inner.heap.lock();
        self.inner.take_back(&mut books);
        books.punch_free(&self.inner.media, &self.inner.table, keep as u64);
        Ok(before.saturating_sub(self.inner.media.disk_bytes()) as usize)
    }

    /// An error while raw or scratch blocks are live, else nothing: typed objects belong to the roots.
    pub fn reset(&self) -> Result<()> {
        match self.active_allocations().len() {
            0 => Ok(()),
            live => Err(Error::InvalidOperation(Refusal::StillLive(live))),
        }
    }

    /// Frees all raw and scratch blocks.
    ///
    /// # Safety
    /// None of them is used or freed after.
    pub unsafe fn reset_unchecked(&self) -> Result<()> {
        let mut blocks = Vec::new();
        self.inner.each_raw(|offset, _| blocks.push(offset));
        blocks.into_iter().for_each(|offset| self.inner.free_any(offset));
        self.reset()
    }

    /// What the pool did over its life (across openings), and holds now.
    pub fn stats(&self) -> MemoryStats {
        self.inner.stats()
    }

    /// Starts the peaks anew from what is current.
    pub fn reset_peak(&self) {
        let mut books = self.inner.heap.lock();
        books.peak = books.held;
    }

    /// Switches the counting of requests on or off: what is done meanwhile does not show in [`stats`](Self::stats)
    /// of this opening. The file counts on, for the openings to come.
    pub fn set_tracking(&self, on: bool) {
        self.inner.set_tracking(on);
    }

    /// Whether requests are counted.
    pub fn is_tracking(&self) -> bool {
        self.inner.tracking.is_on()
    }

    /// The raw and scratch blocks that are live.
    pub fn active_allocations(&self) -> Vec<ActiveAllocation> {
        let mut found = Vec::new();
        let base = self.inner.media.base().as_ptr() as usize;
        self.inner.each_raw(|offset, size| {
            found.push(ActiveAllocation::new(base + offset as usize, size as usize));
        });
        found
    }

    /// Whether raw or scratch blocks are live.
    pub fn has_leaks(&self) -> bool {
        !self.active_allocations().is_empty()
    }

    /// [`MemoryType::Persistent`].
    pub fn memory_type(&self) -> MemoryType {
        MemoryType::Persistent
    }

    /// The name of the file, without its folder.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// A description with the file's path and size.
    pub fn config(&self) -> &PoolConfig {
        &self.inner.config
    }
}

memory_pool! {
    [] PersistentPool {
        /// What is stored stays, raw blocks as well; the file is closed with the last handle, of which each refuses
        /// everything but frees from now on. An error while containers hold scratch memory.
        fn close(&self) -> Result<()> {
            self.inner.destroy()
        }
    }
}

// SAFETY: slots are as large and aligned as asked, overlap nothing that is reserved or live, and the mapping
// stays where it is while a handle exists; fresh bytes are zeroed where asked.
unsafe impl HostPool for PersistentPool {
    fn obtain(&self, layout: Layout, zeroed: bool) -> Result<NonNull<[u8]>> {
        let inner = &*self.inner;
        if !inner.media.is_writable() {
            return Err(Error::refused("this pool was opened read-only", "open it for writing"));
        }
        let mut books = inner.heap.lock();
        // With the books locked, so that nothing is handed out once `destroy` has looked.
        inner.open()?;
        let slot = inner.reserve(&mut books, SCRATCH, layout.size(), layout.align(), false)?;
        drop(books);
        let block = inner.block(slot.offset, slot.size);
        if zeroed {
            // SAFETY: the slot was just reserved.
            unsafe { block.cast::<u8>().write_bytes(0, block.len()) };
        }
        Ok(block)
    }

    unsafe fn give_back(&self, ptr: NonNull<u8>, _: Layout) {
        // SAFETY: the caller's contract.
        unsafe { PersistentPool::deallocate(self, ptr) }
    }
}

//! The file under a pool: lock, mapping, and the few ways in which bytes reach it.
//!
//! The file is mapped once, at a place of the system's choice inside a larger reserved range, so that it can
//! grow without moving. Everything above works with offsets.
//!
//! Invariants
//! 1. `base` is the start of a reserved range of `reserved` bytes, a multiple of 2 MiB; its first `len` bytes
//!    map the file's first `len` bytes. `len` only grows; the range is unmapped when this value is dropped.
//! 2. A writable medium holds the exclusive lock of the file, a read-only one the shared lock, from before
//!    the first byte is read until it is dropped. Other processes are trusted not to ignore the lock.
//! 3. Words are read and written here with atomic accesses only, so these never race with each other. Who
//!    holds a reference into the file is the business of the callers of the unsafe functions.
//! 4. A read-only medium is a private mapping: what recovery writes to it never reaches the file.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::flush::Flusher;
use super::format::{CHUNK, PAGE};
use crate::base::error::{Error, OomReason, Refusal, Result};
use crate::source::os;

/// Alignment of the mapping.
const BASE_ALIGN: usize = 2 << 20;
/// Address space kept for growth, where the system gives that much.
const GROWTH_ROOM: usize = 64 << 30;

/// When what a transaction did is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Durability {
    /// As soon as the transaction returns the process may be killed; the system must not lose power. No sync.
    ProcessCrash,
    /// As soon as the transaction returns power may fail. One `fdatasync` a commit, shared by the threads
    /// that commit at the same time.
    #[default]
    Power,
    /// As `Power`, with flush instructions instead of system calls; for files on persistent memory (a DAX
    /// mapping), refused elsewhere.
    Dax,
}

/// How a range gets its disk space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Blocks of the file system, not written to.
    Reserved,
    /// Small ranges are filled with zeros, page by page. That costs the next sync more and all later ones
    /// less: blocks that are merely reserved make each first sync of a page wait for the file system's
    /// journal, and a file filled in large pieces is written back in large pieces.
    ZeroedPages,
    /// Small ranges are filled with zeros in large pieces, which makes the first write to each of their pages
    /// cheaper. For where nobody waits for syncs.
    Zeroed,
}

impl Backing {
    /// What suits a pool of that durability.
    pub(crate) fn of(durability: Durability) -> Self {
        match durability {
            Durability::Power => Self::ZeroedPages,
            Durability::ProcessCrash => Self::Zeroed,
            Durability::Dax => Self::Reserved,
        }
    }
}

/// Larger ranges are reserved only.
const MOST_ZEROED: u64 = 8 * CHUNK;

/// Counts forks of this process, so that a child notices that a pool is its parent's.
static FORKS: AtomicU32 = AtomicU32::new(0);

fn forks() -> u32 {
    static REGISTERED: std::sync::Once = std::sync::Once::new();
    extern "C" fn in_child() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    REGISTERED.call_once(|| {
        // SAFETY: the handler only adds to an atomic.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
    FORKS.load(Ordering::Relaxed)
}

/// How a file is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Create,
    Write,
    Read,
}

/// Opens and locks a pool's file; nothing is written.
pub(crate) fn open_locked(path: &Path, access: Access) -> Result<File> {
    let mut options = OpenOptions::new();
    // Not to wait for a writer, should the path be a named pipe.
    options.read(true).write(access != Access::Read).custom_flags(libc::O_NONBLOCK).mode(0o600);
    options.create_new(access == Access::Create);
    let file = options.open(path).map_err(|e| Error::io("open", &e))?;
    if !file.metadata().map_err(|e| Error::io("fstat", &e))?.is_file() {
        return Err(Error::corrupt(0, "a regular file; name the pool's file", 0));
    }
    let how = if access == Access::Read { libc::LOCK_SH } else { libc::LOCK_EX };
    // SAFETY: flock on a descriptor that is open.
    if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } != 0 {
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::WouldBlock {
            return Err(Error::io("flock", &error));
        }
        return Err(Error::refused(
            "this pool is open elsewhere, and a writer is alone",
            "close it there, or let the writer make a backup and open that",
        ));
    }
    Ok(file)
}

/// Fails where the process may not write a file of `len` bytes; asking the system would raise a signal.
fn check_size_limit(len: u64) -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is ours to fill.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) } == 0;
    if known && limit.rlim_cur != libc::RLIM_INFINITY && len > limit.rlim_cur {
        return Err(Error::io("ftruncate", &std::io::Error::from_raw_os_error(libc::EFBIG)));
    }
    Ok(())
}

/// Sets the length of a file.
pub(crate) fn set_len(file: &File, len: u64) -> Result<()> {
    check_size_limit(len)?;
    file.set_len(len).map_err(|e| Error::io("ftruncate", &e))
}

#[cold]
#[inline(never)]
fn outside(offset: u64, len: usize) -> ! {
    panic!("{len} bytes at {offset:#x} are not words of the pool")
}

/// The error of a request for disk space.
#[cold]
fn no_space(error: &std::io::Error, len: u64) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Error::oom(len as usize, OomReason::Source),
        _ => Error::io("fallocate", error),
    }
}

/// A mapped, locked file.
pub(crate) struct Media {
    file: File,
    base: NonNull<u8>,
    reserved: usize,
    len: AtomicUsize,
    writable: bool,
    dax: bool,
    flusher: Flusher,
    poisoned: AtomicBool,
    forks: u32,
    syncs: AtomicU64,
    #[cfg(test)]
    pub(crate) trace: super::trace::Trace,
}

// SAFETY: invariant 3: the mapping is accessed atomically or under the contracts of the unsafe functions.
unsafe impl Send for Media {}
// SAFETY: as above.
unsafe impl Sync for Media {}

impl core::fmt::Debug for Media {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Media").field("base", &self.base).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Media {
    /// Maps the first `len` bytes of `file`, which is at least that long.
    pub(crate) fn map(file: File, len: u64, writable: bool, durability: Durability) -> Result<Self> {
        let len = usize::try_from(len).map_err(|_| Error::oom(usize::MAX, OomReason::Overflow))?;
        let len = len.next_multiple_of(os::page_size());
        let dax = writable && durability == Durability::Dax;
        let mut reserved = len.saturating_mul(16).max(GROWTH_ROOM).next_multiple_of(BASE_ALIGN);
        let base = loop {
            match os::map(reserved, BASE_ALIGN, os::Access::None) {
                Ok(base) => break base,
                Err(error) if reserved <= len.next_multiple_of(BASE_ALIGN) => return Err(error),
                Err(_) => reserved = (reserved / 2).max(len).next_multiple_of(BASE_ALIGN),
            }
        };
        let media = Self {
            file,
            base,
            reserved,
            len: AtomicUsize::new(0),
            writable,
            dax,
            flusher: Flusher::detect(),
            poisoned: AtomicBool::new(false),
            forks: forks(),
            syncs: AtomicU64::new(0),
            #[cfg(test)]
            trace: Default::default(),
        };
        media.map_more(len)?;
        Ok(media)
    }

    /// Maps the file from where the mapping ends to `new_len`.
    fn map_more(&self, new_len: usize) -> Result<()> {
        let old = self.len.load(Ordering::Relaxed);
        if new_len <= old {
            return Ok(());
        }
        if new_len > self.reserved {
            return Err(Error::refused(
                "the pool outgrows the address range kept for it",
                "close it and open it again, then grow",
            ));
        }
        #[cfg(test)]
        let sync = self.dax && !super::trace::ANY_FILE_FOR_DAX.get();
        #[cfg(not(test))]
        let sync = self.dax;
        let flags = match (self.writable, sync) {
            (false, _) => libc::MAP_PRIVATE,
            (true, false) => libc::MAP_SHARED,
            #[cfg(target_os = "linux")]
            (true, true) => libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
            #[cfg(not(target_os = "linux"))]
            (true, true) => libc::MAP_SHARED,
        };
        // SAFETY: the place is ours by invariant 1 and nothing lies there yet.
        let mapped = unsafe {
            libc::mmap(
                self.base.as_ptr().add(old).cast(),
                new_len - old,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                self.file.as_raw_fd(),
                old as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            let no_dax = matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL));
            if self.dax && no_dax {
                return Err(Error::config("durability", "Dax", "a file on persistent memory; else Power"));
            }
            return Err(Error::io("mmap", &error));
        }
        self.len.store(new_len, Ordering::Release);
        Ok(())
    }

    /// Makes the file `new_len` bytes long, durably, and maps the new part.
    pub(crate) fn grow(&self, new_len: u64) -> Result<()> {
        // An earlier attempt may have failed after it made the file longer.
        let new_len = new_len.max(self.len());
        #[cfg(test)]
        self.trace.back().map_err(|e| no_space(&e, new_len))?;
        set_len(&self.file, new_len)?;
        self.sync()?;
        self.map_more(new_len as usize)
    }

    #[inline]
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire) as u64
    }

    #[inline]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[inline]
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The place of `len` bytes at `offset`, which lie in the file; panics where they do not.
    #[inline(always)]
    pub(crate) fn at(&self, offset: u64, len: usize) -> NonNull<u8> {
        let held = self.len.load(Ordering::Relaxed);
        if len > held || offset as usize > held - len {
            outside(offset, len);
        }
        // SAFETY: invariant 1.
        unsafe { self.base.add(offset as usize) }
    }

    /// The words at `offset`.
    #[inline(always)]
    fn words<const N: usize>(&self, offset: u64) -> &[AtomicU64; N] {
        // One comparison for both: what is no multiple of 8 becomes a number of a word far behind the end.
        let word = offset.rotate_right(3) as usize;
        if word >= (self.len.load(Ordering::Relaxed) / 8).saturating_sub(N - 1) {
            outside(offset, N * 8);
        }
        // SAFETY: the words lie in the mapping (invariant 1), the base is aligned, and by invariant 3 words are
        // accessed atomically here.
        unsafe { self.base.cast::<AtomicU64>().add(word).cast::<[AtomicU64; N]>().as_ref() }
    }

    /// The word at `offset`.
    #[inline(always)]
    pub(crate) fn load(&self, offset: u64) -> u64 {
        self.words::<1>(offset)[0].load(Ordering::Relaxed)
    }

    /// The two words at `offset`.
    #[inline(always)]
    pub(crate) fn load_pair(&self, offset: u64) -> [u64; 2] {
        let [first, second] = self.words::<2>(offset);
        [first.load(Ordering::Relaxed), second.load(Ordering::Relaxed)]
    }

    /// Sets the word at `offset`. Stores become visible, and survive the process, in program order.
    ///
    /// # Safety
    /// Nobody holds a reference to it, and nobody else writes it now.
    #[inline(always)]
    pub(crate) unsafe fn store(&self, offset: u64, value: u64) {
        self.words::<1>(offset)[0].store(value, Ordering::Release);
        #[cfg(test)]
        self.trace.store(offset, &value.to_le_bytes());
    }

    /// Sets bits of the word at `offset`.
    ///
    /// # Safety
    /// As for [`store`](Self::store).
    #[inline(always)]
    pub(crate) unsafe fn set_bits(&self, offset: u64, mask: u64) {
        // SAFETY: the caller's contract.
        unsafe { self.store(offset, self.load(offset) | mask) };
    }

    /// Clears bits of the word at `offset`.
    ///
    /// # Safety
    /// As for [`store`](Self::store).
    #[inline(always)]
    pub(crate) unsafe fn clear_bits(&self, offset: u64, mask: u64) {
        // SAFETY: the caller's contract.
        unsafe { self.store(offset, self.load(offset) & !mask) };
    }

    /// Writes whole words.
    ///
    /// # Safety
    /// As for [`store`](Self::store), for all of them.
    #[inline(always)]
    pub(crate) unsafe fn store_words(&self, offset: u64, words: &[u64]) {
        assert!(offset.is_multiple_of(8));
        let place = self.at(offset, words.len() * 8).cast::<AtomicU64>();
        for (i, &word) in words.iter().enumerate() {
            // SAFETY: `at` checked the range; invariant 3.
            unsafe { place.add(i).as_ref().store(word, Ordering::Relaxed) };
        }
        // Later stores stay behind these, also for the compiler.
        core::sync::atomic::fence(Ordering::Release);
        #[cfg(test)]
        self.trace.words(offset, words);
    }

    /// Reads whole words.
    pub(crate) fn load_words(&self, offset: u64, words: &mut [u64]) {
        assert!(offset.is_multiple_of(8));
        let place = self.at(offset, words.len() * 8).cast::<AtomicU64>();
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: `at` checked the range; invariant 3.
            *word = unsafe { place.add(i).as_ref().load(Ordering::Relaxed) };
        }
    }

    /// Copies words to `target`.
    ///
    /// # Safety
    /// `target` has room for them, aligned to 8, and nobody else uses it.
    #[inline]
    pub(crate) unsafe fn copy_words(&self, offset: u64, target: NonNull<u64>, words: usize) {
        assert!(offset.is_multiple_of(8));
        let place = self.at(offset, words * 8).cast::<AtomicU64>();
        for i in 0..words {
            // SAFETY: `at` checked the range; invariant 3; the caller's contract for the target.
            unsafe { target.add(i).write(place.add(i).as_ref().load(Ordering::Relaxed)) };
        }
    }

    /// Notes that `len` bytes at `offset` were written through a reference.
    #[inline(always)]
    pub(crate) fn touched(&self, offset: u64, len: usize) {
        #[cfg(test)]
        self.trace.touched(self, offset, len);
        self.flush(offset, len);
    }

    /// Writes a range back from the processor's caches, where that is what durability takes.
    #[inline(always)]
    pub(crate) fn flush(&self, offset: u64, len: usize) {
        if self.dax {
            self.flusher.flush(self.at(offset, len), len);
            #[cfg(test)]
            self.trace.flush(offset, len);
        }
    }

    /// Waits for the flushes before it.
    #[inline(always)]
    pub(crate) fn fence(&self) {
        if self.dax {
            self.flusher.fence();
        }
        #[cfg(test)]
        self.trace.fence();
    }

    /// Makes everything written so far durable. A failure poisons: the system may have dropped what it could
    /// not write, and a second attempt could report success.
    pub(crate) fn sync(&self) -> Result<()> {
        self.check_usable()?;
        if !self.writable {
            return Ok(());
        }
        #[cfg(test)]
        let outcome = self.trace.sync().and_then(|()| self.file.sync_data());
        #[cfg(not(test))]
        let outcome = self.file.sync_data();
        self.syncs.fetch_add(1, Ordering::Relaxed);
        outcome.map_err(|e| {
            self.poisoned.store(true, Ordering::Release);
            Error::io("fdatasync", &e)
        })
    }

    /// How often [`sync`](Self::sync) was called.
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// An error where a sync failed before, or where this process is a fork of the one that opened the pool.
    #[inline]
    pub(crate) fn check_usable(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Relaxed) || !self.is_ours() {
            return Err(self.why_unusable());
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn why_unusable(&self) -> Error {
        if self.is_ours() {
            return Error::InvalidOperation(Refusal::Poisoned);
        }
        Error::refused(
            "this pool belongs to the parent process",
            "open a pool after the fork, in the process that uses it",
        )
    }

    /// Whether this process opened the file, and not a parent of it.
    #[inline]
    pub(crate) fn is_ours(&self) -> bool {
        self.forks == FORKS.load(Ordering::Relaxed)
    }

    /// Gives the range disk space, so that writing to it cannot fail later (in a mapping that is a signal).
    /// Only for ranges whose contents are not needed.
    pub(crate) fn back(&self, offset: u64, len: u64, how: Backing) -> Result<()> {
        let end = offset + len;
        let full = |e: std::io::Error| no_space(&e, len);
        check_size_limit(end)?;
        #[cfg(test)]
        self.trace.back().map_err(full)?;
        #[cfg(target_os = "linux")]
        if how == Backing::Reserved || len > MOST_ZEROED {
            // SAFETY: plain system call on our descriptor.
            let rc = unsafe {
                libc::fallocate(self.file.as_raw_fd(), 0, offset as libc::off_t, len as libc::off_t)
            };
            let error = std::io::Error::last_os_error();
            match error.raw_os_error() {
                _ if rc == 0 => return Ok(()),
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => {}
                _ => return Err(full(error)),
            }
        }
        static ZEROS: [u8; CHUNK as usize] = [0; CHUNK as usize];
        let most = if how == Backing::ZeroedPages { PAGE } else { CHUNK };
        let mut at = offset;
        while at < end {
            let piece = (end - at).min(most) as usize;
            std::os::unix::fs::FileExt::write_all_at(&self.file, &ZEROS[..piece], at).map_err(full)?;
            at += piece as u64;
        }
        #[cfg(test)]
        self.trace.zeroed(offset, len);
        Ok(())
    }

    /// Sees to it that a range with contents has disk space, where it is a hole: a copy of a sparse file may have
    /// made holes of zeros. File systems without the call are taken at their word.
    pub(crate) fn keep_backed(&self, offset: u64, len: u64) -> Result<()> {
        #[cfg(test)]
        self.trace.back().map_err(|e| no_space(&e, len))?;
        #[cfg(target_os = "linux")]
        {
            // SAFETY: plain system call on our descriptor; it changes no contents.
            let rc = unsafe {
                libc::fallocate(self.file.as_raw_fd(), 0, offset as libc::off_t, len as libc::off_t)
            };
            let error = std::io::Error::last_os_error();
            if rc != 0 && !matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) {
                return Err(no_space(&error, len));
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
        Ok(())
    }

    /// Gives the disk space of a range back; it reads as zero afterwards. Does nothing where the file system
    /// cannot.
    pub(crate) fn punch(&self, offset: u64, len: u64) {
        #[cfg(target_os = "linux")]
        // SAFETY: plain system call on our descriptor; the caller needs nothing in the range.
        unsafe {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            libc::fallocate(self.file.as_raw_fd(), mode, offset as libc::off_t, len as libc::off_t);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }

    /// Disk space behind the file.
    pub(crate) fn disk_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// After recovery of a read-only pool: not even we write to it any more.
    pub(crate) fn seal(&self) -> Result<()> {
        // SAFETY: our own mapping; the pool above is told that it is read-only.
        let rc = unsafe {
            libc::mprotect(self.base.as_ptr().cast(), self.len.load(Ordering::Relaxed), libc::PROT_READ)
        };
        if rc == 0 { Ok(()) } else { Err(Error::last_os("mprotect")) }
    }
}

impl Drop for Media {
    fn drop(&mut self) {
        // SAFETY: invariant 1; nobody can reach the mapping any more. Closing the file gives the lock back,
        // unless a forked child still holds a copy of the descriptor.
        unsafe { os::unmap(self.base, self.reserved) };
    }
}

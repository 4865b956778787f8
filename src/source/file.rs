//! A mapped file: memory that may be larger than the machine's, and pages that go to the file when memory is
//! short. What is in the file means nothing without the pool; for data that outlives the process there are
//! persistent pools.
//!
//! The file grows at its end. What is released is punched out of it, so that it takes no room on the disk,
//! and its place is used again for regions that fit.
//!
//! Invariants:
//! 1. Extents of the file in `free` lie below `end`, overlap neither each other nor a mapped region.
//! 2. Every mapped region covers an extent of the file that is in nobody else's hands; `mapped` knows which.
//!
//! One lock guards the books; it is not held while the file grows or is mapped.

use core::ptr::NonNull;
use std::fs::{File as OsFile, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;

use super::os::page_size;
use super::{Region, Source};
use crate::base::bits::round_up;
use crate::base::error::{Error, OomReason, Result};
use crate::base::sync::Lock;

/// A stretch of the file.
#[derive(Clone, Copy, Debug)]
struct Extent {
    offset: u64,
    len: usize,
}

#[derive(Debug, Default)]
struct Books {
    end: u64,
    free: Vec<Extent>,
    /// Start of each region and the offset of its extent.
    mapped: Vec<(usize, u64)>,
}

/// A mapped file as a [`Source`].
///
/// ```
/// use memory_pool::source::{Source, file::File};
/// let path = std::env::temp_dir().join(format!("memory-pool-doc-{}", std::process::id()));
/// let file = File::create(&path)?;
/// let region = file.reserve(1 << 20, 4096)?;
/// // SAFETY: the region is ours until released.
/// unsafe {
///     region.base.write_bytes(7, region.len);
///     file.release(region);
/// }
/// std::fs::remove_file(&path).unwrap();
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Debug)]
pub struct File {
    file: OsFile,
    books: Lock<Books>,
}

impl File {
    /// Makes the file at `path`, or empties the one that is there.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(|error| Error::io("open", &error))?;
        Ok(Self { file, books: Lock::default() })
    }

    /// Takes a free extent of exactly `len` bytes or cuts one from a larger one; else the end of the file
    /// moves up. Returns whether the extent was part of the file before.
    fn take(&self, len: usize) -> Result<(Extent, bool)> {
        let mut books = self.books.lock();
        // Room for both notes now, so that giving an extent back later cannot fail.
        let books = &mut *books;
        let wanted = books.mapped.len() + 1;
        for missing in [
            books.mapped.try_reserve(1),
            books.free.try_reserve((wanted + 1).saturating_sub(books.free.len())),
        ] {
            missing.map_err(|_| Error::oom(len, OomReason::Source))?;
        }
        let fit = books.free.iter().enumerate().filter(|(_, extent)| extent.len >= len);
        if let Some((index, &extent)) = fit.min_by_key(|(_, extent)| extent.len) {
            if extent.len == len {
                books.free.swap_remove(index);
            } else {
                books.free[index] = Extent { offset: extent.offset + len as u64, len: extent.len - len };
            }
            return Ok((Extent { offset: extent.offset, len }, true));
        }
        let extent = Extent { offset: books.end, len };
        let end = extent.offset.checked_add(len as u64).filter(|&end| end <= i64::MAX as u64);
        books.end = end.ok_or(Error::oom(len, OomReason::Overflow))?;
        Ok((extent, false))
    }

    /// Notes an extent as free and joins it with its neighbours.
    fn put_back(&self, mut extent: Extent) {
        let mut books = self.books.lock();
        books.free.retain(|other| {
            if other.offset + other.len as u64 == extent.offset {
                extent = Extent { offset: other.offset, len: other.len + extent.len };
                false
            } else if extent.offset + extent.len as u64 == other.offset {
                extent.len += other.len;
                false
            } else {
                true
            }
        });
        books.free.push(extent);
    }

    /// Gives the room of an extent back to the file system; where it cannot, the next user overwrites it.
    fn punch(&self, extent: Extent) -> bool {
        #[cfg(target_os = "linux")]
        {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: a call on our own descriptor that touches no memory.
            unsafe {
                libc::fallocate(self.file.as_raw_fd(), mode, extent.offset as i64, extent.len as i64) == 0
            }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = extent;
            false
        }
    }

    /// Grows the file to hold `extent` and maps it at a multiple of `align`.
    fn map(&self, extent: Extent, align: usize) -> Result<NonNull<u8>> {
        // The file's room is claimed here: a full disk must fail now, not at the first touch (SIGBUS).
        let fd = self.file.as_raw_fd();
        // SAFETY: a call on our own descriptor that touches no memory.
        let rc = unsafe { libc::posix_fallocate(fd, extent.offset as i64, extent.len as i64) };
        if rc != 0 {
            return Err(Error::io("posix_fallocate", &std::io::Error::from_raw_os_error(rc)));
        }
        let page = page_size();
        let padded = extent.len.checked_add(align.max(page) - page).filter(|&len| len <= isize::MAX as usize);
        let padded = padded.ok_or(Error::oom(extent.len, OomReason::Overflow))?;
        // SAFETY: a new mapping of address space alone touches nothing that exists; the file is then mapped
        // over the aligned part of it, and the rest given back.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let space = libc::mmap(core::ptr::null_mut(), padded, libc::PROT_NONE, flags, -1, 0);
            if space == libc::MAP_FAILED {
                return Err(Error::oom(extent.len, OomReason::Source));
            }
            let head = (space as usize).wrapping_neg() & (align.max(page) - 1);
            let base = space.byte_add(head);
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            if libc::mmap(base, extent.len, prot, flags, fd, extent.offset as i64) == libc::MAP_FAILED {
                let error = Error::last_os("mmap");
                libc::munmap(space, padded);
                return Err(error);
            }
            if head > 0 {
                libc::munmap(space, head);
            }
            if padded > head + extent.len {
                libc::munmap(base.byte_add(extent.len), padded - head - extent.len);
            }
            NonNull::new(base.cast()).ok_or(Error::oom(extent.len, OomReason::Source))
        }
    }
}

// SAFETY: every region is a mapping of its own, over an extent of its own (invariant 2), zeroed only where
// the file had no such bytes before.
unsafe impl Source for File {
    fn granularity(&self) -> usize {
        page_size()
    }

    fn reserve(&self, len: usize, align: usize) -> Result<Region> {
        let overflow = Error::oom(len, OomReason::Overflow);
        let rounded = round_up(len, page_size()).filter(|&len| len <= isize::MAX as usize).ok_or(overflow)?;
        let (extent, used_before) = self.take(rounded)?;
        match self.map(extent, align) {
            Ok(base) => {
                self.books.lock().mapped.push((base.as_ptr() as usize, extent.offset));
                Ok(Region { base, len: rounded, zeroed: !used_before })
            }
            Err(error) => {
                self.put_back(extent);
                Err(error)
            }
        }
    }

    unsafe fn release(&self, region: Region) {
        let mut books = self.books.lock();
        let Some(index) = books.mapped.iter().position(|&(start, _)| start == region.start()) else { return };
        let (_, offset) = books.mapped.swap_remove(index);
        drop(books);
        let extent = Extent { offset, len: region.len };
        // SAFETY: the caller's contract: a whole mapping of ours, used no more.
        unsafe { libc::munmap(region.base.as_ptr().cast(), region.len) };
        self.punch(extent);
        self.put_back(extent);
    }

    unsafe fn discard(&self, part: Region) -> bool {
        let books = self.books.lock();
        let holder = books.mapped.iter().filter(|&&(start, _)| start <= part.start());
        let Some(&(start, offset)) = holder.max_by_key(|&&(start, _)| start) else { return false };
        drop(books);
        // A hole reads as zero through the mapping, too.
        self.punch(Extent { offset: offset + (part.start() - start) as u64, len: part.len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("memory-pool-{name}-{}", std::process::id()))
    }

    #[test]
    fn regions_are_files_and_their_room_is_used_again() {
        let path = temporary("file-source");
        let file = File::create(&path).unwrap();
        let regions = [1, 4, 2].map(|pages| file.reserve(pages * page_size(), 1 << 16).unwrap());
        for (i, region) in regions.iter().enumerate() {
            assert!(region.zeroed && region.start().is_multiple_of(1 << 16));
            // SAFETY: the region is ours until released.
            unsafe {
                assert_eq!(region.base.read(), 0);
                region.base.write_bytes(i as u8 + 1, region.len);
            }
        }
        let length = std::fs::metadata(&path).unwrap().len();
        // SAFETY: released once; only the last is read after.
        unsafe {
            file.release(regions[0]);
            file.release(regions[1]);
            let joined = file.reserve(5 * page_size(), 1).unwrap();
            assert!(!joined.zeroed);
            assert_eq!(regions[2].base.read(), 3);
            assert!(file.discard(Region { len: page_size(), ..regions[2] }));
            assert_eq!(regions[2].base.read(), 0);
            assert_eq!(regions[2].base.add(page_size()).read(), 3);
            file.release(joined);
            file.release(regions[2]);
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), length, "released extents are used again");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_the_file_system_refuses_is_an_error() {
        assert!(matches!(File::create("/nowhere/at/all"), Err(Error::Io(_))));
        let path = temporary("file-source-full");
        let file = File::create(&path).unwrap();
        assert!(file.reserve(1 << 60, 1).is_err());
        let region = file.reserve(1, 1).unwrap();
        // SAFETY: released once.
        unsafe { file.release(region) };
        std::fs::remove_file(&path).unwrap();
    }
}

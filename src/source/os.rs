//! The operating system: anonymous mappings, committed page by page as they are touched.
//!
//! The free functions are the raw calls, for layers that keep their own books (the process heap); they use
//! nothing that could allocate. [`Os`] is the [`Source`] on top of them.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::{Region, Source};
use crate::base::bits::{is_aligned, round_up};
use crate::base::error::{Error, OomReason, Result};

#[cfg(not(unix))]
compile_error!("memory-pool needs a Unix system");

/// Size of a page, a run-time fact: 4, 16 or 64 KiB depending on the kernel.
#[inline]
pub fn page_size() -> usize {
    static CACHED: AtomicUsize = AtomicUsize::new(0);
    match CACHED.load(Ordering::Relaxed) {
        0 => {
            let size = played_page().unwrap_or(0).max(system_page());
            CACHED.store(size, Ordering::Relaxed);
            size
        }
        size => size,
    }
}

fn system_page() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    if size > 0 { size as usize } else { 4096 }
}

/// The page size that a test plays on a system whose pages are smaller: whole pages of the larger size are
/// whole pages of the smaller, so everything done with them is allowed, and checked against the larger.
#[cfg(test)]
fn played_page() -> Option<usize> {
    std::env::var(PLAYED_PAGE).ok()?.parse().ok()
}

#[cfg(not(test))]
const fn played_page() -> Option<usize> {
    None
}

/// Names the page size to play.
#[cfg(test)]
pub const PLAYED_PAGE: &str = "MEMORY_POOL_TEST_PAGE";

/// Whether a mapping may be touched at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Readable and writable; backed when touched.
    ReadWrite,
    /// Address space only; [`commit`] makes it usable.
    None,
}

/// Maps `len` bytes (a multiple of the page size) at a multiple of `align`.
pub fn map(len: usize, align: usize, access: Access) -> Result<NonNull<u8>> {
    // Overcommit is the point of reserving: memory is charged when it is touched.
    map_with(len, align, access, libc::MAP_NORESERVE)
}

/// The same for memory that is about to be used: refused where the system knows that it has nowhere near as much.
pub fn map_for_use(len: usize, align: usize) -> Result<NonNull<u8>> {
    map_with(len, align, Access::ReadWrite, 0)
}

fn map_with(len: usize, align: usize, access: Access, extra_flags: libc::c_int) -> Result<NonNull<u8>> {
    debug_assert!(len > 0 && is_aligned(len, page_size()));
    let too_large = Error::oom(len, OomReason::Overflow);
    let align = if cfg!(test) { align.max(page_size()) } else { align };
    let page = if cfg!(test) { system_page() } else { page_size() };
    if align <= page {
        return map_pages(len, access, extra_flags);
    }
    // Map enough to find an aligned place inside, then give the rest back.
    let padded = len.checked_add(align - page).filter(|&n| n <= isize::MAX as usize).ok_or(too_large)?;
    let base = map_pages(padded, access, extra_flags)?;
    let start = base.as_ptr() as usize;
    let head = round_up(start, align).ok_or(too_large)? - start;
    let tail = padded - head - len;
    // SAFETY: head and tail are whole pages of the mapping just made, outside the part that is kept.
    unsafe {
        if head > 0 {
            unmap(base, head);
        }
        let kept = base.add(head);
        if tail > 0 {
            unmap(kept.add(len), tail);
        }
        Ok(kept)
    }
}

fn map_pages(len: usize, access: Access, extra_flags: libc::c_int) -> Result<NonNull<u8>> {
    let prot = match access {
        Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        Access::None => libc::PROT_NONE,
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | extra_flags;
    if len > isize::MAX as usize {
        return Err(Error::oom(len, OomReason::Overflow));
    }
    // SAFETY: a new anonymous mapping at a place of the kernel's choice touches nothing that exists.
    let base = unsafe { libc::mmap(core::ptr::null_mut(), len, prot, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(Error::oom(len, OomReason::Source));
    }
    NonNull::new(base.cast()).ok_or(Error::oom(len, OomReason::Source))
}

/// Unmaps whole pages. A refusal (the kernel's table of mappings is full) leaves them mapped but empty.
///
/// # Safety
/// The pages belong to mappings made here and are used no more.
pub unsafe fn unmap(base: NonNull<u8>, len: usize) {
    keeping_errno(|| {
        // SAFETY: the caller's contract.
        unsafe {
            if libc::munmap(base.as_ptr().cast(), len) != 0 {
                discard(base, len);
            }
        }
    });
}

/// Runs what happens inside of frees, which leave `errno` as it was.
pub(super) fn keeping_errno<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: this thread's errno.
        let errno = unsafe { &mut *libc::__errno_location() };
        let before = *errno;
        let answer = work();
        *errno = before;
        answer
    }
    #[cfg(not(target_os = "linux"))]
    work()
}

/// Makes pages mapped with [`Access::None`], or shut by [`protect`], usable.
///
/// # Safety
/// The pages belong to a mapping made here.
pub unsafe fn commit(base: NonNull<u8>, len: usize) -> Result<()> {
    // SAFETY: the caller's contract.
    let rc = unsafe { libc::mprotect(base.as_ptr().cast(), len, libc::PROT_READ | libc::PROT_WRITE) };
    if rc == 0 { Ok(()) } else { Err(Error::oom(len, OomReason::Source)) }
}

/// Makes pages inaccessible and keeps what they hold, until [`commit`] makes them usable again; returns
/// whether that worked.
///
/// # Safety
/// The pages are mapped, and nobody uses them meanwhile.
pub unsafe fn protect(base: NonNull<u8>, len: usize) -> bool {
    // SAFETY: the caller's contract.
    unsafe { libc::mprotect(base.as_ptr().cast(), len, libc::PROT_NONE) == 0 }
}

/// `madvise` of Linux 6.13: the page table alone makes pages inaccessible, and the kernel's list of mappings stays as
/// short as it is.
#[cfg(target_os = "linux")]
const MADV_GUARD_INSTALL: libc::c_int = 102;
#[cfg(target_os = "linux")]
const MADV_GUARD_REMOVE: libc::c_int = 103;
/// Whether the system took [`fence`] for something it knows.
static FENCED: AtomicBool = AtomicBool::new(false);

/// Makes pages inaccessible without splitting their mapping; what they hold is lost. False where the system cannot.
///
/// # Safety
/// The pages are mapped, and nobody uses them.
pub unsafe fn fence(base: NonNull<u8>, len: usize) -> bool {
    #[cfg(target_os = "linux")]
    // SAFETY: the caller's contract.
    if keeping_errno(|| unsafe { libc::madvise(base.as_ptr().cast(), len, MADV_GUARD_INSTALL) == 0 }) {
        FENCED.store(true, Ordering::Relaxed);
        return true;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (base, len);
    false
}

/// Makes pages usable that [`fence`] or [`protect`] may have shut, or that were usable all along; returns whether that
/// worked.
///
/// # Safety
/// The pages belong to a mapping made here.
pub unsafe fn open(base: NonNull<u8>, len: usize) -> bool {
    #[cfg(target_os = "linux")]
    // SAFETY: the caller's contract.
    let unfenced = !FENCED.load(Ordering::Relaxed)
        || keeping_errno(|| unsafe { libc::madvise(base.as_ptr().cast(), len, MADV_GUARD_REMOVE) == 0 });
    #[cfg(not(target_os = "linux"))]
    let unfenced = true;
    // SAFETY: the caller's contract.
    unfenced && keeping_errno(|| unsafe { commit(base, len).is_ok() })
}

/// Gives the memory behind pages back and makes them inaccessible; returns whether that worked.
///
/// # Safety
/// The pages belong to a mapping made here and their contents are not needed.
pub unsafe fn decommit(base: NonNull<u8>, len: usize) -> bool {
    // SAFETY: the caller's contract.
    unsafe { discard(base, len) && libc::mprotect(base.as_ptr().cast(), len, libc::PROT_NONE) == 0 }
}

/// Gives the memory behind pages back; they stay accessible and read as zero from now on. Returns whether
/// that worked. `MADV_DONTNEED` and not `MADV_FREE`, which looks like a leak until memory is short.
///
/// # Safety
/// The pages belong to a mapping made here and their contents are not needed.
pub unsafe fn discard(base: NonNull<u8>, len: usize) -> bool {
    debug_assert!(is_aligned(base.as_ptr() as usize, page_size()) && is_aligned(len, page_size()));
    // SAFETY: the caller's contract.
    keeping_errno(|| unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_DONTNEED) == 0 })
}

/// Asks for huge pages (or against them) behind a range, as far as the system offers them.
///
/// # Safety
/// The pages belong to a mapping made here.
pub unsafe fn advise_huge(base: NonNull<u8>, len: usize, wanted: bool) -> bool {
    #[cfg(target_os = "linux")]
    {
        let advice = if wanted { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: the caller's contract.
        keeping_errno(|| unsafe { libc::madvise(base.as_ptr().cast(), len, advice) == 0 })
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (base, len, wanted);
        false
    }
}

/// Changes the length of a mapping; `None` where the system cannot, and the mapping is then as it was.
///
/// # Safety
/// The range is one whole mapping made here, or a part of one that is used no more as such; after success
/// only the returned range is valid.
pub unsafe fn remap(base: NonNull<u8>, old: usize, new: usize, may_move: bool) -> Option<NonNull<u8>> {
    #[cfg(target_os = "linux")]
    {
        let flags = if may_move { libc::MREMAP_MAYMOVE } else { 0 };
        // SAFETY: the caller's contract.
        let moved = keeping_errno(|| unsafe { libc::mremap(base.as_ptr().cast(), old, new, flags) });
        if moved == libc::MAP_FAILED { None } else { NonNull::new(moved.cast()) }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (base, old, new, may_move);
        None
    }
}

/// Which pages back an [`Os`] source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum HugePages {
    /// Whatever the system's setting is.
    #[default]
    System,
    /// Ask for transparent huge pages.
    Transparent,
    /// Pages from the system's reserve of huge pages; falls back to transparent ones when it is empty.
    Explicit,
    /// Small pages only.
    Never,
}

/// The operating system as a [`Source`].
///
/// ```
/// use memory_pool::source::{Source, os::Os};
/// let os = Os::new();
/// let region = os.reserve(1 << 20, 4096)?;
/// assert!(region.len >= 1 << 20 && region.zeroed);
/// // SAFETY: reserved above and not used after.
/// unsafe { os.release(region) };
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Os {
    huge: HugePages,
    numa_node: Option<u32>,
}

/// Size of a huge page where explicit ones are asked for.
const HUGE_PAGE: usize = 2 << 20;

impl Os {
    /// Ordinary pages, from any node.
    pub const fn new() -> Self {
        Self { huge: HugePages::System, numa_node: None }
    }

    /// With a choice of page size.
    #[must_use]
    pub const fn huge_pages(mut self, huge: HugePages) -> Self {
        self.huge = huge;
        self
    }

    /// Bound to a NUMA node: preferred, not forced, so that a full node slows down and does not fail.
    #[must_use]
    pub const fn numa_node(mut self, node: u32) -> Self {
        self.numa_node = Some(node);
        self
    }

    /// Binds a fresh mapping as configured. A system without NUMA refuses; placement is a wish, so that is
    /// no error.
    fn bind(&self, base: NonNull<u8>, len: usize) {
        #[cfg(target_os = "linux")]
        if let Some(node) = self.numa_node
            && node < 1024
        {
            const MPOL_PREFERRED: libc::c_int = 1;
            let mut mask = [0u64; 16];
            mask[(node / 64) as usize] = 1 << (node % 64);
            // SAFETY: the mask outlives the call and the range is a fresh mapping of ours.
            unsafe {
                libc::syscall(
                    libc::SYS_mbind,
                    base.as_ptr(),
                    len,
                    MPOL_PREFERRED,
                    mask.as_ptr(),
                    1025usize,
                    0,
                )
            };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (base, len);
    }
}

// SAFETY: `map` returns fresh, zeroed, aligned, writable memory that stays until unmapped.
unsafe impl Source for Os {
    fn granularity(&self) -> usize {
        if self.huge == HugePages::Explicit { HUGE_PAGE } else { page_size() }
    }

    fn reserve(&self, len: usize, align: usize) -> Result<Region> {
        let overflow = Error::oom(len, OomReason::Overflow);
        let len = round_up(len, self.granularity()).ok_or(overflow)?;
        #[cfg(target_os = "linux")]
        // Without MAP_NORESERVE: a page missing from the system's reserve must fail here, not at first touch.
        if self.huge == HugePages::Explicit
            && align <= HUGE_PAGE
            && let Ok(base) = map_with(len, page_size(), Access::ReadWrite, libc::MAP_HUGETLB)
        {
            self.bind(base, len);
            return Ok(Region { base, len, zeroed: true });
        }
        let base = map(len, align, Access::ReadWrite)?;
        match self.huge {
            HugePages::System => {}
            // SAFETY: the mapping was just made.
            HugePages::Transparent | HugePages::Explicit => _ = unsafe { advise_huge(base, len, true) },
            // SAFETY: the mapping was just made.
            HugePages::Never => _ = unsafe { advise_huge(base, len, false) },
        }
        self.bind(base, len);
        Ok(Region { base, len, zeroed: true })
    }

    unsafe fn release(&self, region: Region) {
        // SAFETY: the caller's contract.
        unsafe { unmap(region.base, region.len) }
    }

    unsafe fn discard(&self, part: Region) -> bool {
        // SAFETY: the caller's contract.
        unsafe { discard(part.base, part.len) }
    }

    unsafe fn resize(&self, region: Region, new_len: usize, may_move: bool) -> Option<Region> {
        let len = round_up(new_len, self.granularity())?;
        // SAFETY: the caller's contract.
        let base = unsafe { remap(region.base, region.len, len, may_move) }?;
        Some(Region { base, len, zeroed: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_zeroed_and_writable() {
        let os = Os::new();
        for align in [1, 4096, 1 << 21, 1 << 30] {
            let region = os.reserve(3 * page_size() + 1, align).unwrap();
            assert_eq!(region.len, 4 * page_size());
            assert!(is_aligned(region.start(), align));
            // SAFETY: the region is ours until released.
            unsafe {
                let bytes = core::slice::from_raw_parts_mut(region.base.as_ptr(), region.len);
                assert!(bytes.iter().all(|&byte| byte == 0));
                bytes.fill(0xA5);
                assert!(os.discard(region));
                assert_eq!(region.base.read(), 0);
                os.release(region);
            }
        }
    }

    #[test]
    fn absurd_lengths_are_errors() {
        let os = Os::new();
        for len in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert!(matches!(os.reserve(len, 4096), Err(Error::OutOfMemory { .. })), "{len}");
        }
        assert!(os.reserve(1 << 50, 1 << 62).is_err());
    }

    #[test]
    fn resizing_keeps_the_contents() {
        let os = Os::new().huge_pages(HugePages::Never).numa_node(0);
        let region = os.reserve(page_size(), 1).unwrap();
        // SAFETY: the region is ours; after a resize only the new one is used.
        unsafe {
            region.base.write(42);
            let grown = os.resize(region, 64 * page_size(), true).unwrap();
            assert_eq!((grown.base.read(), grown.len), (42, 64 * page_size()));
            os.release(grown);
        }
    }

    #[test]
    fn address_space_alone_is_unusable_until_committed() {
        let len = 4 * page_size();
        let base = map(len, page_size(), Access::None).unwrap();
        // SAFETY: the mapping is ours.
        unsafe {
            commit(base, page_size()).unwrap();
            base.write(1);
            assert!(decommit(base, page_size()));
            commit(base, page_size()).unwrap();
            assert_eq!(base.read(), 0);
            unmap(base, len);
        }
    }

    #[test]
    fn explicit_huge_pages_fall_back_where_there_are_none() {
        let os = Os::new().huge_pages(HugePages::Explicit);
        let region = os.reserve(1, 1).unwrap();
        assert_eq!(region.len, HUGE_PAGE);
        // SAFETY: ours, and not used after.
        unsafe {
            region.base.write(7);
            os.release(region);
        }
    }
}

//! What lies around a block, and where.
//!
//! ```text
//! canaries alone            inner                outer                             inner + inner_size
//!                           | … unused … canary  | the user's bytes | canary … unused |
//!
//! with guard pages   inner                    outer                         end
//!                    | no access | … canary   | the user's bytes | canary … | no access | … unused |
//! ```
//! The user's bytes end as close to the second guard page as their alignment lets them, so that a read or
//! write past the block faults at the instruction that does it.

use core::alloc::Layout;
use core::ops::Range;
use core::ptr::NonNull;

use super::records::Record;
use crate::base::bits::{round_down, round_up};
use crate::base::config::PoolConfig;
use crate::source::os;

/// How a layer surrounds every block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Surround {
    canary: usize,
    /// Least alignment of the user's bytes, whatever is asked.
    align: usize,
    /// Size of a guard page; 0 for none.
    page: usize,
}

impl Surround {
    pub(super) fn new(config: &PoolConfig, pages: bool) -> Self {
        let page = if config.debug.guard_pages && pages { os::page_size() } else { 0 };
        Self { canary: config.debug.canary, align: config.alignment, page }
    }

    /// What to ask the engine for.
    #[inline]
    pub(super) fn inflate(&self, asked: Layout) -> Option<Layout> {
        let (size, align) = (asked.size(), asked.align().max(self.align));
        let total = if self.page == 0 {
            round_up(self.canary, align)?.checked_add(size)?.checked_add(self.canary)?
        } else {
            self.lead(align).checked_add(round_up(size, self.page)?)?.checked_add(self.page)?
        };
        Layout::from_size_align(total, align.max(self.page)).ok()
    }

    /// Where the user's bytes begin in an inner block at `inner`.
    #[inline]
    pub(super) fn outer(&self, inner: usize, asked: Layout) -> usize {
        let align = asked.align().max(self.align);
        if self.page == 0 {
            return inner + round_down(self.canary + align - 1, align);
        }
        // At least `inner + lead`, which is a multiple of the alignment.
        round_down(inner + self.end(asked.size(), align) - asked.size(), align)
    }

    /// Bytes up to the first place for user's bytes under guard pages.
    fn lead(&self, align: usize) -> usize {
        align.max(self.page)
    }

    /// Offset of the second guard page.
    fn end(&self, size: usize, align: usize) -> usize {
        self.lead(align.max(self.align)) + size.next_multiple_of(self.page)
    }

    /// The canary in front of a block.
    #[inline]
    pub(super) fn front(&self, record: &Record) -> Range<usize> {
        let room = record.outer - record.inner - self.page;
        record.outer - self.canary.min(room)..record.outer
    }

    /// The canary behind a block.
    #[inline]
    pub(super) fn back(&self, record: &Record) -> Range<usize> {
        let start = record.outer + record.size;
        let end = if self.page == 0 {
            record.inner + record.inner_size
        } else {
            record.inner + self.end(record.size, record.align)
        };
        start..end.min(start + self.canary)
    }

    /// Makes the guard pages of a block inaccessible, or with `all` the block as well; whether that worked.
    ///
    /// # Safety
    /// The block belongs to the pool and, with `all`, to nobody else.
    pub(super) unsafe fn fence(&self, record: &Record, all: bool) -> bool {
        let (inner, end) = (record.inner, record.inner + self.end(record.size, record.align));
        // SAFETY: whole pages within the inner block, whose alignment is a page at least.
        unsafe {
            if all {
                return os::protect(address(inner), end + self.page - inner);
            }
            let fenced = os::protect(address(inner), self.page) && os::protect(address(end), self.page);
            if !fenced {
                self.unfence(record);
            }
            fenced
        }
    }

    /// Makes all of a block accessible.
    ///
    /// # Safety
    /// As for [`fence`](Self::fence).
    pub(super) unsafe fn unfence(&self, record: &Record) {
        let len = self.end(record.size, record.align) + self.page;
        // SAFETY: as in `fence`. The kernel refuses only where it cannot split a mapping, and this joins them.
        let _ = unsafe { os::commit(address(record.inner), len) };
    }

    /// Whether blocks get guard pages.
    #[inline]
    pub(super) fn has_pages(&self) -> bool {
        self.page != 0
    }
}

fn address(at: usize) -> NonNull<u8> {
    NonNull::new(at as *mut u8).unwrap_or(NonNull::dangling())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::config::DebugConfig;

    #[test]
    fn the_users_bytes_fit_and_are_aligned_whatever_is_asked() {
        for guard_pages in [false, true] {
            for canary in [0, 1, 16, 100] {
                let debug = DebugConfig { canary, guard_pages, ..DebugConfig::OFF };
                let config =
                    PoolConfig::default_cpu().alignment(if canary == 1 { 256 } else { 1 }).debug(debug);
                let surround = Surround::new(&config, true);
                for size in [1, 15, 16, 4095, 4096, 4097, 70_000] {
                    for align in (0..=17).map(|bits| 1usize << bits) {
                        let asked = Layout::from_size_align(size, align).unwrap();
                        let inner = surround.inflate(asked).unwrap();
                        let start = 1 << 40;
                        let outer = surround.outer(start, asked);
                        let record = Record::new(outer, size, align, start, inner.size());
                        assert!(outer.is_multiple_of(align.max(config.alignment)));
                        assert!(outer >= start + canary.min(16) * usize::from(!guard_pages));
                        let (front, back) = (surround.front(&record), surround.back(&record));
                        assert!(front.start >= start && front.end == outer);
                        assert!(back.start == outer + size && back.end <= start + inner.size());
                        if guard_pages {
                            let page = os::page_size();
                            assert!(front.start >= start + page);
                            assert!(back.end + page <= start + inner.size());
                            assert!(
                                back.start + align.max(config.alignment) > start + surround.end(size, align)
                            );
                        } else {
                            assert_eq!((front.len(), back.len()), (canary, canary));
                        }
                    }
                }
                assert_eq!(
                    surround.inflate(Layout::from_size_align(isize::MAX as usize, 1).unwrap()).is_some(),
                    canary == 0 && !guard_pages
                );
            }
        }
    }
}

//! Memory of the simulated devices.
//!
//! Device addresses are address space that the CPU may not touch (so a stray access faults, as on a real
//! card); behind them lie physical pieces, ordinary host mappings that are committed when touched. Pinned
//! and managed memory is plain host memory at its own address.
//!
//! Invariants
//! 1. `mapped` entries do not overlap; each lies in one range of `reserved` and shows a live piece of at
//!    least its length, whose `at` names it, or (host memory) shows itself.
//! 2. A piece is unmapped from the host only when no entry of `mapped` shows it.

mod shared;

use std::collections::BTreeMap;
use std::fs::File;
use std::ptr::NonNull;

use crate::base::bits::round_up;
use crate::base::error::Result;
use crate::source::os::{self, Access};

/// A physical piece.
#[derive(Debug)]
struct Piece {
    host: NonNull<u8>,
    len: usize,
    device: usize,
    /// Where it is mapped.
    at: Vec<usize>,
    /// The file behind it, once another process may have it.
    file: Option<File>,
    /// Whether it is another process's, whose device it counts for.
    imported: bool,
    /// Whether it is a plain allocation, which has no handle that could be exported.
    plain: bool,
}

// SAFETY: a piece is a place; who touches it holds the world's lock.
unsafe impl Send for Piece {}

/// What lies at a range of addresses.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    len: usize,
    /// Host address of the first byte behind it.
    host: usize,
    /// The piece shown; `None` for host memory.
    piece: Option<u64>,
    /// Whether work may touch it.
    accessible: bool,
}

/// All memory of one simulated world.
#[derive(Debug, Default)]
pub(super) struct Memory {
    reserved: BTreeMap<usize, usize>,
    mapped: BTreeMap<usize, Mapped>,
    pieces: BTreeMap<u64, Piece>,
    next_piece: u64,
    /// Bytes of physical pieces, a device.
    pub(super) used: Vec<usize>,
}

fn pages(bytes: usize) -> usize {
    round_up(bytes.max(1), os::page_size()).unwrap_or(usize::MAX & !(os::page_size() - 1))
}

impl Memory {
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<usize> {
        // 2 MiB: what cuMemAddressReserve aligns to.
        let base = os::map(pages(bytes), 2 << 20, Access::None)?.as_ptr() as usize;
        self.reserved.insert(base, pages(bytes));
        Ok(base)
    }

    /// Whether the range was reserved, whole; gives it back if so.
    pub(super) fn unreserve(&mut self, addr: usize) -> bool {
        let Some(len) = self.reserved.get(&addr).copied() else { return false };
        if self.mapped.range(addr..addr + len).next().is_some() {
            return false;
        }
        self.reserved.remove(&addr);
        if let Some(base) = NonNull::new(addr as *mut u8) {
            // SAFETY: invariant 1: nothing is mapped in it, and it came from `reserve`.
            unsafe { os::unmap(base, len) };
        }
        true
    }

    pub(super) fn create(&mut self, device: usize, bytes: usize) -> Result<u64> {
        let host = os::map(pages(bytes), os::page_size(), Access::ReadWrite)?;
        let id = self.next_piece;
        self.next_piece += 1;
        let piece = Piece {
            host,
            len: pages(bytes),
            device,
            at: Vec::new(),
            file: None,
            imported: false,
            plain: false,
        };
        self.pieces.insert(id, piece);
        self.used[device] += pages(bytes);
        Ok(id)
    }

    /// Says that a piece is a plain allocation.
    pub(super) fn make_plain(&mut self, id: u64) {
        if let Some(piece) = self.pieces.get_mut(&id) {
            piece.plain = true;
        }
    }

    /// Gives a piece back; false where it is unknown or still mapped.
    pub(super) fn release(&mut self, id: u64) -> bool {
        if self.pieces.get(&id).is_none_or(|piece| !piece.at.is_empty()) {
            return false;
        }
        let Some(piece) = self.pieces.remove(&id) else { return false };
        if !piece.imported {
            self.used[piece.device] -= piece.len;
        }
        // SAFETY: invariant 2: nothing shows it any more.
        unsafe { os::unmap(piece.host, piece.len) };
        true
    }

    pub(super) fn map(&mut self, addr: usize, bytes: usize, id: u64) -> bool {
        let inside = self.reserved.range(..=addr).next_back();
        if inside.is_none_or(|(start, len)| addr + bytes > start + len) || self.overlaps(addr, bytes) {
            return false;
        }
        let Some(piece) = self.pieces.get_mut(&id).filter(|piece| piece.len >= bytes) else { return false };
        piece.at.push(addr);
        let host = piece.host.as_ptr() as usize;
        self.mapped.insert(addr, Mapped { len: bytes, host, piece: Some(id), accessible: false });
        true
    }

    /// Unmaps whole mappings of pieces that lie side by side; false, and nothing is done, where the range is no such.
    pub(super) fn unmap(&mut self, addr: usize, bytes: usize) -> bool {
        let whole = self.pieces_in(addr, bytes).is_some();
        if whole {
            for (gone, mapped) in self.mapped.extract_if(addr..addr + bytes, |_, _| true) {
                if let Some(piece) = mapped.piece.and_then(|piece| self.pieces.get_mut(&piece)) {
                    piece.at.retain(|&at| at != gone);
                }
            }
        }
        whole
    }

    /// Host memory: an address that the CPU may touch.
    pub(super) fn alloc_host(&mut self, bytes: usize) -> Result<usize> {
        let base = os::map(pages(bytes), os::page_size(), Access::ReadWrite)?.as_ptr() as usize;
        self.mapped.insert(base, Mapped { len: pages(bytes), host: base, piece: None, accessible: true });
        Ok(base)
    }

    /// Frees host memory; returns its length.
    pub(super) fn free_host(&mut self, addr: usize) -> Option<usize> {
        let len = self.mapped.get(&addr).filter(|m| m.piece.is_none())?.len;
        self.mapped.remove(&addr);
        // SAFETY: the mapping came from `alloc_host` and left the table.
        unsafe { os::unmap(NonNull::new(addr as *mut u8)?, len) };
        Some(len)
    }

    /// How many pieces are mapped side by side in the range; `None` where they do not fill it.
    pub(super) fn pieces_in(&self, addr: usize, bytes: usize) -> Option<usize> {
        let (mut at, mut pieces) = (addr, 0);
        while at < addr + bytes {
            let mapped = self.mapped.get(&at)?;
            mapped.piece?;
            at += mapped.len;
            pieces += 1;
        }
        (at == addr + bytes).then_some(pieces)
    }

    /// Bytes of a piece.
    pub(super) fn piece_len(&self, id: u64) -> usize {
        self.pieces.get(&id).map_or(0, |piece| piece.len)
    }

    /// Makes mapped memory accessible.
    pub(super) fn set_access(&mut self, addr: usize, bytes: usize) {
        self.mapped.range_mut(addr..addr + bytes).for_each(|(_, mapped)| mapped.accessible = true);
    }

    /// The piece that is mapped at `addr`, with the length of its mapping.
    pub(super) fn piece_at(&self, addr: usize) -> Option<(u64, usize)> {
        let mapped = self.mapped.get(&addr)?;
        Some((mapped.piece?, mapped.len))
    }

    /// Where else the memory behind a range is mapped.
    pub(super) fn elsewhere(&self, addr: usize, len: usize) -> Vec<(usize, usize)> {
        let first = self.mapped.range(..=addr).next_back().map_or(addr, |(&start, _)| start);
        let mut found = Vec::new();
        for (&start, here) in self.mapped.range(first..addr + len) {
            let (from, to) = (start.max(addr), (start + here.len).min(addr + len));
            let Some(piece) = here.piece.and_then(|piece| self.pieces.get(&piece)) else { continue };
            let others = piece.at.iter().filter(|&&at| at != start);
            found.extend(others.map(|at| (at + (from - start), to.saturating_sub(from))));
        }
        found
    }

    fn overlaps(&self, addr: usize, bytes: usize) -> bool {
        self.mapped.range(..addr + bytes).next_back().is_some_and(|(start, m)| start + m.len > addr)
    }

    /// Splits a range into runs of (host address, length); `None` where a byte is not mapped. Addresses that
    /// are nobody's count as the process's own memory.
    fn runs(&self, mut addr: usize, mut len: usize) -> Option<Vec<(usize, usize)>> {
        let mut runs = Vec::new();
        while len > 0 {
            let found = self.mapped.range(..=addr).next_back().filter(|(start, m)| **start + m.len > addr);
            let run = match found {
                Some((_, m)) if !m.accessible => return None,
                Some((start, m)) => (m.host + (addr - start), len.min(start + m.len - addr)),
                None if self.is_device(addr) => return None,
                None => (addr, len),
            };
            runs.push(run);
            addr += run.1;
            len -= run.1;
        }
        Some(runs)
    }

    /// Whether the address is device address space.
    pub(super) fn is_device(&self, addr: usize) -> bool {
        self.reserved.range(..=addr).next_back().is_some_and(|(start, len)| addr < start + len)
    }

    /// Copies between any two ranges; false where one is not mapped.
    ///
    /// # Safety
    /// What is not memory of this world is valid host memory, free of data races.
    pub(super) unsafe fn copy(&self, dst: usize, src: usize, len: usize) -> bool {
        let (Some(to), Some(from)) = (self.runs(dst, len), self.runs(src, len)) else { return false };
        let (mut to, mut from) = (to.into_iter(), from.into_iter());
        let (mut t, mut f) = ((0, 0), (0, 0));
        loop {
            if t.1 == 0 {
                match to.next() {
                    Some(run) => t = run,
                    None => return true,
                }
            }
            if f.1 == 0 {
                match from.next() {
                    Some(run) => f = run,
                    None => return true,
                }
            }
            let step = t.1.min(f.1);
            // SAFETY: invariant 1 makes mapped runs valid host memory; the rest is the caller's contract.
            unsafe { std::ptr::copy(f.0 as *const u8, t.0 as *mut u8, step) };
            t = (t.0 + step, t.1 - step);
            f = (f.0 + step, f.1 - step);
        }
    }

    /// Fills a range; false where it is not mapped.
    ///
    /// # Safety
    /// As for `copy`.
    pub(super) unsafe fn fill(&self, dst: usize, byte: u8, len: usize) -> bool {
        let Some(runs) = self.runs(dst, len) else { return false };
        for (host, len) in runs {
            // SAFETY: as in `copy`.
            unsafe { std::ptr::write_bytes(host as *mut u8, byte, len) };
        }
        true
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (addr, mapped) in std::mem::take(&mut self.mapped) {
            if let (None, Some(base)) = (mapped.piece, NonNull::new(addr as *mut u8)) {
                // SAFETY: the world is gone, and with it everyone who could name this memory.
                unsafe { os::unmap(base, mapped.len) };
            }
        }
        for piece in self.pieces.values() {
            // SAFETY: as above.
            unsafe { os::unmap(piece.host, piece.len) };
        }
        for (&addr, &len) in &self.reserved {
            if let Some(base) = NonNull::new(addr as *mut u8) {
                // SAFETY: as above.
                unsafe { os::unmap(base, len) };
            }
        }
    }
}

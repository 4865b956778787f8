//! Pieces that several processes have: a file in memory stands for the descriptor that a driver makes.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use super::{Memory, Piece, pages};
use crate::base::error::{Error, Result};

fn io(call: &'static str) -> Error {
    Error::io(call, &std::io::Error::last_os_error())
}

/// A file that has no name and lies in memory.
fn anonymous(len: usize) -> Result<File> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the name ends with a NUL; the descriptor is ours alone.
        let file = unsafe {
            let number = libc::memfd_create(c"simulated device".as_ptr(), libc::MFD_CLOEXEC);
            if number < 0 {
                return Err(io("memfd_create"));
            }
            File::from_raw_fd(number)
        };
        file.set_len(len as u64).map_err(|error| Error::io("ftruncate", &error))?;
        Ok(file)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = len;
        Err(Error::refused("simulated devices share memory on Linux only", "copy through the host"))
    }
}

/// Maps a file, in place of what lies at `at` or where the system likes.
///
/// # Safety
/// The file has `len` bytes. At `at`, if given, lie `len` bytes of a mapping that is the caller's to replace.
unsafe fn map_file(file: &File, len: usize, at: Option<NonNull<u8>>) -> Result<NonNull<u8>> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let place = at.map_or(core::ptr::null_mut(), |at| at.as_ptr().cast());
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the caller's contract; without a place the mapping touches nothing that exists.
    let base = unsafe { libc::mmap(place, len, access, libc::MAP_SHARED | fixed, file.as_raw_fd(), 0) };
    if base == libc::MAP_FAILED {
        return Err(io("mmap"));
    }
    NonNull::new(base.cast()).ok_or(io("mmap"))
}

impl Piece {
    /// The file behind the piece, which moves there with all it holds when first asked for.
    fn file(&mut self) -> Result<&File> {
        if self.file.is_none() {
            let file = anonymous(self.len)?;
            // SAFETY: invariant 1 of `memory`; the world is locked, so nobody writes meanwhile.
            let held = unsafe { core::slice::from_raw_parts(self.host.as_ptr(), self.len) };
            file.write_all_at(held, 0).map_err(|error| Error::io("write", &error))?;
            // SAFETY: the file is as long as the piece, whose mapping it replaces with equal bytes.
            unsafe { map_file(&file, self.len, Some(self.host)) }?;
            self.file = Some(file);
        }
        self.file.as_ref().ok_or(io("memfd_create"))
    }
}

impl Memory {
    /// The mapping around an address, and a descriptor of the piece that it shows; `None` where there is none.
    pub(in crate::gpu::driver::sim) fn export(
        &mut self,
        addr: usize,
    ) -> Option<Result<(usize, usize, OwnedFd)>> {
        let (&start, mapped) =
            self.mapped.range(..=addr).next_back().filter(|(start, m)| addr - **start < m.len)?;
        let (len, piece) = (mapped.len, self.pieces.get_mut(&mapped.piece?)?);
        if piece.plain {
            return None;
        }
        let copy = piece.file().and_then(|file| file.try_clone().map_err(|error| Error::io("dup", &error)));
        Some(copy.map(|file| (start, len, file.into())))
    }

    /// A piece behind a descriptor, of this process or another.
    pub(in crate::gpu::driver::sim) fn import(
        &mut self,
        device: usize,
        descriptor: BorrowedFd<'_>,
        bytes: usize,
    ) -> Result<u64> {
        let copy = descriptor.try_clone_to_owned().map_err(|error| Error::io("dup", &error))?;
        let (file, len) = (File::from(copy), pages(bytes));
        let size = file.metadata().map_err(|error| Error::io("fstat", &error))?.len();
        if size != len as u64 {
            // A shorter file would fault when touched.
            return Err(Error::refused(
                "the descriptor is no device memory of that size",
                "send it unchanged",
            ));
        }
        // SAFETY: as long as asked.
        let host = unsafe { map_file(&file, len, None) }?;
        let id = self.next_piece;
        self.next_piece += 1;
        self.pieces.insert(
            id,
            Piece { host, len, device, at: Vec::new(), file: Some(file), imported: true, plain: false },
        );
        Ok(id)
    }
}

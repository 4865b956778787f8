//! The source of pools that are made from a configuration alone.

use crate::base::config::PoolConfig;
use crate::base::error::Result;
use crate::source::file::File;
use crate::source::os::Os;
use crate::source::{Region, Source};

/// The operating system, or the mapped file that the configuration names in `path`.
#[derive(Debug)]
pub enum HostMemory {
    /// Anonymous memory.
    Os(Os),
    /// A mapped file.
    File(File),
}

impl HostMemory {
    /// What `config` asks for; a file is made, or emptied.
    pub fn new(config: &PoolConfig) -> Result<Self> {
        match &config.path {
            Some(path) => File::create(path).map(Self::File),
            None => Ok(Self::Os(Os::new())),
        }
    }
}

// SAFETY: forwards to sources that keep the contract; a region goes back where it came from, as the choice
// never changes.
unsafe impl Source for HostMemory {
    fn granularity(&self) -> usize {
        match self {
            Self::Os(os) => os.granularity(),
            Self::File(file) => file.granularity(),
        }
    }

    fn reserve(&self, len: usize, align: usize) -> Result<Region> {
        match self {
            Self::Os(os) => os.reserve(len, align),
            Self::File(file) => file.reserve(len, align),
        }
    }

    unsafe fn release(&self, region: Region) {
        // SAFETY: the caller's contract, passed on.
        unsafe {
            match self {
                Self::Os(os) => os.release(region),
                Self::File(file) => file.release(region),
            }
        }
    }

    unsafe fn discard(&self, part: Region) -> bool {
        // SAFETY: the caller's contract, passed on.
        unsafe {
            match self {
                Self::Os(os) => os.discard(part),
                Self::File(file) => file.discard(part),
            }
        }
    }

    unsafe fn resize(&self, region: Region, new_len: usize, may_move: bool) -> Option<Region> {
        // SAFETY: the caller's contract, passed on.
        unsafe {
            match self {
                Self::Os(os) => os.resize(region, new_len, may_move),
                Self::File(file) => file.resize(region, new_len, may_move),
            }
        }
    }
}

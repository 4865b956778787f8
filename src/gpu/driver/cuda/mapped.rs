//! What is mapped on a card, who may reach it, and how another process gets it.
//!
//! Invariants
//! 1. An entry of `ranges` for each mapping of this device that was made through the driver's `map`, and no other.
//! 2. Every such mapping that was shown (`set_access`) may be reached from this device and from each of `peers`.

use core::ffi::c_int;
use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};

use super::CudaDevice;
use super::api::{AccessDesc, Location};
use crate::base::error::{Error, PointerFault, Result};
use crate::gpu::driver::{Exported, Handle};

/// The kind of handle that is a file descriptor.
pub(super) const DESCRIPTOR: c_int = 1;

#[derive(Debug, Default)]
pub(super) struct Mapped {
    /// Length and handle by address.
    ranges: BTreeMap<usize, (usize, Handle)>,
    peers: Vec<c_int>,
    /// Whether handles are made so that other processes can have them.
    pub(super) exportable: bool,
}

pub(super) fn location(device: c_int) -> Location {
    const DEVICE: c_int = 1;
    Location { kind: DEVICE, id: device }
}

fn access(device: c_int) -> AccessDesc {
    const READ_WRITE: c_int = 3;
    AccessDesc { location: location(device), flags: READ_WRITE }
}

impl CudaDevice {
    pub(super) fn map_and_note(&self, addr: usize, bytes: usize, handle: Handle) -> Result<()> {
        let mut mapped = self.mapped.lock();
        // SAFETY: invariants 1 and 3: the caller of `map` vouches for range and handle.
        self.relaxed("cuMemMap", |api| unsafe { (api.handle_map)(addr as u64, bytes, 0, handle.0, 0) })?;
        mapped.ranges.insert(addr, (bytes, handle));
        Ok(())
    }

    /// Lets this device and its peers reach a range that `map_and_note` filled.
    pub(super) fn show_to_all(&self, addr: usize, bytes: usize) -> Result<()> {
        let mapped = self.mapped.lock();
        let who: Vec<AccessDesc> =
            core::iter::once(self.device).chain(mapped.peers.iter().copied()).map(access).collect();
        // SAFETY: invariants 1, 2 and 3: the caller of `set_access` vouches for the range; `who` is a local.
        self.relaxed("cuMemSetAccess", |api| unsafe {
            (api.set_access)(addr as u64, bytes, who.as_ptr(), who.len())
        })
    }

    pub(super) fn unmap_and_forget(&self, addr: usize, bytes: usize) -> Result<()> {
        let mut mapped = self.mapped.lock();
        // SAFETY: invariants 1 and 3: the caller of `unmap` vouches for the range.
        self.relaxed("cuMemUnmap", |api| unsafe { (api.handle_unmap)(addr as u64, bytes) })?;
        mapped.ranges.extract_if(addr..addr + bytes, |_, _| true).for_each(drop);
        Ok(())
    }

    /// Lets another device reach what is mapped here, and what will be.
    pub(super) fn let_in(&self, peer: c_int) -> Result<()> {
        let mut mapped = self.mapped.lock();
        if mapped.peers.contains(&peer) {
            return Ok(());
        }
        let who = access(peer);
        for (&addr, &(bytes, _)) in &mapped.ranges {
            // SAFETY: invariant 1; `who` outlives the call. Access once given does no harm if a later call fails.
            self.relaxed("cuMemSetAccess", |api| unsafe { (api.set_access)(addr as u64, bytes, &who, 1) })?;
        }
        mapped.peers.push(peer);
        Ok(())
    }

    pub(super) fn export_around(&self, addr: usize) -> Result<Exported> {
        let mapped = self.mapped.lock();
        let around = mapped.ranges.range(..=addr).next_back();
        let Some((&start, &(bytes, handle))) = around.filter(|(start, (bytes, _))| addr - **start < *bytes)
        else {
            return Err(Error::pointer(addr, PointerFault::Foreign));
        };
        if !mapped.exportable {
            return Err(Error::refused(
                "this system makes no descriptors for device memory",
                "copy through the host, or use a newer driver",
            ));
        }
        let mut number: c_int = -1;
        // SAFETY: by invariant 1 the handle is live; `number` outlives the call and takes a descriptor.
        self.relaxed("cuMemExportToShareableHandle", |api| unsafe {
            (api.handle_export)((&raw mut number).cast(), handle.0, DESCRIPTOR, 0)
        })?;
        // SAFETY: the driver just opened it for us.
        Ok(Exported { start, bytes, descriptor: unsafe { OwnedFd::from_raw_fd(number) } })
    }
}

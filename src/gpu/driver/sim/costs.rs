//! What the calls cost on the virtual clock, in nanoseconds: medians measured on one H200 with driver
//! 580.159 (CUDA 13.0). They tell the order of magnitude of a design, not of a particular machine.

pub(super) const QUERY: u64 = 120;
pub(super) const RECORD: u64 = 170;
pub(super) const WAIT: u64 = 140;
pub(super) const LAUNCH: u64 = 2_000;
pub(super) const HOST_CALL: u64 = 3_000;
pub(super) const SYNC: u64 = 3_000;
pub(super) const STREAM: u64 = 5_000;
pub(super) const EVENT: u64 = 500;
pub(super) const MANAGED: u64 = 11_000;
pub(super) const MEMORY_INFO: u64 = 5_000;
pub(super) const RESERVE: u64 = 5_000;
pub(super) const CREATE: u64 = 9_000;
pub(super) const MAP: u64 = 500;

/// Giving access to mapped pieces, in one call.
pub(super) fn access(pieces: usize) -> u64 {
    15_000 + 20_000 * pieces as u64
}

/// Unmapping pieces that lie side by side, in one call.
pub(super) fn unmap(pieces: usize) -> u64 {
    6_000 + 14_000 * pieces as u64
}

/// A piece of device memory straight from the driver.
pub(super) fn device(bytes: usize) -> u64 {
    26_000 + bytes as u64 / 3_000
}

/// Page-locked memory: about half a millisecond, and a third of a millisecond a MiB.
pub(super) fn pinned(bytes: usize) -> u64 {
    280_000 + bytes as u64 / 6
}

/// A physical piece given back.
pub(super) fn release(bytes: usize) -> u64 {
    8_000 + bytes as u64 / 3_000
}

/// A copy or fill at 50 GB/s, as over the bus.
pub(super) fn transfer(bytes: usize) -> u64 {
    1_500 + bytes as u64 / 50
}

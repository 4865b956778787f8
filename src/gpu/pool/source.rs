//! Where a pool's memory comes from: physical pieces mapped into address space of its own where the device can,
//! the driver's plain allocations elsewhere.
//!
//! Mapping costs the same whatever the size, and neither mapping nor unmapping waits for the device, while a
//! plain free waits for all of its work.

use super::super::arena::{Done, From, Piece, Plan, Step};
use super::super::device::GpuDevice;
use super::super::driver::{Driver, Space};
use crate::base::bits::round_up;
use crate::base::error::Result;

/// A pool reserves this many times the addresses that the device could fill, so that there is always room for a large
/// block beside what is live.
const SPACE: usize = 4;
/// More than a range can count in granules of 512 bytes is of no use.
const MOST_SPACE: usize = 508 << 30;
/// Least units of memory that a pool must be able to hold to be worth address space of its own.
const LEAST_UNITS: usize = 16;

/// Address space of a pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reserved {
    pub(super) start: usize,
    pub(super) len: usize,
    /// Pieces come in multiples of this.
    pub(super) unit: usize,
}

#[derive(Debug)]
pub(super) struct Source {
    space: Space,
    /// `None` for plain allocations.
    pub(super) reserved: Option<Reserved>,
}

impl Source {
    /// Pieces come in multiples of some MiB, so a pool that may hold little takes plain memory; so does one whose
    /// addresses the driver refuses.
    pub(super) fn new(device: &GpuDevice, space: Space, max_size: usize) -> Self {
        let driver = &device.0.driver;
        let total = driver.info().total_memory;
        let unit = driver.info().vmm_granularity;
        let unit = unit.filter(|unit| space == Space::Device && max_size.min(total) / unit >= LEAST_UNITS);
        let reserved = unit.and_then(|unit| {
            let len = round_up(total.saturating_mul(SPACE).min(MOST_SPACE), unit)?;
            let start = driver.reserve_va(len).ok()?;
            Some(Reserved { start, len, unit })
        });
        Self { space, reserved }
    }

    /// A segment of `len` bytes.
    pub(super) fn take(&self, driver: &dyn Driver, len: usize) -> Result<usize> {
        driver.alloc(self.space, len)
    }

    /// Gives a segment back; on failure it is as it was.
    ///
    /// # Safety
    /// `start` is a segment from [`take`](Self::take); all work on it is known to be complete, and it is used
    /// no more.
    pub(super) unsafe fn give(&self, driver: &dyn Driver, start: usize) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { driver.free(self.space, start) }
    }

    /// Does what a plan asks for, and says where every piece of it ended up.
    ///
    /// # Safety
    /// The plan was made by this pool's books: its gaps are unmapped, the pieces it takes lie where it says, and
    /// all work on them is known to be complete.
    pub(super) unsafe fn fill(&self, driver: &dyn Driver, plan: &Plan) -> Done {
        // SAFETY: the caller's contract.
        let mut done = unsafe { self.release(driver, &plan.releases) };
        for steps in &plan.gaps {
            if done.error.is_some() {
                steps.iter().for_each(|step| leave(step, &mut done));
                continue;
            }
            // SAFETY: the caller's contract.
            unsafe { fill_gap(driver, steps, &mut done) };
        }
        done
    }

    /// Gives pieces back to the driver, mapped ones and (at address 0) others. What it does not take is in the
    /// answer.
    ///
    /// # Safety
    /// The pieces lie where it says, and all work on them is known to be complete.
    pub(super) unsafe fn release(&self, driver: &dyn Driver, pieces: &[(usize, Piece)]) -> Done {
        let mut done = Done::default();
        let mut sorted = pieces.to_vec();
        sorted.sort_unstable_by_key(|&(at, _)| at);
        let touch =
            |&(at, piece): &(usize, Piece), &(next, _): &(usize, Piece)| at != 0 && at + piece.len == next;
        for side_by_side in sorted.chunk_by(touch) {
            let (first, bytes) = (side_by_side[0].0, side_by_side.iter().map(|(_, piece)| piece.len).sum());
            // SAFETY: the caller's contract.
            if first != 0 && unsafe { driver.unmap(first, bytes) }.is_err() {
                done.mapped.extend_from_slice(side_by_side);
                continue;
            }
            for &(_, piece) in side_by_side {
                // A second try gets past a passing failure.
                let release = || {
                    // SAFETY: the piece is mapped nowhere any more.
                    unsafe { driver.release_handle(piece.handle) }
                };
                if release().is_err() && release().is_err() {
                    done.spare.push(piece);
                }
            }
        }
        done
    }

    /// Gives the address space back.
    ///
    /// # Safety
    /// Nothing is mapped in it, and it is used no more.
    pub(super) unsafe fn close(&self, driver: &dyn Driver) {
        if let Some(Reserved { start, len, .. }) = self.reserved {
            // Addresses that the driver refuses to take back twice are leaked.
            // SAFETY: reserved by `new`; the rest is the caller's contract.
            let _ = unsafe { driver.free_va(start, len).or_else(|_| driver.free_va(start, len)) };
        }
    }
}

/// Notes that a step was not done: what it would take is where it was.
fn leave(step: &Step, done: &mut Done) {
    match step.from {
        From::Mapped(at, handle) => done.mapped.push((at, Piece { len: step.len, handle })),
        From::Spare(handle) => done.spare.push(Piece { len: step.len, handle }),
        From::New => {}
    }
}

/// Unmaps the pieces that a gap's steps take from elsewhere, those that lie side by side in one call; says for each
/// step whether its piece is free to be mapped now. Stops at the first refusal.
///
/// # Safety
/// As for [`Source::fill`].
unsafe fn unmap_all(driver: &dyn Driver, steps: &[Step]) -> (Vec<bool>, Result<()>) {
    let mut at_hand: Vec<bool> = steps.iter().map(|step| !matches!(step.from, From::Mapped(..))).collect();
    let mut sources: Vec<(usize, usize, usize)> = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        if let From::Mapped(at, _) = step.from {
            sources.push((at, step.len, index));
        }
    }
    sources.sort_unstable();
    for side_by_side in sources.chunk_by(|(at, len, _), (next, _, _)| at + len == *next) {
        let (first, bytes) = (side_by_side[0].0, side_by_side.iter().map(|(_, len, _)| len).sum());
        // SAFETY: whole pieces lie there, and no work touches them.
        if let Err(error) = unsafe { driver.unmap(first, bytes) } {
            return (at_hand, Err(error));
        }
        side_by_side.iter().for_each(|&(_, _, index)| at_hand[index] = true);
    }
    (at_hand, Ok(()))
}

/// Fills one gap, whose steps touch; all of it or nothing.
///
/// # Safety
/// As for [`Source::fill`].
unsafe fn fill_gap(driver: &dyn Driver, steps: &[Step], done: &mut Done) {
    let mut filled: Vec<(usize, Piece)> = Vec::new();
    // SAFETY: the caller's contract.
    let (at_hand, mut result) = unsafe { unmap_all(driver, steps) };
    for (step, at_hand) in steps.iter().zip(at_hand) {
        let handle = match step.from {
            From::Mapped(_, handle) | From::Spare(handle) if at_hand => handle,
            From::New if result.is_ok() => match driver.create_handle(step.len) {
                Ok(handle) => handle,
                Err(error) => {
                    result = Err(error);
                    continue;
                }
            },
            _ => {
                leave(step, done);
                continue;
            }
        };
        let piece = Piece { len: step.len, handle };
        if result.is_ok() {
            // SAFETY: the gap is reserved and unmapped.
            result = unsafe { driver.map(step.to, step.len, handle) };
        }
        if result.is_ok() {
            filled.push((step.to, piece));
        } else {
            done.spare.push(piece);
        }
    }
    if let (Ok(()), Some(first)) = (result, steps.first()) {
        let bytes = steps.iter().map(|step| step.len).sum();
        // SAFETY: all of it was just mapped.
        result = unsafe { driver.set_access(first.to, bytes) };
    }
    if let Err(error) = result {
        done.error = Some(error);
        filled.retain(|&(at, piece)| {
            // SAFETY: just mapped, and nobody has seen it.
            let gone =
                unsafe { driver.unmap(at, piece.len).or_else(|_| driver.unmap(at, piece.len)) }.is_ok();
            if gone {
                done.spare.push(piece);
            }
            !gone
        });
    }
    done.mapped.append(&mut filled);
}

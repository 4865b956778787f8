//! Where a pool's memory comes from: physical pieces mapped into address space of its own where the device can,
//! the driver's plain allocations elsewhere.
//!
//! Mapping costs the same whatever the size, and neither mapping nor unmapping waits for the device, while a
//! plain free waits for all of its work.

use super::super::arena::{Done, From, Leaving, Piece, Plan, Step};
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
    /// The plan was made by this pool's books: nothing is mapped in its gaps but the shadows that it names, its pieces
    /// lie where it says, and all work on them is known to be complete.
    pub(super) unsafe fn fill(&self, driver: &dyn Driver, plan: &Plan) -> Done {
        // SAFETY: shadows are used by nobody.
        let (kept, cleared) = unsafe { unmap_all(driver, &plan.in_the_way) };
        // One that is only too much may stay.
        let needed = |(at, piece): &(usize, Piece)| {
            plan.gaps.iter().flatten().any(|step| step.to < at + piece.len && *at < step.to + step.len)
                || plan.releases.iter().any(|leaving| leaving.piece.handle == piece.handle)
        };
        let mut done = match cleared.err().filter(|_| kept.iter().any(needed)) {
            // SAFETY: the caller's contract; no shadow of these pieces is left but those that they name.
            None => unsafe { self.release(driver, &plan.releases) },
            Some(error) => {
                let mut done = Done { error: Some(error), ..Done::default() };
                plan.releases.iter().for_each(|piece| stay(piece, &mut done));
                done
            }
        };
        done.stuck.extend(kept);
        for steps in &plan.gaps {
            // SAFETY: the caller's contract; nothing is in the way any more where there was no error.
            unsafe { fill_gap(driver, steps, &mut done) };
        }
        done.at_ns = driver.now_ns();
        done
    }

    /// Gives pieces back to the driver. What it does not take is in the answer.
    ///
    /// # Safety
    /// The pieces are mapped where it says and nowhere else, and all work on them is known to be complete.
    pub(super) unsafe fn release(&self, driver: &dyn Driver, leaving: &[Leaving]) -> Done {
        let mut done = Done::default();
        let homes = leaving.iter().filter_map(|gone| Some((gone.home?, gone.piece)));
        let shadows = leaving.iter().flat_map(|gone| gone.shadows.iter().map(|&at| (at, gone.piece)));
        let places: Vec<(usize, Piece)> = homes.chain(shadows).collect();
        // SAFETY: the caller's contract.
        let (kept, _) = unsafe { unmap_all(driver, &places) };
        for Leaving { piece, home, .. } in leaving {
            let mut stays = false;
            for &place in kept.iter().filter(|(_, kept)| kept.handle == piece.handle) {
                let is_home = *home == Some(place.0);
                let places = if is_home { &mut done.mapped } else { &mut done.stuck };
                places.push(place);
                stays |= is_home;
            }
            let mapped = kept.iter().any(|(_, kept)| kept.handle == piece.handle);
            // A second try gets past a passing failure.
            let release = || {
                // SAFETY: the piece is mapped nowhere any more.
                unsafe { driver.release_handle(piece.handle) }
            };
            if !stays && (mapped || release().is_err() && release().is_err()) {
                done.spare.push(*piece);
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

/// Notes that a piece was not given back.
fn stay(leaving: &Leaving, done: &mut Done) {
    match leaving.home {
        Some(at) => done.mapped.push((at, leaving.piece)),
        None => done.spare.push(leaving.piece),
    }
    done.stuck.extend(leaving.shadows.iter().map(|&at| (at, leaving.piece)));
}

/// Notes that a step was not done: what it would take is where it was.
fn leave(step: &Step, done: &mut Done) {
    let (From::Mapped(_, handle) | From::Spare(handle)) = step.from else { return };
    let piece = Piece { len: step.len, handle };
    match step.from {
        From::Mapped(at, _) => done.mapped.push((at, piece)),
        _ => done.spare.push(piece),
    }
    if step.shadowed {
        done.shadows.push((step.to, piece));
    }
}

/// Unmaps pieces, those that lie side by side in one call; returns those that the driver did not unmap, and why.
///
/// # Safety
/// The pieces are mapped there, and no work touches them.
unsafe fn unmap_all(driver: &dyn Driver, places: &[(usize, Piece)]) -> (Vec<(usize, Piece)>, Result<()>) {
    let mut sorted = places.to_vec();
    sorted.sort_unstable_by_key(|&(at, _)| at);
    let (mut kept, mut result) = (Vec::new(), Ok(()));
    for side_by_side in sorted.chunk_by(|(at, piece), (next, _)| at + piece.len == *next) {
        let (first, bytes) = (side_by_side[0].0, side_by_side.iter().map(|(_, piece)| piece.len).sum());
        // SAFETY: the caller's contract.
        if let Err(error) = unsafe { driver.unmap(first, bytes) } {
            kept.extend_from_slice(side_by_side);
            result = Err(error);
        }
    }
    (kept, result)
}

/// Fills one gap, whose steps touch; all of it or nothing. A piece that comes from elsewhere stays mapped there, as a
/// shadow. Does nothing where an error is noted already.
///
/// # Safety
/// As for [`Source::fill`].
unsafe fn fill_gap(driver: &dyn Driver, steps: &[Step], done: &mut Done) {
    let mut result = done.error.map_or(Ok(()), Err);
    // What this call mapped, by step.
    let mut filled: Vec<(&Step, Piece)> = Vec::new();
    for step in steps {
        let handle = match step.from {
            _ if result.is_err() => break,
            From::Mapped(_, handle) | From::Spare(handle) => Ok(handle),
            From::New => driver.create_handle(step.len),
        };
        let mapped = handle.and_then(|handle| {
            let piece = Piece { len: step.len, handle };
            if !step.shadowed {
                // SAFETY: the gap is reserved, and nothing is mapped there.
                unsafe { driver.map(step.to, step.len, handle) }.inspect_err(|_| {
                    if step.from == From::New {
                        done.spare.push(piece);
                    }
                })?;
            }
            Ok(piece)
        });
        result = mapped.map(|piece| filled.push((step, piece)));
    }
    if result.is_ok() {
        // Shadows are accessible as they are.
        for run in steps.chunk_by(|one, next| one.shadowed == next.shadowed).filter(|run| !run[0].shadowed) {
            let bytes = run.iter().map(|step| step.len).sum();
            // SAFETY: all of it was just mapped.
            result = result.and_then(|()| unsafe { driver.set_access(run[0].to, bytes) });
        }
    }
    let Err(error) = result else {
        for (step, piece) in filled {
            done.mapped.push((step.to, piece));
            if let From::Mapped(at, _) = step.from {
                done.shadows.push((at, piece));
            }
        }
        return;
    };
    done.error = Some(error);
    for (step, piece) in &filled {
        // SAFETY: just mapped, and nobody has seen it.
        let unmap = || unsafe { driver.unmap(step.to, piece.len) };
        let stays = !step.shadowed && unmap().is_err() && unmap().is_err();
        if step.from == From::New {
            done.spare.push(*piece);
        }
        if stays {
            done.stuck.push((step.to, *piece));
        }
    }
    steps.iter().for_each(|step| leave(step, done));
}

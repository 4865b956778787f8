//! What a configuration means to a GPU pool.
//!
//! | field | effect |
//! |---|---|
//! | `allocator_type` | `VariableSize`: the bytes asked for, in multiples of 512 (64 for pinned and managed memory); `SizeClass`: powers of two below 1 MiB, eight classes a doubling above; `FixedSize`: multiples of `block_size` |
//! | `strategy` | which free range a request is cut from |
//! | `min_block_size` | a split that would leave less gives the rest away with the block; not with `FixedSize` |
//! | `initial_size`, `growth_factor`, `max_size`, `alignment`, `track_stats` | as for every pool |
//! | `stream_ordered` | `false`: a free waits for the device, and the block is then free for everybody |
//! | `thread_safe` | `false`: only the thread that made the pool may allocate |
//! | `debug` | see [`watch`](super::watch) |
//! | `sync_type` | `Mutex` alone |
//! | `use_pinned_memory`, `use_managed_memory` | must not contradict the pool's type |
//! | `device_id` | read by who opens the device |
//! | `path`, `debug.guard_pages` | refused |
//!
//! Whatever the configuration, requests below 1 MiB and below 4 MiB have zones of their own (small, medium and
//! large), so that a small block never pins a large range; not in fixed-size pools and those of less than 64 MiB.

use super::super::core::ZONE_LIMITS;
use crate::base::bits::round_up;
use crate::base::config::{AllocatorType, PoolConfig, SyncType};
use crate::base::error::{Error, Result};
use crate::base::pool::MemoryType;

/// Checks a configuration for a pool of this kind of memory.
pub(super) fn validate(config: &PoolConfig, memory: MemoryType) -> Result<()> {
    config.validate()?;
    if config.sync_type != SyncType::Mutex {
        let value = format_args!("{:?}", config.sync_type);
        return Err(Error::config(
            "sync_type",
            value,
            "Mutex; GPU pools are ordered by stream under one lock",
        ));
    }
    if config.use_pinned_memory && memory != MemoryType::Pinned {
        return Err(Error::config("use_pinned_memory", true, "false here; make a PinnedPool"));
    }
    if config.use_managed_memory && memory != MemoryType::Managed {
        return Err(Error::config("use_managed_memory", true, "false here; make a ManagedPool"));
    }
    if config.path.is_some() {
        return Err(Error::config("path", "a file", "none here; a file is for host and persistent pools"));
    }
    if config.debug.guard_pages {
        let allowed = "false here; single pages of such memory cannot be made inaccessible";
        return Err(Error::config("debug.guard_pages", true, allowed));
    }
    Ok(())
}

/// The size that a request takes, before rounding to granules; `None` where that overflows.
#[inline]
pub(super) fn rounded(config: &PoolConfig, bytes: usize) -> Option<usize> {
    let bytes = bytes.max(1);
    let size = match config.allocator_type {
        AllocatorType::FixedSize => bytes.checked_next_multiple_of(config.block_size),
        AllocatorType::SizeClass => class_size(bytes),
        _ => Some(bytes),
    };
    size.filter(|&size| size <= isize::MAX as usize)
}

/// The class of a request: a power of two for small blocks, of which most programs have few sizes; of eight
/// classes a doubling for others, so that no more than an eighth is lost.
fn class_size(bytes: usize) -> Option<usize> {
    let power = bytes.checked_next_power_of_two()?;
    if bytes < ZONE_LIMITS[0] { Some(power) } else { round_up(bytes, power / 16) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_powers_of_two_when_small_and_finer_when_large() {
        let size = |bytes| class_size(bytes).unwrap();
        assert_eq!([1, 3, 512, 513, 600_000].map(size), [1, 4, 512, 1024, 1 << 20]);
        let mib = 1 << 20;
        assert_eq!([mib, mib + 1, 9 * mib, 9 * mib + 1].map(size), [mib, mib + mib / 8, 9 * mib, 10 * mib]);
        let mut classes = std::collections::BTreeSet::new();
        for bytes in (mib..64 * mib).step_by(4093) {
            let class = size(bytes);
            assert!(class >= bytes && (class - bytes) * 8 <= bytes, "{bytes}");
            assert_eq!(size(class), class, "a class is its own");
            classes.insert(class);
        }
        assert_eq!(classes.len(), 8 * 6 + 1);
        assert_eq!(class_size(usize::MAX), None);
    }
}

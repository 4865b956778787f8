//! The statistics of all pools of a manager.

use core::fmt;

use crate::base::pool::{MemoryPool, MemoryType};
use crate::base::stats::{Bytes, MemoryStats};

/// One pool of a [`ManagerStats`].
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PoolSummary {
    /// Its name in the manager.
    pub name: String,
    /// Whose memory it is.
    pub memory_type: MemoryType,
    /// What it did and holds.
    pub stats: MemoryStats,
}

/// The statistics of all pools of a manager, and of all together.
///
/// ```
/// use memory_pool::{PoolConfig, PoolManager};
/// let manager = PoolManager::new();
/// manager.create_cpu_pool("frames", PoolConfig::fixed_size_cpu(4096).initial_size(1 << 20))?;
/// manager.create_cpu_pool("scratch", PoolConfig::default_cpu())?;
/// let stats = manager.all_stats();
/// assert_eq!(stats.pools.len(), 2);
/// assert!(stats.total.reserved >= 1 << 20);
/// println!("{stats}"); // a table
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ManagerStats {
    /// Each name, in alphabetical order.
    pub pools: Vec<PoolSummary>,
    /// All pools together. A pool with two names counts once, and memory that a pool got from another one here
    /// is that pool's: of it counts as live what is live in the inner pool. Requests add up, whoever made them.
    /// The peaks are sums of the pools' peaks, which may have been at different times.
    pub total: MemoryStats,
}

impl ManagerStats {
    pub(super) fn gather<'a>(entries: impl Iterator<Item = (&'a str, &'a dyn MemoryPool)>) -> Self {
        let mut pools = Vec::new();
        let mut total = MemoryStats::default();
        let (mut counted, mut enclosed) = (Vec::new(), Vec::new());
        let entries: Vec<_> = entries.collect();
        // Handles on one pool show one and the same configuration.
        let identity = |pool: &dyn MemoryPool| core::ptr::from_ref(pool.config());
        for &(name, pool) in &entries {
            let stats = pool.stats();
            if !counted.contains(&identity(pool)) {
                counted.push(identity(pool));
                total.add(&stats);
                let mut others = entries.iter().filter(|(_, other)| identity(*other) != identity(pool));
                if pool.anchor().is_some_and(|place| others.any(|(_, other)| other.owns(place))) {
                    enclosed.push(pools.len());
                }
            }
            pools.push(PoolSummary { name: name.into(), memory_type: pool.memory_type(), stats });
        }
        // Now that what encloses them is counted.
        enclosed.into_iter().for_each(|inner: usize| total.enclose(&pools[inner].stats));
        Self { pools, total }
    }
}

impl fmt::Display for ManagerStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.pools.iter().map(|pool| pool.name.chars().count());
        let width = names.max().unwrap_or(0).max("total".len());
        write!(
            f,
            "{:<width$}  {:<10} {:>10} {:>10} {:>10} {:>10} {:>12} {:>10} {:>6}",
            "pool", "memory", "live", "peak", "reserved", "free", "allocations", "blocks", "frag"
        )?;
        let bytes = |count: usize| Bytes(count as u64);
        let rows = self.pools.iter().map(|pool| (pool.name.as_str(), Some(pool.memory_type), &pool.stats));
        for (name, kind, stats) in rows.chain([("total", None, &self.total)]) {
            write!(
                f,
                "\n{name:<width$}  {:<10} {:>10} {:>10} {:>10} {:>10} {:>12} {:>10} {:>4.0} %",
                kind.map(|kind| kind.to_string()).unwrap_or_default(),
                bytes(stats.current_allocated),
                bytes(stats.peak_allocated),
                bytes(stats.reserved),
                bytes(stats.free),
                stats.allocation_count,
                stats.active_count(),
                100.0 * stats.fragmentation_ratio(),
            )?;
        }
        Ok(())
    }
}

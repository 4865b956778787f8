//! Typed memory in one call, from pools of the process-wide manager.

use bytemuck::Zeroable;

use super::PoolManager;
use crate::api::{PoolBox, PoolRef};
use crate::base::error::Result;
use crate::pool::AnyPool;

/// `count` zeroed elements in the default pool, freed when dropped. The pool is made at first use, as
/// [`PoolConfig::from_env`](crate::PoolConfig::from_env) says.
///
/// ```
/// let mut samples = memory_pool::allocate::<f32>(1024)?;
/// samples[7] = 0.5;
/// assert_eq!((samples.len(), samples[7], samples[8]), (1024, 0.5, 0.0));
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub fn allocate<T: Zeroable>(count: usize) -> Result<PoolBox<[T], PoolRef<AnyPool>>> {
    PoolBox::<[T]>::new_zeroed_slice_in(count, PoolManager::global().default_cpu_pool()?)
}

/// `count` zeroed elements in the pool of that name of the process-wide manager, freed when dropped.
///
/// ```
/// use memory_pool::{PoolConfig, PoolManager};
/// PoolManager::global().create_cpu_pool("frames", PoolConfig::default_cpu())?;
/// let frame = memory_pool::allocate_in::<u32>("frames", 640 * 480)?;
/// assert!(frame.iter().all(|&pixel| pixel == 0));
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub fn allocate_in<T: Zeroable>(name: &str, count: usize) -> Result<PoolBox<[T], PoolRef<AnyPool>>> {
    PoolBox::<[T]>::new_zeroed_slice_in(count, PoolManager::global().cpu_pool(name)?)
}

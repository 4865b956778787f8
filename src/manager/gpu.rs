//! GPU pools by name, and typed device memory in one call.

use bytemuck::Zeroable;

use super::{Managed, PoolManager};
use crate::api::PoolRef;
use crate::base::config::PoolConfig;
use crate::base::error::Result;
use crate::base::pool::MemoryType;
use crate::gpu::{DeviceBuffer, DevicePool, GpuDevice, GpuPool, ManagedPool, MemoryKind, PinnedPool};

/// The pool behind [`allocate_gpu`].
const DEFAULT_GPU: &str = "default gpu";

impl<K: MemoryKind> Managed for GpuPool<K> {
    const KIND: &'static str = match K::TYPE {
        MemoryType::Pinned => "pinned",
        MemoryType::Managed => "managed",
        _ => "gpu",
    };
}

impl PoolManager {
    /// Makes a pool of device memory.
    ///
    /// ```
    /// use memory_pool::{GpuDevice, PoolConfig, PoolManager, SimConfig};
    /// let gpu = GpuDevice::simulated(SimConfig::default());
    /// let stream = gpu.new_stream()?;
    /// let manager = PoolManager::new();
    /// let pool = manager.create_gpu_pool("weights", &gpu, PoolConfig::default_gpu())?;
    /// let mut weights = pool.alloc::<f32>(3, &stream)?;
    /// manager.copy_slice(&mut weights, &[1.0, 2.0, 3.0][..])?;
    /// assert_eq!(weights.to_vec(&stream)?, [1.0, 2.0, 3.0]);
    /// drop(weights);
    /// manager.destroy_pool("weights")?;
    /// # Ok::<(), memory_pool::Error>(())
    /// ```
    pub fn create_gpu_pool(
        &self,
        name: &str,
        device: &GpuDevice,
        config: PoolConfig,
    ) -> Result<PoolRef<DevicePool>> {
        self.create(name, || DevicePool::named(device, name, config))
    }

    /// The pool of device memory of that name.
    pub fn gpu_pool(&self, name: &str) -> Result<PoolRef<DevicePool>> {
        self.get(name)
    }

    /// Makes a pool of page-locked host memory.
    pub fn create_pinned_pool(
        &self,
        name: &str,
        device: &GpuDevice,
        config: PoolConfig,
    ) -> Result<PoolRef<PinnedPool>> {
        self.create(name, || PinnedPool::named(device, name, config))
    }

    /// The pool of page-locked memory of that name.
    pub fn pinned_pool(&self, name: &str) -> Result<PoolRef<PinnedPool>> {
        self.get(name)
    }

    /// Makes a pool of memory that CPU and card share.
    pub fn create_managed_pool(
        &self,
        name: &str,
        device: &GpuDevice,
        config: PoolConfig,
    ) -> Result<PoolRef<ManagedPool>> {
        self.create(name, || ManagedPool::named(device, name, config))
    }

    /// The pool of managed memory of that name.
    pub fn managed_pool(&self, name: &str) -> Result<PoolRef<ManagedPool>> {
        self.get(name)
    }

    /// The pool named `"default gpu"`, made at the first call as `MEMORY_POOL_GPU_*` says, on the real card
    /// that it names; an error where there is none. To use another device, make a pool of that name before.
    pub fn default_gpu_pool(&self) -> Result<PoolRef<DevicePool>> {
        self.get_or_create(DEFAULT_GPU, || {
            let config = PoolConfig::default_gpu().with_env_gpu()?;
            DevicePool::named(&GpuDevice::open(config.device_id)?, DEFAULT_GPU, config)
        })
    }
}

/// `count` zeroed elements on the default card, freed when dropped, in the order of its default stream.
///
/// ```
/// match memory_pool::allocate_gpu::<f32>(1024) {
///     Ok(buffer) => assert_eq!(buffer.len(), 1024),
///     Err(error) => println!("{error}"), // no CUDA driver on this machine; …
/// }
/// ```
pub fn allocate_gpu<T: Zeroable>(count: usize) -> Result<DeviceBuffer<T>> {
    let pool = PoolManager::global().default_gpu_pool()?;
    pool.alloc(count, &pool.stream())
}

/// `count` zeroed elements in the device pool of that name of the process-wide manager, freed when dropped, in
/// the order of the pool's stream.
///
/// ```
/// use memory_pool::{GpuDevice, PoolConfig, PoolManager, SimConfig};
/// let gpu = GpuDevice::simulated(SimConfig::default());
/// PoolManager::global().create_gpu_pool("activations", &gpu, PoolConfig::default_gpu())?;
/// let buffer = memory_pool::allocate_gpu_in::<u32>("activations", 64)?;
/// assert_eq!(buffer.to_vec(buffer.stream())?, [0; 64]);
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub fn allocate_gpu_in<T: Zeroable>(name: &str, count: usize) -> Result<DeviceBuffer<T>> {
    let pool = PoolManager::global().gpu_pool(name)?;
    pool.alloc(count, &pool.stream())
}

//! The pool whose kind the configuration decides, when the program runs.

use core::fmt;
use std::sync::Arc;

use super::front::Locked;
use super::interface::Host;
use super::lock_free::FixedFront;
use super::memory::HostMemory;
use super::wrapped::Wrapped;
use super::{BuildFront, Core, checked, inside};
use crate::base::config::{AllocatorType, PoolConfig};
use crate::base::error::Result;
use crate::engine::ranges::{InBlocks, Ranges};
use crate::observe::{DebugLayer, Observer};

/// A handle on a pool of any kind, chosen by its configuration.
///
/// ```
/// use memory_pool::{AnyPool, PoolConfig};
/// for config in [PoolConfig::fixed_size_cpu(256), PoolConfig::default_cpu(), PoolConfig::high_performance_cpu()] {
///     let pool = AnyPool::new(config)?;
///     let mut list = allocator_api2::vec::Vec::new_in(&pool);
///     list.extend([1, 2, 3]);
///     assert_eq!(list.len(), 3);
/// }
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone)]
pub struct AnyPool(pub(super) Arc<dyn Host + Send + Sync>);

impl AnyPool {
    /// A pool as `config` describes it.
    pub fn new(config: PoolConfig) -> Result<Self> {
        Self::named("", config)
    }

    /// A pool with a name, which statistics and reports show.
    pub fn named(name: &str, config: PoolConfig) -> Result<Self> {
        if config.debug.is_on() {
            let layer = DebugLayer::new(name, &config)?;
            return Self::observed(name, config, layer);
        }
        Self::observed(name, config, ())
    }

    /// The pool that `config` asks for, with `observer` around it.
    fn observed<O: Observer + 'static>(name: &str, config: PoolConfig, observer: O) -> Result<Self> {
        match config.allocator_type {
            AllocatorType::FixedSize => Self::of::<FixedFront, O>(name, config, observer),
            AllocatorType::VariableSize => Self::of::<Locked<Ranges<InBlocks>>, O>(name, config, observer),
            AllocatorType::SizeClass => {
                let config = checked(config, AllocatorType::SizeClass)?;
                Ok(Self(Arc::new(Wrapped::new(name, config, observer)?)))
            }
        }
    }

    fn of<F, O>(name: &str, config: PoolConfig, observer: O) -> Result<Self>
    where
        F: BuildFront + Send + Sync + 'static,
        O: Observer + 'static,
    {
        let config = checked(config, F::KIND)?;
        let front = F::build(&inside(&config, &observer)?)?;
        let source = HostMemory::new(&config)?;
        Ok(Self(Arc::new(Core::new(name, config, front, source, observer)?)))
    }
}

impl fmt::Debug for AnyPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

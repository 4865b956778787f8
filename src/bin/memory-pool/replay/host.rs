//! Pools of host memory.

use std::alloc::Layout;
use std::ptr::NonNull;

use memory_pool::{AnyPool, Error, PoolConfig, Strategy};

use super::{Held, Target};
use crate::Failure;

pub(super) fn target(pool: &str) -> Result<Box<dyn Target>, Failure> {
    let config = match pool {
        "segregated" => PoolConfig::default_cpu(),
        "best-fit" => PoolConfig::default_cpu().strategy(Strategy::BestFit),
        "first-fit" => PoolConfig::default_cpu().strategy(Strategy::FirstFit),
        other => match other.strip_prefix("fixed:").and_then(|size| size.parse().ok()) {
            Some(size) => PoolConfig::fixed_size_cpu(size),
            None => return Err(Failure::Usage(format!("no pool `{other}`"))),
        },
    };
    Ok(Box::new(AnyPool::new(config)?))
}

impl Target for AnyPool {
    fn alloc(&self, bytes: usize, _: u16) -> Result<usize, String> {
        let block =
            Layout::from_size_align(bytes, 16).map_err(Error::from).and_then(|layout| self.allocate(layout));
        Ok(block.map_err(|error| error.to_string())?.cast::<u8>().expose_provenance().get())
    }

    fn free(&self, block: usize, _: u16) {
        let block = NonNull::new(std::ptr::with_exposed_provenance_mut(block));
        // SAFETY: the address of a live block (contract of `Target`), freed once.
        block.into_iter().for_each(|block| unsafe { self.deallocate(block) });
    }

    fn held(&self) -> Held {
        Held::from(&self.stats())
    }

    fn place(&self) -> String {
        "the host".into()
    }
}

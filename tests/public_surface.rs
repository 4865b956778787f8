//! The public surface of the host pools, used as an outside program would: the names and shapes that other
//! programs are written against.

use std::alloc::Layout;
use std::ptr::NonNull;

use allocator_api2::alloc::Allocator;
use allocator_api2::boxed::Box as PoolAllocBox;
use allocator_api2::vec::Vec as PoolVec;
use memory_pool::{
    AllocFlags, AnyPool, Error, FixedPool, FreeRange, LocalFixedPool, LocalVariablePool, MemoryPool,
    MemoryType, Policy, PoolBox, PoolConfig, Request, Result, Strategy, VariablePool,
};

fn is_send_sync<T: Send + Sync>() {}

#[test]
fn shared_pools_cross_threads() {
    is_send_sync::<FixedPool>();
    is_send_sync::<VariablePool>();
    is_send_sync::<AnyPool>();
    is_send_sync::<Error>();
    is_send_sync::<PoolConfig>();
}

/// Whatever allocates serves a vector, a box, an empty request and an over-aligned one.
fn serves_containers<A: Allocator + Copy>(pool: A) {
    let mut vector = PoolVec::new_in(pool);
    vector.extend(0..100u32);
    vector.shrink_to_fit();
    assert_eq!(vector.iter().sum::<u32>(), 4950);
    let boxed = PoolAllocBox::new_in([7u64; 4], pool);
    assert_eq!(boxed[3], 7);
    let empty: PoolVec<u8, A> = PoolVec::with_capacity_in(0, pool);
    assert_eq!(empty.capacity(), 0);
    let zero = pool.allocate(Layout::from_size_align(0, 64).unwrap()).unwrap();
    assert_eq!(zero.cast::<u8>().as_ptr() as usize % 64, 0);
    // SAFETY: allocated above with this layout.
    unsafe { pool.deallocate(zero.cast(), Layout::from_size_align(0, 64).unwrap()) };
}

#[test]
fn every_host_pool_serves_containers() -> Result<()> {
    serves_containers(&FixedPool::new(PoolConfig::fixed_size_cpu(512))?);
    serves_containers(&VariablePool::new(PoolConfig::default_cpu().strategy(Strategy::BestFit))?);
    serves_containers(&AnyPool::new(PoolConfig::default_cpu())?);
    serves_containers(&LocalFixedPool::new(PoolConfig::fixed_size_cpu(512))?);
    serves_containers(&LocalVariablePool::new(PoolConfig::default_cpu())?);
    Ok(())
}

#[test]
fn handles_are_cheap_and_containers_keep_the_pool_alive() -> Result<()> {
    let pool = VariablePool::new(PoolConfig::default_cpu())?;
    let mut vector = PoolVec::new_in(pool.clone());
    drop(pool);
    vector.extend([1u8; 100_000]);
    assert_eq!(vector.len(), 100_000);
    Ok(())
}

#[test]
fn boxes_are_zeroed_slices() -> Result<()> {
    let pool = VariablePool::new(PoolConfig::default_cpu())?;
    let mut zeros = PoolBox::<[f32]>::new_zeroed_slice_in(1024, &pool)?;
    assert!(zeros.iter().all(|&x| x == 0.0));
    zeros[3] = 1.0;
    drop(zeros);
    assert!(!pool.has_leaks());
    Ok(())
}

#[test]
fn local_pools_reset() -> Result<()> {
    let mut pool = LocalFixedPool::new(PoolConfig::fixed_size_cpu(64))?;
    let block = pool.allocate(Layout::new::<u64>())?;
    assert!(block.len() >= 8);
    pool.reset();
    assert!(!pool.has_leaks());
    Ok(())
}

#[test]
fn a_policy_of_ones_own() -> Result<()> {
    #[derive(Debug)]
    struct Last;
    impl Policy for Last {
        fn name(&self) -> &str {
            "last"
        }
        fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
            free.filter(|range| range.fits(request.size, request.align)).max_by_key(|range| range.start)
        }
    }
    let pool = VariablePool::new(PoolConfig::default_cpu().strategy(Last))?;
    serves_containers(&pool);
    Ok(())
}

/// The trait and the allocator trait side by side are never ambiguous.
#[test]
fn both_traits_in_scope() -> Result<()> {
    let pool = FixedPool::new(PoolConfig::fixed_size_cpu(64).max_size(1 << 20))?;
    let block = pool.allocate(Layout::new::<[u8; 64]>())?;
    let ptr: NonNull<u8> = block.cast();
    assert!(pool.owns(ptr));
    assert_eq!(pool.usable_size(ptr), Some(64));
    assert_eq!(pool.memory_type(), MemoryType::Cpu);
    assert!(matches!(pool.reset(), Err(Error::InvalidOperation { .. })));
    // SAFETY: live, freed once.
    unsafe { pool.deallocate(ptr) };
    pool.reset()?;
    let zeroed = pool.allocate_with(Layout::new::<u64>(), AllocFlags::ZEROED)?;
    // SAFETY: 8 live bytes.
    assert_eq!(unsafe { zeroed.cast::<u64>().read() }, 0);
    // SAFETY: live, freed once.
    unsafe { pool.deallocate(zeroed.cast()) };
    assert!(
        matches!(pool.reserve(1 << 30), Err(Error::OutOfMemory { requested, .. }) if requested >= 1 << 30)
    );
    let mut other = 0u8;
    assert!(!pool.owns(NonNull::from(&mut other)));
    let stats = pool.stats();
    assert_eq!((stats.allocation_count, stats.deallocation_count), (2, 2));
    let dynamic: &dyn MemoryPool = &pool;
    assert!(dynamic.trim(0)? > 0);
    Ok(())
}

#[test]
fn batches_go_in_and_out() -> Result<()> {
    let pool = FixedPool::new(PoolConfig::fixed_size_cpu(64))?;
    let blocks = pool.allocate_batch(Layout::new::<[u8; 64]>(), 100)?;
    assert_eq!(blocks.len(), 100);
    // SAFETY: all live, each freed once.
    unsafe { pool.deallocate_batch(&blocks) };
    assert!(!pool.has_leaks());
    Ok(())
}

#[test]
fn a_bound_pool_refuses_other_threads() -> Result<()> {
    let pool = VariablePool::new(PoolConfig::default_cpu().thread_safe(false))?;
    std::thread::scope(|s| {
        let pool = &pool;
        let refused = s.spawn(move || pool.allocate(Layout::new::<u64>()).unwrap_err()).join().unwrap();
        assert!(matches!(refused, Error::InvalidOperation { .. }));
    });
    Ok(())
}

#[test]
fn an_impossible_configuration_names_its_fields() {
    let error = VariablePool::new(PoolConfig::default_cpu().initial_size(100).max_size(10)).unwrap_err();
    assert!(matches!(error, Error::Config { .. }));
    assert!(error.to_string().contains("initial_size") && error.to_string().contains("max_size"));
}

//! The conformance suite, instantiated for every host pool × strategy × synchronisation.

#[allow(dead_code, reason = "other pools use the rest of the suite")]
mod conformance;

use std::sync::Arc;

use conformance::faults::{Faulty, every_call_may_fail};
use conformance::{Subject, all_rules, containers, shared_rules};
use memory_pool::{
    AllocatorType, AnyPool, FixedPool, FreeRange, LocalFixedPool, LocalVariablePool, Policy, PoolConfig,
    Request, Result, Strategy, SyncType, VariablePool,
};

type FaultyFixed = FixedPool<Faulty>;
type FaultyLocalFixed = LocalFixedPool<Faulty>;
type FaultyVariable = VariablePool<Faulty>;
type FaultyLocalVariable = LocalVariablePool<Faulty>;

subject!(shared FixedPool);
subject!(shared AnyPool);
subject!(local LocalFixedPool);
subject!(shared FaultyFixed);
subject!(local FaultyLocalFixed);
subject!(shared VariablePool);
subject!(local LocalVariablePool);
subject!(shared FaultyVariable);
subject!(local FaultyLocalVariable);

/// A policy of a user's own: what is largest stays useful longest.
#[derive(Debug)]
struct WorstFit;

impl Policy for WorstFit {
    fn name(&self) -> &str {
        "worst_fit"
    }
    fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
        free.filter(|range| range.fits(request.size, request.align)).max_by_key(|range| range.len)
    }
}

/// Every strategy, and other granules and limits.
fn variable_subjects() -> [Subject; 5] {
    let config = PoolConfig::default_cpu;
    [
        Subject::host("variable, segregated", config()),
        Subject::host("variable, best fit", config().strategy(Strategy::BestFit)),
        Subject::host("variable, first fit", config().strategy(Strategy::FirstFit).growth_factor(1.0)),
        Subject::host("variable, worst fit", config().strategy(WorstFit)),
        Subject::host("variable, 256 B granule", config().alignment(256).min_block_size(1024)),
    ]
}

fn lock_free(block: usize) -> PoolConfig {
    PoolConfig::fixed_size_cpu(block).sync_type(SyncType::LockFree)
}

/// Block sizes from a word to pages, a size that is no power of two among them.
fn fixed_subjects() -> [Subject; 6] {
    [
        Subject::host("fixed, 512 B", PoolConfig::fixed_size_cpu(512)),
        Subject::host("fixed, 24 B at 8", PoolConfig::fixed_size_cpu(24).alignment(8)),
        Subject::host("fixed, 8 KiB at 4 KiB", PoolConfig::fixed_size_cpu(8192).alignment(4096)),
        Subject::host("fixed, 1000 B, slow growth", PoolConfig::fixed_size_cpu(1000).growth_factor(1.0)),
        Subject::host("lock-free, 512 B", lock_free(512)),
        Subject::host("lock-free, 24 B at 8", lock_free(24).alignment(8)),
    ]
}

/// Both versions of `Allocator` by value and by reference, and hashbrown's maps.
macro_rules! all_containers {
    ($pool:expr) => {{
        let pool = $pool;
        containers::v04::all(&pool, 1 << 30);
        containers::v02::all(&pool, 1 << 30);
        containers::maps(&pool);
        assert!(!pool.has_leaks());
        pool.check().unwrap();
        pool
    }};
}

/// The same, and by handle.
macro_rules! all_containers_by_handle {
    ($pool:expr) => {{
        let pool = all_containers!($pool);
        containers::v04::all(pool.clone(), 1 << 12);
        containers::v02::all(pool.clone(), 1 << 12);
        containers::maps(pool.clone());
        assert!(!pool.has_leaks());
    }};
}

#[test]
fn fixed_pools() {
    for subject in fixed_subjects() {
        all_rules::<FixedPool>(&subject, &FixedPool::new);
        shared_rules::<FixedPool>(&subject, &FixedPool::new);
        all_containers_by_handle!(FixedPool::new(subject.config).unwrap());
    }
}

#[test]
fn local_fixed_pools() {
    for subject in fixed_subjects() {
        all_rules::<LocalFixedPool>(&subject, &LocalFixedPool::new);
        all_containers!(LocalFixedPool::new(subject.config).unwrap());
    }
}

#[test]
fn variable_pools() {
    for subject in variable_subjects() {
        all_rules::<VariablePool>(&subject, &VariablePool::new);
        shared_rules::<VariablePool>(&subject, &VariablePool::new);
        all_containers_by_handle!(VariablePool::new(subject.config).unwrap());
    }
}

#[test]
fn local_variable_pools() {
    for subject in variable_subjects() {
        all_rules::<LocalVariablePool>(&subject, &LocalVariablePool::new);
        all_containers!(LocalVariablePool::new(subject.config).unwrap());
    }
}

#[test]
fn pools_of_any_kind() {
    for subject in fixed_subjects().into_iter().chain(variable_subjects()) {
        all_rules::<AnyPool>(&subject, &AnyPool::new);
        shared_rules::<AnyPool>(&subject, &AnyPool::new);
        all_containers_by_handle!(AnyPool::new(subject.config).unwrap());
    }
}

#[test]
fn pools_of_size_classes_by_configuration() {
    for (name, config) in [
        ("size classes", PoolConfig::default_cpu().allocator_type(AllocatorType::SizeClass)),
        ("debug, size classes", PoolConfig::debug_cpu().allocator_type(AllocatorType::SizeClass)),
    ] {
        let subject = Subject::host(name, config.sync_type(SyncType::ThreadCached));
        conformance::model::random_operations::<AnyPool>(&subject, &AnyPool::new);
        conformance::rules::sizes_of_zero_are_dangling::<AnyPool>(&subject, &AnyPool::new);
        conformance::rules::zeroed_means_zeroed::<AnyPool>(&subject, &AnyPool::new);
        conformance::rules::live_blocks_are_listed::<AnyPool>(&subject, &AnyPool::new);
        conformance::rules::foreign_addresses_are_recognised::<AnyPool>(&subject, &AnyPool::new);
        conformance::threads::blocks_cross_threads::<AnyPool>(&subject, &AnyPool::new);
        all_containers_by_handle!(AnyPool::new(subject.config).unwrap());
    }
}

#[test]
fn pools_with_the_debug_layer() {
    let fixed =
        Subject::host("debug, fixed", PoolConfig::debug_cpu().allocator_type(AllocatorType::FixedSize));
    let subjects = [
        Subject::host("debug, variable", PoolConfig::debug_cpu()),
        Subject { config: fixed.config.clone().sync_type(SyncType::LockFree), ..fixed.clone() },
        fixed,
    ];
    for subject in subjects {
        all_rules::<AnyPool>(&subject, &AnyPool::new);
        shared_rules::<AnyPool>(&subject, &AnyPool::new);
        all_containers_by_handle!(AnyPool::new(subject.config).unwrap());
    }
}

#[test]
fn every_call_to_the_source_may_fail() {
    for subject in fixed_subjects() {
        let shared = |config: PoolConfig, source: Arc<_>| -> Result<FaultyFixed> {
            FixedPool::with_source(config, source)
        };
        every_call_may_fail(&subject, &shared);
        let local = |config: PoolConfig, source: Arc<_>| -> Result<FaultyLocalFixed> {
            LocalFixedPool::with_source(config, source)
        };
        every_call_may_fail(&subject, &local);
    }
    for subject in variable_subjects() {
        let shared = |config: PoolConfig, source: Arc<_>| -> Result<FaultyVariable> {
            VariablePool::with_source(config, source)
        };
        every_call_may_fail(&subject, &shared);
        let local = |config: PoolConfig, source: Arc<_>| -> Result<FaultyLocalVariable> {
            LocalVariablePool::with_source(config, source)
        };
        every_call_may_fail(&subject, &local);
    }
}

//! Configurations, statistics and findings as JSON.
#![cfg(feature = "serde")]

use std::alloc::Layout;

use memory_pool::{AnyPool, OnFinding, PoolConfig, PoolManager, Strategy};
use serde_json::{Value, from_str, from_value, json, to_value};

#[test]
fn configurations_go_there_and_back_and_need_name_only_what_differs() {
    for config in [
        PoolConfig::default_cpu().strategy(Strategy::BestFit),
        PoolConfig::debug_gpu(3),
        PoolConfig::high_performance_cpu().path("/tmp/x"),
    ] {
        assert_eq!(from_value::<PoolConfig>(to_value(&config).unwrap()).unwrap(), config);
    }
    let text = r#"{ "allocator_type": "fixed_size", "block_size": 512, "debug": { "canary": 8 } }"#;
    let config: PoolConfig = from_str(text).unwrap();
    assert_eq!((config.block_size, config.debug.canary, config.debug.fill), (512, 8, false));
    assert_eq!(config.growth_factor, PoolConfig::default_cpu().growth_factor);
    let error = from_str::<PoolConfig>(r#"{ "strategy": "worst_fit" }"#).unwrap_err().to_string();
    assert!(error.contains("worst_fit") && error.contains("best_fit"), "{error}");
}

#[test]
fn statistics_have_what_is_computed_as_well() {
    let manager = PoolManager::new();
    let pool = manager.create_cpu_pool("frames", PoolConfig::default_cpu()).unwrap();
    let _block = pool.allocate(Layout::new::<[u8; 100]>()).unwrap();
    let stats = to_value(pool.stats()).unwrap();
    assert_eq!((&stats["allocation_count"], &stats["active_count"]), (&json!(1), &json!(1)));
    assert!(stats["fragmentation_ratio"].is_number() && stats["latency"].is_null());
    let all = to_value(manager.all_stats()).unwrap();
    assert_eq!(
        (&all["pools"][0]["name"], &all["pools"][0]["memory_type"]),
        (&json!("frames"), &json!("Cpu"))
    );
    assert_eq!(all["total"]["active_count"], json!(1));
}

#[test]
fn findings_carry_resolved_stacks() {
    let mut config = PoolConfig::debug_cpu();
    config.debug.on_finding = OnFinding::Collect;
    let pool = AnyPool::new(config).unwrap();
    let _block = pool.allocate(Layout::new::<u64>()).unwrap();
    let leaks = to_value(pool.diagnostics().unwrap().leaks()).unwrap();
    assert_eq!(leaks[0]["kind"], json!("Leak"));
    let stack = leaks[0]["allocated"]["stack"].as_array().unwrap();
    let names =
        |frame: &Value| frame["function"].as_str().unwrap().contains("findings_carry_resolved_stacks");
    assert!(stack.iter().any(names), "{stack:#?}");
}

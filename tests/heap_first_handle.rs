//! Where the program's allocator is another one, the handle that is used first configures the process heap.

use allocator_api2::vec::Vec;
use memory_pool::{GlobalPool, HeapConfig, Purge};

#[test]
fn the_first_handle_decides() {
    const FIRST: HeapConfig = HeapConfig::new().limit(32 << 20).purge(Purge::Eager);
    let mut list = Vec::new_in(GlobalPool::with_config(FIRST));
    list.resize(1000, 7u8);
    assert_eq!(GlobalPool::config(), FIRST);
    let mut second = Vec::new_in(GlobalPool::with_config(HeapConfig::new().limit(1 << 40)));
    second.push(1u8);
    assert!(second.try_reserve(64 << 20).is_err());
    assert_eq!(GlobalPool::config(), FIRST);
}

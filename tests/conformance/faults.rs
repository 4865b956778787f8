//! A source that fails at every n-th call: each failure is an error, nothing is lost, and the pool goes on.

use std::alloc::Layout;
use std::sync::Arc;

use memory_pool::source::failing::Failing;
use memory_pool::source::os::Os;
use memory_pool::{Error, PoolConfig, Result};

use super::{Held, Pool, Random, Subject};

/// A source that fails on command.
pub type Faulty = Arc<Failing<Os>>;

/// Runs the same work with call `n` of the source failing, for every `n` the work makes, and with all calls
/// from `n` on failing.
pub fn every_call_may_fail<P: Pool>(subject: &Subject, make: &dyn Fn(PoolConfig, Faulty) -> Result<P>) {
    let config = subject.config.clone().initial_size(16 << 10);
    let source = Arc::new(Failing::new(Os::new()));
    work(subject, make(config.clone(), source.clone()));
    let calls = source.calls();
    assert!(calls > 1, "{}: the work never grows the pool", subject.name);
    for n in 0..calls {
        for lasting in [false, true] {
            let source = Arc::new(Failing::new(Os::new()));
            if lasting {
                source.fail_from(n)
            } else {
                source.fail_at(n)
            }
            work(subject, make(config.clone(), source.clone()));
            assert_eq!(source.outstanding(), 0, "{}: call {n} leaked", subject.name);
        }
    }
}

/// Fills a pool, remembers what failed, verifies and frees all of it, and drops the pool.
fn work<P: Pool>(subject: &Subject, pool: Result<P>) {
    let pool = match pool {
        Ok(pool) => pool,
        Err(error) => return assert!(matches!(error, Error::OutOfMemory { .. }), "{error}"),
    };
    let mut random = Random::new(7);
    let mut live = Vec::new();
    for _ in 0..120 {
        let size = random.size(subject.largest.min(256 << 10));
        let layout = Layout::from_size_align(size, random.align(subject.max_align.min(8192))).unwrap();
        match pool.allocate(layout) {
            Ok(block) => {
                let held = Held::new(block, layout);
                if subject.touchable {
                    held.fill();
                }
                live.push(held);
            }
            Err(error) => assert!(matches!(error, Error::OutOfMemory { .. }), "{error}"),
        }
        pool.check();
    }
    for held in live {
        if subject.touchable {
            held.verify();
        }
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(held.ptr) };
    }
    assert!(!pool.has_leaks());
    pool.check();
}

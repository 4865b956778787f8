//! What one may ask of a pool that watches itself.

use core::fmt;
use std::sync::Arc;

use super::finding::Finding;
use super::stack::Stack;
use super::sync::Lock;

/// The debugging side of a pool, whatever its kind: [`MemoryPool::diagnostics`](crate::MemoryPool::diagnostics).
///
/// ```
/// use memory_pool::{AnyPool, Diagnostics, PoolConfig};
/// let pool = AnyPool::new(PoolConfig::debug_cpu())?;
/// let watch = pool.diagnostics().expect("debug_cpu watches");
/// assert_eq!(watch.check(), 0); // every canary and every freed block is as it should be
/// assert!(watch.findings().is_empty() && watch.leaks().is_empty());
/// assert!(AnyPool::new(PoolConfig::default_cpu())?.diagnostics().is_none());
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub trait Diagnostics: Send + Sync {
    /// Checks the surroundings of every live block and the contents of every freed one that is held back;
    /// returns how many findings that made. What was found damaged is repaired, so it is found once.
    fn check(&self) -> usize;

    /// What was found so far, oldest first.
    fn findings(&self) -> Vec<Finding> {
        self.log().findings()
    }

    /// Where findings are kept, a handle that outlives the pool.
    fn log(&self) -> FindingLog;

    /// Every live block as the leak that it would be if the pool went away now.
    fn leaks(&self) -> Vec<Finding>;

    /// The last operations, oldest first, as many as
    /// [`DebugConfig::history`](crate::DebugConfig::history) says.
    fn history(&self) -> Vec<Operation>;
}

/// Findings of one pool, kept until read; clones share them.
///
/// ```
/// use memory_pool::{AnyPool, Diagnostics, FindingKind, OnFinding, PoolConfig};
/// use std::alloc::Layout;
/// let mut config = PoolConfig::debug_cpu();
/// config.debug.on_finding = OnFinding::Collect;
/// let pool = AnyPool::new(config)?;
/// let log = pool.diagnostics().unwrap().log();
/// let _ = pool.allocate(Layout::new::<u64>())?;
/// drop(pool);
/// assert_eq!(log.findings()[0].kind, FindingKind::Leak);
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct FindingLog(Arc<Lock<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    findings: Vec<Finding>,
    total: u64,
}

impl FindingLog {
    /// Findings kept; later ones are counted only.
    pub const CAPACITY: usize = 1024;

    /// The findings kept, oldest first.
    pub fn findings(&self) -> Vec<Finding> {
        self.0.lock().findings.clone()
    }

    /// The findings kept, which are forgotten here.
    pub fn take(&self) -> Vec<Finding> {
        core::mem::take(&mut self.0.lock().findings)
    }

    /// Findings made, those not kept as well.
    pub fn total(&self) -> u64 {
        self.0.lock().total
    }

    pub(crate) fn push(&self, finding: &Finding) {
        let mut kept = self.0.lock();
        kept.total += 1;
        if kept.findings.len() < Self::CAPACITY {
            kept.findings.push(finding.clone());
        }
    }
}

/// What an [`Operation`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub enum OperationKind {
    /// A block was handed out.
    Allocate,
    /// A block was freed.
    Free,
    /// The pool took memory from its source.
    Grow,
    /// The pool was emptied.
    Reset,
}

/// One entry of a pool's history.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Operation {
    /// Its number, from 1.
    pub number: u64,
    /// What was done.
    pub kind: OperationKind,
    /// The block; 0 where it concerns none.
    pub address: usize,
    /// Bytes asked for.
    pub size: usize,
    /// Who did it.
    pub thread: u32,
    /// From where, if stacks are kept.
    pub stack: Option<Stack>,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, kind, address, size, thread, .. } = self;
        let kind = format!("{kind:?}").to_lowercase();
        write!(f, "{number:>8}  thread {thread:<3} {kind:<8} {address:#014x} {size:>10} bytes")
    }
}

//! Where a variable pool places a request: the three built-in strategies and the trait for a user's own.

use std::fmt;
use std::sync::Arc;

/// How a variable pool chooses among its free ranges.
///
/// | strategy | chooses | cost |
/// |---|---|---|
/// | [`Segregated`](Strategy::Segregated) | any range from the nearest bin that surely fits | O(1) |
/// | [`BestFit`](Strategy::BestFit) | the smallest range that fits, the lowest address among equals | O(log n) |
/// | [`FirstFit`](Strategy::FirstFit) | the lowest address that fits | O(n) |
/// | [`Custom`](Strategy::Custom) | what a [`Policy`] says | the policy's |
///
/// ```
/// use memory_pool::{PoolConfig, Strategy};
/// let config = PoolConfig::default_cpu().strategy(Strategy::BestFit);
/// assert_eq!(config.strategy, Strategy::BestFit);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Strategy {
    /// Good fit by size class in constant time.
    #[default]
    Segregated,
    /// Tightest fit; the most frugal.
    BestFit,
    /// Lowest address that fits; keeps the far end of the memory free.
    FirstFit,
    /// A user's own policy.
    Custom(Arc<dyn Policy>),
}

impl Strategy {
    /// A strategy from a [`Policy`].
    pub fn custom(policy: impl Policy + 'static) -> Self {
        Self::Custom(Arc::new(policy))
    }

    /// The strategy's name, as the configuration and the statistics show it.
    pub fn name(&self) -> &str {
        match self {
            Self::Segregated => "segregated",
            Self::BestFit => "best_fit",
            Self::FirstFit => "first_fit",
            Self::Custom(policy) => policy.name(),
        }
    }
}

impl PartialEq for Strategy {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Custom(a), Self::Custom(b)) => Arc::ptr_eq(a, b),
            (a, b) => core::mem::discriminant(a) == core::mem::discriminant(b),
        }
    }
}

/// As its name; a policy of one's own cannot be read back.
#[cfg(feature = "serde")]
impl serde::Serialize for Strategy {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Strategy {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known = [Self::Segregated, Self::BestFit, Self::FirstFit];
        let found = known.into_iter().find(|strategy| strategy.name() == name);
        let names = &["segregated", "best_fit", "first_fit"];
        found.ok_or_else(|| serde::de::Error::unknown_variant(&name, names))
    }
}

impl<P: Policy + 'static> From<P> for Strategy {
    fn from(policy: P) -> Self {
        Self::custom(policy)
    }
}

/// A free range as a [`Policy`] sees it: a place, never memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FreeRange {
    /// First address of the range.
    pub start: usize,
    /// Its length in bytes.
    pub len: usize,
}

impl FreeRange {
    /// Bytes lost in front when a block aligned to `align` is cut from this range, and whether `size` bytes
    /// fit after them.
    pub fn fits(&self, size: usize, align: usize) -> bool {
        let skip = self.start.wrapping_neg() & (align - 1);
        self.len >= skip && self.len - skip >= size
    }
}

/// What is asked of a [`Policy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bytes the block will take, rounded to the pool's granule.
    pub size: usize,
    /// Alignment of the block's first address; a power of two.
    pub align: usize,
}

/// A user's own placement strategy.
///
/// The trait is safe: a policy sees places and answers with one, and the engine verifies every answer. An
/// answer that names no free range, or one too small, counts as no answer, and the pool falls back to best
/// fit; a policy can make a pool slow or wasteful, never unsound.
///
/// ```
/// use memory_pool::{FreeRange, Policy, PoolConfig, Request, VariablePool};
///
/// /// Takes the largest range, so that what stays behind is as useful as can be.
/// #[derive(Debug)]
/// struct WorstFit;
///
/// impl Policy for WorstFit {
///     fn name(&self) -> &str {
///         "worst_fit"
///     }
///     fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
///         free.filter(|range| range.fits(request.size, request.align)).max_by_key(|range| range.len)
///     }
/// }
///
/// let pool = VariablePool::new(PoolConfig::default_cpu().strategy(WorstFit))?;
/// # Ok::<(), memory_pool::Error>(())
/// ```
pub trait Policy: Send + Sync + fmt::Debug {
    /// The name shown in statistics.
    fn name(&self) -> &str;

    /// The range to cut the request from; `None` when none will do. `free` yields the free ranges in no
    /// particular order; this is called with the pool locked, so it must not use that pool.
    fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange>;
}

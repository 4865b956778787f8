//! The one suite that every pool passes, whatever its engine, strategy, synchronisation and kind of memory.
//!
//! A pool joins with [`subject!`](crate::subject), which goes through its inherent methods, so that pools for
//! one thread (which cannot be a `MemoryPool`) pass the same suite; [`Subject`] says what the pool can serve.

pub mod containers;
pub mod faults;
pub mod model;
pub mod rules;
pub mod threads;

use std::alloc::Layout;
use std::ptr::NonNull;

use memory_pool::{ActiveAllocation, AllocFlags, MemoryPool, MemoryStats, PoolConfig, Result};

/// The methods that every pool has, shared or not.
pub trait Pool {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>>;
    fn allocate_with(&self, layout: Layout, flags: AllocFlags) -> Result<NonNull<[u8]>>;
    /// # Safety
    /// As for the pool's.
    unsafe fn deallocate(&self, ptr: NonNull<u8>);
    fn owns(&self, ptr: NonNull<u8>) -> bool;
    fn usable_size(&self, ptr: NonNull<u8>) -> Option<usize>;
    fn reserve(&self, bytes: usize) -> Result<()>;
    fn trim(&self, keep: usize) -> Result<usize>;
    fn stats(&self) -> MemoryStats;
    fn reset_peak(&self);
    fn set_tracking(&self, on: bool);
    fn is_tracking(&self) -> bool;
    fn active_allocations(&self) -> Vec<ActiveAllocation>;
    fn has_leaks(&self) -> bool;
    fn config(&self) -> &PoolConfig;
    /// Empties the pool; shared pools refuse while anything is live, local ones cannot be asked then.
    fn try_reset(&mut self) -> Result<()>;
    /// Walks every invariant.
    fn check(&self);
}

/// Implements [`Pool`] from a pool's inherent methods: `shared` pools reset fallibly, `local` ones through
/// `&mut self`.
#[macro_export]
macro_rules! subject {
    (@reset shared, $self:ident) => {
        $self.reset()
    };
    (@reset local, $self:ident) => {{
        $self.reset();
        Ok(())
    }};
    ($sharing:ident $pool:ty) => {
        impl $crate::conformance::Pool for $pool {
            fn allocate(
                &self,
                layout: std::alloc::Layout,
            ) -> memory_pool::Result<std::ptr::NonNull<[u8]>> {
                <$pool>::allocate(self, layout)
            }
            fn allocate_with(
                &self,
                layout: std::alloc::Layout,
                flags: memory_pool::AllocFlags,
            ) -> memory_pool::Result<std::ptr::NonNull<[u8]>> {
                <$pool>::allocate_with(self, layout, flags)
            }
            unsafe fn deallocate(&self, ptr: std::ptr::NonNull<u8>) {
                // SAFETY: the caller's contract is the same.
                unsafe { <$pool>::deallocate(self, ptr) }
            }
            fn owns(&self, ptr: std::ptr::NonNull<u8>) -> bool {
                <$pool>::owns(self, ptr)
            }
            fn usable_size(&self, ptr: std::ptr::NonNull<u8>) -> Option<usize> {
                <$pool>::usable_size(self, ptr)
            }
            fn reserve(&self, bytes: usize) -> memory_pool::Result<()> {
                <$pool>::reserve(self, bytes)
            }
            fn trim(&self, keep: usize) -> memory_pool::Result<usize> {
                <$pool>::trim(self, keep)
            }
            fn stats(&self) -> memory_pool::MemoryStats {
                <$pool>::stats(self)
            }
            fn reset_peak(&self) {
                <$pool>::reset_peak(self)
            }
            fn set_tracking(&self, on: bool) {
                <$pool>::set_tracking(self, on)
            }
            fn is_tracking(&self) -> bool {
                <$pool>::is_tracking(self)
            }
            fn active_allocations(&self) -> Vec<memory_pool::ActiveAllocation> {
                <$pool>::active_allocations(self)
            }
            fn has_leaks(&self) -> bool {
                <$pool>::has_leaks(self)
            }
            fn config(&self) -> &memory_pool::PoolConfig {
                <$pool>::config(self)
            }
            fn try_reset(&mut self) -> memory_pool::Result<()> {
                $crate::subject!(@reset $sharing, self)
            }
            fn check(&self) {
                <$pool>::check(self).unwrap_or_else(|broken| panic!("{broken:?}"))
            }
        }
    };
}

/// A kind of pool under test, and what it can serve.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What failures are reported under.
    pub name: &'static str,
    /// The configuration to make pools from; the rules change limits and sizes only.
    pub config: PoolConfig,
    /// The largest request that must be served.
    pub largest: usize,
    /// The largest alignment that must be served.
    pub max_align: usize,
    /// Whether the CPU may read and write the memory.
    pub touchable: bool,
}

impl Subject {
    /// A pool on the host that serves anything.
    pub fn host(name: &'static str, config: PoolConfig) -> Self {
        Self { name, config, largest: 1 << 20, max_align: 1 << 30, touchable: true }
    }
}

/// How a rule gets its pools.
pub type Make<'a, P> = &'a dyn Fn(PoolConfig) -> Result<P>;

/// Every rule that holds for pools of one thread as well as for shared ones.
pub fn all_rules<P: Pool>(subject: &Subject, make: Make<'_, P>) {
    println!("{}", subject.name);
    model::random_operations(subject, make);
    rules::sizes_of_zero_are_dangling(subject, make);
    rules::absurd_sizes_are_errors(subject, make);
    rules::alignment_is_kept(subject, make);
    rules::growth_stops_at_the_limit(subject, make);
    rules::reserve_makes_later_growth_needless(subject, make);
    rules::trim_gives_idle_memory_back(subject, make);
    rules::zeroed_means_zeroed(subject, make);
    rules::no_grow_serves_from_what_is_there(subject, make);
    rules::foreign_addresses_are_recognised(subject, make);
    rules::live_blocks_are_listed(subject, make);
    rules::counts_and_peaks_add_up(subject, make);
    rules::device_wishes_are_refused_by_host_pools(subject, make);
    rules::reset_empties(subject, make);
}

/// What only pools that threads may share can be asked.
pub fn shared_rules<P: Pool + MemoryPool + 'static>(subject: &Subject, make: Make<'_, P>) {
    rules::reset_refuses_while_anything_is_live(subject, make);
    rules::the_trait_says_what_the_pool_says(subject, make);
    threads::blocks_cross_threads(subject, make);
    threads::growth_is_shared(subject, make);
}

/// A block under test: the place, and the layout it was asked with.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub ptr: NonNull<u8>,
    pub len: usize,
    pub layout: Layout,
}

// SAFETY: a place; the tests say who may touch it.
unsafe impl Send for Held {}

impl Held {
    pub fn new(block: NonNull<[u8]>, layout: Layout) -> Self {
        assert!(block.len() >= layout.size(), "{} bytes for {layout:?}", block.len());
        let ptr: NonNull<u8> = block.cast();
        assert_eq!(ptr.as_ptr() as usize % layout.align(), 0, "misaligned for {layout:?}");
        Self { ptr, len: block.len(), layout }
    }

    pub fn start(&self) -> usize {
        self.ptr.as_ptr() as usize
    }

    /// A byte that depends on the place, so that overlapping blocks disagree.
    fn mark(&self) -> u8 {
        (self.start() >> 4) as u8 ^ (self.start() >> 12) as u8 ^ 0x5A
    }

    /// Writes a pattern over the edges and some of the middle of the block.
    pub fn fill(&self) {
        for at in self.probes() {
            // SAFETY: inside a live block that the test owns.
            unsafe { self.ptr.add(at).write(self.mark() ^ at as u8) }
        }
    }

    /// Whether the pattern is still there.
    pub fn verify(&self) {
        for at in self.probes() {
            // SAFETY: inside a live block that the test owns.
            let found = unsafe { self.ptr.add(at).read() };
            assert_eq!(found, self.mark() ^ at as u8, "byte {at} of {self:?} was overwritten");
        }
    }

    /// All bytes of small blocks; both ends and every 61st byte of large ones.
    fn probes(&self) -> impl Iterator<Item = usize> + use<> {
        let len = self.len;
        let dense = len.min(256);
        (0..dense)
            .chain((dense..len.saturating_sub(64)).step_by(61))
            .chain(len.saturating_sub(64).max(dense)..len)
    }
}

/// A small generator (xorshift), so that a seed names a run.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % bound.max(1) as u64) as usize
    }

    /// A size between 1 and `largest`, each magnitude as likely.
    pub fn size(&mut self, largest: usize) -> usize {
        let magnitude = self.below(largest.ilog2() as usize + 1);
        (1 + self.below(2 << magnitude)).min(largest)
    }

    /// Mostly small alignments, now and then a larger one up to `max`.
    pub fn align(&mut self, max: usize) -> usize {
        let shift = if self.below(8) == 0 { self.below(15) } else { self.below(5) };
        (1usize << shift).min(max)
    }
}

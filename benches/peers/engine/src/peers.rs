//! One face for all allocators: an arena, alloc, free.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::NonNull;

use memory_pool::Strategy;
use memory_pool::engine::ranges::{Division, Ranges, Store};
use memory_pool::engine::{Engine, Span};

pub trait Peer {
    fn alloc(&mut self, layout: Layout) -> *mut u8;
    /// # Safety
    /// `at` came from `alloc` with this layout.
    unsafe fn free(&mut self, at: *mut u8, layout: Layout);
}

/// An arena of touched memory, aligned to 2 MiB.
#[derive(Clone, Copy)]
pub struct Arena {
    pub base: *mut u8,
    pub len: usize,
}

impl Arena {
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, 2 << 20).unwrap();
        // SAFETY: the layout has a size; the memory is never given back.
        let base = unsafe { System.alloc(layout) };
        assert!(!base.is_null());
        // SAFETY: just allocated.
        unsafe { base.write_bytes(1, len) };
        Self { base, len }
    }
}

/// Ours: the bare engine.
pub struct Ours<S: Store>(Ranges<S>);

impl<S: Store> Ours<S> {
    pub fn new(arena: Arena, strategy: Strategy) -> Self {
        let granule = std::env::var("GRANULE").map_or(16, |granule| granule.parse().expect("a number"));
        let min_rest = std::env::var("MIN_REST").map_or(32, |rest| rest.parse().expect("a number"));
        let mut ranges = Ranges::new(Division { strategy, granule, min_rest }).unwrap();
        let span = Span { start: arena.base.expose_provenance(), len: arena.len, zeroed: false };
        // SAFETY: the arena is never given back and serves nothing else meanwhile.
        unsafe { ranges.add(span) }.unwrap();
        Self(ranges)
    }
}

impl<S: Store> Peer for Ours<S> {
    #[inline]
    fn alloc(&mut self, layout: Layout) -> *mut u8 {
        match self.0.alloc(layout) {
            Some(block) => std::ptr::with_exposed_provenance_mut(block.start),
            None => std::ptr::null_mut(),
        }
    }
    #[inline]
    unsafe fn free(&mut self, at: *mut u8, _: Layout) {
        // SAFETY: the caller's contract.
        unsafe { self.0.free(at.addr()) };
    }
}

pub struct Talc(talc::base::Talc<talc::source::Manual, talc::DefaultBinning>);

impl Talc {
    pub fn new(arena: Arena) -> Self {
        let mut talc = talc::base::Talc::new(talc::source::Manual);
        // SAFETY: as above.
        unsafe { talc.claim(arena.base, arena.len) }.unwrap();
        Self(talc)
    }
}

impl Peer for Talc {
    #[inline]
    fn alloc(&mut self, layout: Layout) -> *mut u8 {
        // SAFETY: the size is not 0.
        unsafe { self.0.allocate(layout) }.map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }
    #[inline]
    unsafe fn free(&mut self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { self.0.deallocate(at, layout) };
    }
}

pub struct Rlsf(rlsf::Tlsf<'static, u32, u32, 24, 32>);

impl Rlsf {
    pub fn new(arena: Arena) -> Self {
        let mut tlsf = rlsf::Tlsf::new();
        let block = NonNull::slice_from_raw_parts(NonNull::new(arena.base).unwrap(), arena.len);
        // SAFETY: as above.
        unsafe { tlsf.insert_free_block_ptr(block) }.unwrap();
        Self(tlsf)
    }
}

impl Peer for Rlsf {
    #[inline]
    fn alloc(&mut self, layout: Layout) -> *mut u8 {
        self.0.allocate(layout).map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }
    #[inline]
    unsafe fn free(&mut self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { self.0.deallocate(NonNull::new_unchecked(at), layout.align()) };
    }
}

pub struct Dlmalloc(dlmalloc::Dlmalloc<Once>);

/// A system that gives the arena once, whole.
struct Once(Cell<Option<Arena>>);

// SAFETY: gives the arena to one caller.
unsafe impl dlmalloc::Allocator for Once {
    fn alloc(&self, _: usize) -> (*mut u8, usize, u32) {
        self.0.take().map_or((std::ptr::null_mut(), 0, 0), |arena| (arena.base, arena.len, 0))
    }
    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        std::ptr::null_mut()
    }
    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }
    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }
    fn can_release_part(&self, _: u32) -> bool {
        false
    }
    fn allocates_zeros(&self) -> bool {
        false
    }
    fn page_size(&self) -> usize {
        4096
    }
}
// SAFETY: this program has one thread.
unsafe impl Send for Once {}

impl Dlmalloc {
    pub fn new(arena: Arena) -> Self {
        Self(dlmalloc::Dlmalloc::new_with_allocator(Once(Cell::new(Some(arena)))))
    }
}

impl Peer for Dlmalloc {
    #[inline]
    fn alloc(&mut self, layout: Layout) -> *mut u8 {
        // SAFETY: the size is not 0.
        unsafe { self.0.malloc(layout.size(), layout.align()) }
    }
    #[inline]
    unsafe fn free(&mut self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { self.0.free(at, layout.size(), layout.align()) };
    }
}

/// Calls `$run(name, peer)` for each allocator, or only those whose names hold what `ONLY` says.
#[macro_export]
macro_rules! each_peer {
    ($arena:expr, $run:expr) => {{
        use memory_pool::Strategy::{BestFit, FirstFit, Segregated};
        let only = std::env::var("ONLY").unwrap_or_default();
        each_peer!(@ only, $run,
            "ours, segregated" => Ours::<InBlocks>::new($arena, Segregated),
            "talc 5" => Talc::new($arena),
            "rlsf 0.2" => Rlsf::new($arena),
            "dlmalloc 0.2" => Dlmalloc::new($arena),
            "ours, best fit" => Ours::<InBlocks>::new($arena, BestFit),
            "ours, first fit" => Ours::<InBlocks>::new($arena, FirstFit),
            "ours, beside, segregated" => Ours::<Beside>::new($arena, Segregated),
            "ours, beside, best fit" => Ours::<Beside>::new($arena, BestFit),
        );
    }};
    (@ $only:expr, $run:expr, $($name:literal => $peer:expr,)*) => {
        $(if $name.contains($only.as_str()) { $run($name, $peer); })*
    };
}

pub struct Random(pub u64);

impl Random {
    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    #[inline]
    pub fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next()) * limit as u128) >> 64) as usize
    }

    /// Log-uniform from 16 bytes to 64 KiB.
    pub fn size(&mut self) -> usize {
        let unit = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        (16.0 * 4096_f64.powf(unit)) as usize
    }
}

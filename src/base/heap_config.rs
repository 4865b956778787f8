//! How the process heap is to behave: settled once, before its first allocation.

/// When idle memory goes back to the system by itself. [`trim`](crate::GlobalPool::trim) gives it back at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Purge {
    /// Nearly at once: for programs whose memory others wait for. What comes back is faulted in anew.
    Eager,
    /// A thread keeps idle memory up to half of what is live in it, and 2 MiB in any case (4 MiB shared out once there
    /// are more than two threads, but at least 128 KiB each); more if it needed again what it gave back, as far as
    /// 14 MiB for each thread of as many as ran at once, all together; and up to 8 MiB of pages scattered among live blocks. `tests/heap_blow_up.rs` holds it to that:
    /// at most 2 times the pages that live blocks lie in and 64 MiB for one thread whose sizes shift; 3 times the
    /// live bytes and 8 MiB for four threads that come and go.
    #[default]
    Balanced,
    /// Never by itself: for programs that own the machine.
    Never,
}

/// Which parts of the process heap ask for huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum HugeUse {
    /// None, even where the system's setting is to use them everywhere.
    Never,
    /// Threads with more than 16 MiB of live blocks, and blocks of 4 MiB and more: small programs stay small.
    #[default]
    WhenLarge,
    /// All, from the first kilobyte.
    Always,
}

/// What the process heap does against errors and attacks.
///
/// With any part on, every allocation and every free take a checked path: each live block ends in a secret word that an
/// overflow destroys, and a free is verified to name the start of a live block. A free that is none, a block freed twice
/// and a block written past its end end the program with one line on stderr. A write after free meets nothing of the
/// heap's; [`HeapConfig::debug`] finds it. What the parts add is beside each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Hardening {
    /// The checked path, with nothing more.
    pub checks: bool,
    /// Inaccessible pages between spans (64 KiB or more of blocks of one size) and around large blocks. Of memory that
    /// asks for huge pages one half has none between spans, where they would prevent those.
    pub guard_pages: bool,
    /// Blocks are handed out in any order among a few neighbours.
    pub random_order: bool,
    /// A block is used again only after a number of later frees of its size.
    pub quarantine: bool,
}

impl Hardening {
    /// No part.
    pub const OFF: Self = Self { checks: false, guard_pages: false, random_order: false, quarantine: false };
    /// All parts.
    pub const FULL: Self = Self { checks: true, guard_pages: true, random_order: true, quarantine: true };

    /// Whether any part is on.
    pub const fn is_on(self) -> bool {
        self.checks || self.guard_pages || self.random_order || self.quarantine
    }

    /// The parts of both.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self {
            checks: self.checks || other.checks,
            guard_pages: self.guard_pages || other.guard_pages,
            random_order: self.random_order || other.random_order,
            quarantine: self.quarantine || other.quarantine,
        }
    }
}

/// The configuration of the process heap, given to [`GlobalPool::with_config`](crate::GlobalPool::with_config).
///
/// ```
/// use memory_pool::{GlobalPool, Hardening, HeapConfig, Purge};
/// #[global_allocator]
/// static POOL: GlobalPool = GlobalPool::with_config(HeapConfig { limit: 4 << 30, ..HeapConfig::new() });
/// static SAME: GlobalPool = GlobalPool::with_config(HeapConfig::new().limit(4 << 30));
/// const SAFE: HeapConfig = HeapConfig::new().hardened(Hardening::FULL).purge(Purge::Eager);
/// assert_eq!(GlobalPool::config().limit, 4 << 30);
/// # let _ = (&SAME, SAFE);
/// ```
///
/// The environment overrides, unless the program runs with more rights than its caller (setuid):
///
/// | variable | values | field |
/// |---|---|---|
/// | `MEMORY_POOL_LIMIT` | `512M`, `2G`, … or `unlimited` | `limit` |
/// | `MEMORY_POOL_PURGE` | `eager`, `balanced`, `never` | `purge` |
/// | `MEMORY_POOL_HUGE_PAGES` | `never`, `when_large`, `always` | `huge_pages` |
/// | `MEMORY_POOL_HARDENED` | `1`, or a list of `checks`, `guard_pages`, `random_order`, `quarantine`; adds to what the program asks for | `hardened` |
/// | `MEMORY_POOL_ZERO_ON_FREE` | `1`; `0` does not take back what the program asks for | `zero_on_free` |
/// | `MEMORY_POOL_HEAP_DEBUG` | `1`; `0` does not take back what the program asks for | `debug` |
/// | `MEMORY_POOL_REPORT` | `1`, `0` | `report_at_exit` |
///
/// A value that is none of these is named in a line on stderr, and what the program asked for stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeapConfig {
    /// Most bytes that the heap may hold; beyond, requests fail. Counted in pages of blocks, not in blocks.
    pub limit: usize,
    /// When idle memory goes back.
    pub purge: Purge,
    /// Who gets huge pages.
    pub huge_pages: HugeUse,
    /// What is done against errors and attacks.
    pub hardened: Hardening,
    /// Blocks are overwritten with zeros when they are freed. Turns the checks of `hardened` on.
    pub zero_on_free: bool,
    /// To find errors: fresh blocks are filled with `0xA5`, freed ones with `0xDD`, and a freed block that was
    /// written to, anywhere, ends the program when its turn to be used again comes. Turns the checks of `hardened`
    /// on; a block that is to be zero on free is filled with zeros instead.
    pub debug: bool,
    /// [`GlobalPool::report`](crate::GlobalPool::report) on stderr when the program exits.
    pub report_at_exit: bool,
}

impl HeapConfig {
    /// The defaults: no limit, balanced, huge pages for what is large, nothing else.
    pub const fn new() -> Self {
        Self {
            limit: usize::MAX,
            purge: Purge::Balanced,
            huge_pages: HugeUse::WhenLarge,
            hardened: Hardening::OFF,
            zero_on_free: false,
            debug: false,
            report_at_exit: false,
        }
    }

    /// Whether allocations and frees take the checked path.
    pub const fn is_checked(&self) -> bool {
        self.hardened.is_on() || self.zero_on_free || self.debug
    }
}

impl Default for HeapConfig {
    fn default() -> Self {
        Self::new()
    }
}

macro_rules! setters {
    ($($field:ident: $type:ty),*) => {
        impl HeapConfig {$(
            #[doc = concat!("Sets [`", stringify!($field), "`](Self#structfield.", stringify!($field), ").")]
            #[must_use]
            pub const fn $field(mut self, $field: $type) -> Self {
                self.$field = $field;
                self
            }
        )*}
    };
}

setters!(
    limit: usize,
    purge: Purge,
    huge_pages: HugeUse,
    hardened: Hardening,
    zero_on_free: bool,
    debug: bool,
    report_at_exit: bool
);

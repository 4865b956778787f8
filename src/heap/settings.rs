//! What the process heap is configured to do: the program's word and the environment's, settled once.
//!
//! The first allocation may come before `main` and from within a C library, so nothing here allocates or calls
//! what might.

use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::fmt::Write;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::hub::Hub;
use super::seal::{self, SEAL};
use super::stderr::Stderr;
use crate::base::env::parse_bytes;
use crate::base::heap_config::{Hardening, HeapConfig, HugeUse, Purge};
use crate::source::os;

/// What a hub may do beside, each a bit.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// Allocations and frees take the checked path.
    Checks = 1,
    GuardPages = 2,
    RandomOrder = 4,
    Quarantine = 8,
    ZeroOnFree = 16,
    Debug = 32,
}

/// How a hub behaves, as its slow paths read it. Written before the hub is used.
pub(crate) struct Settings {
    keep_least: AtomicUsize,
    keep_part: AtomicUsize,
    scattered: AtomicUsize,
    regret: AtomicUsize,
    warm: AtomicUsize,
    live_before_huge: AtomicUsize,
    huge_large: AtomicUsize,
    parts: AtomicU32,
}

impl Settings {
    /// Idle memory that a thread keeps in any case.
    const KEEP_LEAST: usize = 2 << 20;
    /// Idle memory up to which pages within spans, of which each takes a call, are not worth giving back.
    const SCATTERED: usize = 8 << 20;
    /// Idle memory that a thread comes to keep beyond that, if it needed again what it gave back.
    const REGRET: usize = 14 << 20;
    /// Idle memory that unowned segments may hold: enough for a stream of short threads.
    const WARM: usize = 4 << 20;
    /// A thread with this many live bytes gets further segments with huge pages: half of such a page, which it may
    /// never need, is then little beside what it has.
    const LIVE_BEFORE_HUGE: usize = 16 << 20;
    /// Mappings of this size ask for huge pages.
    const HUGE_LARGE: usize = 4 << 20;

    pub(super) const fn new() -> Self {
        Self {
            keep_least: AtomicUsize::new(Self::KEEP_LEAST),
            keep_part: AtomicUsize::new(2),
            scattered: AtomicUsize::new(Self::SCATTERED),
            regret: AtomicUsize::new(Self::REGRET),
            warm: AtomicUsize::new(Self::WARM),
            live_before_huge: AtomicUsize::new(Self::LIVE_BEFORE_HUGE),
            huge_large: AtomicUsize::new(Self::HUGE_LARGE),
            parts: AtomicU32::new(0),
        }
    }

    pub(super) fn apply(&self, config: &HeapConfig) {
        let (least, part, scattered, regret, warm) = match config.purge {
            Purge::Eager => (64 << 10, 32, 0, 0, 0),
            Purge::Balanced => (Self::KEEP_LEAST, 2, Self::SCATTERED, Self::REGRET, Self::WARM),
            Purge::Never => (usize::MAX, 1, usize::MAX, 0, usize::MAX),
        };
        let (live, large) = match config.huge_pages {
            HugeUse::Never => (usize::MAX, usize::MAX),
            HugeUse::WhenLarge => (Self::LIVE_BEFORE_HUGE, Self::HUGE_LARGE),
            HugeUse::Always => (0, 0),
        };
        self.keep_least.store(least, Ordering::Relaxed);
        self.keep_part.store(part, Ordering::Relaxed);
        self.scattered.store(scattered, Ordering::Relaxed);
        self.regret.store(regret, Ordering::Relaxed);
        self.warm.store(warm, Ordering::Relaxed);
        self.live_before_huge.store(live, Ordering::Relaxed);
        self.huge_large.store(large, Ordering::Relaxed);
        let hardened = config.hardened;
        let parts = [
            (config.is_checked(), Part::Checks),
            (hardened.guard_pages, Part::GuardPages),
            (hardened.random_order, Part::RandomOrder),
            (hardened.quarantine, Part::Quarantine),
            (config.zero_on_free, Part::ZeroOnFree),
            (config.debug, Part::Debug),
        ];
        let bits = parts.iter().filter(|(on, _)| *on).map(|(_, part)| *part as u32).sum();
        self.parts.store(bits, Ordering::Relaxed);
        if config.is_checked() {
            seal::draw();
        }
    }

    #[inline]
    pub(super) fn has(&self, part: Part) -> bool {
        self.parts.load(Ordering::Relaxed) & part as u32 != 0
    }

    /// Bytes at the end of a block that are not the program's.
    pub(super) fn seal(&self) -> usize {
        if self.has(Part::Checks) { SEAL } else { 0 }
    }

    /// Bytes of a guard page, where there are any.
    pub(super) fn guard_page(&self) -> usize {
        if self.has(Part::GuardPages) { os::page_size() } else { 0 }
    }

    /// Idle memory that is kept beside `live` bytes, where there is nobody else.
    pub(super) fn keep_alone(&self, live: usize) -> usize {
        self.keep_least.load(Ordering::Relaxed).max(live / self.keep_part.load(Ordering::Relaxed))
    }

    /// Idle memory that one of `threads` keeps beside `live` bytes, where `extra` bytes proved worth keeping.
    pub(super) fn keep(&self, live: usize, extra: usize, threads: usize) -> usize {
        let least = self.keep_least.load(Ordering::Relaxed);
        share(least, threads).max(live / self.keep_part.load(Ordering::Relaxed)).saturating_add(extra)
    }

    /// And up to which pages within spans stay, where `keep` bytes of whole slices do.
    pub(super) fn keep_scattered(&self, keep: usize) -> usize {
        keep.max(self.scattered.load(Ordering::Relaxed))
    }

    /// Most that a thread keeps for having given it back in vain.
    pub(super) fn regret(&self) -> usize {
        self.regret.load(Ordering::Relaxed)
    }

    /// Whether idle memory goes back by itself.
    pub(super) fn purges(&self) -> bool {
        self.keep_least.load(Ordering::Relaxed) != usize::MAX
    }

    /// Idle memory that unowned segments may hold where `heaps` threads ran at once: what as many idle threads
    /// would keep, so that threads that come and go fault in no more than threads that stay. Each would keep
    /// `extra` bytes beyond the least.
    pub(super) fn warm(&self, heaps: usize, extra: usize) -> usize {
        match self.warm.load(Ordering::Relaxed) {
            0 => 0,
            least => {
                let each = self.keep_least.load(Ordering::Relaxed).saturating_add(extra);
                least.max(heaps.saturating_mul(each))
            }
        }
    }

    /// Whether a thread with so many live bytes gets its next segment with huge pages.
    pub(super) fn huge_segment(&self, live: usize) -> bool {
        live >= self.live_before_huge.load(Ordering::Relaxed)
    }

    /// The length of a mapping for `len` bytes: whole huge pages, where it asks for those and that is little more.
    pub(super) fn large_len(&self, len: usize) -> usize {
        let whole = len.checked_next_multiple_of(HUGE_PAGE).unwrap_or(len);
        let wanted = self.huge_large(len) == Some(true) && self.guard_page() == 0;
        if wanted && whole - len <= len / 16 { whole } else { len }
    }

    /// Whether a mapping of `len` bytes asks for huge pages; `None` leaves that to the system.
    pub(super) fn huge_large(&self, len: usize) -> Option<bool> {
        match self.huge_large.load(Ordering::Relaxed) {
            usize::MAX => Some(false),
            least => (len >= least).then_some(true),
        }
    }
}

/// What a huge page holds, on most systems.
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// What one of `threads` may keep of `bytes`: all of it if they are few; many have no more than a few would.
fn share(bytes: usize, threads: usize) -> usize {
    const FEW: usize = 2;
    const LEAST: usize = 128 << 10;
    if threads <= FEW || bytes == usize::MAX { bytes } else { (bytes / threads * FEW).max(LEAST.min(bytes)) }
}

const FRESH: u32 = 0;
const BUSY: u32 = 1;
const SETTLED: u32 = 2;
static STATE: AtomicU32 = AtomicU32::new(FRESH);

/// The configuration in force; written once, before `STATE` says so.
struct InForce(UnsafeCell<HeapConfig>);
// SAFETY: written by the one thread that made `STATE` busy, read once it is settled.
unsafe impl Sync for InForce {}
static IN_FORCE: InForce = InForce(UnsafeCell::new(HeapConfig::new()));

/// The configuration in force, once there is one.
pub(crate) fn in_force() -> Option<HeapConfig> {
    // SAFETY: settled, it is never written again.
    (STATE.load(Ordering::Acquire) == SETTLED).then(|| unsafe { *IN_FORCE.0.get() })
}

/// Settles the configuration of `hub`, the process heap, if nobody did: `asked` with what the environment says.
/// Whether it was settled here.
pub(super) fn settle(hub: &Hub, asked: &HeapConfig) -> bool {
    match STATE.compare_exchange(FRESH, BUSY, Ordering::Acquire, Ordering::Acquire) {
        Ok(_) => {
            let config = with_environment(*asked);
            hub.configure(&config);
            // SAFETY: this thread alone made the state busy, and nobody reads before it is settled.
            unsafe { *IN_FORCE.0.get() = config };
            STATE.store(SETTLED, Ordering::Release);
            true
        }
        Err(_) => {
            while STATE.load(Ordering::Acquire) != SETTLED {
                // SAFETY: sched_yield has no preconditions.
                unsafe { libc::sched_yield() };
            }
            false
        }
    }
}

/// Whether the program has rights that who started it may lack.
fn is_privileged() -> bool {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    // SAFETY: getauxval has no preconditions.
    unsafe {
        libc::getauxval(libc::AT_SECURE) != 0
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    // SAFETY: these have no preconditions.
    unsafe {
        libc::getuid() != libc::geteuid() || libc::getgid() != libc::getegid()
    }
}

fn with_environment(asked: HeapConfig) -> HeapConfig {
    if is_privileged() { asked } else { overridden(asked, &variable, &mut complain) }
}

/// A variable's value, where it was when the program started.
fn variable(name: &'static CStr) -> Option<&'static [u8]> {
    // SAFETY: the name ends in a null; before `main` nobody changes the environment.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    // SAFETY: the environment's strings end in a null.
    (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) }.to_bytes())
}

fn complain(name: &'static CStr, value: &[u8], allowed: &str) {
    let name = name.to_str().unwrap_or_default();
    let mut line = Stderr::new();
    _ = write!(line, "memory-pool: {name}=\"");
    for byte in value.iter().take(100) {
        let shown = if byte.is_ascii_graphic() || *byte == b' ' { *byte as char } else { '?' };
        _ = line.write_char(shown);
    }
    _ = writeln!(line, "\" is ignored; allowed: {allowed}");
}

type Lookup<'a> = &'a dyn Fn(&'static CStr) -> Option<&'static [u8]>;
type Complain<'a> = &'a mut dyn FnMut(&'static CStr, &[u8], &str);

/// `config` with what the variables say.
fn overridden(mut config: HeapConfig, variable: Lookup<'_>, complain: Complain<'_>) -> HeapConfig {
    let mut read = |name, allowed: &str, set: &mut dyn FnMut(&str) -> Option<()>| {
        let Some(value) = variable(name) else { return };
        if core::str::from_utf8(value).ok().map(str::trim).and_then(set).is_none() {
            complain(name, value, allowed);
        }
    };
    const SWITCH: &str = "1, 0, true, false, on, off, yes, no";
    let switch = |text: &str| match text {
        "1" | "true" | "on" | "yes" => Some(true),
        "0" | "false" | "off" | "no" => Some(false),
        _ => None,
    };
    read(c"MEMORY_POOL_LIMIT", "bytes: 512M, 2G or unlimited", &mut |text| {
        config.limit = parse_bytes(text).filter(|&limit| limit > 0)?;
        Some(())
    });
    read(c"MEMORY_POOL_PURGE", "eager, balanced, never", &mut |text| {
        config.purge = match text {
            "eager" => Purge::Eager,
            "balanced" => Purge::Balanced,
            "never" => Purge::Never,
            _ => return None,
        };
        Some(())
    });
    read(c"MEMORY_POOL_HUGE_PAGES", "never, when_large, always", &mut |text| {
        config.huge_pages = match text {
            "never" => HugeUse::Never,
            "when_large" => HugeUse::WhenLarge,
            "always" => HugeUse::Always,
            _ => return None,
        };
        Some(())
    });
    read(
        c"MEMORY_POOL_HARDENED",
        "1, 0, or a list of checks, guard_pages, random_order, quarantine",
        &mut |text| {
            config.hardened = config.hardened.and(hardening(text, &switch)?);
            Some(())
        },
    );
    read(c"MEMORY_POOL_ZERO_ON_FREE", SWITCH, &mut |text| {
        config.zero_on_free |= switch(text)?;
        Some(())
    });
    read(c"MEMORY_POOL_HEAP_DEBUG", SWITCH, &mut |text| {
        config.debug |= switch(text)?;
        Some(())
    });
    read(c"MEMORY_POOL_REPORT", SWITCH, &mut |text| {
        config.report_at_exit = switch(text)?;
        Some(())
    });
    config
}

fn hardening(text: &str, switch: &dyn Fn(&str) -> Option<bool>) -> Option<Hardening> {
    if let Some(all) = switch(text) {
        return Some(if all { Hardening::FULL } else { Hardening::OFF });
    }
    let mut parts = Hardening::OFF;
    for part in text.split(',') {
        match part.trim() {
            "checks" => parts.checks = true,
            "guard_pages" => parts.guard_pages = true,
            "random_order" => parts.random_order = true,
            "quarantine" => parts.quarantine = true,
            _ => return None,
        }
    }
    Some(parts)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn with(variables: &[(&'static CStr, &'static str)], asked: HeapConfig) -> (HeapConfig, usize) {
        let mut complaints = 0;
        let config = overridden(
            asked,
            &|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_bytes()),
            &mut |_, _, allowed| {
                assert!(!allowed.is_empty());
                complaints += 1;
            },
        );
        (config, complaints)
    }

    #[test]
    fn every_field_has_its_variable() {
        let (config, complaints) = with(
            &[
                (c"MEMORY_POOL_LIMIT", "3G"),
                (c"MEMORY_POOL_PURGE", " eager"),
                (c"MEMORY_POOL_HUGE_PAGES", "always"),
                (c"MEMORY_POOL_HARDENED", "checks, quarantine"),
                (c"MEMORY_POOL_ZERO_ON_FREE", "yes"),
                (c"MEMORY_POOL_HEAP_DEBUG", "on"),
                (c"MEMORY_POOL_REPORT", "1"),
            ],
            HeapConfig::new(),
        );
        let hardened = Hardening { checks: true, quarantine: true, ..Hardening::OFF };
        let expected = HeapConfig::new()
            .limit(3 << 30)
            .purge(Purge::Eager)
            .huge_pages(HugeUse::Always)
            .hardened(hardened)
            .zero_on_free(true)
            .debug(true)
            .report_at_exit(true);
        assert_eq!((config, complaints), (expected, 0));
        assert_eq!(with(&[(c"MEMORY_POOL_HARDENED", "1")], HeapConfig::new()).0.hardened, Hardening::FULL);
    }

    #[test]
    fn the_environment_never_weakens() {
        let safe = HeapConfig::new().hardened(Hardening::FULL).zero_on_free(true).debug(true);
        for value in ["0", "off", "checks", "nonsense", ""] {
            let variables = [
                (c"MEMORY_POOL_HARDENED", value),
                (c"MEMORY_POOL_ZERO_ON_FREE", value),
                (c"MEMORY_POOL_HEAP_DEBUG", value),
            ];
            assert_eq!(with(&variables, safe).0, safe, "{value}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named_and_changes_nothing() {
        let asked = HeapConfig::new().limit(1 << 30).purge(Purge::Never);
        for (name, value) in [
            (c"MEMORY_POOL_LIMIT", "64 monkeys"),
            (c"MEMORY_POOL_LIMIT", "0"),
            (c"MEMORY_POOL_LIMIT", "99999999999T"),
            (c"MEMORY_POOL_PURGE", "EAGER"),
            (c"MEMORY_POOL_HUGE_PAGES", ""),
            (c"MEMORY_POOL_HARDENED", "checks,all"),
            (c"MEMORY_POOL_HARDENED", "2"),
            (c"MEMORY_POOL_ZERO_ON_FREE", "maybe"),
            (c"MEMORY_POOL_REPORT", "\u{fffd}"),
        ] {
            assert_eq!(with(&[(name, value)], asked), (asked, 1), "{name:?}={value}");
        }
    }
}

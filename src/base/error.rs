//! The one error type: a fixed-size value that is made without allocating and rendered when printed.
//!
//! | code | variant | category | meaning |
//! |---|---|---|---|
//! | 101 | [`Error::OutOfMemory`] | Memory | the source, the limit or the address space is exhausted |
//! | 201 | [`Error::InvalidOperation`] | Usage | the call is not allowed in the present state |
//! | 202 | [`Error::InvalidPointer`] | Usage | the address is not a live block of this pool |
//! | 301 | [`Error::Config`] | Configuration | a field or a variable has an impossible value |
//! | 401 | [`Error::NoDriver`] | Device | no CUDA driver on this machine |
//! | 402 | [`Error::NoDevice`] | Device | no device of that number |
//! | 403 | [`Error::Cuda`] | Device | a driver call failed |
//! | 404 | [`Error::OldDriver`] | Device | the CUDA driver is too old, or not whole |
//! | 501 | [`Error::Io`] | System | the operating system refused |
//! | 601 | [`Error::Corrupt`] | Corruption | stored data contradicts itself |

use core::fmt;

pub use super::text::ShortText;

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// What went wrong, where, and (when printed) what to do next.
///
/// ```
/// use memory_pool::{Error, ErrorCategory, FixedPool, PoolConfig};
/// let pool = FixedPool::new(PoolConfig::fixed_size_cpu(512).max_size(1 << 20))?;
/// let error = pool.reserve(1 << 30).unwrap_err();
/// assert!(matches!(error, Error::OutOfMemory { requested, .. } if requested >= 1 << 30));
/// assert_eq!((error.code(), error.category()), (101, ErrorCategory::Memory));
/// println!("{error}"); // … raise `max_size` …
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A request that cannot be served.
    #[non_exhaustive]
    OutOfMemory {
        /// Bytes that were asked for.
        requested: usize,
        /// What ran out.
        reason: OomReason,
    },
    /// The call is not allowed now.
    InvalidOperation(Refusal),
    /// The address is not what the call needs.
    InvalidPointer(BadPointer),
    /// An impossible configuration.
    Config(BadConfig),
    /// A call of the CUDA driver failed.
    #[non_exhaustive]
    Cuda {
        /// The driver's `CUresult`.
        code: i32,
        /// The driver call.
        call: &'static str,
    },
    /// No CUDA driver library on this machine.
    NoDriver,
    /// There is a CUDA driver, but it cannot serve.
    OldDriver {
        /// Its version as the driver counts: 11030 is CUDA 11.3.
        found: i32,
        /// The oldest version that serves.
        needed: i32,
        /// A function that it lacks, if it is new enough otherwise.
        missing: Option<&'static str>,
    },
    /// No such device.
    #[non_exhaustive]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        available: usize,
    },
    /// The operating system refused.
    Io(IoFault),
    /// Stored data contradicts itself.
    #[non_exhaustive]
    Corrupt {
        /// Byte offset of the contradiction in the file, or the address in memory.
        at: u64,
        /// What was expected there.
        what: &'static str,
        /// The word found there instead, where one word says it.
        found: Option<u64>,
    },
}

/// What an [`Error::OutOfMemory`] ran out of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OomReason {
    /// The source (operating system, driver, file system) gave nothing more.
    Source,
    /// The pool's `max_size`, in bytes.
    Limit(usize),
    /// The pool's file; its size in bytes.
    PoolFull(usize),
    /// The memory handed in by the caller, which cannot grow; its size in bytes.
    Fixed(usize),
    /// The pool's free memory, where the request forbade asking the source.
    NoGrow,
    /// Larger than one block of this pool can ever be; that size in bytes.
    TooLarge(usize),
    /// The device's memory; who holds it, in bytes.
    Device {
        /// Live in this pool.
        live: usize,
        /// Free in this pool, in pieces too small or still in use by the device.
        idle: usize,
        /// Free on the device.
        free: usize,
    },
    /// Size and alignment together overflow the address space.
    Overflow,
}

/// Why an [`Error::InvalidOperation`] was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// This many blocks are still live.
    StillLive(usize),
    /// The pool was made with `thread_safe(false)` and belongs to another thread.
    WrongThread,
    /// Stream and memory are of different devices.
    WrongDevice {
        /// The number of the stream's device.
        found: usize,
        /// The number of the memory's device.
        needed: usize,
    },
    /// Source and destination of a copy differ in length; both in elements.
    Lengths {
        /// Elements of the source.
        source: usize,
        /// Elements of the destination.
        target: usize,
    },
    /// The call waits or asks, which would invalidate the graph capture in progress on the stream.
    Capturing,
    /// A pool of that name exists.
    NameTaken(ShortText),
    /// No pool of that name exists.
    NameUnknown(ShortText),
    /// The pool of that name is of another kind.
    WrongKind {
        /// The name looked up.
        name: ShortText,
        /// The kind of pool found.
        found: &'static str,
    },
    /// The pool behind this handle was destroyed.
    Destroyed,
    /// An earlier failure to synchronise poisoned the pool.
    Poisoned,
    /// The file holds another layout than the one asked for.
    WrongLayout {
        /// The layout found.
        found: ShortText,
    },
    /// No root of that name exists.
    RootUnknown(ShortText),
    /// Two transactions want what the other has; this one gave way.
    Conflict,
    /// This kind of pool does not do that; the first text says what, the second what to use instead.
    Unsupported(&'static str, &'static str),
    /// Anything else; the first text says what, the second what to do.
    Other(&'static str, &'static str),
}

/// What is wrong with the address of an [`Error::InvalidPointer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BadPointer {
    /// The address.
    pub address: usize,
    /// What is wrong with it.
    pub fault: PointerFault,
}

/// The kinds of wrong addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PointerFault {
    /// No memory of this pool.
    Foreign,
    /// Inside a block, not at its start.
    Interior,
    /// The block is free already.
    NotLive,
    /// The layout given at free does not fit the block.
    Layout,
    /// A range that leaves its block or pool.
    OutOfRange,
    /// Memory of another device or another pool than the call needs.
    WrongOwner,
    /// What lies there is of another type.
    WrongType,
}

/// The field or variable an [`Error::Config`] complains of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BadConfig {
    /// The field, the fields, or the environment variable.
    pub field: &'static str,
    /// Its value as written.
    pub value: ShortText,
    /// What is allowed.
    pub allowed: &'static str,
}

/// The system call behind an [`Error::Io`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IoFault {
    /// The call.
    pub call: &'static str,
    /// The kind of failure.
    pub kind: std::io::ErrorKind,
    /// The system's error number, where there is one.
    pub os: Option<i32>,
}

impl IoFault {
    /// What helps, where the call and its failure say it.
    fn advice(&self) -> &'static str {
        use std::io::ErrorKind;
        match (self.call, self.kind) {
            ("open", ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                "; chmod gives more, and a persistent pool that may only be read opens with open_read_only"
            }
            ("open", ErrorKind::NotFound) => "; create it first",
            ("open", ErrorKind::AlreadyExists) => "; open it, or remove it first",
            ("fdatasync" | "fsync", _) => {
                "; what was not yet durable may be lost, so the pool writes no more: open it again when the disk works"
            }
            (_, ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => "; free disk space",
            _ => "",
        }
    }
}

/// The family an [`Error`] belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCategory {
    /// Memory ran out; freeing some or raising a limit helps.
    Memory,
    /// The program misused the pool.
    Usage,
    /// The configuration is impossible.
    Configuration,
    /// The device or its driver failed.
    Device,
    /// The operating system refused.
    System,
    /// Stored data is damaged.
    Corruption,
}

impl Error {
    /// A number that never changes its meaning.
    pub const fn code(&self) -> u32 {
        match self {
            Self::OutOfMemory { .. } => 101,
            Self::InvalidOperation(_) => 201,
            Self::InvalidPointer(_) => 202,
            Self::Config(_) => 301,
            Self::NoDriver => 401,
            Self::NoDevice { .. } => 402,
            Self::Cuda { .. } => 403,
            Self::OldDriver { .. } => 404,
            Self::Io(_) => 501,
            Self::Corrupt { .. } => 601,
        }
    }

    /// The family of the error.
    pub const fn category(&self) -> ErrorCategory {
        match self.code() / 100 {
            1 => ErrorCategory::Memory,
            2 => ErrorCategory::Usage,
            3 => ErrorCategory::Configuration,
            4 => ErrorCategory::Device,
            5 => ErrorCategory::System,
            _ => ErrorCategory::Corruption,
        }
    }

    #[inline]
    pub(crate) const fn oom(requested: usize, reason: OomReason) -> Self {
        Self::OutOfMemory { requested, reason }
    }

    #[inline]
    pub(crate) const fn pointer(address: usize, fault: PointerFault) -> Self {
        Self::InvalidPointer(BadPointer { address, fault })
    }

    #[cold]
    pub(crate) fn config(field: &'static str, value: impl fmt::Display, allowed: &'static str) -> Self {
        Self::Config(BadConfig { field, value: ShortText::from_display(&value), allowed })
    }

    #[cold]
    pub(crate) fn io(call: &'static str, error: &std::io::Error) -> Self {
        Self::Io(IoFault { call, kind: error.kind(), os: error.raw_os_error() })
    }

    /// The failure that `errno` names right now, of system call `call`.
    #[cold]
    pub(crate) fn last_os(call: &'static str) -> Self {
        Self::io(call, &std::io::Error::last_os_error())
    }

    /// Stored data at `at` is `found` where it should be `what`.
    #[cold]
    pub(crate) const fn corrupt(at: u64, what: &'static str, found: u64) -> Self {
        Self::Corrupt { at, what, found: Some(found) }
    }

    #[cold]
    pub(crate) const fn refused(what: &'static str, advice: &'static str) -> Self {
        Self::InvalidOperation(Refusal::Other(what, advice))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfMemory { requested, reason } => {
                write!(f, "out of memory: {requested} bytes asked for, {reason}")
            }
            Self::InvalidOperation(refusal) => write!(f, "invalid operation: {refusal}"),
            Self::InvalidPointer(bad) => write!(f, "invalid pointer {:#x}: {}", bad.address, bad.fault),
            Self::Config(bad) => {
                write!(f, "impossible configuration: {} = {}; allowed: {}", bad.field, bad.value, bad.allowed)
            }
            Self::Cuda { code, call } => {
                write!(f, "{call} failed with CUDA error {code}{}", cuda_advice(*code))
            }
            Self::OldDriver { found, needed, missing } => {
                write!(f, "the CUDA driver serves CUDA {}", CudaVersion(*found))?;
                if let Some(missing) = missing {
                    write!(f, " but lacks {missing}")?;
                }
                write!(f, ", CUDA {} is needed; install a newer driver", CudaVersion(*needed))
            }
            Self::NoDriver => f.write_str(
                "no CUDA driver on this machine; install one, or use GpuDevice::simulated for tests",
            ),
            Self::NoDevice { ordinal, available } => {
                write!(f, "no CUDA device {ordinal}: {available} visible; check CUDA_VISIBLE_DEVICES")
            }
            Self::Io(fault) => {
                write!(f, "{} failed: {}", fault.call, fault.kind)?;
                if let Some(errno) = fault.os {
                    write!(f, " (os error {errno})")?;
                }
                f.write_str(fault.advice())
            }
            Self::Corrupt { at, what, found } => {
                write!(f, "corrupt at {at:#x}: expected {what}; ")?;
                if let Some(found) = found {
                    write!(f, "found {found:#x}; ")?;
                }
                f.write_str("do not write to it")
            }
        }
    }
}

impl core::error::Error for Error {}

/// A version as the CUDA driver counts.
struct CudaVersion(i32);

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// What the driver's commoner errors mean, and what to do.
fn cuda_advice(code: i32) -> &'static str {
    match code {
        1 => " (invalid value); check addresses and lengths",
        2 => " (out of memory); free something on the device",
        101 => " (invalid device); check the number of the device",
        201 => " (invalid context); the device's context was destroyed, or belongs to another device",
        217 => " (no peer access); these two devices cannot reach each other, copy through the host",
        400 => " (invalid handle); the stream, event or graph was destroyed, or belongs to another device",
        700 => " (illegal address); a kernel went wrong before, and the context is lost: start anew",
        719 => " (launch failure); a kernel went wrong before, and the context is lost: start anew",
        802 | 803 => " (driver mismatch); library and kernel driver differ: restart the machine",
        900..=907 => {
            " (graph capture); this is not allowed while a stream is captured: do it before or after"
        }
        _ => "; see CUresult in the CUDA driver API",
    }
}

impl fmt::Display for OomReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source => f.write_str("the source has no more; free or trim something, then retry"),
            Self::Limit(max) => write!(f, "past max_size = {max}; free something or raise `max_size`"),
            Self::PoolFull(len) => {
                write!(f, "the pool's file of {len} bytes is full; free something or grow it")
            }
            Self::Fixed(len) => write!(f, "the {len} bytes handed in cannot grow; hand in more"),
            Self::NoGrow => {
                f.write_str("nothing that fits is free; reserve it before, or allow growth (no NO_GROW)")
            }
            Self::TooLarge(max) => write!(f, "this pool serves at most {max}; use a variable pool"),
            Self::Device { live, idle, free } => write!(
                f,
                "this pool holds {live} live and {idle} idle, the device has {free} free; drop buffers, or \
                 look at print_allocated_blocks"
            ),
            Self::Overflow => f.write_str("more than the address space holds; check the size computation"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StillLive(count) => write!(f, "{count} blocks are still live; free them first"),
            Self::WrongThread => f.write_str(
                "this pool was made with thread_safe(false) by another thread; make it with thread_safe(true)",
            ),
            Self::WrongDevice { found, needed } if found == needed => write!(
                f,
                "stream and memory come from two openings of device {found}; open it once and clone the handle"
            ),
            Self::WrongDevice { found, needed } => write!(
                f,
                "the stream is of device {found} and the memory of device {needed}; use a stream of that device"
            ),
            Self::Lengths { source, target } => write!(
                f,
                "the source has {source} elements and the destination {target}; slice the longer to the shorter"
            ),
            Self::Capturing => f.write_str(
                "the stream is being captured into a graph, which waiting or asking would invalidate; do it \
                 before or after the capture",
            ),
            Self::NameTaken(name) => {
                write!(f, "a pool named \"{name}\" exists; choose another name or destroy it first")
            }
            Self::NameUnknown(name) => write!(f, "no pool is named \"{name}\"; create it first"),
            Self::WrongKind { name, found } => {
                write!(f, "pool \"{name}\" is a {found} pool; look it up as one")
            }
            Self::Destroyed => f.write_str("the pool was destroyed; create it again"),
            Self::Poisoned => f.write_str("an earlier sync failed; close the pool and open it again"),
            Self::WrongLayout { found } => {
                write!(f, "the file's layout is \"{found}\"; open it under that name with a program that knows it")
            }
            Self::RootUnknown(name) => write!(f, "no root is named \"{name}\"; set it in a transaction first"),
            Self::Conflict => f.write_str("another transaction holds what this one needs; run this one again"),
            Self::Unsupported(what, advice) | Self::Other(what, advice) => write!(f, "{what}; {advice}"),
        }
    }
}

impl fmt::Display for PointerFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Foreign => "not memory of this pool; free it where it was allocated",
            Self::Interior => "inside a block; pass the address that allocate returned",
            Self::NotLive => "not a live block; it may have been freed before",
            Self::Layout => "the layout does not fit this block; pass the one it was allocated with",
            Self::OutOfRange => "the range leaves the block; check offset and length",
            Self::WrongType => "what lies there is of another type; ask for the type it was stored as",
            Self::WrongOwner => "it belongs to another pool or device; use that one",
        })
    }
}

impl From<core::alloc::LayoutError> for Error {
    fn from(_: core::alloc::LayoutError) -> Self {
        Self::oom(usize::MAX, OomReason::Overflow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_stay_small_and_every_message_says_what_to_do() {
        assert!(size_of::<Error>() <= 80, "{} bytes", size_of::<Error>());
        let name = ShortText::new("frames");
        let all = [
            Error::oom(1, OomReason::Source),
            Error::oom(1, OomReason::Limit(2)),
            Error::oom(1, OomReason::PoolFull(2)),
            Error::oom(1, OomReason::Fixed(2)),
            Error::oom(1, OomReason::Device { live: 1, idle: 2, free: 3 }),
            Error::oom(1, OomReason::NoGrow),
            Error::oom(1, OomReason::TooLarge(2)),
            Error::oom(1, OomReason::Overflow),
            Error::InvalidOperation(Refusal::StillLive(3)),
            Error::InvalidOperation(Refusal::WrongThread),
            Error::InvalidOperation(Refusal::NameTaken(name)),
            Error::InvalidOperation(Refusal::NameUnknown(name)),
            Error::InvalidOperation(Refusal::WrongKind { name, found: "gpu" }),
            Error::InvalidOperation(Refusal::Destroyed),
            Error::InvalidOperation(Refusal::Poisoned),
            Error::InvalidOperation(Refusal::Conflict),
            Error::InvalidOperation(Refusal::RootUnknown(name)),
            Error::InvalidOperation(Refusal::WrongLayout { found: name }),
            Error::pointer(16, PointerFault::Foreign),
            Error::pointer(16, PointerFault::NotLive),
            Error::pointer(16, PointerFault::WrongType),
            Error::config("block_size", 0, "1 or more"),
            Error::Cuda { code: 2, call: "cuMemCreate" },
            Error::Cuda { code: 400, call: "cuEventRecord" },
            Error::Cuda { code: 999, call: "cuMemCreate" },
            Error::OldDriver { found: 11030, needed: 11040, missing: None },
            Error::InvalidOperation(Refusal::WrongDevice { found: 1, needed: 0 }),
            Error::InvalidOperation(Refusal::Lengths { source: 1, target: 2 }),
            Error::InvalidOperation(Refusal::Capturing),
            Error::NoDriver,
            Error::NoDevice { ordinal: 3, available: 1 },
            Error::corrupt(64, "a checksum", 0),
        ];
        for error in all {
            let text = error.to_string();
            assert!(text.contains(';'), "no advice in: {text}");
        }
        let io = Error::io("mmap", &std::io::Error::from_raw_os_error(12));
        assert!(io.to_string().contains("mmap") && io.to_string().contains("12"));
    }
}

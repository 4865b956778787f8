//! What a debug layer found: a value that a test can inspect and a report that a person can read.

use core::fmt;

use super::stack::Stack;
use super::stats::Bytes;

/// Bytes of memory that a [`Finding`] shows.
pub const WINDOW: usize = 48;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub enum FindingKind {
    /// Bytes behind a block were written.
    Overflow,
    /// Bytes in front of a block were written.
    Underflow,
    /// A freed block was written.
    WriteAfterFree,
    /// A block was freed a second time.
    DoubleFree,
    /// An address was freed that this pool did not hand out.
    ForeignFree,
    /// An address inside a live block was freed.
    InteriorFree,
    /// A block was freed with a layout that it was not allocated with.
    WrongLayout,
    /// A block was still live when its pool went away.
    Leak,
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Overflow => "overflow",
            Self::Underflow => "underflow",
            Self::WriteAfterFree => "write after free",
            Self::DoubleFree => "double free",
            Self::ForeignFree => "foreign free",
            Self::InteriorFree => "interior free",
            Self::WrongLayout => "wrong layout",
            Self::Leak => "leak",
        })
    }
}

/// When, by which thread and from where something was done to a block.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Site {
    /// The pool's operations are numbered from 1.
    pub operation: u64,
    /// Threads are numbered in the order in which they first used a debug layer.
    pub thread: u32,
    /// The stack, where stacks are kept.
    pub stack: Option<Stack>,
}

/// One error that a debug layer found.
///
/// ```
/// use memory_pool::{AnyPool, FindingKind, OnFinding, PoolConfig};
/// use std::alloc::Layout;
/// /// use std::alloc::Layout;
/// let mut config = PoolConfig::debug_cpu();
/// config.debug.on_finding = OnFinding::Collect;
/// let pool = AnyPool::new(config)?;
/// let block = pool.allocate(Layout::new::<[u8; 24]>())?.cast::<u8>();
/// // SAFETY: not at all: this writes one byte too far, into memory that the debug layer set aside for that.
/// unsafe { block.add(24).write(1) };
/// // SAFETY: the block is live and freed once.
/// unsafe { pool.deallocate(block) };
/// let found = &pool.diagnostics().unwrap().findings()[0];
/// assert_eq!((found.kind, found.offset, found.damaged), (FindingKind::Overflow, 24, 1));
/// println!("{found}");
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Finding {
    /// What is wrong.
    pub kind: FindingKind,
    /// The block, as the user knows it; for a foreign free the address that was freed.
    pub address: usize,
    /// Bytes that the user asked for; 0 where the block is unknown.
    pub size: usize,
    /// The alignment that the user asked for; 0 where the block is unknown.
    pub align: usize,
    /// Where the damage begins, from the block's first byte; for an interior free, how far inside it is.
    pub offset: isize,
    /// Damaged bytes.
    pub damaged: usize,
    /// Size and alignment given at free, where they are what is wrong.
    pub given: Option<(usize, usize)>,
    /// Who allocated the block.
    pub allocated: Option<Site>,
    /// Who freed the block before.
    pub freed: Option<Site>,
    /// Who was at work when this was found: for a double free, the second one.
    pub found: Option<Site>,
    /// Address of the first of the [`bytes`](Self::bytes).
    pub bytes_at: usize,
    /// The bytes around the damage as they were when it was found; none where there is no damage.
    pub bytes: Vec<u8>,
    /// What undamaged bytes hold, around the block or in it after its free.
    pub expected: u8,
}

impl Finding {
    /// A finding about the block at `address`, its details still to be filled in.
    pub(crate) fn new(kind: FindingKind, address: usize) -> Self {
        Self {
            kind,
            address,
            size: 0,
            align: 0,
            offset: 0,
            damaged: 0,
            given: None,
            allocated: None,
            freed: None,
            found: None,
            bytes_at: address,
            bytes: Vec::new(),
            expected: 0,
        }
    }

    fn summary(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, address, damaged, offset, .. } = self;
        let bytes = Count(*damaged, "byte");
        match kind {
            FindingKind::Overflow => write!(f, "{bytes} changed behind a block, from byte {offset} on"),
            FindingKind::Underflow => write!(f, "{bytes} changed in front of a block, from byte {offset} on"),
            FindingKind::WriteAfterFree => {
                write!(f, "{bytes} of a freed block changed, from byte {offset} on")
            }
            FindingKind::DoubleFree => f.write_str("a block was freed that is free already"),
            FindingKind::ForeignFree => write!(f, "{address:#x} was freed, which is no block of this pool"),
            FindingKind::InteriorFree => write!(f, "byte {offset} of a block was freed, not its first"),
            FindingKind::WrongLayout => {
                let (size, align) = self.given.unwrap_or_default();
                write!(f, "a block was freed as {} aligned to {align}", Count(size, "byte"))
            }
            FindingKind::Leak => f.write_str("a block was never freed"),
        }
    }

    fn dump(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (line, bytes) in self.bytes.chunks(16).enumerate() {
            let start = self.bytes_at + 16 * line;
            write!(f, "\n    {start:#014x} ")?;
            for (index, byte) in bytes.iter().enumerate() {
                // The damage is bracketed where it begins.
                let here = (start + index).wrapping_sub(self.address) as isize == self.offset;
                write!(f, "{}{byte:02x}", if here { '>' } else { ' ' })?;
            }
        }
        if !self.bytes.is_empty() {
            write!(f, "\n    (undamaged: {:02x})", self.expected)?;
        }
        Ok(())
    }
}

/// A number of things.
struct Count(usize, &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.0, self.1, if self.0 == 1 { "" } else { "s" })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.kind)?;
        self.summary(f)?;
        if self.align > 0 {
            write!(f, "\n  block of {} bytes aligned to {} at {:#x}", self.size, self.align, self.address)?;
        }
        self.dump(f)?;
        let sites = [("allocated", &self.allocated), ("freed", &self.freed), ("found", &self.found)];
        for (what, site) in sites {
            if let Some(site) = site {
                write!(f, "\n  {what} by thread {} in operation {}", site.thread, site.operation)?;
                if let Some(stack) = &site.stack {
                    write!(f, "\n{stack}")?;
                }
            }
        }
        Ok(())
    }
}

/// Leaks as a person reads them: grouped by the stack that allocated, the largest groups first.
///
/// ```
/// use memory_pool::{Diagnostics, LeakReport, PoolConfig};
/// let pool = memory_pool::AnyPool::new(PoolConfig::debug_cpu())?;
/// let report = LeakReport::new(pool.diagnostics().unwrap().leaks());
/// assert_eq!((report.blocks(), report.bytes()), (0, 0));
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LeakReport {
    groups: Vec<LeakGroup>,
}

#[derive(Clone, Debug)]
struct LeakGroup {
    first: Finding,
    blocks: usize,
    bytes: usize,
}

impl LeakReport {
    /// Groups that are printed in full.
    const SHOWN: usize = 10;

    /// Groups `leaks` by the stack that allocated.
    pub fn new(leaks: impl IntoIterator<Item = Finding>) -> Self {
        let mut groups = std::collections::HashMap::<Option<Stack>, LeakGroup>::new();
        for leak in leaks {
            let stack = leak.allocated.as_ref().and_then(|site| site.stack);
            let size = leak.size;
            let group = groups.entry(stack).or_insert(LeakGroup { first: leak, blocks: 0, bytes: 0 });
            group.blocks += 1;
            group.bytes += size;
        }
        let mut groups: Vec<_> = groups.into_values().collect();
        groups.sort_by_key(|group| (core::cmp::Reverse(group.bytes), group.first.address));
        Self { groups }
    }

    /// Blocks leaked.
    pub fn blocks(&self) -> usize {
        self.groups.iter().map(|group| group.blocks).sum()
    }

    /// Bytes leaked, as asked for.
    pub fn bytes(&self) -> usize {
        self.groups.iter().map(|group| group.bytes).sum()
    }
}

impl fmt::Display for LeakReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "leak: {}, {}, never freed", Count(self.blocks(), "block"), Bytes(self.bytes() as u64))?;
        for LeakGroup { first, blocks, bytes } in self.groups.iter().take(Self::SHOWN) {
            let (blocks, bytes) = (Count(*blocks, "block"), Bytes(*bytes as u64));
            write!(f, "\n  {blocks}, {bytes}, the first at {:#x}", first.address)?;
            if let Some(Site { operation, thread, stack }) = &first.allocated {
                write!(f, ", allocated by thread {thread} in operation {operation}")?;
                if let Some(stack) = stack {
                    write!(f, "\n{stack}")?;
                }
            }
        }
        if self.groups.len() > Self::SHOWN {
            write!(f, "\n  and {}", Count(self.groups.len() - Self::SHOWN, "smaller group"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_where_and_shows_the_bytes() {
        let mut finding = Finding::new(FindingKind::Overflow, 0x1000);
        (finding.size, finding.align, finding.offset, finding.damaged) = (24, 8, 24, 1);
        (finding.bytes_at, finding.bytes, finding.expected) = (0x1010, vec![0xb9; 16], 0xb9);
        finding.bytes[8] = 0x41;
        finding.allocated = Some(Site { operation: 7, thread: 2, stack: None });
        let text = finding.to_string();
        assert!(text.starts_with("overflow: 1 byte changed behind a block, from byte 24 on"), "{text}");
        assert!(text.contains("block of 24 bytes aligned to 8 at 0x1000"), "{text}");
        assert!(text.contains("0x000000001010  b9 b9 b9 b9 b9 b9 b9 b9>41 b9"), "{text}");
        assert!(text.contains("allocated by thread 2 in operation 7"), "{text}");
    }

    #[test]
    fn leaks_are_grouped_by_stack() {
        let leak = |size, frames: &[usize]| {
            let mut leak = Finding::new(FindingKind::Leak, 16);
            leak.size = size;
            let stack = Some(Stack::from_frames(frames));
            leak.allocated = Some(Site { operation: 1, thread: 1, stack });
            leak
        };
        let report = LeakReport::new([leak(8, &[64]), leak(100, &[65]), leak(24, &[64])]);
        assert_eq!((report.groups.len(), report.blocks(), report.bytes()), (2, 3, 132));
        assert_eq!(report.groups[0].bytes, 100);
        assert!(report.to_string().starts_with("leak: 3 blocks, 132 B, never freed"));
    }
}

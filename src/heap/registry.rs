//! Which addresses belong to which heap: a table of all segments and large mappings of the process.
//!
//! Any address may be looked up and no memory behind it is read. The table has two levels over units of a
//! segment; leaves are mapped when first needed and stay. An entry is the hub's address, with the
//! lowest bit set for large mappings and the next for the first unit of one, where its books are; it is
//! written before the unit is handed out and cleared before it is unmapped.

use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::hub::Hub;
use super::lock::SpinLock;
use super::segment::SEGMENT;
use crate::source::os;

/// Addresses have this many bits at most.
const ADDRESS_BITS: u32 = if cfg!(target_pointer_width = "64") { 48 } else { 32 };
const UNITS: usize = 1 << (ADDRESS_BITS - SEGMENT.trailing_zeros());
const LEAF: usize = if UNITS < 1 << 13 { UNITS } else { 1 << 13 };

type Leaf = [Entry; LEAF];

/// What is noted of a unit. The links make lists of a hub's segments that are in order while the segments
/// themselves hold no memory; they are addresses of segments, 0 at the end, and the hub's lock guards them.
pub(super) struct Entry {
    owner: AtomicPtr<Hub>,
    /// The next of all segments of the hub.
    pub(super) sibling: AtomicUsize,
    /// The next of those that hold nothing, not even their books.
    pub(super) bare: AtomicUsize,
}

/// Tags of an entry.
const LARGE: usize = 1;
const FIRST: usize = 2;
const _: () = assert!(align_of::<Hub>() > LARGE | FIRST);
static ROOT: [AtomicPtr<Leaf>; UNITS / LEAF] = [const { AtomicPtr::new(ptr::null_mut()) }; UNITS / LEAF];
/// Held while a leaf is added.
pub(super) static GROWTH: SpinLock<()> = SpinLock::new(());

#[inline(always)]
fn leaf(unit: usize) -> Option<&'static Leaf> {
    // SAFETY: leaves are never unmapped, and published after they were mapped.
    unsafe { ROOT.get(unit / LEAF)?.load(Ordering::Acquire).as_ref() }
}

fn grow(unit: usize) -> Option<&'static Leaf> {
    let slot = ROOT.get(unit / LEAF)?;
    let _growth = GROWTH.lock();
    if let Some(present) = leaf(unit) {
        return Some(present);
    }
    let len = size_of::<Leaf>().next_multiple_of(os::page_size());
    let fresh = os::map(len, os::page_size(), os::Access::ReadWrite).ok()?;
    slot.store(fresh.as_ptr().cast(), Ordering::Release);
    leaf(unit)
}

/// What lies at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Nothing of ours.
    Foreign,
    /// A segment of this hub.
    Segment(*const Hub),
    /// The first unit of a large mapping of this hub, which begins with its books.
    LargeBooks(*const Hub),
    /// A later one, not all of which need be ours.
    LargeRest(*const Hub),
}

/// Notes that `[base, base + len)` belongs to `hub`; false where there is no memory for that.
pub(super) fn insert(base: usize, len: usize, hub: &Hub, large: bool) -> bool {
    let units = base / SEGMENT..(base + len).div_ceil(SEGMENT);
    for unit in units.clone() {
        if leaf(unit).or_else(|| grow(unit)).is_none() {
            return false;
        }
    }
    for unit in units.clone() {
        if let Some(leaf) = leaf(unit) {
            let tags = match large {
                false => 0,
                true if unit == units.start => LARGE | FIRST,
                true => LARGE,
            };
            let entry = ptr::from_ref(hub).cast_mut().map_addr(|hub| hub | tags);
            leaf[unit % LEAF].owner.store(entry, Ordering::Release);
        }
    }
    true
}

/// Forgets `[base, base + len)`.
pub(super) fn remove(base: usize, len: usize) {
    for unit in base / SEGMENT..(base + len).div_ceil(SEGMENT) {
        if let Some(leaf) = leaf(unit) {
            leaf[unit % LEAF].owner.store(ptr::null_mut(), Ordering::Release);
        }
    }
}

/// The entry of the unit of `address`, if its part of the table is there.
#[inline(always)]
pub(super) fn entry(address: usize) -> Option<&'static Entry> {
    let unit = address / SEGMENT;
    leaf(unit).map(|leaf| &leaf[unit % LEAF])
}

#[inline(always)]
fn owner(address: usize) -> *mut Hub {
    entry(address).map_or(ptr::null_mut(), |entry| entry.owner.load(Ordering::Acquire))
}

/// Whether `address` lies in a segment of `hub`.
#[inline(always)]
pub(super) fn in_segment(address: usize, hub: &Hub) -> bool {
    ptr::eq(owner(address), hub)
}

/// What the unit of `address` belongs to.
pub(crate) fn lookup(address: usize) -> Unit {
    let entry = owner(address);
    let hub = entry.map_addr(|hub| hub & !(LARGE | FIRST));
    match entry.addr() & (LARGE | FIRST) {
        _ if hub.is_null() => Unit::Foreign,
        0 => Unit::Segment(hub),
        LARGE => Unit::LargeRest(hub),
        _ => Unit::LargeBooks(hub),
    }
}

//! Size classes: which block size serves a request.
//!
//! Sizes up to 256 bytes go in steps of 16; above, each doubling is cut into eight, so that at most one
//! ninth of a block is unused. Every function is `const` and folds away for a constant layout.

/// Number of size classes.
pub(crate) const COUNT: usize = 81;
/// Largest size that has a class; larger requests take slices or mappings of their own.
pub(crate) const MAX: usize = 64 << 10;
/// The class behind that of `MAX`, for what a hardened heap makes of such requests.
pub(crate) const LARGEST: usize = COUNT - 1;
/// Alignment of its blocks.
pub(crate) const LARGEST_ALIGN: usize = 1 << size(LARGEST).trailing_zeros();
/// Alignment that every block has.
pub(crate) const MIN_ALIGN: usize = 16;
/// Requests below this size find their class in the fine table, the others in the coarse one.
const FINE_END: usize = 16 << 10;
/// Classes from `FINE_END` on lie this far apart, or farther.
const COARSE_STEP: usize = 1024;

static FINE: [u8; FINE_END / MIN_ALIGN + 1] = table(MIN_ALIGN);
static COARSE: [u8; MAX / COARSE_STEP + 1] = table(COARSE_STEP);

/// The class of each multiple of `step`.
const fn table<const N: usize>(step: usize) -> [u8; N] {
    let mut table = [0; N];
    let mut at = 1;
    while at < N {
        table[at] = compute(at * step) as u8;
        at += 1;
    }
    table
}

/// The class by arithmetic: the position of the leading bit chooses the doubling, the next three the step.
const fn compute(size: usize) -> usize {
    let last = size - 1;
    let shift = (last | 128).ilog2() as usize - 3;
    (shift - 4) * 8 + (last >> shift)
}

/// The class whose blocks hold `size` bytes; `size <= MAX`.
#[inline(always)]
pub(crate) fn of(size: usize) -> usize {
    debug_assert!(size <= MAX);
    if size < FINE_END {
        FINE[size.wrapping_add(MIN_ALIGN - 1) / MIN_ALIGN] as usize
    } else {
        COARSE[size.wrapping_add(COARSE_STEP - 1) / COARSE_STEP] as usize
    }
}

/// The class of a small request, which is what fast paths serve themselves; `None` leaves it to [`of_layout`].
#[inline(always)]
pub(crate) fn of_small(size: usize, align: usize) -> Option<usize> {
    // One comparison for both: a power of two above `MIN_ALIGN` has none of the lower bits, and becomes huge.
    let unaligned = (align & (2 * MIN_ALIGN - 1)).wrapping_sub(1);
    if size | unaligned < FINE_END {
        Some(FINE[size.wrapping_add(MIN_ALIGN - 1) / MIN_ALIGN] as usize)
    } else {
        None
    }
}

/// The class for `size` bytes at a multiple of `align`; `None` when only a mapping of its own will do. All
/// sizes from the one asked for up to the block's give the same class.
#[inline(always)]
pub(crate) fn of_layout(size: usize, align: usize) -> Option<usize> {
    // Blocks start at a multiple of the largest power of two that divides their size.
    let size = if align <= MIN_ALIGN { size } else { size.checked_add(align - 1)? & !(align - 1) };
    if size <= MAX { Some(of(size)) } else { None }
}

/// Block size of a class.
#[inline]
pub(crate) const fn size(class: usize) -> usize {
    if class < 16 { (class + 1) * 16 } else { (class % 8 + 9) << (class / 8 + 3) }
}

/// Slices of a span of this class. Where many blocks are in use, 16 of them or more up to 16 KiB and 8 or more above, of
/// which little is cut off at the end; else a quarter of that, so that little lies idle in a span that is not filled.
pub(crate) const fn slices(class: usize, many: bool) -> usize {
    match size(class) {
        0..=0x1000 => 1,
        0x1001..=0x4000 => {
            if many {
                4
            } else {
                1
            }
        }
        0x4001..=0x8000 => {
            if many {
                8
            } else {
                2
            }
        }
        _ => {
            if many {
                8
            } else {
                4
            }
        }
    }
}

/// Blocks that a thread keeps of this class before it hands half of them back.
pub(crate) const fn cache_capacity(class: usize) -> usize {
    match size(class) {
        0..=0x100 => 128,
        0x101..=0x400 => 64,
        0x401..=0x1000 => 32,
        0x1001..=0x4000 => 16,
        0x4001..=0x8000 => 8,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_their_sizes_with_little_waste() {
        for asked in 1..=MAX {
            let class = of(asked);
            let block = size(class);
            assert!(class < LARGEST && block >= asked, "{asked}");
            assert!(class == 0 || size(class - 1) < asked, "{asked} fits a smaller class");
            assert!(asked < 128 || (block - asked) * 8 <= block, "{asked} wastes in {block}");
        }
        assert_eq!((size(0), size(of(MAX)), of(MAX) + 1), (16, MAX, LARGEST));
    }

    #[test]
    fn aligned_layouts_keep_one_class_over_all_fitting_sizes() {
        for align in (0..=16).map(|shift| 1 << shift) {
            for asked in [1, 24, 100, 250, 300, 1000, 5000, 33000, 65536usize] {
                let Some(class) = of_layout(asked, align) else {
                    assert!(asked.next_multiple_of(align) > MAX);
                    continue;
                };
                let block = size(class);
                assert!(block >= asked && block.is_multiple_of(align));
                for fitting in [asked, (asked + block) / 2, block] {
                    let small = of_small(fitting, align);
                    assert!(small.is_none_or(|small| small == class), "{fitting} {align}");
                    assert_eq!(of_layout(fitting, align), Some(class), "{asked} {fitting} {align}");
                }
            }
        }
        assert_eq!(of_layout(usize::MAX, 4096), None);
    }
}

//! Bits and checked rounding. Alignments and granules are powers of two throughout.

/// `value` rounded up to a multiple of `align`; `None` when that does not fit.
#[inline]
pub(crate) const fn round_up(value: usize, align: usize) -> Option<usize> {
    debug_assert!(align.is_power_of_two());
    match value.checked_add(align - 1) {
        Some(sum) => Some(sum & !(align - 1)),
        None => None,
    }
}

/// `value` rounded down to a multiple of `align`.
#[inline]
pub(crate) const fn round_down(value: usize, align: usize) -> usize {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}

/// Whether `value` is a multiple of `align`.
#[inline]
pub(crate) const fn is_aligned(value: usize, align: usize) -> bool {
    debug_assert!(align.is_power_of_two());
    value & (align - 1) == 0
}

/// The largest `n` with `1 << n <= value`; `value` is not zero.
#[inline]
pub(crate) const fn floor_log2(value: usize) -> u32 {
    debug_assert!(value != 0);
    usize::BITS - 1 - value.leading_zeros()
}

/// The `n`s for which `start + n * stride` is a multiple of `align`: the first, and the distance to the next.
/// `None` where there is none.
pub(crate) fn aligned_steps(start: usize, stride: usize, align: usize) -> Option<(usize, usize)> {
    let common = 1 << stride.trailing_zeros().min(align.trailing_zeros());
    if !is_aligned(start, common) {
        return None;
    }
    let step = align / common;
    // Modulo a power of two an odd number has an inverse; each round doubles the bits that are right.
    let odd = stride / common;
    let mut inverse = odd;
    for _ in 0..6 {
        inverse = inverse.wrapping_mul(2usize.wrapping_sub(odd.wrapping_mul(inverse)));
    }
    let first = (start / common).wrapping_neg().wrapping_mul(inverse) & (step - 1);
    Some((first, step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_stops_at_the_end_of_the_address_space() {
        assert_eq!(round_up(0, 16), Some(0));
        assert_eq!(round_up(1, 16), Some(16));
        assert_eq!(round_up(16, 16), Some(16));
        assert_eq!(round_up(usize::MAX - 14, 16), None);
        assert_eq!(round_up(usize::MAX - 15, 16), Some(usize::MAX - 15));
        assert_eq!(round_down(31, 16), 16);
        assert!(is_aligned(32, 32) && !is_aligned(33, 32));
        assert_eq!((floor_log2(1), floor_log2(255), floor_log2(256)), (0, 7, 8));
    }

    #[test]
    fn aligned_steps_are_all_there_are() {
        for start in (0..200).chain([1 << 40, (1 << 40) + 24]) {
            for stride in [1, 8, 24, 40, 64, 96, 1008, 4096] {
                for align in [1, 2, 16, 64, 256, 4096] {
                    let expected: Vec<usize> =
                        (0..5000).filter(|n| is_aligned(start + n * stride, align)).collect();
                    let found: Vec<usize> = match aligned_steps(start, stride, align) {
                        Some((first, step)) => (first..5000).step_by(step).collect(),
                        None => Vec::new(),
                    };
                    assert_eq!(found, expected, "{start} + n * {stride}, {align}");
                }
            }
        }
    }
}

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
}

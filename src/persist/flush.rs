//! Flush instructions for persistent memory, chosen when a pool is opened.

use core::ptr::NonNull;

const LINE: usize = 64;

/// How a cache line is written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flusher {
    /// CLWB: the line stays in the cache.
    #[cfg(target_arch = "x86_64")]
    Clwb,
    /// CLFLUSHOPT: the line is dropped, in any order with others.
    #[cfg(target_arch = "x86_64")]
    ClflushOpt,
    /// CLFLUSH: every processor of the architecture has it.
    #[cfg(target_arch = "x86_64")]
    Clflush,
    /// DC CVAP: clean to the point of persistence.
    #[cfg(target_arch = "aarch64")]
    DcCvap,
    /// The architecture has no such instruction in this crate, and DAX mappings are refused by its kernel.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    None,
}

impl Flusher {
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn detect() -> Self {
        use core::arch::x86_64::{__cpuid, __cpuid_count};
        let features = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).ebx } else { 0 };
        if features & 1 << 24 != 0 {
            Self::Clwb
        } else if features & 1 << 23 != 0 {
            Self::ClflushOpt
        } else {
            Self::Clflush
        }
    }

    #[cfg(target_arch = "aarch64")]
    pub(crate) fn detect() -> Self {
        Self::DcCvap
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(crate) fn detect() -> Self {
        Self::None
    }

    /// Starts to write back every line of the range, which is mapped.
    pub(crate) fn flush(self, start: NonNull<u8>, len: usize) {
        let first = start.as_ptr() as usize & !(LINE - 1);
        let end = start.as_ptr() as usize + len;
        for line in (first..end).step_by(LINE) {
            // SAFETY: the instruction writes a mapped line back and changes nothing the program can see; it
            // exists on this processor as `detect` found.
            unsafe {
                match self {
                    #[cfg(target_arch = "x86_64")]
                    Self::Clwb => core::arch::asm!("clwb [{}]", in(reg) line, options(nostack)),
                    #[cfg(target_arch = "x86_64")]
                    Self::ClflushOpt => core::arch::asm!("clflushopt [{}]", in(reg) line, options(nostack)),
                    #[cfg(target_arch = "x86_64")]
                    Self::Clflush => core::arch::asm!("clflush [{}]", in(reg) line, options(nostack)),
                    #[cfg(target_arch = "aarch64")]
                    Self::DcCvap => core::arch::asm!("dc cvap, {}", in(reg) line, options(nostack)),
                    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
                    Self::None => _ = line,
                }
            }
        }
    }

    /// Waits until the flushes before it have reached persistence.
    pub(crate) fn fence(self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE is part of the architecture.
        unsafe {
            core::arch::x86_64::_mm_sfence();
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a barrier changes nothing the program can see.
        unsafe {
            core::arch::asm!("dsb sy", options(nostack));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_that_this_processor_has_keeps_the_data() {
        let data = vec![7u8; 1000];
        #[cfg(target_arch = "x86_64")]
        let kinds = [Flusher::detect(), Flusher::Clflush];
        #[cfg(not(target_arch = "x86_64"))]
        let kinds = [Flusher::detect()];
        for kind in kinds {
            kind.flush(NonNull::from(&data[3]), 900);
            kind.fence();
            assert!(data.iter().all(|&byte| byte == 7));
        }
    }
}

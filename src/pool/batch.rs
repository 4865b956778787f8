//! Many blocks at once: one turn at the engine for all of them.

use core::alloc::Layout;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use super::core::{Core, pointer};
use super::front::Front;
use super::large::large_aligned;
use crate::base::config::MAX_ALIGNMENT;
use crate::base::error::Result;
use crate::base::host::dangling;
use crate::observe::Observer;
use crate::source::Source;

impl<F: Front, S: Source, O: Observer> Core<F, S, O> {
    /// Fills `blocks`, or leaves nothing allocated.
    pub(super) fn allocate_batch(
        &self,
        layout: Layout,
        blocks: &mut [MaybeUninit<NonNull<u8>>],
    ) -> Result<()> {
        self.admit()?;
        if layout.size() == 0 {
            blocks.fill(MaybeUninit::new(dangling(layout).cast()));
            return Ok(());
        }
        let mut filled = 0;
        if !O::ACTIVE && self.front.in_turn() {
            self.front.with(|engine| {
                while filled < blocks.len()
                    && let Some(block) = engine.alloc(layout)
                {
                    blocks[filled].write(pointer(block.start));
                    filled += 1;
                }
            });
        }
        while filled < blocks.len() {
            match self.allocate(layout) {
                Ok(block) => {
                    blocks[filled].write(block.cast());
                    filled += 1;
                }
                Err(error) => {
                    // SAFETY: the first `filled` were just written, and nobody has seen them.
                    unsafe { self.deallocate_batch(blocks[..filled].assume_init_ref()) };
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Frees all of `blocks`.
    ///
    /// # Safety
    /// As for `deallocate`, for each of them.
    pub(super) unsafe fn deallocate_batch(&self, blocks: &[NonNull<u8>]) {
        // Whether the engine alone knows what to do with the block; the same answer both times it is asked.
        let plain = |address: usize| address > MAX_ALIGNMENT && !large_aligned::<F>(address);
        let addresses = blocks.iter().map(|block| block.as_ptr() as usize);
        let at_once = !O::ACTIVE && self.front.in_turn();
        if at_once {
            self.front.with(|engine| {
                for address in addresses.filter(|&address| plain(address)) {
                    // SAFETY: the caller's contract; empty and large blocks are left out.
                    unsafe { engine.free(address) };
                }
            });
        }
        for &block in blocks.iter().filter(|block| !at_once || !plain(block.as_ptr() as usize)) {
            // SAFETY: the caller's contract.
            unsafe { self.deallocate(block, None) };
        }
    }
}

//! Each thread's slot: which heap the thread uses.
//!
//! The heap may be the program's `malloc`, so reading the slot must neither allocate nor call anything. A
//! `thread_local!` in a shared library is read through a function of the dynamic loader, which may allocate
//! the thread's copy. On Linux for x86-64 the slot is therefore declared to the assembler, as one that lies
//! at a fixed distance from the thread's base ("initial exec"): two loads wherever it is, one of them a
//! constant once linked into a program. A library opened late finds room for it in the reserve that the
//! loader keeps for such slots. Elsewhere it is a plain `thread_local!`.

pub(super) use chosen::{get, set};

#[cfg(all(target_arch = "x86_64", target_os = "linux", target_pointer_width = "64", not(miri)))]
mod chosen {
    use core::arch::{asm, global_asm};

    use crate::heap::thread::{Front, UNBOUND};

    /// The slot's symbol; two versions of this crate in one program have one each.
    macro_rules! slot {
        () => {
            concat!(
                "memory_pool_slot_",
                env!("CARGO_PKG_VERSION_MAJOR"),
                "_",
                env!("CARGO_PKG_VERSION_MINOR"),
                "_",
                env!("CARGO_PKG_VERSION_PATCH")
            )
        };
    }

    global_asm!(
        ".pushsection .tdata, \"awT\", @progbits",
        concat!(".globl ", slot!()),
        concat!(".hidden ", slot!()),
        concat!(".type ", slot!(), ", @object"),
        concat!(".size ", slot!(), ", 8"),
        ".p2align 3",
        concat!(slot!(), ": .quad {unbound}"),
        ".popsection",
        unbound = sym UNBOUND,
    );

    /// What the slot holds.
    #[inline(always)]
    pub(in crate::heap) fn get() -> *const Front {
        let front;
        // SAFETY: reads this thread's eight bytes of `slot!()`.
        unsafe {
            asm!(
                concat!("mov {0}, qword ptr [rip + ", slot!(), "@gottpoff]"),
                "mov {0}, qword ptr fs:[{0}]",
                out(reg) front,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        front
    }

    /// Stores into the slot.
    pub(in crate::heap) fn set(front: *const Front) {
        // SAFETY: writes this thread's eight bytes of `slot!()`, which nothing else refers to.
        unsafe {
            asm!(
                concat!("mov {0}, qword ptr [rip + ", slot!(), "@gottpoff]"),
                "mov qword ptr fs:[{0}], {1}",
                out(reg) _,
                in(reg) front,
                options(nostack, preserves_flags),
            );
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", target_pointer_width = "64", not(miri))))]
mod chosen {
    use core::cell::Cell;

    use crate::heap::thread::{Front, UNBOUND};

    thread_local! {
        static SLOT: Cell<*const Front> = const { Cell::new(&raw const UNBOUND) };
    }

    #[inline(always)]
    pub(in crate::heap) fn get() -> *const Front {
        SLOT.with(Cell::get)
    }

    pub(in crate::heap) fn set(front: *const Front) {
        SLOT.with(|slot| slot.set(front));
    }
}

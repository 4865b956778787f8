//! What programs ask of glibc's heap beside memory, answered for this one.

use std::ffi::c_int;
use std::fmt::{self, Write};

use memory_pool::{GlobalPool, HeapStats};

use crate::c::set_errno;

/// Writes `line` to stderr and aborts.
pub(crate) fn die(line: &[u8]) -> ! {
    // SAFETY: the line outlives the call.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::abort()
    }
}

/// Bytes of live blocks, those with a mapping of their own among them.
fn live(stats: &HeapStats) -> usize {
    stats.classes.iter().map(|class| class.live * class.size).sum::<usize>() + stats.large
}

/// The table of [`HeapStats`] on stderr.
#[unsafe(no_mangle)]
extern "C" fn malloc_stats() {
    GlobalPool::print_report();
}

/// The same as XML, as far as glibc's format has a place for it.
///
/// # Safety
/// `stream` is open for writing.
#[unsafe(no_mangle)]
unsafe extern "C" fn malloc_info(options: c_int, stream: *mut libc::FILE) -> c_int {
    if options != 0 {
        set_errno(libc::EINVAL);
        return -1;
    }
    struct Stream(*mut libc::FILE);
    impl Write for Stream {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            // SAFETY: the stream is open.
            let written = unsafe { libc::fwrite(text.as_ptr().cast(), 1, text.len(), self.0) };
            if written == text.len() { Ok(()) } else { Err(fmt::Error) }
        }
    }
    let stats = GlobalPool::stats();
    let written = write!(
        Stream(stream),
        "<malloc version=\"1\">\n<heap nr=\"0\">\n<sizes>\n</sizes>\n</heap>\n\
         <total type=\"mmap\" count=\"0\" size=\"{}\"/>\n<system type=\"current\" size=\"{}\"/>\n\
         <aspace type=\"total\" size=\"{}\"/>\n</malloc>\n",
        stats.large,
        stats.committed,
        stats.reserved
    );
    if written.is_ok() { 0 } else { -1 }
}

/// Gives idle memory back: 1 if there was any. How much to keep is the heap's choice.
#[unsafe(no_mangle)]
extern "C" fn malloc_trim(_keep: usize) -> c_int {
    c_int::from(GlobalPool::trim() > 0)
}

/// Takes the parameters of glibc's design, which have no counterpart here, in silence; says no (0) to the rest,
/// above all to `M_PERTURB`, whose effect a program could miss.
#[unsafe(no_mangle)]
extern "C" fn mallopt(parameter: c_int, value: c_int) -> c_int {
    set_parameter(parameter, value)
}

/// The same under glibc's other name.
#[unsafe(no_mangle)]
extern "C" fn __libc_mallopt(parameter: c_int, value: c_int) -> c_int {
    set_parameter(parameter, value)
}

fn set_parameter(parameter: c_int, _value: c_int) -> c_int {
    /// Names as in `malloc.h`; those of thresholds and arenas are negative.
    const M_MXFAST: c_int = 1;
    const M_TRIM_THRESHOLD: c_int = -1;
    const M_TOP_PAD: c_int = -2;
    const M_MMAP_THRESHOLD: c_int = -3;
    const M_MMAP_MAX: c_int = -4;
    const M_ARENA_TEST: c_int = -7;
    const M_ARENA_MAX: c_int = -8;
    let known =
        [M_MXFAST, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_TEST, M_ARENA_MAX];
    c_int::from(known.contains(&parameter))
}

/// `struct mallinfo` and `struct mallinfo2`, which differ in the type of their fields.
#[repr(C)]
#[derive(Default)]
struct Info<N> {
    /// Bytes held beside mappings of single blocks.
    arena: N,
    ordblks: N,
    smblks: N,
    hblks: N,
    /// Bytes of blocks with a mapping of their own.
    hblkhd: N,
    usmblks: N,
    fsmblks: N,
    /// Bytes of live blocks.
    uordblks: N,
    /// Bytes held and not live.
    fordblks: N,
    keepcost: N,
}

/// `number` narrows, to the largest there is if need be.
fn info<N: Default>(number: impl Fn(usize) -> N) -> Info<N> {
    let stats = GlobalPool::stats();
    let live = live(&stats);
    Info {
        arena: number(stats.committed - stats.large.min(stats.committed)),
        hblkhd: number(stats.large),
        uordblks: number(live),
        fordblks: number(stats.committed.saturating_sub(live)),
        ..Info::default()
    }
}

#[unsafe(no_mangle)]
extern "C" fn mallinfo2() -> Info<usize> {
    info(|number| number)
}

#[unsafe(no_mangle)]
extern "C" fn mallinfo() -> Info<c_int> {
    narrow_info()
}

/// The same under glibc's other name.
#[unsafe(no_mangle)]
extern "C" fn __libc_mallinfo() -> Info<c_int> {
    narrow_info()
}

fn narrow_info() -> Info<c_int> {
    info(|number| c_int::try_from(number).unwrap_or(c_int::MAX))
}

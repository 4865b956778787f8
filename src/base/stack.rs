//! Where the program was: return addresses, captured cheaply and resolved only when printed.
//!
//! Two ways to capture, chosen once per process by trying them against each other:
//!
//! | way | cost | when |
//! |---|---|---|
//! | frame pointers | some 2 ns a frame | this crate was built with `-C force-frame-pointers=yes` |
//! | the unwinder | some 150 ns a frame | otherwise |
//!
//! Invariants:
//! 1. The walk along frame pointers reads only between the present stack pointer and the top of the thread's
//!    own stack, whatever the registers hold.
//! 2. Nothing here takes a lock of this crate, and callers hold none: unwinding may wait for the dynamic
//!    loader.

use core::cell::Cell;
use core::fmt;
use core::sync::atomic::{AtomicU8, Ordering};

/// Frames a [`Stack`] holds; the outermost of a deeper stack are cut off.
pub const STACK_DEPTH: usize = 32;

/// The return addresses of the calling thread, innermost first.
///
/// ```
/// use memory_pool::Stack;
/// let here = Stack::capture();
/// assert!(!here.frames().is_empty());
/// println!("{here}"); // function names, files and lines where the program has them
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stack {
    frames: [usize; STACK_DEPTH],
    len: usize,
}

/// One function of a resolved [`Stack`]; inlined functions have one each.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Frame {
    /// The function's name, or its address where it has none.
    pub function: String,
    /// Source file, where known.
    pub file: Option<String>,
    /// Line in it, where known.
    pub line: Option<u32>,
}

impl Stack {
    /// No frame at all.
    pub(crate) const EMPTY: Self = Self { frames: [0; STACK_DEPTH], len: 0 };

    /// The stack of the caller.
    #[inline(never)]
    pub fn capture() -> Self {
        let mut stack = Self::EMPTY;
        if walks_frame_pointers() {
            stack.walk(frame_pointer());
        }
        // A thread on a stack that is not its own has no bounds to walk within.
        if stack.len == 0 {
            stack.unwind();
        }
        stack
    }

    /// The return addresses, innermost first.
    pub fn frames(&self) -> &[usize] {
        &self.frames[..self.len]
    }

    /// A stack with these return addresses.
    #[cfg(test)]
    pub(crate) fn from_frames(frames: &[usize]) -> Self {
        let mut stack = Self::EMPTY;
        for &address in frames.iter().take(STACK_DEPTH) {
            stack.push(address);
        }
        stack
    }

    fn push(&mut self, address: usize) -> bool {
        // The outermost frame may say 0.
        if self.len < STACK_DEPTH && address != 0 {
            self.frames[self.len] = address;
            self.len += 1;
        }
        self.len < STACK_DEPTH
    }

    fn unwind(&mut self) {
        // SAFETY: on Unix the unwinder is thread-safe; the lock that `trace` would take protects nothing here.
        unsafe { backtrace::trace_unsynchronized(|frame| self.push(frame.ip() as usize)) }
    }

    fn walk(&mut self, mut frame: usize) {
        let marker = 0u8;
        let here = &raw const marker as usize;
        let (bottom, high) = stack_bounds();
        // A signal handler or a coroutine may run elsewhere; upwards from there lies unknown memory.
        let low = if (bottom..high).contains(&here) { here } else { usize::MAX };
        while frame >= low && frame.is_multiple_of(size_of::<usize>()) && frame < high - 16 {
            // SAFETY: both words lie between a local of this function and the top of this thread's stack,
            // which is mapped and readable (invariant 1).
            let (next, return_address) = unsafe {
                ((frame as *const usize).read_volatile(), (frame as *const usize).add(1).read_volatile())
            };
            if !self.push(return_address) || next <= frame {
                break;
            }
            frame = next;
        }
    }

    /// Names, files and lines, as far as the program carries them: from the function that called into this
    /// crate outwards to the program's or thread's main function. Slow, and allocates.
    pub fn resolve(&self) -> Vec<Frame> {
        let mut all = Vec::new();
        for &address in self.frames() {
            let before = all.len();
            // A return address lies behind its call, perhaps already in the next line or function.
            backtrace::resolve((address - 1) as *mut _, |symbol| {
                let function = symbol.name().map(|name| format!("{name:#}"));
                all.push(Frame {
                    function: function.unwrap_or_else(|| format!("{address:#x}")),
                    file: symbol.filename().map(|path| path.display().to_string()),
                    line: symbol.lineno(),
                });
            });
            if all.len() == before {
                all.push(Frame { function: format!("{address:#x}"), file: None, line: None });
            }
        }
        let mut end = all.iter().position(|frame| frame.is_runtime()).unwrap_or(all.len());
        while end > 0 && all[end - 1].is_glue() {
            end -= 1;
        }
        let start = all[..end].iter().position(|frame| !frame.is_ours()).unwrap_or(0);
        all.drain(start..end).collect()
    }
}

impl Frame {
    /// Frames that only say that this crate was called. Names of inlined functions may lack their path, so
    /// the file counts as well.
    fn is_ours(&self) -> bool {
        const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/");
        let name = self.function.trim_start_matches(['<', '&']);
        let file = self.file.as_deref().unwrap_or_default();
        let ours = name.starts_with("memory_pool::") || file.starts_with(SOURCES);
        let below = ["backtrace::", "allocator_api2::alloc::"].iter().any(|prefix| name.starts_with(prefix))
            || file.contains("/src/backtrace/")
            || file.contains("/allocator-api2-");
        (ours || below) && !name.contains("::tests::")
    }

    /// How std calls a closure.
    fn is_glue(&self) -> bool {
        let file = self.file.as_deref().unwrap_or_default();
        file.contains("/core/src/ops/function.rs") || self.function.contains("core::ops::function::FnOnce")
    }

    /// Frames below the program's own: how std starts threads and tests.
    fn is_runtime(&self) -> bool {
        self.function.contains("__rust_begin_short_backtrace")
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.function)?;
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, "\n             at {file}:{line}"),
            (Some(file), None) => write!(f, "\n             at {file}"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frames = self.resolve();
        if frames.is_empty() {
            return f.write_str("       (no frames)");
        }
        for (number, frame) in frames.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            write!(f, "      {number:>3}: {frame}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_list();
        for address in self.frames() {
            list.entry(&format_args!("{address:#x}"));
        }
        list.finish()
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Stack {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.resolve())
    }
}

const UNKNOWN: u8 = 0;
const NO: u8 = 1;
const YES: u8 = 2;
static MODE: AtomicU8 = AtomicU8::new(UNKNOWN);

/// From now on every stack is unwound. For callers under code that may keep no frame pointers, or that may be the C
/// library looking for the bounds of a stack: it allocates meanwhile, under a lock that the walk would wait for.
pub(crate) fn unwind_always() {
    MODE.store(NO, Ordering::Relaxed);
}

/// Whether code of this crate keeps frame pointers, found out at the first call.
#[inline]
fn walks_frame_pointers() -> bool {
    match MODE.load(Ordering::Relaxed) {
        UNKNOWN => {
            let found = if probe() { YES } else { NO };
            MODE.store(found, Ordering::Relaxed);
            found == YES
        }
        known => known == YES,
    }
}

/// Compares the two ways: where the walk begins with the two return addresses that the unwinder finds above
/// this very function, the register is a frame pointer. Without frame pointers it may still hold that of some
/// function further out, or anything else.
#[cold]
#[inline(never)]
fn probe() -> bool {
    let mut walked = Stack::EMPTY;
    walked.walk(frame_pointer());
    let mut above = 0;
    let mut agrees = false;
    // SAFETY: as in `Stack::unwind`.
    unsafe {
        backtrace::trace_unsynchronized(|frame| {
            if above > 0 {
                agrees = walked.frames().get(above - 1) == Some(&(frame.ip() as usize));
                above += 1;
                return agrees && above <= 2;
            }
            above = usize::from(std::ptr::eq(frame.symbol_address(), probe as *const _));
            true
        });
    }
    agrees && above > 2
}

/// The frame pointer register of the function this is inlined into.
#[inline(always)]
fn frame_pointer() -> usize {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let frame: usize;
        // SAFETY: copies a register.
        unsafe { core::arch::asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
        frame
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    {
        let frame: usize;
        // SAFETY: copies a register.
        unsafe { core::arch::asm!("mov {}, x29", out(reg) frame, options(nomem, nostack, preserves_flags)) };
        frame
    }
    #[cfg(any(not(any(target_arch = "x86_64", target_arch = "aarch64")), miri))]
    0
}

/// The bounds of the calling thread's own stack; empty where they are unknown.
fn stack_bounds() -> (usize, usize) {
    thread_local! {
        static BOUNDS: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
    }
    BOUNDS.with(|bounds| {
        let found = bounds.get().unwrap_or_else(find_stack_bounds);
        bounds.set(Some(found));
        found
    })
}

#[cfg(target_os = "linux")]
#[cold]
fn find_stack_bounds() -> (usize, usize) {
    let mut attributes = core::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
    let (mut low, mut size) = (core::ptr::null_mut(), 0);
    // SAFETY: the attributes are written by the first call, and read and destroyed only if it succeeded.
    unsafe {
        if libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) != 0 {
            return (0, 0);
        }
        libc::pthread_attr_getstack(attributes.as_ptr(), &mut low, &mut size);
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
    }
    (low as usize, low as usize + size)
}

#[cfg(not(target_os = "linux"))]
fn find_stack_bounds() -> (usize, usize) {
    (0, 0)
}

/// A small number for the calling thread, given out in order of first use.
pub(crate) fn thread_number() -> u32 {
    use core::sync::atomic::AtomicU32;
    static NEXT: AtomicU32 = AtomicU32::new(1);
    thread_local! {
        static NUMBER: Cell<u32> = const { Cell::new(0) };
    }
    NUMBER.with(|number| {
        if number.get() == 0 {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        number.get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn a_function_of_our_own() -> Stack {
        core::hint::black_box(Stack::capture())
    }

    #[test]
    fn a_stack_names_who_called() {
        let stack = core::hint::black_box(a_function_of_our_own());
        let names: Vec<String> = stack.resolve().into_iter().map(|frame| frame.function).collect();
        assert!(names[0].contains("a_function_of_our_own"), "{names:?}");
        assert!(names[1].contains("a_stack_names_who_called"), "{names:?}");
        assert!(!stack.to_string().contains("__rust_begin_short_backtrace"));
    }

    #[test]
    fn the_walk_stays_on_the_stack_whatever_the_register_holds() {
        let (low, high) = stack_bounds();
        let here = &raw const low as usize & !7;
        assert!(low < here && here < high);
        for frame in [0, 1, 8, usize::MAX, usize::MAX - 7, low, high, high - 8, here] {
            let mut stack = Stack::EMPTY;
            stack.walk(frame);
            assert!(stack.len <= STACK_DEPTH);
        }
    }

    #[test]
    fn a_deep_stack_keeps_its_innermost_frames() {
        #[inline(never)]
        fn dive(depth: usize) -> Stack {
            if depth == 0 {
                return Stack::capture();
            }
            core::hint::black_box(dive(depth - 1))
        }
        let stack = dive(100);
        assert_eq!(stack.frames().len(), STACK_DEPTH);
        assert!(stack.resolve().iter().all(|frame| frame.function.contains("dive")), "{stack}");
    }

    #[test]
    fn threads_have_numbers_of_their_own() {
        let mine = thread_number();
        assert_eq!(mine, thread_number());
        assert_ne!(mine, std::thread::spawn(thread_number).join().unwrap());
    }
}

//! The process heap as a drop-in `malloc`: what C programs may expect of it, opened at run time and preloaded.
//!
//! Tests that need a preloaded process start this very program again with the library in `LD_PRELOAD`.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod children;
#[path = "preload/conformance.rs"]
mod conformance;
#[path = "preload/programs.rs"]
mod foreign;
#[path = "programs/mod.rs"]
mod programs;
#[path = "preload/watched.rs"]
mod watched;

use std::ffi::c_void;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use conformance::Surface;

/// Set in the processes that have the library preloaded.
const PRELOADED: &str = "TEST_IS_PRELOADED";

fn library() -> PathBuf {
    programs::example_library("malloc_preload")
}

/// Whether this process is on the heap under test.
fn preloaded() -> bool {
    std::env::var_os(PRELOADED).is_some()
}

/// Runs the test of this name in a process of its own, with the library preloaded.
fn again(test: &str, more: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads", "1"]);
    command.env("LD_PRELOAD", library()).env(PRELOADED, "1").envs(more.iter().copied());
    children::output_of(&mut command).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn expect_success(output: &Output) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{}\n{out}\n{err}", output.status);
}

#[test]
fn the_functions_of_c_do_as_posix_and_glibc_say_when_opened_at_run_time() {
    // SAFETY: loading has no effect on this process's own allocations.
    let library = unsafe { libloading::os::unix::Library::new(library()) }.unwrap();
    // SAFETY: the symbols are of the library under test.
    let surface = unsafe { Surface::new(|name| library.get::<*mut c_void>(name).unwrap().into_raw()) };
    conformance::run(&surface);
    // Threads that used it may outlive a handle.
    let thread = std::thread::spawn(move || {
        conformance::run(&surface);
        drop(library);
    });
    thread.join().unwrap();
}

#[test]
fn the_functions_of_c_do_as_posix_and_glibc_say_when_preloaded() {
    if !preloaded() {
        return expect_success(&again(
            "the_functions_of_c_do_as_posix_and_glibc_say_when_preloaded",
            &[("TEST_EXPECTS_OURS", "1")],
        ));
    }
    // SAFETY: the process's own functions, which are those under test.
    let surface = unsafe {
        Surface::new(|name| {
            let found = libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr().cast());
            assert!(!found.is_null(), "{}", text(name));
            found
        })
    };
    // glibc would say 24.
    assert_eq!(surface.usable_of(20), 32, "the preloaded heap answers");
    conformance::run(&surface);
    let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(move || conformance::run(&surface))).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn trim_says_whether_it_gave_anything_back() {
    if !preloaded() {
        return expect_success(&again("trim_says_whether_it_gave_anything_back", &[]));
    }
    // SAFETY: plain calls; each block is freed once.
    unsafe {
        let blocks: Vec<*mut c_void> = (0..20_000).map(|_| libc::malloc(1000)).collect();
        blocks.iter().for_each(|block| block.cast::<u8>().write_bytes(1, 1000));
        blocks.into_iter().for_each(|block| libc::free(block));
        assert_eq!(libc::malloc_trim(0), 1, "what the heap kept goes");
        // The second call finds what the first one's own work left, if anything; the third finds nothing.
        libc::malloc_trim(0);
        assert_eq!(libc::malloc_trim(0), 0);
    }
}

/// Rounds that destructors of this thread's keys ran.
static ROUNDS: AtomicUsize = AtomicUsize::new(0);
static KEY: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Allocates, frees, and asks to be called again; the heap's own hook has run by the later rounds.
extern "C" fn late_destructor(block: *mut c_void) {
    ROUNDS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: blocks of this thread, each freed once; the key is the test's.
    unsafe {
        for size in [10, 5000, 100_000, 3 << 20] {
            let other = libc::realloc(libc::malloc(size), size * 2);
            assert!(!other.is_null());
            other.cast::<u8>().write_bytes(7, size * 2);
            libc::free(other);
        }
        libc::free(block);
        libc::pthread_setspecific(KEY.load(Ordering::Relaxed) as libc::pthread_key_t, libc::calloc(1, 24));
    }
}

#[test]
fn destructors_allocate_after_the_thread_let_go_of_its_heap() {
    if !preloaded() {
        for hardened in ["0", "1"] {
            let test = "destructors_allocate_after_the_thread_let_go_of_its_heap";
            expect_success(&again(test, &[("MEMORY_POOL_HARDENED", hardened)]));
        }
        return;
    }
    let mut key = 0;
    // SAFETY: plain calls with a function that does not unwind.
    unsafe {
        assert_eq!(libc::pthread_key_create(&raw mut key, Some(late_destructor)), 0);
        KEY.store(key as usize, Ordering::Relaxed);
        for _ in 0..20 {
            let thread = std::thread::spawn(move || libc::pthread_setspecific(key, libc::malloc(40)));
            assert_eq!(thread.join().unwrap(), 0);
        }
    }
    assert!(ROUNDS.load(Ordering::Relaxed) >= 40, "destructors were called again");
}

#[test]
fn operator_new_without_a_cxx_library_ends_the_program_with_a_line() {
    if preloaded() {
        // SAFETY: the name is the signature.
        let new: unsafe extern "C" fn(usize) -> *mut c_void =
            unsafe { std::mem::transmute(libc::dlsym(libc::RTLD_DEFAULT, c"_Znwm".as_ptr())) };
        // SAFETY: no preconditions.
        unsafe { new(usize::MAX / 2) };
        unreachable!("it returned");
    }
    let output = again("operator_new_without_a_cxx_library_ends_the_program_with_a_line", &[]);
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("memory-pool: operator new has no memory"),
        "{}",
        text(&output.stderr)
    );
}

/// Calls of the handler that the C++ library was given.
static HANDLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn new_handler() {
    // The third call takes the handler away, so that the operator gives up.
    if HANDLED.fetch_add(1, Ordering::Relaxed) == 2 {
        set_new_handler(None);
    }
}

fn set_new_handler(handler: Option<extern "C" fn()>) {
    // SAFETY: the library is open for ever, and the mangled name is the signature.
    unsafe {
        let library = libc::dlopen(c"libstdc++.so.6".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        let set = libc::dlsym(library, c"_ZSt15set_new_handlerPFvvE".as_ptr());
        let set: extern "C" fn(Option<extern "C" fn()>) = std::mem::transmute(set);
        set(handler);
    }
}

#[test]
fn a_cxx_library_that_came_late_has_its_new_handler_called() {
    const TEST: &str = "a_cxx_library_that_came_late_has_its_new_handler_called";
    // SAFETY: opening a library of the system.
    if unsafe { libc::dlopen(c"libstdc++.so.6".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) }.is_null() {
        return println!("left out, not on this machine: libstdc++");
    }
    if !preloaded() {
        return expect_success(&again(TEST, &[]));
    }
    set_new_handler(Some(new_handler));
    // SAFETY: the mangled name is the signature.
    unsafe {
        let name = c"_ZnwmRKSt9nothrow_t";
        let new: extern "C" fn(usize, *const u8) -> *mut c_void =
            std::mem::transmute(libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()));
        assert!(new(usize::MAX / 2, &0).is_null());
        assert_eq!(HANDLED.load(Ordering::Relaxed), 3, "as often as the handler wants");
        // Rounded up to the alignment, this is nothing, which the library's own operator takes for what was asked.
        let name = c"_ZnwmSt11align_val_tRKSt9nothrow_t";
        let new: extern "C" fn(usize, usize, *const u8) -> *mut c_void =
            std::mem::transmute(libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()));
        assert!(new(usize::MAX - 20, 64, &0).is_null());
    }
}

/// What the process got before any library was initialised.
static EARLY: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
static EARLY_ZEROED: AtomicBool = AtomicBool::new(false);

extern "C" fn early() {
    // SAFETY: plain calls; the loader has bound them by now.
    unsafe {
        let first = libc::malloc(100);
        let second = libc::calloc(30, 1000).cast::<u8>();
        EARLY_ZEROED
            .store(!second.is_null() && (0..30_000).all(|at| *second.add(at) == 0), Ordering::Relaxed);
        libc::free(second.cast());
        EARLY.store(libc::realloc(first, 5000), Ordering::Relaxed);
    }
}

/// Run before the constructors of all libraries, the C library among them.
#[used]
// SAFETY: the linker's table of such functions, which are called without what they do not use.
#[unsafe(link_section = ".preinit_array")]
static BEFORE_ALL: extern "C" fn() = early;

#[test]
fn calls_before_any_constructor_are_served() {
    if !preloaded() {
        return expect_success(&again("calls_before_any_constructor_are_served", &[]));
    }
    let block = EARLY.load(Ordering::Relaxed);
    assert!(!block.is_null() && EARLY_ZEROED.load(Ordering::Relaxed));
    // SAFETY: a live block of the process's heap.
    unsafe {
        assert!(libc::malloc_usable_size(block) >= 5000);
        libc::free(block);
    }
}

#[test]
fn a_child_of_many_threads_allocates_and_its_children_too() {
    if !preloaded() {
        return expect_success(&again("a_child_of_many_threads_allocates_and_its_children_too", &[]));
    }
    static STOP: AtomicBool = AtomicBool::new(false);
    let busy: Vec<_> = (0..4)
        .map(|seed| {
            std::thread::spawn(move || {
                let mut kept: Vec<Vec<u8>> = Vec::new();
                for step in 0usize.. {
                    let size = (step * 7919 + seed * 104_729) % 200_000;
                    kept.push(vec![1; size + 1]);
                    if kept.len() > 50 {
                        kept.swap_remove(step % 50);
                    }
                    if STOP.load(Ordering::Relaxed) {
                        break;
                    }
                }
            })
        })
        .collect();
    for depth in 0..30 {
        // SAFETY: the child calls the heap and `_exit` only.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                let worker =
                    || (1..2000).map(|n| vec![n as u8; n * 3 % 90_000 + 1][0] as usize).sum::<usize>();
                let sum = worker() + std::thread::spawn(worker).join().unwrap();
                if depth % 10 == 0 && libc::fork() == 0 {
                    libc::_exit(i32::from(worker() == 0));
                }
                libc::_exit(i32::from(sum == 0));
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            assert_eq!(status, 0, "child {depth}");
        }
    }
    STOP.store(true, Ordering::Relaxed);
    busy.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Blocks that were never there, by what makes them hard to tell.
fn foreign_block(which: &str) -> *mut c_void {
    static STATIC: [u8; 64] = [0; 64];
    // SAFETY: mappings of the test's own.
    unsafe {
        let pages = || {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), 1 << 20, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        match which {
            "stack" => (&raw const which).cast_mut().cast(),
            "static" => STATIC.as_ptr().cast_mut().cast(),
            "mapped" => pages(),
            "inside a mapping" => pages().byte_add(4096 + 16),
            "small number" => std::ptr::without_provenance_mut(16),
            "odd number" => std::ptr::without_provenance_mut(1),
            "not canonical" => std::ptr::without_provenance_mut(0x0123_4567_89ab_cde0),
            "last" => std::ptr::without_provenance_mut(usize::MAX - 15),
            "inside a large block" => libc::malloc(64 << 20).byte_add(32 << 20),
            "near the start of a large block" => libc::malloc(64 << 20).byte_add(4096),
            _ => unreachable!("{which}"),
        }
    }
}

#[test]
fn a_free_of_what_was_never_allocated_ends_the_program_with_a_line() {
    const WHICH: &str = "TEST_FOREIGN_BLOCK";
    if preloaded() {
        let block = foreign_block(&std::env::var(WHICH).unwrap());
        // SAFETY: none: this is the error that is looked for.
        unsafe { libc::free(block) };
        unreachable!("the heap went on");
    }
    for which in [
        "stack",
        "static",
        "mapped",
        "inside a mapping",
        "small number",
        "odd number",
        "not canonical",
        "last",
        "inside a large block",
        "near the start of a large block",
    ] {
        let output =
            again("a_free_of_what_was_never_allocated_ends_the_program_with_a_line", &[(WHICH, which)]);
        let said = text(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{which}: {said}");
        assert!(said.contains("memory-pool: free of what was not allocated here, at 0x"), "{which}: {said}");
    }
}

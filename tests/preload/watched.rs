//! The debug layer under programs that know nothing of it.

use std::ffi::c_void;
use std::process::{Command, Output};

use crate::children::output_told;
use crate::{again, expect_success, library, preloaded, text};

/// Runs a test of this module again, under the layer.
fn under(test: &str, debug: &str) -> Output {
    again(&format!("watched::{test}"), &[("MEMORY_POOL_DEBUG", debug)])
}

#[inline(never)]
fn a_function_that_leaks(count: usize) {
    for _ in 0..count {
        // SAFETY: plain calls.
        unsafe { std::hint::black_box(libc::malloc(3 << 20)) };
    }
}

#[test]
fn leaks_are_told_by_stack_at_exit() {
    if preloaded() {
        return a_function_that_leaks(std::hint::black_box(5));
    }
    let output = under("leaks_are_told_by_stack_at_exit", "leaks");
    expect_success(&output);
    let said = text(&output.stderr);
    assert!(said.contains("memory-pool: leak: "), "{said}");
    assert!(said.contains("5 blocks, 15.0 MiB, the first at 0x"), "{said}");
    assert!(said.contains("a_function_that_leaks") && said.contains("watched.rs"), "{said}");
}

#[inline(never)]
fn a_function_that_writes_too_far() -> *mut c_void {
    // SAFETY: not at all: the byte after the last is the bug. The layer keeps a canary there.
    unsafe {
        let block = libc::malloc(24);
        block.cast::<u8>().add(std::hint::black_box(24)).write(0x41);
        block
    }
}

#[test]
fn a_write_past_a_block_is_told_at_its_free_with_the_history() {
    if preloaded() {
        // SAFETY: a live block, damaged behind.
        return unsafe { libc::free(a_function_that_writes_too_far()) };
    }
    let output =
        under("a_write_past_a_block_is_told_at_its_free_with_the_history", "canary,stacks,history=500");
    expect_success(&output);
    let said = text(&output.stderr);
    assert!(said.contains("overflow: 1 byte changed behind a block, from byte 24 on"), "{said}");
    assert!(said.contains("block of 24 bytes") && said.contains("a_function_that_writes_too_far"), "{said}");
    assert!(said.contains("the last operations:") && said.contains(" free "), "{said}");
}

#[test]
fn a_second_free_and_a_write_after_free_are_told() {
    if preloaded() {
        // SAFETY: not at all: these are the bugs. The layer holds freed blocks back.
        unsafe {
            let twice = libc::malloc(100);
            libc::free(twice);
            libc::free(std::hint::black_box(twice));
            let late = libc::malloc(200).cast::<u8>();
            libc::free(late.cast());
            std::hint::black_box(late).add(50).write(1);
            libc::free((&raw const late).cast_mut().cast());
        }
        return;
    }
    let output = under("a_second_free_and_a_write_after_free_are_told", "full");
    expect_success(&output);
    let said = text(&output.stderr);
    for finding in [
        "double free: ",
        "write after free: 1 byte of a freed block changed, from byte 50 on",
        "foreign free: ",
    ] {
        assert!(said.contains(finding), "no {finding} in {said}");
    }
}

#[test]
fn threads_and_forks_work_under_the_layer() {
    if !preloaded() {
        let output =
            under("threads_and_forks_work_under_the_layer", "canary,fill,quarantine=1M,history=100,leaks");
        expect_success(&output);
        let said = text(&output.stderr);
        for finding in ["overflow", "underflow", "double free", "foreign free", "after free", "interior free"]
        {
            assert!(!said.contains(&format!("memory-pool: {finding}")), "{said}");
        }
        return;
    }
    let churn = |seed: usize| {
        let mut kept: Vec<Vec<u8>> = Vec::new();
        for step in 0..1500 {
            kept.push(vec![seed as u8; (step * 7919 + seed * 31) % 5000]);
            if kept.len() > 40 {
                kept.swap_remove(step % 40);
            }
        }
    };
    // The C library holds a lock of its own while this allocates.
    // SAFETY: the attributes are made by the first call.
    unsafe {
        let mut attributes = std::mem::zeroed::<libc::pthread_attr_t>();
        assert_eq!(libc::pthread_getattr_np(libc::pthread_self(), &raw mut attributes), 0);
        libc::pthread_attr_destroy(&raw mut attributes);
    }
    std::thread::scope(|scope| {
        for seed in 0..3 {
            scope.spawn(move || churn(seed));
        }
        for _ in 0..10 {
            // SAFETY: the child uses the heap and `_exit` only.
            unsafe {
                let child = libc::fork();
                if child == 0 {
                    churn(9);
                    libc::_exit(0);
                }
                let mut status = 1;
                assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                assert_eq!(status, 0);
            }
        }
    });
}

#[test]
fn foreign_programs_run_under_the_layer_and_nothing_is_found_in_them() {
    let script = "x=a; for i in 1 2 3 4 5 6 7; do x=$x$x; done; echo ${#x}; (echo in a child) | cat";
    let python = "import json; print(len(json.dumps([{str(i): [i] * 9} for i in range(300)])))";
    let mut ran = 0;
    for (program, arguments) in [("/bin/sh", ["-c", script]), ("python3", ["-c", python])] {
        let Ok(plain) = output_told(Command::new(program).args(arguments), "") else {
            println!("left out, not on this machine: {program}");
            continue;
        };
        let mut command = Command::new(program);
        command.args(arguments).env("LD_PRELOAD", library());
        let watched = output_told(command.env("MEMORY_POOL_DEBUG", "canary,fill,quarantine=1M"), "").unwrap();
        assert_eq!(
            (text(&watched.stdout), text(&watched.stderr), watched.status.code()),
            (text(&plain.stdout), text(&plain.stderr), plain.status.code()),
            "{program}"
        );
        ran += 1;
    }
    assert!(ran > 0, "/bin/sh is everywhere");
}

#[test]
fn nonsense_in_the_environment_is_named_and_the_program_runs() {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "echo well"]).env("LD_PRELOAD", library()).env("MEMORY_POOL_DEBUG", "everything");
    let output = output_told(&mut command, "").unwrap();
    assert_eq!(text(&output.stdout), "well\n");
    let said = text(&output.stderr);
    assert!(said.contains("MEMORY_POOL_DEBUG") && said.contains("nothing is watched"), "{said}");
}

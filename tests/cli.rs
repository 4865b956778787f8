//! The `memory-pool` program, run as a person runs it.
#![cfg(feature = "cli")]

mod children;

use std::process::{Command, Output};

fn run(words: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } =
        children::output_of(Command::new(env!("CARGO_BIN_EXE_memory-pool")).args(words)).unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// A trace of three blocks, two live at once, as a file that is gone when the test is.
struct TraceFile(std::path::PathBuf);

impl TraceFile {
    fn new(name: &str) -> Self {
        let record = |kind: u8, id: u8, kib: u8| [kind, 0, 0, 0, id, 0, 0, 0, 0, 4 * kib, 0, 0, 0, 0, 0, 0];
        let bytes = [record(0, 0, 1), record(0, 1, 2), record(1, 0, 1), record(0, 2, 1), record(1, 1, 2)];
        let path = std::env::temp_dir().join(format!("memory-pool-{}-{name}.trace", std::process::id()));
        std::fs::write(&path, bytes.concat()).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TraceFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn replays_a_trace() {
    let file = TraceFile::new("replay");
    let (code, out, err) = run(&["replay", file.path(), "--pool", "best-fit"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("best-fit on 5 operations, 1 streams\n"), "{out}");
    let (code, out, _) = run(&["replay", "--json", "--pool=fixed:1024", file.path()]);
    assert_eq!(code, 0);
    assert!(out.contains("\"peak_live\":3072,") && out.contains("\"operations\":5,"), "{out}");
}

#[test]
fn replays_on_the_simulated_device() {
    let file = TraceFile::new("device");
    for pool in ["device", "cuda-malloc"] {
        let (code, out, err) = run(&["replay", file.path(), "--pool", pool, "--driver", "sim", "--json"]);
        assert_eq!((code, err.as_str()), (0, ""));
        assert!(out.contains("\"peak_live\":3072,") && out.contains("\"cold_driver_ns\":"), "{out}");
    }
    let record = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    std::fs::write(&file.0, record).unwrap();
    let small = ["replay", file.path(), "--pool", "device", "--memory", "3"];
    let (code, _, err) = run(&small);
    assert!(code == 1 && err.contains("4294967296 bytes live at once"), "{err}");
}

#[test]
fn says_what_is_wrong() {
    let file = TraceFile::new("wrong");
    let (code, _, err) = run(&["replay"]);
    assert!(code == 2 && err.contains("TRACE is missing") && err.contains("usage:"), "{err}");
    let (code, _, err) = run(&["replay", file.path(), "--pool", "swamp"]);
    assert!(code == 2 && err.contains("no pool `swamp`"), "{err}");
    let (code, _, err) = run(&["replay", file.path(), "--fast"]);
    assert!(code == 2 && err.contains("--fast"), "{err}");
    let (code, _, err) = run(&["replay", file.path(), "--driver", "sim"]);
    assert!(code == 2 && err.contains("no pool of a device"), "{err}");
    let (code, _, err) = run(&["replay", file.path(), "--pool", "device", "--driver", "tape"]);
    assert!(code == 2 && err.contains("no driver `tape`"), "{err}");
    let (code, _, err) = run(&["replay", file.path(), "--pool", "cuda-async", "--driver", "sim"]);
    assert!(code == 1 && err.contains("--driver cuda"), "{err}");
    let (code, _, err) = run(&["frobnicate"]);
    assert!(code == 2 && err.contains("no command `frobnicate`"), "{err}");
    let (code, _, err) = run(&["replay", "/nonexistent/file"]);
    assert!(code == 1 && err.contains("/nonexistent/file"), "{err}");
    std::fs::write(&file.0, [9; 40]).unwrap();
    let (code, _, err) = run(&["replay", file.path()]);
    assert!(code == 1 && err.contains("record 1: expected zero bytes here"), "{err}");
    let (code, out, _) = run(&[]);
    assert!(code == 0 && out.contains("replay TRACE"), "{out}");
}

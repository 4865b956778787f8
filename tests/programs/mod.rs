//! What the tests that load or run other programs share.

use std::path::PathBuf;
use std::process::Command;

use crate::children;

/// The dynamic library of an example, as `cargo test` builds it, or built now where only one test was asked for.
pub fn example_library(name: &str) -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--profile", "test", "--message-format", "json", "--example", name]);
    let output = children::output_of(cargo.current_dir(env!("CARGO_MANIFEST_DIR"))).expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let messages = String::from_utf8_lossy(&output.stdout);
    let file = format!("lib{name}{}", std::env::consts::DLL_SUFFIX);
    // The path of a message is a JSON string: none of these file names needs an escape.
    let path = messages.split('"').find(|text| text.ends_with(&file)).unwrap_or_else(|| panic!("{messages}"));
    PathBuf::from(path)
}

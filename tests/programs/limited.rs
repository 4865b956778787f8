//! Programs that tests run, with a limit to their time.

use std::io::{Result, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// No program of these tests takes as long.
const LIMIT: Duration = Duration::from_secs(100);

/// What a program says, told `input`. One that hangs is ended, with its children, and is a failure.
pub fn output_of(command: &mut Command, input: &str) -> Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let group = -i32::try_from(child.id()).unwrap();
    // A program that reads nothing may be gone already.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let (ended, ending) = mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let late = ending.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout);
        if late {
            // SAFETY: a plain call; the group is the child's own.
            unsafe { libc::kill(group, libc::SIGKILL) };
        }
        late
    });
    let output = child.wait_with_output();
    drop(ended);
    assert!(!watch.join().unwrap(), "still running after {LIMIT:?}: {command:?}");
    output
}

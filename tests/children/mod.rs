//! Programs that tests start: none outlives its time.

use std::io;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// More than any of them needs on a machine that is busy with other things.
const LONGEST: Duration = Duration::from_secs(200);

/// `command.output()` of a program that is killed if it runs for longer than that.
pub(crate) fn output_of(command: &mut Command) -> io::Result<Output> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let id = child.id() as libc::pid_t;
    let (ended, end) = channel::<()>();
    let watch = thread::spawn(move || {
        if end.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
            // SAFETY: no preconditions. Nobody has waited for the child yet, so its number is its own.
            unsafe { libc::kill(id, libc::SIGKILL) };
        }
    });
    let output = child.wait_with_output();
    drop(ended);
    watch.join().expect("it does not panic");
    output
}

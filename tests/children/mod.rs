//! Programs that tests start: none outlives its time, nor does what it starts.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// More than any of them needs on a machine that is busy with other things; compilers need the most.
const LONGEST: Duration = Duration::from_secs(500);

/// Ends a child that runs for too long, with its process group if it leads one. Dropped before the child is waited for, or together with who waits.
pub(crate) struct Watch(Option<Sender<()>>, Option<JoinHandle<()>>);

impl Watch {
    pub(crate) fn over(child: &Child) -> Self {
        let id = child.id() as libc::pid_t;
        let (ended, end) = channel::<()>();
        let watch = thread::spawn(move || {
            if end.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
                // SAFETY: no preconditions. Nobody has waited for the child yet, so its number is its own.
                unsafe {
                    libc::kill(-id, libc::SIGKILL);
                    libc::kill(id, libc::SIGKILL);
                }
            }
        });
        Self(Some(ended), Some(watch))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.take();
        self.1.take().into_iter().for_each(|watch| drop(watch.join()));
    }
}

/// `command.output()` of a program that reads nothing, and is killed if it runs for too long.
pub(crate) fn output_of(command: &mut Command) -> io::Result<Output> {
    output_told(command, "")
}

/// The same of a program that reads `input`.
pub(crate) fn output_told(command: &mut Command, input: &str) -> io::Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let watch = Watch::over(&child);
    // A program that reads nothing may be gone already.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output();
    drop(watch);
    output
}

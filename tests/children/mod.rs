//! Programs that tests start: none outlives its time.

use std::io;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// More than any of them needs on a machine that is busy with other things; compilers need the most.
const LONGEST: Duration = Duration::from_secs(500);

/// Ends a child that runs for too long. Dropped before the child is waited for, or together with who waits.
pub(crate) struct Watch(Option<Sender<()>>, Option<JoinHandle<()>>);

impl Watch {
    pub(crate) fn over(child: &Child) -> Self {
        let id = child.id() as libc::pid_t;
        let (ended, end) = channel::<()>();
        let watch = thread::spawn(move || {
            if end.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
                // SAFETY: no preconditions. Nobody has waited for the child yet, so its number is its own.
                unsafe { libc::kill(id, libc::SIGKILL) };
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

/// `command.output()` of a program that is killed if it runs for too long.
pub(crate) fn output_of(command: &mut Command) -> io::Result<Output> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let watch = Watch::over(&child);
    let output = child.wait_with_output();
    drop(watch);
    output
}

//! `memory-pool`: the program of the crate (feature `cli`).

mod arguments;
mod persistent;
mod replay;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use arguments::Arguments;

/// A command: its name, what follows it, what it does, and the function.
type Command = (&'static str, &'static str, &'static str, fn(Arguments) -> Result<(), Failure>);

const COMMANDS: &[Command] = &[
    ("check", persistent::CHECK_USAGE, "say what is wrong in a persistent pool's file", persistent::check),
    (
        "repair",
        persistent::REPAIR_USAGE,
        "say what a repair would do; with --yes, repair what can be repaired",
        persistent::repair,
    ),
    ("dump", persistent::DUMP_USAGE, "say what is in a persistent pool's file", persistent::dump),
    ("backup", persistent::BACKUP_USAGE, "copy a pool that is not in use to a new file", persistent::backup),
    (
        "replay",
        replay::USAGE,
        "replay a recorded trace on a pool: live and reserved bytes, time, calls to the source",
        replay::run,
    ),
];

/// Why a command did not do what was asked.
#[derive(Debug)]
enum Failure {
    /// The command line makes no sense; exit status 2.
    Usage(String),
    /// What was asked failed; exit status 1.
    Error(String),
}

impl From<memory_pool::Error> for Failure {
    fn from(error: memory_pool::Error) -> Self {
        Self::Error(error.to_string())
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_env();
    let name = arguments.next_word();
    let result = match name.as_deref() {
        None | Some("help" | "--help" | "-h") => say(&usage()),
        Some("--version") => say(concat!("memory-pool ", env!("CARGO_PKG_VERSION"), "\n")),
        Some(name) => match COMMANDS.iter().find(|command| command.0 == name) {
            Some((.., run)) => run(arguments),
            None => Err(Failure::Usage(format!("no command `{name}`"))),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(what)) => {
            eprint!("memory-pool: {what}\n\n{}", usage());
            ExitCode::from(2)
        }
        Err(Failure::Error(what)) => {
            eprintln!("memory-pool: {what}");
            ExitCode::FAILURE
        }
    }
}

/// Writes to stdout; who closed it early, as `head` does, has read what was wanted.
fn say(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::Error(format!("output: {error}")))
        }
        _ => Ok(()),
    }
}

fn usage() -> String {
    let mut text = String::from("usage:\n");
    for (name, follows, does, _) in COMMANDS {
        text += &format!("  memory-pool {name} {follows}\n      {does}\n");
    }
    text
}

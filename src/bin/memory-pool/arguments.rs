//! The command line: words, flags and options with a value, in any order.

use std::collections::VecDeque;

use crate::Failure;

/// What is left of the command line.
#[derive(Debug)]
pub(crate) struct Arguments(VecDeque<String>);

impl Arguments {
    /// The program's own, without its name. What is no text cannot name anything here and is shown as it can.
    pub(crate) fn from_env() -> Self {
        Self(std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect())
    }

    /// The next word, whatever it is.
    pub(crate) fn next_word(&mut self) -> Option<String> {
        self.0.pop_front()
    }

    /// Whether `name` is there; takes it.
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        let found = self.0.iter().position(|word| word == name);
        found.is_some_and(|at| self.0.remove(at).is_some())
    }

    /// The value behind `name`, or of `name=value`; takes both.
    pub(crate) fn option(&mut self, name: &str) -> Result<Option<String>, Failure> {
        let joined = |word: &String| word.strip_prefix(name).is_some_and(|rest| rest.starts_with('='));
        let Some(at) = self.0.iter().position(|word| word == name || joined(word)) else { return Ok(None) };
        let word = self.0.remove(at).unwrap_or_default();
        if let Some((_, value)) = word.split_once('=') {
            return Ok(Some(value.to_owned()));
        }
        let value = self.0.remove(at).ok_or_else(|| Failure::Usage(format!("`{name}` needs a value")))?;
        Ok(Some(value))
    }

    /// The one word left, called `what` where it is missing.
    pub(crate) fn only(mut self, what: &str) -> Result<String, Failure> {
        let word = self.next_word().ok_or_else(|| Failure::Usage(format!("{what} is missing")))?;
        if word.starts_with('-') && word != "-" {
            return Err(Failure::Usage(format!("no option `{word}`")));
        }
        match self.next_word() {
            None => Ok(word),
            Some(more) => Err(Failure::Usage(format!("`{more}` is too much"))),
        }
    }
}

//! `check`, `repair`, `dump` and `backup`: what can be done to the file of a persistent pool from outside.

use memory_pool::persist::{self, PersistentPool};

use super::Failure;
use super::arguments::Arguments;

pub(crate) const CHECK_USAGE: &str = "FILE";
pub(crate) const REPAIR_USAGE: &str = "[--yes] FILE";
pub(crate) const DUMP_USAGE: &str = "FILE";
pub(crate) const BACKUP_USAGE: &str = "--to COPY FILE";

fn at(path: &str) -> impl Fn(memory_pool::Error) -> Failure + '_ {
    move |error| Failure::Error(format!("{path}: {error}"))
}

pub(crate) fn check(arguments: Arguments) -> Result<(), Failure> {
    let path = arguments.only("FILE")?;
    let report = persist::check(&path).map_err(at(&path))?;
    println!("{report}");
    if report.is_whole() { Ok(()) } else { Err(Failure::Error(format!("{path} is damaged"))) }
}

/// Says what it would do; does it with `--yes`.
pub(crate) fn repair(mut arguments: Arguments) -> Result<(), Failure> {
    let sure = arguments.flag("--yes");
    let path = arguments.only("FILE")?;
    if !sure {
        println!("{}", persist::check(&path).map_err(at(&path))?);
        println!("nothing was written; --yes repairs (make a copy of the file before)");
        return Ok(());
    }
    println!("{}", persist::repair(&path).map_err(at(&path))?);
    let after = persist::check(&path).map_err(at(&path))?;
    println!("after the repair:\n{after}");
    if after.is_whole() { Ok(()) } else { Err(Failure::Error(format!("{path} is still damaged"))) }
}

pub(crate) fn dump(arguments: Arguments) -> Result<(), Failure> {
    let path = arguments.only("FILE")?;
    let mut text = String::new();
    persist::dump(&path, &mut text).map_err(at(&path))?;
    print!("{text}");
    Ok(())
}

pub(crate) fn backup(mut arguments: Arguments) -> Result<(), Failure> {
    let copy = arguments.option("--to")?.ok_or_else(|| Failure::Usage("backup needs --to COPY".into()))?;
    let path = arguments.only("FILE")?;
    PersistentPool::open_any_layout(&path).map_err(at(&path))?.backup(&copy).map_err(at(&copy))
}

//! `memory-pool replay`: a recorded trace on a pool of one's choice.
//!
//! On the simulated device the driver's time is what its calls cost on the virtual clock, which charges what was
//! measured on a card; the wall's time there is mostly the simulation's own.

mod gpu;
mod host;
mod report;

use std::time::{Duration, Instant};

use memory_pool::Error;
use memory_pool::trace::{Event, Trace};

use crate::{Arguments, Failure};
use report::{Report, Round, Sample};

pub(crate) const USAGE: &str = "TRACE [--pool segregated|best-fit|first-fit|fixed:BYTES|device|cuda-async|cuda-malloc] \
[--driver sim|cuda] [--memory GIB] [--json]";

/// Points of the curve of live and reserved bytes.
const SAMPLES: usize = 64;

pub(crate) fn run(mut arguments: Arguments) -> Result<(), Failure> {
    let json = arguments.flag("--json");
    let pool = arguments.option("--pool")?.unwrap_or_else(|| "segregated".into());
    let driver = arguments.option("--driver")?;
    let memory = arguments.option("--memory")?;
    let path = arguments.only("TRACE")?;
    let trace = read(&path)?;
    let wish = gpu::Wish::parse(&pool, driver.as_deref(), memory.as_deref())?;
    let named = |failure| match failure {
        Failure::Error(what) => Failure::Error(format!("{path}: {what}")),
        usage => usage,
    };
    let target: Box<dyn Target> = match wish {
        Some(wish) => gpu::target(wish, &trace).map_err(named)?,
        None => host::target(&pool)?,
    };
    let report = replay(&trace, &*target, pool).map_err(|what| Failure::Error(format!("{path}: {what}")))?;
    crate::say(&if json { report.json() } else { report.table() })
}

/// The trace in a file; what is wrong with it names the file and the place in it.
fn read(path: &str) -> Result<Trace, Failure> {
    let bytes = std::fs::read(path).map_err(|error| Failure::Error(format!("{path}: {error}")))?;
    Trace::parse(&bytes).map_err(|error| {
        let what = match (Trace::place(&bytes, &error), &error) {
            (Some(place), Error::Corrupt { what, .. }) => format!("{place}: expected {what}"),
            _ => error.to_string(),
        };
        Failure::Error(format!("{path}: {what}"))
    })
}

/// What a trace is replayed on.
trait Target {
    /// A block, as a number that `free` takes.
    fn alloc(&self, bytes: usize, stream: u16) -> Result<usize, String>;
    /// Frees a block that `alloc` gave, once.
    fn free(&self, block: usize, stream: u16);
    /// What it holds.
    fn held(&self) -> Held;
    /// Where it runs: a device's name, or the host.
    fn place(&self) -> String;
    /// What the driver did so far: calls, and nanoseconds where a virtual clock counts them.
    fn driver(&self) -> Option<(u64, u64)> {
        None
    }
    /// Bytes of host memory that its books take, where it knows.
    fn books(&self) -> Option<usize> {
        None
    }
    /// Waits until nothing is in flight.
    fn settle(&self) {}
}

/// What a target has taken from its source.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    reserved: usize,
    peak_reserved: usize,
    source_calls: u64,
    /// Free bytes of what is reserved, and the largest free range.
    free: usize,
    largest_free: usize,
}

/// Replays the trace twice: on an empty pool, and on what that left.
fn replay(trace: &Trace, target: &dyn Target, pool: String) -> Result<Report, String> {
    let mut curve = Vec::with_capacity(SAMPLES);
    let cold = round(trace, target, |live| curve.push(Sample { live, held: target.held() }))?;
    let peak_reserved = target.held().peak_reserved;
    let warm = round(trace, target, |_| ())?;
    Ok(Report {
        pool,
        place: target.place(),
        events: trace.events().len(),
        streams: trace.streams(),
        peak_live: trace.peak_live(),
        peak_reserved,
        books: target.books(),
        cold,
        warm,
        curve,
    })
}

/// One round, timed without the samples. What the trace leaves live is freed at the end, which does not count.
fn round(trace: &Trace, target: &dyn Target, mut sample: impl FnMut(u64)) -> Result<Round, String> {
    const DEAD: usize = 0;
    let mut blocks = vec![(DEAD, 0); trace.allocations()];
    let calls = target.held().source_calls;
    let driver = target.driver();
    let mut time = Duration::ZERO;
    let mut live = 0;
    let mut failed = None;
    for events in trace.events().chunks(trace.events().len().div_ceil(SAMPLES)) {
        let start = Instant::now();
        for event in events {
            match *event {
                Event::Alloc { id, stream, bytes } => match allocate(target, bytes, stream) {
                    Ok(block) => {
                        blocks[id as usize] = (block, bytes);
                        live += bytes;
                    }
                    Err(error) => {
                        failed = Some(format!("allocation {id} with {live} bytes live: {error}"));
                        break;
                    }
                },
                Event::Free { id, stream } => {
                    let (block, bytes) = std::mem::replace(&mut blocks[id as usize], (DEAD, 0));
                    target.free(block, stream);
                    live -= bytes;
                }
            }
        }
        time += start.elapsed();
        if failed.is_some() {
            break;
        }
        sample(live);
    }
    let source_calls = target.held().source_calls - calls;
    let driver = driver.zip(target.driver()).map(|(before, now)| (now.0 - before.0, now.1 - before.1));
    blocks.iter().filter(|(block, _)| *block != DEAD).for_each(|(block, _)| target.free(*block, 0));
    target.settle();
    match failed {
        None => Ok(Round { time, source_calls, driver }),
        Some(what) => Err(what),
    }
}

fn allocate(target: &dyn Target, bytes: u64, stream: u16) -> Result<usize, String> {
    target.alloc(usize::try_from(bytes).unwrap_or(usize::MAX), stream)
}

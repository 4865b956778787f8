//! `memory-pool replay`: a recorded trace on a pool of one's choice.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use memory_pool::trace::{Event, Trace};
use memory_pool::{AnyPool, Error, PoolConfig, Strategy};

use crate::{Arguments, Failure};

pub(crate) const USAGE: &str = "TRACE [--pool segregated|best-fit|first-fit|fixed:BYTES] [--json]";

/// Points of the curve of live and reserved bytes.
const SAMPLES: usize = 64;

pub(crate) fn run(mut arguments: Arguments) -> Result<(), Failure> {
    let json = arguments.flag("--json");
    let pool = arguments.option("--pool")?.unwrap_or_else(|| "segregated".into());
    let path = arguments.only("TRACE")?;
    let trace = Trace::open(&path).map_err(|error| Failure::Error(format!("{path}: {error}")))?;
    let target = target(&pool)?;
    let report = replay(&trace, target.as_ref(), pool)?;
    print!("{}", if json { report.json() } else { report.table() });
    Ok(())
}

/// What a trace is replayed on.
trait Target {
    /// A block, as a number that `free` takes.
    fn alloc(&self, bytes: usize, stream: u16) -> Result<usize, Error>;
    /// Frees a block that `alloc` gave, once.
    fn free(&self, block: usize, stream: u16);
    /// What it holds.
    fn held(&self) -> Held;
}

/// What a target has taken from its source.
#[derive(Clone, Copy, Debug)]
struct Held {
    reserved: usize,
    peak_reserved: usize,
    source_calls: u64,
}

fn target(pool: &str) -> Result<Box<dyn Target>, Failure> {
    let config = match pool {
        "segregated" => PoolConfig::default_cpu(),
        "best-fit" => PoolConfig::default_cpu().strategy(Strategy::BestFit),
        "first-fit" => PoolConfig::default_cpu().strategy(Strategy::FirstFit),
        other => match other.strip_prefix("fixed:").and_then(|size| size.parse().ok()) {
            Some(size) => PoolConfig::fixed_size_cpu(size),
            None => return Err(Failure::Usage(format!("no pool `{other}`"))),
        },
    };
    Ok(Box::new(AnyPool::new(config)?))
}

impl Target for AnyPool {
    fn alloc(&self, bytes: usize, _: u16) -> Result<usize, Error> {
        let layout = Layout::from_size_align(bytes, 16)?;
        Ok(self.allocate(layout)?.cast::<u8>().expose_provenance().get())
    }

    fn free(&self, block: usize, _: u16) {
        let block = NonNull::new(std::ptr::with_exposed_provenance_mut(block));
        // SAFETY: the address of a live block (contract of `Target`), freed once.
        block.into_iter().for_each(|block| unsafe { self.deallocate(block) });
    }

    fn held(&self) -> Held {
        let stats = self.stats();
        let (reserved, peak_reserved, source_calls) =
            (stats.reserved, stats.peak_reserved, stats.source_calls);
        Held { reserved, peak_reserved, source_calls }
    }
}

/// What a replay shows.
#[derive(Debug)]
struct Report {
    pool: String,
    events: usize,
    streams: usize,
    peak_live: u64,
    peak_reserved: usize,
    /// Time of a round and calls to the source in it: first with an empty pool, then with what that left.
    cold: (Duration, u64),
    warm: (Duration, u64),
    /// Live and reserved bytes over the first round.
    curve: Vec<(u64, usize)>,
}

/// Replays the trace twice: on an empty pool, and on what that left.
fn replay(trace: &Trace, target: &dyn Target, pool: String) -> Result<Report, Failure> {
    let mut curve = Vec::with_capacity(SAMPLES);
    let cold = round(trace, target, |live| curve.push((live, target.held().reserved)))?;
    let warm = round(trace, target, |_| ())?;
    Ok(Report {
        pool,
        events: trace.events().len(),
        streams: trace.streams(),
        peak_live: trace.peak_live(),
        peak_reserved: target.held().peak_reserved,
        cold,
        warm,
        curve,
    })
}

/// One round: its time, without that of the samples, and the calls it made to the source. What the trace leaves
/// live is freed at the end, which counts neither.
fn round(
    trace: &Trace,
    target: &dyn Target,
    mut sample: impl FnMut(u64),
) -> Result<(Duration, u64), Failure> {
    const DEAD: usize = 0;
    let mut blocks = vec![(DEAD, 0); trace.allocations()];
    let calls = target.held().source_calls;
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
    let calls = target.held().source_calls - calls;
    blocks.iter().filter(|(block, _)| *block != DEAD).for_each(|(block, _)| target.free(*block, 0));
    match failed {
        None => Ok((time, calls)),
        Some(what) => Err(Failure::Error(what)),
    }
}

fn allocate(target: &dyn Target, bytes: u64, stream: u16) -> Result<usize, Error> {
    target.alloc(usize::try_from(bytes).unwrap_or(usize::MAX), stream)
}

impl Report {
    /// Nanoseconds an operation.
    fn nanoseconds(&self, (time, _): (Duration, u64)) -> f64 {
        time.as_nanos() as f64 / self.events as f64
    }

    fn ratio(&self) -> f64 {
        self.peak_reserved as f64 / self.peak_live as f64
    }

    fn table(&self) -> String {
        let gib = |bytes: f64| bytes / f64::from(1 << 30);
        let mut text = format!(
            "{} on {} operations, {} streams\n\
             peak live      {:>9.3} GiB\n\
             peak reserved  {:>9.3} GiB, {:.3} of the live\n\
             cold           {:>9.1} ns an operation, {} calls to the source\n\
             warm           {:>9.1} ns an operation, {} calls to the source\n\n\
             reserved (.) and live (#) over the first round, in sixtieths of the peak reserved\n",
            self.pool,
            self.events,
            self.streams,
            gib(self.peak_live as f64),
            gib(self.peak_reserved as f64),
            self.ratio(),
            self.nanoseconds(self.cold),
            self.cold.1,
            self.nanoseconds(self.warm),
            self.warm.1,
        );
        let scale = |bytes: f64| (bytes * 60.0 / self.peak_reserved.max(1) as f64).round() as usize;
        // Every other sample makes a screenful.
        for (live, reserved) in self.curve.iter().step_by(2) {
            let (live, reserved) = (scale(*live as f64), scale(*reserved as f64));
            text += &format!("{}{}\n", "#".repeat(live), ".".repeat(reserved.saturating_sub(live)));
        }
        text
    }

    fn json(&self) -> String {
        let curve: Vec<String> =
            self.curve.iter().map(|(live, reserved)| format!("[{live},{reserved}]")).collect();
        format!(
            "{{\"pool\":\"{}\",\"operations\":{},\"streams\":{},\"peak_live\":{},\"peak_reserved\":{},\
             \"reserved_over_live\":{:.4},\"cold_ns\":{:.1},\"cold_source_calls\":{},\"warm_ns\":{:.1},\
             \"warm_source_calls\":{},\"live_reserved\":[{}]}}\n",
            self.pool,
            self.events,
            self.streams,
            self.peak_live,
            self.peak_reserved,
            self.ratio(),
            self.nanoseconds(self.cold),
            self.cold.1,
            self.nanoseconds(self.warm),
            self.warm.1,
            curve.join(","),
        )
    }
}

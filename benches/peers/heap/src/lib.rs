//! Workloads that every program of this package runs on its own global allocator.
//!
//! `PROGRAM WORKLOAD` prints one number a line: nanoseconds an operation, milliseconds, or MiB, as
//! [`WORKLOADS`] says. `PROGRAM` alone prints the names; `PROGRAM pair SIZE COUNT` frees as many blocks as it
//! allocates and prints nothing, for who counts instructions.

mod memory;
mod pairs;
mod programs;
mod threads;

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds an operation.
    Nanoseconds,
    /// Milliseconds in all.
    Milliseconds,
    /// Mebibytes.
    Mebibytes,
}

impl Unit {
    /// Its sign.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Milliseconds => "ms",
            Self::Mebibytes => "MiB",
        }
    }
}

/// One row, or several, of the table.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name on the command line.
    pub name: &'static str,
    /// What each of its numbers is called, and its unit.
    pub rows: &'static [(&'static str, Unit)],
    run: fn() -> Vec<f64>,
}

macro_rules! workloads {
    ($($name:literal [$($row:literal $unit:ident),*] $run:expr;)*) => {
        /// All workloads.
        pub const WORKLOADS: &[Workload] =
            &[$(Workload { name: $name, rows: &[$(($row, Unit::$unit)),*], run: $run }),*];
    };
}

workloads! {
    "pairs" [
        "pair 16 B" Nanoseconds, "pair 64 B" Nanoseconds, "pair 256 B" Nanoseconds, "pair 1 KiB" Nanoseconds,
        "pair 8 KiB" Nanoseconds, "pair 64 KiB" Nanoseconds
    ] pairs::unknown_sizes;
    "box" ["Box<[u64; 8]>" Nanoseconds] pairs::constant_size;
    "random" ["1000 random objects" Nanoseconds] pairs::random_lifetimes;
    "random2" ["the same on two threads" Nanoseconds] pairs::random_lifetimes_on_two;
    "random_all" ["the same on all cores" Nanoseconds] pairs::random_lifetimes_on_all;
    "pipe" ["producer and consumer" Nanoseconds] threads::producer_and_consumer;
    "exchange" ["exchange between threads" Nanoseconds, "its peak" Mebibytes] || peak(threads::exchange());
    "larson" ["larson-like" Nanoseconds, "its peak" Mebibytes] || peak(threads::larson());
    "mstress" ["mstress-like" Milliseconds, "its peak" Mebibytes] || peak(threads::mstress());
    "rptest" ["rptest-like" Nanoseconds, "its peak" Mebibytes] || peak(threads::rptest());
    "json" ["JSON parse" Milliseconds, "JSON drop" Milliseconds, "JSON again" Milliseconds] programs::json;
    "maps" ["maps and strings" Milliseconds] programs::maps;
    "vec" ["Vec pushed to 64 MiB" Milliseconds, "into a faulted buffer" Milliseconds] programs::vec_push;
    "resident" [
        "1 GiB live" Mebibytes, "95 % freed" Mebibytes, "all freed" Mebibytes, "2 s later" Mebibytes
    ] memory::gibibyte;
    "small" ["peak of a small program" Mebibytes] memory::small_program;
}

/// Adds what the program held at most.
fn peak(mut figures: Vec<f64>) -> Vec<f64> {
    figures.push(memory::peak());
    figures
}

/// Runs the workload that the command line names.
pub fn main(available: bool) {
    if !available {
        eprintln!("built without this allocator");
        std::process::exit(3);
    }
    let Some(name) = std::env::args().nth(1) else {
        return WORKLOADS.iter().for_each(|workload| println!("{}", workload.name));
    };
    if let ("pair", [size, count]) = (name.as_str(), &std::env::args().skip(2).collect::<Vec<_>>()[..]) {
        return pairs::run(size.parse().unwrap(), count.parse().unwrap());
    }
    let Some(workload) = WORKLOADS.iter().find(|workload| workload.name == name) else {
        eprintln!("no workload {name}");
        std::process::exit(2);
    };
    for figure in (workload.run)() {
        println!("{figure:.3}");
    }
}

/// xorshift: cheap enough not to be what is measured, and it allocates nothing.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    #[inline]
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (((self.next() >> 32) * bound as u64) >> 32) as usize
    }

    /// Between `low` and `high`, powers of two, each magnitude as likely.
    pub(crate) fn log_uniform(&mut self, low: usize, high: usize) -> usize {
        let magnitude = self.below((high / low).ilog2() as usize);
        let base = low << magnitude;
        base + self.below(base)
    }
}

/// Nanoseconds since `start`, over `operations`.
pub(crate) fn per_operation(start: std::time::Instant, operations: usize) -> f64 {
    start.elapsed().as_nanos() as f64 / operations as f64
}

/// Cores this process may use, or as many as `HEAP_PEERS_THREADS` says.
pub(crate) fn cores() -> usize {
    let asked = std::env::var("HEAP_PEERS_THREADS").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

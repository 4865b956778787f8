//! Placement alone, with no driver: random programs against every invariant, and what synthetic programs of known
//! shape reserve over what they live on.

use super::*;
use crate::gpu::GpuDevice;
use crate::gpu::driver::sim::SimConfig;
use crate::gpu::driver::{Driver, Handle};

const UNIT: usize = 2 << 20;

/// Books without a driver behind them: pieces are numbers.
struct Books {
    core: Core,
    gpu: GpuDevice,
    handles: u64,
    /// Driver nanoseconds by the measured price of each call.
    ns: u64,
    max_size: usize,
    /// Every so manieth piece cannot be had.
    fail_every: u64,
    calls: u64,
    /// Pieces that moved, and those of them that came back to a shadow.
    moved: u64,
    came_back: u64,
}

impl Books {
    fn new(max_size: usize) -> Self {
        let mut core = Core::new(9, &crate::base::config::PoolConfig::default_gpu());
        assert!(core.set_space(1 << 40, 508 << 30, UNIT));
        core.unrest = Unrest::new(usize::MAX);
        let gpu = GpuDevice::simulated(SimConfig::default());
        Self { core, gpu, handles: 0, ns: 0, max_size, fail_every: 0, calls: 0, moved: 0, came_back: 0 }
    }

    fn fails(&mut self) -> bool {
        self.calls += 1;
        self.fail_every != 0 && self.calls.is_multiple_of(self.fail_every)
    }

    fn fill(&mut self, plan: &Plan) -> Done {
        let mut done = Done::default();
        self.ns += plan.releases.len() as u64 * 40_000 + plan.in_the_way.len() as u64 * 15_000;
        for steps in &plan.gaps {
            for step in steps {
                let failed = done.error.is_some() || !step.shadowed && self.fails();
                let handle = match step.from {
                    From::Mapped(at, handle) => {
                        let piece = Piece { len: step.len, handle };
                        if failed {
                            done.mapped.push((at, piece))
                        } else {
                            done.shadows.push((at, piece))
                        }
                        Some(handle)
                    }
                    From::Spare(handle) if failed => {
                        done.spare.push(Piece { len: step.len, handle });
                        Some(handle)
                    }
                    From::Spare(handle) => Some(handle),
                    From::New if failed => None,
                    From::New => {
                        self.handles += 1;
                        self.ns += 9_000;
                        Some(Handle(self.handles))
                    }
                };
                if failed {
                    if let Some(handle) = handle.filter(|_| step.shadowed) {
                        done.shadows.push((step.to, Piece { len: step.len, handle }));
                    }
                    done.error = Some(Error::oom(step.len, OomReason::Source));
                } else if let Some(handle) = handle {
                    self.moved += u64::from(matches!(step.from, From::Mapped(..)));
                    self.came_back += u64::from(step.shadowed);
                    self.ns += if step.shadowed { 0 } else { 20_500 };
                    done.mapped.push((step.to, Piece { len: step.len, handle }));
                }
            }
            self.ns += 15_000;
        }
        done.at_ns = self.ns;
        done
    }

    fn alloc(&mut self, bytes: usize) -> Option<Placed> {
        let ask = Ask { bytes, align: 256, lane: CLEAN, by_address: false };
        let driver: &dyn Driver = &*self.gpu.0.driver.clone();
        if let Some(placed) = self.core.place(ask).or_else(|| self.core.place_slow(driver, ask)) {
            return Some(placed);
        }
        let plan = self.core.plan(self.core.zone_of(bytes), ask, self.max_size, self.ns).ok()?;
        let done = self.fill(&plan);
        self.core.finish(&plan, done, ask).ok()
    }

    fn free(&mut self, block: Placed) {
        let driver = self.gpu.0.driver.clone();
        self.core.free(&*driver, block.ticket, CLEAN, None);
    }

    fn trim(&mut self, keep: usize) {
        let idle = self.core.take_idle(self.core.idle_bytes().saturating_sub(keep));
        assert!(idle.iter().all(|leaving| leaving.piece.handle.0 <= self.handles));
        self.core.idle_given(Done::default());
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % limit as u64) as usize
    }

    /// Sizes spread evenly over the powers of two.
    fn size(&mut self, most_log2: usize) -> usize {
        let log2 = 6 + self.below(most_log2 - 6);
        (1 << log2) + self.below(1 << log2)
    }
}

#[test]
fn random_programs_keep_every_invariant() {
    let (mut moved, mut came_back) = (0, 0);
    for seed in 1..60u64 {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut books = Books::new([96 << 20, 512 << 20, usize::MAX][random.below(3)]);
        books.fail_every = [0, 7, 40][random.below(3)];
        let mut live: Vec<(Placed, usize)> = Vec::new();
        for _ in 0..300 {
            match random.below(10) {
                0..=5 => {
                    let bytes = random.size(27);
                    if let Some(block) = books.alloc(bytes) {
                        assert!(block.len >= bytes && block.start.is_multiple_of(256));
                        for (other, _) in &live {
                            let apart = block.start + block.len <= other.start
                                || other.start + other.len <= block.start;
                            assert!(apart, "blocks overlap");
                        }
                        live.push((block, bytes));
                    }
                }
                6..=8 if !live.is_empty() => {
                    let (block, _) = live.swap_remove(random.below(live.len()));
                    books.free(block);
                }
                9 if random.below(4) == 0 => books.trim(random.size(28)),
                9 if !live.is_empty() => {
                    let at = random.below(live.len());
                    let bytes = live[at].1 + random.size(24);
                    let ticket = live[at].0.ticket;
                    let grown = books.core.grow(ticket, bytes, CLEAN).is_some() || {
                        let plan = books.core.plan_growth(ticket, bytes, CLEAN, books.max_size, books.ns);
                        plan.is_some_and(|plan| {
                            let done = books.fill(&plan);
                            books.core.finish_growth(ticket, &plan, done).is_ok()
                        })
                    };
                    if grown {
                        live[at].0.len = books.core.len(ticket);
                        assert!(live[at].0.len >= bytes);
                        live[at].1 = bytes;
                    }
                }
                _ => {}
            }
            books.core.check().unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
            assert!(books.core.reserved <= books.max_size);
        }
        live.drain(..).for_each(|(block, _)| books.free(block));
        books.trim(0);
        books.core.check().unwrap();
        assert_eq!(books.core.reserved, 0, "seed {seed}: everything idle goes back");
        moved += books.moved;
        came_back += books.came_back;
    }
    assert!(came_back >= 5, "of {moved} moves {came_back} were to a shadow");
}

/// Runs a program of sizes and lifetimes; peak reserved over peak live.
struct Shape {
    ratio: f64,
    ns_an_operation: f64,
}

fn shape(program: impl Fn(&mut dyn FnMut(Option<usize>, usize))) -> Shape {
    let mut books = Books::new(usize::MAX);
    let mut live: Vec<Option<Placed>> = Vec::new();
    let (mut bytes, mut peak, mut operations) = (0, 0, 0u64);
    // `None` allocates `size`; `Some(id)` frees the block of that number.
    program(&mut |free, size| {
        operations += 1;
        match free {
            None => {
                let block = books.alloc(size).unwrap();
                bytes += size;
                peak = peak.max(bytes);
                live.push(Some(block));
            }
            Some(id) => {
                books.free(live[id].take().unwrap());
                bytes -= size;
            }
        }
    });
    books.core.check().unwrap();
    let reserved = books.core.peak_reserved();
    Shape { ratio: reserved as f64 / peak as f64, ns_an_operation: books.ns as f64 / operations as f64 }
}

/// Layers of a network, forwards and backwards, with a batch and sequence of random length each step.
fn training(make: &mut dyn FnMut(Option<usize>, usize), scale: usize, layers: usize) {
    let mut random = Random(7);
    let mut next = 0;
    let mut alloc = |make: &mut dyn FnMut(Option<usize>, usize), size: usize| {
        make(None, size);
        next += 1;
        (next - 1, size)
    };
    let weights: Vec<_> = (0..layers * 3).map(|at| alloc(make, (4 + at % 3 * 12) << 20)).collect();
    for _ in 0..30 {
        let tokens = scale * (64 + random.below(192));
        let mut kept = Vec::new();
        for layer in 0..layers {
            let inside: Vec<_> = (0..4).map(|at| alloc(make, tokens * (1024 + 2048 * at))).collect();
            let scratch = alloc(make, tokens * 512 + layer * 4096);
            make(Some(scratch.0), scratch.1);
            kept.push(inside);
        }
        for inside in kept.into_iter().rev() {
            let gradient = alloc(make, tokens * 3000);
            inside.into_iter().for_each(|(id, size)| make(Some(id), size));
            make(Some(gradient.0), gradient.1);
        }
    }
    weights.into_iter().for_each(|(id, size)| make(Some(id), size));
}

/// Requests of random length that grow a cache block by block, and end in any order.
fn serving(make: &mut dyn FnMut(Option<usize>, usize)) {
    let mut random = Random(11);
    let mut next = 0;
    let mut running: Vec<(Vec<(usize, usize)>, usize)> = Vec::new();
    for _ in 0..6000 {
        if running.len() < 48 {
            running.push((Vec::new(), 4 + random.below(60)));
        }
        let at = random.below(running.len());
        let size = (1 + random.below(3)) << 20;
        make(None, size);
        running[at].0.push((next, size));
        next += 1;
        // Activations of the step.
        let scratch = (1 + random.below(64)) << 20;
        make(None, scratch);
        make(Some(next), scratch);
        next += 1;
        if running[at].0.len() >= running[at].1 {
            running.swap_remove(at).0.into_iter().for_each(|(id, size)| make(Some(id), size));
        }
    }
}

/// Tensors of a convolutional network: large and few at the front, small and many at the back, and a workspace.
fn convolution(make: &mut dyn FnMut(Option<usize>, usize)) {
    let mut random = Random(13);
    let mut next = 0;
    for _ in 0..60 {
        let batch = 16 + random.below(48);
        let mut kept = Vec::new();
        for layer in 0..24 {
            let size = ((batch << 20) * 4) >> (layer / 4);
            let workspace = (1 + random.below(300)) << 20;
            make(None, size);
            kept.push((next, size));
            make(None, workspace);
            make(Some(next + 1), workspace);
            next += 2;
        }
        for (id, size) in kept.into_iter().rev() {
            make(Some(id), size);
        }
    }
}

#[test]
fn what_is_reserved_follows_what_is_live() {
    let shapes = [
        ("training", shape(|make| training(make, 16, 24)), 1.04),
        ("small training", shape(|make| training(make, 1, 8)), 1.10),
        ("serving", shape(serving), 1.08),
        ("convolution", shape(convolution), 1.06),
    ];
    for (name, Shape { ratio, ns_an_operation }, most) in shapes {
        eprintln!("{name}: {ratio:.3} of the live bytes, {ns_an_operation:.0} ns of driver an operation");
        assert!(ratio <= most, "{name}: reserved {ratio:.3} times what is live");
    }
}

/// Where others hold what the pool would like to have, a refusal is no error: what is at hand does as well.
#[test]
fn a_refusal_makes_the_pool_move_again() {
    let mut books = Books::new(usize::MAX);
    let small = books.alloc(64 << 20).unwrap();
    let _between = books.alloc(1 << 30).unwrap();
    books.free(small);
    let now = Moment { served: 2, ns: books.ns };
    (0..64).for_each(|_| books.core.unrest.moved(now, now));
    let ask = Ask { bytes: 128 << 20, align: 256, lane: CLEAN, by_address: false };
    let takes = |plan: &Plan| plan.gaps.iter().flatten().any(|step| matches!(step.from, From::Mapped(..)));
    let greedy = books.core.plan(LARGE, ask, usize::MAX, books.ns).unwrap();
    assert!(greedy.for_rest && !takes(&greedy));
    assert!(!books.core.claimed.is_empty(), "lanes of claims are not given on");
    let refused = Done { error: Some(Error::oom(ask.bytes, OomReason::Source)), ..Done::default() };
    assert!(books.core.finish(&greedy, refused, ask).is_err());
    assert!(books.core.claimed.is_empty());
    books.core.check().unwrap();
    let content = books.core.plan(LARGE, ask, usize::MAX, books.ns).unwrap();
    assert!(!content.for_rest && takes(&content));
    let done = books.fill(&content);
    assert!(books.core.finish(&content, done, ask).is_ok());
    books.core.check().unwrap();
}

/// Pieces of 64 MiB from address 0 on.
fn pieces_of_64(count: usize) -> Pieces {
    let mut pieces = Pieces::new(UNIT);
    let mapped = (0..count).map(|at| (at * (64 << 20), Piece { len: 64 << 20, handle: Handle(at as u64) }));
    pieces.keep(&Done { mapped: mapped.collect(), ..Done::default() });
    pieces
}

#[test]
fn a_gap_takes_what_fits() {
    let pieces = pieces_of_64(64);
    assert_eq!((pieces.usual(0, 1), pieces_of_64(16).usual(0, 1)), (32 << 20, 16 << 20));
    assert_eq!(pieces_of_64(16).usual(0, 2), 8 << 20, "half of that for several streams");
    let gap = Gap { start: 0, end: 40 << 20, low: 0, high: 42 << 20 };
    let mut at_hand = vec![(8 << 20, From::Spare(Handle(1))), (64 << 20, From::Spare(Handle(2)))];
    let lengths = |steps: Vec<Step>| steps.iter().map(|step| step.len >> 20).collect::<Vec<_>>();
    assert_eq!(lengths(pieces.fill(&gap, &mut at_hand, Some(pieces.usual(0, 1)))), [8, 32]);
    assert_eq!(at_hand.len(), 1, "the piece that is too large stays");
    let below = Gap { start: 20 << 20, end: 40 << 20, low: 0, high: 40 << 20 };
    let down = pieces.fill(&below, &mut at_hand, Some(pieces.usual(0, 1)));
    assert_eq!(down[0].to, 8 << 20);
    assert_eq!(lengths(down), [32], "down into the hole");
    assert_eq!(lengths(pieces.fill(&below, &mut at_hand, None)), [20], "exactly");
}

#[test]
fn a_gap_takes_the_pieces_whose_shadows_lie_there() {
    const MIB: usize = 1 << 20;
    let mut pieces = pieces_of_64(64);
    let shadows = [(1 << 40, 8), (2 << 40, 7)]
        .map(|(at, handle)| (at, Piece { len: 64 * MIB, handle: Handle(handle) }));
    pieces.keep(&Done { shadows: shadows.to_vec(), ..Done::default() });
    assert_eq!(pieces.misplaced_shadow(), None);
    let hand = |handles: &[u64]| -> Vec<(usize, From)> {
        handles.iter().map(|&at| (64 * MIB, From::Mapped(at as usize * 64 * MIB, Handle(at)))).collect()
    };
    let gap = Gap { start: (1 << 40) - 64 * MIB, end: (1 << 40) + 128 * MIB, low: 1 << 39, high: 2 << 40 };
    let mut at_hand = hand(&[1, 2, 8, 9]);
    let steps = pieces.fill(&gap, &mut at_hand, Some(32 * MIB));
    let mut places: Vec<_> = steps.iter().map(|step| (step.to, step.shadowed)).collect();
    places.sort_unstable();
    let around = [(gap.start, false), (1 << 40, true), ((1 << 40) + 64 * MIB, false)];
    assert_eq!(places, around, "filled without a break, the shadow where it lies");
    assert_eq!(at_hand.len(), 1);
    assert!(pieces.in_the_way(&[steps]).is_empty());
    // Its piece is in use: the shadow must go.
    let mut others = hand(&[1, 2, 3, 9]);
    let steps = pieces.fill(&gap, &mut others, Some(32 * MIB));
    assert!(steps.iter().all(|step| !step.shadowed));
    assert_eq!(pieces.in_the_way(&[steps]), shadows[..1]);
    // One that reaches beyond what is needed is none for this gap.
    let narrow = Gap {
        start: (1 << 40) + 2 * MIB,
        end: (1 << 40) + 64 * MIB,
        low: 1 << 40,
        high: (1 << 40) + 64 * MIB,
    };
    let steps = pieces.fill(&narrow, &mut hand(&[8]), None);
    assert!(steps.iter().all(|step| !step.shadowed));
    // Nor is one that leaves more to be made new than without it.
    let front = Gap {
        start: (1 << 40) - 32 * MIB,
        end: (1 << 40) + 96 * MIB,
        low: (1 << 40) - 32 * MIB,
        high: (1 << 40) + 96 * MIB,
    };
    let mut large = vec![(64 * MIB, From::Spare(Handle(8))), (128 * MIB, From::Spare(Handle(100)))];
    let steps = pieces.fill(&front, &mut large, None);
    assert_eq!(steps.iter().map(|step| (step.len, step.shadowed)).collect::<Vec<_>>(), [(128 * MIB, false)]);
    // One that the driver did not unmap may be out of the device's reach: it goes before anything lies there.
    let mut after_failure = pieces_of_64(64);
    after_failure.keep(&Done { stuck: shadows.to_vec(), ..Done::default() });
    let steps = after_failure.fill(&gap, &mut hand(&[1, 2, 8, 9]), Some(32 * MIB));
    assert!(steps.iter().all(|step| !step.shadowed));
    assert_eq!(after_failure.in_the_way(&[steps]), shadows[..1]);
    // A piece that goes takes its shadows with it.
    let leaving = pieces.leave(vec![(Some(8 * 64 * MIB), shadows[0].1)]);
    assert_eq!((leaving[0].home, &*leaving[0].shadows), (Some(8 * 64 * MIB), &[1 << 40][..]));
}

#[test]
fn there_are_no_more_shadows_than_twice_the_pieces() {
    let mut pieces = pieces_of_64(64);
    let piece = Piece { len: UNIT, handle: Handle(1) };
    let shadows: Vec<(usize, Piece)> = (0..129).map(|at| ((1 << 40) + at * UNIT, piece)).collect();
    pieces.keep(&Done { shadows: shadows[..128].to_vec(), ..Done::default() });
    assert!(pieces.in_the_way(&[]).is_empty());
    pieces.keep(&Done { shadows: shadows[128..].to_vec(), ..Done::default() });
    assert_eq!(pieces.in_the_way(&[]), shadows[..9], "the oldest, some at once");
}

//! Errors and attacks of C programs against the process heap: each case is a program of its own, started with a
//! hardened heap and with the default one, and judged by how it ends.
//!
//! | verdict | what it takes |
//! |---|---|
//! | detected | the program ends with one line of the heap's on stderr, or at memory that it may not access |
//! | harmless | it runs to its end, and finds on the way: every block that the error did not name as it was; what is allocated afterwards (thousands of blocks of the size in question) all apart from each other and from what is live, and holding what is written to it |
//! | harmed | anything else |
//!
//! `cargo test --test heap_attacks` runs all; `-- list` names them with their verdicts.

mod children;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::ptr;

use memory_pool::{GlobalPool, HeapConfig};

#[global_allocator]
static POOL: GlobalPool = GlobalPool::with_config(HeapConfig::new());

/// One size in each way that blocks are kept: with maps beside them and without, in small spans and large ones,
/// alone in slices, alone in a mapping.
const SIZES: [usize; 8] = [24, 64, 200, 1000, 5000, 40_000, 100_000, 3 << 20];

struct Case {
    kind: &'static str,
    size: usize,
    detail: usize,
    attack: fn(&Scene, usize),
}

/// The victim among its neighbours, all filled.
struct Scene {
    size: usize,
    blocks: Vec<*mut u8>,
    victim: *mut u8,
}

const VICTIM: usize = 13;

fn alloc(size: usize) -> *mut u8 {
    let block = POOL.alloc_unsized(size, 16);
    assert!(!block.is_null());
    block
}

fn free(block: *mut u8) {
    // SAFETY: none for some blocks, which is the point: this process is here to be broken.
    unsafe { POOL.free_unsized(block) }
}

fn fill(block: *mut u8, size: usize, byte: u8) {
    // SAFETY: the caller's block of that size.
    unsafe { block.write_bytes(byte, size) }
}

fn holds(block: *mut u8, size: usize, byte: u8) -> bool {
    // SAFETY: the caller's block of that size.
    let bytes = unsafe { std::slice::from_raw_parts(block, size) };
    // All are as the first: compared as one piece, since there are many and this is built without optimisation.
    bytes[0] == byte && bytes[1..] == bytes[..size - 1]
}

/// Writes `len` bytes from `block + at`, wherever that is.
fn scribble(block: *mut u8, at: isize, len: usize) {
    for n in 0..len {
        // SAFETY: none: see `free`.
        unsafe { block.offset(at + n as isize).write_volatile(0x41 + n as u8 % 26) };
    }
}

fn usable(block: *mut u8) -> usize {
    GlobalPool::usable_size(block).unwrap()
}

impl Scene {
    fn new(size: usize) -> Self {
        let count = if size > 1 << 20 { 20 } else { 40 };
        let blocks: Vec<*mut u8> = (0..count).map(|_| alloc(size)).collect();
        blocks.iter().enumerate().for_each(|(at, &block)| fill(block, size, at as u8));
        let victim = blocks[VICTIM];
        Self { size, blocks, victim }
    }

    /// Blocks that no error named: all but the victim, and but those that `spared` leaves out.
    fn others_are_whole(&self) -> bool {
        self.blocks
            .iter()
            .enumerate()
            .all(|(at, &block)| block.is_null() || at == VICTIM || holds(block, self.size, at as u8))
    }

    /// Frees all but the victim, which the error has dealt with.
    fn free_others(&self) {
        for (at, &block) in self.blocks.iter().enumerate() {
            if at != VICTIM && !block.is_null() {
                free(block);
            }
        }
    }

    /// Whether the heap still serves: many blocks of this size and of others, all apart and holding what is written.
    fn heap_serves(&self) -> bool {
        for size in [self.size, 64, 3000] {
            let count = ((16 << 20) / size).clamp(6, 3000);
            let mut blocks: Vec<(*mut u8, u8)> = (0..count).map(|n| (alloc(size), n as u8)).collect();
            blocks.iter().for_each(|&(block, byte)| fill(block, size, byte));
            let whole = blocks.iter().all(|&(block, byte)| holds(block, size, byte));
            blocks.sort_unstable();
            let apart = blocks.windows(2).all(|pair| pair[0].0.addr() + size <= pair[1].0.addr());
            let apart_from_live = self.live().all(|live| {
                blocks.iter().all(|(block, _)| {
                    block.addr() + size <= live.addr() || live.addr() + self.size <= block.addr()
                })
            });
            if !(whole && apart && apart_from_live) {
                return false;
            }
            blocks.iter().for_each(|&(block, _)| free(block));
        }
        true
    }

    fn live(&self) -> impl Iterator<Item = *mut u8> {
        self.blocks
            .iter()
            .enumerate()
            .filter(|(at, block)| *at != VICTIM && !block.is_null())
            .map(|(_, &block)| block)
    }
}

fn on_another_thread(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
}

/// A pointer that crosses threads.
#[derive(Clone, Copy)]
struct Shared(*mut u8);
// SAFETY: the threads take turns.
unsafe impl Send for Shared {}
impl Shared {
    fn free(self) {
        free(self.0);
    }
}

static ELSEWHERE: [u64; 64] = [7; 64];

/// Each kind of error, the sizes it is tried on, and the details it is tried with.
type Kind = (&'static str, &'static [usize], &'static [usize], fn(&Scene, usize));

const SMALL: &[usize] = &[24, 64, 200, 1000, 5000, 40_000];

const KINDS: &[Kind] = &[
    ("double free, at once", &SIZES, &[0], |scene, _| {
        free(scene.victim);
        free(scene.victim);
    }),
    // `detail` other blocks are freed in between.
    ("double free, far", SMALL, &[1, 20], |scene, between| {
        let others: Vec<*mut u8> = (0..between).map(|_| alloc(scene.size)).collect();
        free(scene.victim);
        others.into_iter().for_each(free);
        free(scene.victim);
    }),
    ("double free, after an allocation of the size", &SIZES, &[0], |scene, _| {
        free(scene.victim);
        let other = alloc(scene.size);
        fill(other, scene.size, 9);
        free(scene.victim);
        assert!(holds(other, scene.size, 9));
        free(other);
    }),
    ("double free, second on another thread", &SIZES, &[0], |scene, _| {
        free(scene.victim);
        let victim = Shared(scene.victim);
        on_another_thread(move || victim.free());
    }),
    ("double free, first on another thread", &SIZES, &[0], |scene, _| {
        let victim = Shared(scene.victim);
        on_another_thread(move || victim.free());
        free(scene.victim);
    }),
    ("double free, both on another thread", &SIZES, &[0], |scene, _| {
        let victim = Shared(scene.victim);
        on_another_thread(move || {
            victim.free();
            victim.free();
        });
    }),
    // Past what the block can be used for, by so many bytes.
    ("overflow", &SIZES, &[1, 2, 4, 8, 16, 32, 64], |scene, by| {
        scribble(scene.victim, usable(scene.victim) as isize, by);
        free(scene.victim);
    }),
    ("overflow of zeros", &SIZES, &[1, 8, 64], |scene, by| {
        fill(scene.victim.wrapping_add(usable(scene.victim)), by, 0);
        free(scene.victim);
    }),
    ("overflow of what was asked for", &SIZES, &[1], |scene, by| {
        scribble(scene.victim, scene.size as isize, by);
        free(scene.victim);
    }),
    ("underflow", &SIZES, &[1, 8, 16, 64], |scene, by| {
        scribble(scene.victim, -(by as isize), by);
        free(scene.victim);
        scene
            .blocks
            .iter()
            .filter(|&&block| block < scene.victim && !block.is_null())
            .for_each(|&block| free(block));
        std::process::exit(if scene.heap_serves() { 0 } else { HARMED });
    }),
    ("free inside of the block", &SIZES, &[1, 8, 16, 4096], |scene, at| {
        free(scene.victim.wrapping_add(at));
    }),
    ("free past the last block", SMALL, &[0], |scene, _| {
        let last = scene.blocks.iter().copied().max().unwrap();
        free(last.wrapping_add(usable(last) + 256));
    }),
    // At the start, in the middle, at the end; then blocks of the size are used.
    ("write after free", &SIZES, &[0, 1, 2], |scene, third| {
        free(scene.victim);
        let at = (scene.size - 8) * third / 2;
        scribble(scene.victim, at as isize, 8);
    }),
    ("write after free, into what was allocated since", &SIZES, &[0, 1], |scene, half| {
        free(scene.victim);
        let other = alloc(scene.size);
        fill(other, scene.size, 9);
        scribble(scene.victim, ((scene.size - 8) * half) as isize, 8);
        assert!(holds(other, scene.size, 9));
        free(other);
    }),
    ("free list poisoned with an address", SMALL, &[0, 8], |scene, at| {
        let mut target = [0u64; 32];
        free(scene.victim);
        // SAFETY: none: see `free`.
        unsafe { scene.victim.add(at).cast::<u64>().write_unaligned((&raw mut target).addr() as u64) };
        for _ in 0..200 {
            let block = alloc(scene.size);
            assert!(block.addr().abs_diff((&raw const target).addr()) > 4096);
        }
    }),
    ("resize of a free block", &SIZES, &[0, 1], |scene, grow| {
        free(scene.victim);
        // SAFETY: none: see `free`.
        let moved = unsafe { POOL.realloc_unsized(scene.victim, scene.size + grow * scene.size) };
        assert!(moved.is_null());
    }),
    ("free with another size's layout", SMALL, &[0], |scene, _| {
        let layout = std::alloc::Layout::from_size_align(scene.size * 3, 8).unwrap();
        // SAFETY: none: see `free`.
        unsafe { std::alloc::dealloc(scene.victim, layout) };
    }),
    ("free of the stack", &[64], &[0, 1], |scene, sized| {
        let mut here = [[0u64; 8]; 4];
        free_as((&raw mut here[2]).cast(), scene, sized);
    }),
    ("free of a static", &[64], &[0, 1], |scene, sized| {
        free_as((&raw const ELSEWHERE[8]).cast_mut().cast(), scene, sized);
    }),
    ("free of another allocator's block", &[64, 1000], &[0, 1], |scene, sized| {
        // SAFETY: freed by nobody.
        free_as(unsafe { libc::malloc(scene.size) }.cast(), scene, sized);
    }),
    ("free of a mapping", &[64], &[0, 1], |scene, sized| {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping.
        let place = unsafe { libc::mmap(ptr::null_mut(), 16 << 20, prot, flags, -1, 0) };
        free_as(place.cast::<u8>().wrapping_add(9 << 20), scene, sized);
    }),
    ("free of a small number", &[64], &[0, 1], |scene, sized| {
        free_as(ptr::without_provenance_mut(0x1230), scene, sized);
    }),
    ("free of the heap's own books", &[64], &[0, 1], |scene, sized| {
        free_as(scene.victim.map_addr(|address| (address & !((4 << 20) - 1)) + 4096), scene, sized);
    }),
];

fn free_as(block: *mut u8, scene: &Scene, sized: usize) {
    if sized == 1 {
        let layout = std::alloc::Layout::from_size_align(scene.size, 8).unwrap();
        // SAFETY: none: see `free`.
        unsafe { std::alloc::dealloc(block, layout) };
    } else {
        free(block);
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &(kind, sizes, details, attack) in KINDS {
        for &size in sizes {
            for &detail in details {
                if !(kind == "free inside of the block" && detail >= size) {
                    cases.push(Case { kind, size, detail, attack });
                }
            }
        }
    }
    cases
}

const HARMED: i32 = 3;

/// Runs a case in this process; comes back only if nothing stopped it.
fn attempt(case: &Case) -> i32 {
    // A check inside of an attack that fails is harm done.
    std::panic::set_hook(Box::new(|_| std::process::exit(HARMED)));
    let scene = Scene::new(case.size);
    (case.attack)(&scene, case.detail);
    let whole = scene.others_are_whole() && scene.heap_serves();
    if !whole || !scene.others_are_whole() {
        return HARMED;
    }
    scene.free_others();
    GlobalPool::trim();
    if scene.heap_serves_alone() { 0 } else { HARMED }
}

impl Scene {
    /// [`heap_serves`](Self::heap_serves) when nothing of the scene is live.
    fn heap_serves_alone(&self) -> bool {
        Self { size: self.size, blocks: Vec::new(), victim: self.victim }.heap_serves()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Detected,
    Harmless,
    Harmed,
}

fn judge(number: usize, hardened: bool) -> Verdict {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("case").arg(number.to_string()).env_clear();
    if hardened {
        command.env("MEMORY_POOL_HARDENED", "1");
    }
    let output = children::output_of(&mut command).unwrap();
    let line = String::from_utf8_lossy(&output.stderr);
    match (output.status.code(), output.status.signal()) {
        (Some(0), _) => Verdict::Harmless,
        (_, Some(libc::SIGABRT)) if line.lines().count() == 1 && line.starts_with("memory-pool: ") => {
            Verdict::Detected
        }
        (_, Some(libc::SIGSEGV | libc::SIGBUS)) => Verdict::Detected,
        _ => Verdict::Harmed,
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let cases = cases();
    if let [first, number] = arguments.as_slice()
        && first == "case"
    {
        return ExitCode::from(attempt(&cases[number.parse::<usize>().unwrap()]) as u8);
    }
    let list = arguments.iter().any(|argument| argument == "list");
    let verdicts: Vec<[Verdict; 2]> = {
        let next = std::sync::atomic::AtomicUsize::new(0);
        let mut found: Vec<(usize, [Verdict; 2])> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut found = Vec::new();
                        loop {
                            let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            if at >= cases.len() {
                                return found;
                            }
                            found.push((at, [judge(at, true), judge(at, false)]));
                        }
                    })
                })
                .collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        found.sort_unstable_by_key(|(at, _)| *at);
        found.into_iter().map(|(_, verdicts)| verdicts).collect()
    };
    if list {
        for (case, [hardened, plain]) in cases.iter().zip(&verdicts) {
            println!("{:<50} {:>8} {:>5}  {hardened:?} / {plain:?}", case.kind, case.size, case.detail);
        }
    }
    println!("{:<50} {:>6} {:>28} {:>28}", "kind", "cases", "hardened", "default");
    println!("{:<50} {:>6} {:>28} {:>28}", "", "", "detected harmless harmed", "detected harmless harmed");
    let row = |name: &str, of: &dyn Fn(&Case) -> bool| {
        let chosen: Vec<&[Verdict; 2]> =
            cases.iter().zip(&verdicts).filter(|(case, _)| of(case)).map(|(_, verdicts)| verdicts).collect();
        let count = |which: usize, verdict| chosen.iter().filter(|found| found[which] == verdict).count();
        print!("{name:<50} {:>6}", chosen.len());
        for which in 0..2 {
            print!("    {:>8}", count(which, Verdict::Detected));
            print!(" {:>8} {:>6}", count(which, Verdict::Harmless), count(which, Verdict::Harmed));
        }
        println!();
        count(0, Verdict::Harmed)
    };
    for (kind, ..) in KINDS {
        row(kind, &|case| case.kind == *kind);
    }
    let harmed = row("all", &|_| true);
    if cases.len() < 100 || harmed * 20 > cases.len() {
        println!("more than one in twenty did harm to a hardened heap");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

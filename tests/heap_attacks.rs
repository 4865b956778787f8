//! Errors and attacks of C programs against the process heap: each case is a program of its own, started with a
//! hardened heap and with the default one, and judged by how it ends. It reaches the heap without telling sizes (as C
//! programs do, in Rust), as Rust programs do, with layouts, or through the C functions of the preloaded library.
//!
//! | verdict | what it takes |
//! |---|---|
//! | detected | the program ends with one line of the heap's on stderr, or at memory that it may not access |
//! | harmless | it runs to its end, and finds on the way: every block that the error did not name as it was; what is allocated afterwards (thousands of blocks of the size in question) all apart from each other and from what is live, and holding what is written to it |
//! | harmed | anything else |
//!
//! `cargo test --test heap_attacks` runs all; `-- list` names them with their verdicts.

mod children;
mod programs;

use std::alloc::Layout;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use memory_pool::{GlobalPool, HeapConfig};

#[global_allocator]
static POOL: GlobalPool = GlobalPool::with_config(HeapConfig::new());

/// One size in each way that blocks are kept: with maps beside them and without, in small spans and large ones,
/// alone in slices, alone in a mapping.
const SIZES: [usize; 8] = [24, 64, 200, 1000, 5000, 40_000, 100_000, 3 << 20];

/// How a case reaches the heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Api {
    Unsized,
    Layouts,
    C,
}

struct Case {
    api: Api,
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

/// How this process reaches the heap.
static API: OnceLock<Api> = OnceLock::new();

fn api() -> Api {
    *API.get().unwrap()
}

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn alloc(size: usize) -> *mut u8 {
    let block = match api() {
        Api::Unsized => POOL.alloc_unsized(size, 16),
        // SAFETY: no size is 0.
        Api::Layouts => unsafe { std::alloc::alloc(layout(size)) },
        // SAFETY: no preconditions.
        Api::C => unsafe { libc::malloc(size) }.cast(),
    };
    assert!(!block.is_null());
    block
}

/// Frees what is said to be a block of `size` bytes.
fn free(block: *mut u8, size: usize) {
    // SAFETY: none for some blocks, which is the point: this process is here to be broken.
    unsafe {
        match api() {
            Api::Unsized => POOL.free_unsized(block),
            Api::Layouts => std::alloc::dealloc(block, layout(size)),
            Api::C => libc::free(block.cast()),
        }
    }
}

fn resize(block: *mut u8, size: usize, to: usize) -> *mut u8 {
    // SAFETY: none: see `free`.
    unsafe {
        match api() {
            Api::Unsized => POOL.realloc_unsized(block, to),
            Api::Layouts => std::alloc::realloc(block, layout(size), to),
            Api::C => libc::realloc(block.cast(), to).cast(),
        }
    }
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

/// Gives back what can be, so that what comes next is built anew.
fn trim() {
    match api() {
        // SAFETY: no preconditions.
        Api::C => _ = unsafe { libc::malloc_trim(0) },
        _ => _ = GlobalPool::trim(),
    }
}

fn usable(block: *mut u8) -> usize {
    match api() {
        // SAFETY: a live block.
        Api::C => unsafe { libc::malloc_usable_size(block.cast()) },
        _ => GlobalPool::usable_size(block).unwrap(),
    }
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
                free(block, self.size);
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
            blocks.iter().for_each(|&(block, _)| free(block, size));
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

/// A block that crosses threads, and its size.
#[derive(Clone, Copy)]
struct Shared(*mut u8, usize);
// SAFETY: the threads take turns.
unsafe impl Send for Shared {}
impl Shared {
    fn free(self) {
        free(self.0, self.1);
    }
}

static ELSEWHERE: [u64; 64] = [7; 64];

/// Each kind of error, the sizes it is tried on, and the details it is tried with.
type Kind = (&'static str, &'static [usize], &'static [usize], fn(&Scene, usize));

const SMALL: &[usize] = &[24, 64, 200, 1000, 5000, 40_000];

const KINDS: &[Kind] = &[
    ("double free, at once", &SIZES, &[0], |scene, _| {
        free(scene.victim, scene.size);
        free(scene.victim, scene.size);
    }),
    // `detail` other blocks are freed in between.
    ("double free, far", SMALL, &[1, 20], |scene, between| {
        let others: Vec<*mut u8> = (0..between).map(|_| alloc(scene.size)).collect();
        free(scene.victim, scene.size);
        others.into_iter().for_each(|block| free(block, scene.size));
        free(scene.victim, scene.size);
    }),
    ("double free, after an allocation of the size", &SIZES, &[0], |scene, _| {
        free(scene.victim, scene.size);
        let other = alloc(scene.size);
        fill(other, scene.size, 9);
        free(scene.victim, scene.size);
        assert!(holds(other, scene.size, 9));
        free(other, scene.size);
    }),
    ("double free, second on another thread", &SIZES, &[0], |scene, _| {
        free(scene.victim, scene.size);
        let victim = Shared(scene.victim, scene.size);
        on_another_thread(move || victim.free());
    }),
    ("double free, first on another thread", &SIZES, &[0], |scene, _| {
        let victim = Shared(scene.victim, scene.size);
        on_another_thread(move || victim.free());
        free(scene.victim, scene.size);
    }),
    ("double free, both on another thread", &SIZES, &[0], |scene, _| {
        let victim = Shared(scene.victim, scene.size);
        on_another_thread(move || {
            victim.free();
            victim.free();
        });
    }),
    // Past what the block can be used for, by so many bytes.
    ("overflow", &SIZES, &[1, 2, 4, 8, 16, 32, 64], |scene, by| {
        scribble(scene.victim, usable(scene.victim) as isize, by);
        free(scene.victim, scene.size);
    }),
    ("overflow of zeros", &SIZES, &[1, 8, 64], |scene, by| {
        fill(scene.victim.wrapping_add(usable(scene.victim)), by, 0);
        free(scene.victim, scene.size);
    }),
    ("overflow of what was asked for", &SIZES, &[1], |scene, by| {
        scribble(scene.victim, scene.size as isize, by);
        free(scene.victim, scene.size);
    }),
    ("underflow", &SIZES, &[1, 8, 16, 64], |scene, by| {
        scribble(scene.victim, -(by as isize), by);
        free(scene.victim, scene.size);
        scene
            .blocks
            .iter()
            .filter(|&&block| block < scene.victim && !block.is_null())
            .for_each(|&block| free(block, scene.size));
        std::process::exit(if scene.heap_serves() { 0 } else { HARMED });
    }),
    ("underflow, into blocks that stay", &SIZES, &[1, 64], |scene, by| {
        scribble(scene.victim, -(by as isize), by);
        free(scene.victim, scene.size);
    }),
    ("free inside of the block", &SIZES, &[1, 8, 16, 4096], |scene, at| {
        free(scene.victim.wrapping_add(at), scene.size);
    }),
    ("free past the last block", SMALL, &[0], |scene, _| {
        let last = scene.blocks.iter().copied().max().unwrap();
        free(last.wrapping_add(usable(last) + 256), scene.size);
    }),
    // At the start, in the middle, at the end; then blocks of the size are used.
    ("write after free", &SIZES, &[0, 1, 2], |scene, third| {
        free(scene.victim, scene.size);
        let at = (scene.size - 8) * third / 2;
        scribble(scene.victim, at as isize, 8);
    }),
    ("write after free, into what was allocated since", &SIZES, &[0, 1], |scene, half| {
        free(scene.victim, scene.size);
        let other = alloc(scene.size);
        fill(other, scene.size, 9);
        scribble(scene.victim, ((scene.size - 8) * half) as isize, 8);
        assert!(holds(other, scene.size, 9));
        free(other, scene.size);
    }),
    ("free list poisoned with an address", SMALL, &[0, 8], |scene, at| {
        let mut target = [0u64; 32];
        free(scene.victim, scene.size);
        // SAFETY: none: see `free`.
        unsafe { scene.victim.add(at).cast::<u64>().write_unaligned((&raw mut target).addr() as u64) };
        for _ in 0..200 {
            let block = alloc(scene.size);
            assert!(block.addr().abs_diff((&raw const target).addr()) > 4096);
        }
    }),
    ("resize of a free block", &SIZES, &[0, 1], |scene, grow| {
        free(scene.victim, scene.size);
        resize(scene.victim, scene.size, scene.size * (2 + grow));
        std::process::exit(HARMED);
    }),
    ("free with another size's layout", SMALL, &[0], |scene, _| {
        free(scene.victim, scene.size * 3);
    }),
    ("free of the stack", &[64], &[0], |scene, _| {
        let mut here = [[0u64; 8]; 4];
        free((&raw mut here[2]).cast(), scene.size);
    }),
    ("free of a static", &[64], &[0], |scene, _| {
        free((&raw const ELSEWHERE[8]).cast_mut().cast(), scene.size);
    }),
    ("free of a mapping", &[64], &[0], |scene, _| {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping.
        let place = unsafe { libc::mmap(ptr::null_mut(), 16 << 20, prot, flags, -1, 0) };
        free(place.cast::<u8>().wrapping_add(9 << 20), scene.size);
    }),
    ("free of a small number", &[64], &[0], |scene, _| {
        free(ptr::without_provenance_mut(0x1230), scene.size);
    }),
    ("free of the heap's own books", &[64], &[0], |scene, _| {
        free(scene.victim.map_addr(|address| (address & !((4 << 20) - 1)) + 4096), scene.size);
    }),
];

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for api in [Api::Unsized, Api::Layouts, Api::C] {
        for &(kind, sizes, details, attack) in KINDS {
            for (&size, &detail) in
                sizes.iter().flat_map(|size| details.iter().map(move |detail| (size, detail)))
            {
                let inside = kind != "free inside of the block" || detail < size;
                // One way in gets all sizes; the others those that take different ways from there.
                let told = kind != "free with another size's layout" || api == Api::Layouts;
                if inside && told && (api == Api::Unsized || [64, 5000, 100_000, 3 << 20].contains(&size)) {
                    cases.push(Case { api, kind, size, detail, attack });
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
    API.set(case.api).unwrap();
    let scene = Scene::new(case.size);
    (case.attack)(&scene, case.detail);
    let whole = scene.others_are_whole() && scene.heap_serves();
    if !whole || !scene.others_are_whole() {
        return HARMED;
    }
    scene.free_others();
    trim();
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

fn judge(number: usize, case: &Case, library: &Path, hardened: bool) -> Verdict {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("case").arg(number.to_string()).env_clear();
    if case.api == Api::C {
        command.env("LD_PRELOAD", library);
    }
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
    let library = programs::example_library("malloc_preload");
    let next = AtomicUsize::new(0);
    let work = || {
        let mut found = Vec::new();
        while let at = next.fetch_add(1, Ordering::Relaxed)
            && let Some(case) = cases.get(at)
        {
            // What becomes of them on a heap that is not hardened is there to compare with: one way in will do.
            let plain = (case.api == Api::Unsized).then(|| judge(at, case, &library, false));
            found.push((at, judge(at, case, &library, true), plain));
        }
        found
    };
    let mut verdicts: Vec<(usize, Verdict, Option<Verdict>)> = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        work().into_iter().chain(other.join().unwrap()).collect()
    });
    verdicts.sort_unstable_by_key(|(at, ..)| *at);
    if arguments.iter().any(|argument| argument == "list") {
        for (Case { api, kind, size, detail, .. }, (_, hardened, plain)) in cases.iter().zip(&verdicts) {
            println!("{kind:<50} {api:<8?} {size:>8} {detail:>5}  {hardened:?} / {plain:?}");
        }
    }
    println!("{:<50} {:>6} {:>28} {:>35}", "kind", "cases", "hardened", "default");
    let columns = "detected harmless harmed";
    println!("{:<50} {:>6} {columns:>28}  {:>6} {columns:>28}", "", "", "cases");
    let row = |name: &str, of: &dyn Fn(&Case) -> bool| {
        let chosen = || cases.iter().zip(&verdicts).filter(|(case, _)| of(case)).map(|(_, verdict)| verdict);
        let harmed = |verdicts: &[Verdict]| {
            let count = |verdict| verdicts.iter().filter(|found| **found == verdict).count();
            print!("{:>6}    {:>8}", verdicts.len(), count(Verdict::Detected));
            print!(" {:>8} {:>6}  ", count(Verdict::Harmless), count(Verdict::Harmed));
            count(Verdict::Harmed)
        };
        print!("{name:<50} ");
        let harmed_hardened = harmed(&chosen().map(|(_, hardened, _)| *hardened).collect::<Vec<_>>());
        harmed(&chosen().filter_map(|(.., plain)| *plain).collect::<Vec<_>>());
        println!();
        harmed_hardened
    };
    for (kind, ..) in KINDS {
        row(kind, &|case| case.kind == *kind);
    }
    for api in [Api::Unsized, Api::Layouts, Api::C] {
        row(&format!("all, {api:?}"), &|case| case.api == api);
    }
    let harmed = row("all", &|_| true);
    if cases.len() < 100 || harmed > 0 {
        println!("{harmed} did harm to a hardened heap");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

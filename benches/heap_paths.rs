//! Instructions on the fast paths of the process heap, counted by callgrind, against a recorded table.
//!
//! `cargo bench --bench heap_paths` fails where a path became longer than `benches/heap_paths.txt` says, or where
//! an instruction that locks the bus runs on a path that stays within a thread; `cargo bench --bench heap_paths --
//! --record` writes the table anew. It runs itself under valgrind, each path with two numbers of turns; the
//! difference is what the turns took. Instructions that lock are found in the program's disassembly, and counted
//! where they ran. A turn's loop is counted on its own and taken off.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, realloc};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::hint::black_box;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use memory_pool::{CpuPool, GlobalPool, PoolConfig};

#[global_allocator]
static POOL: GlobalPool = GlobalPool::new();

type Path = (&'static str, fn(usize), bool);

/// The table's lines: what a path is called, what one turn does, and whether it stays within a thread.
const PATHS: [Path; 14] = [
    ("nothing: the loop", |turns| (0..turns).for_each(|turn| _ = black_box(turn)), true),
    ("pair of 16 B, unknown layout", |turns| pairs(16, turns), true),
    ("pair of 64 B, unknown layout", |turns| pairs(64, turns), true),
    ("pair of 256 B, unknown layout", |turns| pairs(256, turns), true),
    ("pair of 1 KiB, unknown layout", |turns| pairs(1024, turns), true),
    ("pair of 8 KiB, unknown layout", |turns| pairs(8192, turns), true),
    ("pair of 64 KiB, unknown layout", |turns| pairs(65536, turns), true),
    ("pair of 64 B, constant layout", constant_pairs, true),
    ("pair of 64 B, zeroed", zeroed_pairs, true),
    ("pair of 64 B, freed without its size", unsized_pairs, true),
    ("pair of 64 B of a CpuPool", pool_pairs, true),
    ("resize within a block", resizes, true),
    ("pair of 64 B, a thousand live at a time", batches, true),
    ("pair of 64 B, freed by another thread", handed_over, false),
];
const TURNS: usize = 20_000;
/// Instructions a turn by which a path may differ from the table: what slow paths take now and then.
const SLACK: f64 = 0.3;

fn layout(size: usize) -> Layout {
    Layout::from_size_align(black_box(size), black_box(8)).unwrap()
}

fn pairs(size: usize, turns: usize) {
    let layout = layout(size);
    for _ in 0..turns {
        // SAFETY: the size is not 0, and the block is freed once.
        unsafe { dealloc(black_box(alloc(black_box(layout))), black_box(layout)) };
    }
}

fn constant_pairs(turns: usize) {
    const LAYOUT: Layout = Layout::new::<[u64; 8]>();
    for _ in 0..turns {
        // SAFETY: as above.
        unsafe { dealloc(black_box(alloc(LAYOUT)), LAYOUT) };
    }
}

fn zeroed_pairs(turns: usize) {
    let layout = layout(64);
    for _ in 0..turns {
        // SAFETY: as above.
        unsafe { dealloc(black_box(alloc_zeroed(black_box(layout))), black_box(layout)) };
    }
}

fn unsized_pairs(turns: usize) {
    for _ in 0..turns {
        let block = POOL.alloc_unsized(black_box(64), black_box(16));
        // SAFETY: live, freed once.
        unsafe { POOL.free_unsized(black_box(block)) };
    }
}

fn pool_pairs(turns: usize) {
    let pool = CpuPool::new(PoolConfig::high_performance_cpu()).unwrap();
    let layout = layout(64);
    for _ in 0..turns {
        let block = pool.allocate(black_box(layout)).unwrap();
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(black_box(block.cast())) };
    }
}

fn resizes(turns: usize) {
    let (small, large) = (layout(100), layout(112));
    // SAFETY: the block is live, of the layout that is told, and both sizes are not 0.
    unsafe {
        let mut block = alloc(small);
        for _ in 0..turns {
            block = realloc(black_box(block), black_box(small), large.size());
            block = realloc(black_box(block), black_box(large), small.size());
        }
        dealloc(block, small);
    }
}

fn batches(turns: usize) {
    let layout = layout(64);
    let mut live = [std::ptr::null_mut(); 1000];
    for _ in 0..turns / live.len() {
        // SAFETY: the size is not 0, and each block is freed once.
        unsafe {
            live.iter_mut().for_each(|block| *block = alloc(black_box(layout)));
            live.iter().for_each(|block| dealloc(black_box(*block), layout));
        }
    }
}

fn handed_over(turns: usize) {
    let blocks: Vec<Box<[u64; 8]>> = (0..turns).map(|_| Box::new(black_box([1; 8]))).collect();
    std::thread::spawn(move || drop(black_box(blocks))).join().unwrap();
}

/// Instructions by address, those of this program alone.
type Profile = BTreeMap<u64, u64>;

fn profile(path: &str, turns: usize) -> (u64, Profile) {
    let itself = std::env::current_exe().unwrap();
    let out = std::env::temp_dir().join(format!("heap_paths-{}", std::process::id()));
    let mut valgrind = Command::new("valgrind");
    valgrind
        .args(["--tool=callgrind", "--dump-instr=yes", "--compress-pos=no", "--compress-strings=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(&itself)
        .args(["--work", path, &turns.to_string()]);
    let said = valgrind.output().expect("valgrind runs");
    assert!(said.status.success(), "{path}: {}", String::from_utf8_lossy(&said.stderr));
    let text = std::fs::read_to_string(&out).unwrap();
    _ = std::fs::remove_file(&out);
    let (mut total, mut ran, mut ours, mut inclusive) = (0, Profile::new(), false, false);
    for line in text.lines() {
        if let Some(object) = line.strip_prefix("ob=") {
            ours = PathBuf::from(object).file_name() == itself.file_name();
        } else if line.starts_with("calls=") {
            // The line after it sums up what the called function did, which is counted where it stands.
            inclusive = true;
        } else if let Some(rest) = line.strip_prefix("0x") {
            let mut fields = rest.split(' ');
            let (address, cost) = (fields.next().unwrap(), fields.next_back().unwrap());
            let cost: u64 = cost.parse().unwrap();
            if !std::mem::take(&mut inclusive) {
                total += cost;
                if ours {
                    *ran.entry(u64::from_str_radix(address, 16).unwrap()).or_default() += cost;
                }
            }
        }
    }
    assert!(ran.len() > 1000, "no profile of {}", itself.display());
    (total, ran)
}

/// Addresses of the instructions that lock: with the prefix, or exchanging with memory.
fn locking() -> HashSet<u64> {
    let itself = std::env::current_exe().unwrap();
    let mut objdump = Command::new("objdump");
    let said = objdump.args(["-d", "--no-show-raw-insn"]).arg(itself).output().expect("objdump runs");
    let text = String::from_utf8_lossy(&said.stdout);
    let locks = |instruction: &str| {
        instruction.starts_with("lock") || (instruction.starts_with("xchg") && instruction.contains('('))
    };
    let found: HashSet<u64> = text
        .lines()
        .filter_map(|line| line.split_once(":\t"))
        .filter(|(_, instruction)| locks(instruction.trim_start()))
        .filter_map(|(address, _)| u64::from_str_radix(address.trim(), 16).ok())
        .collect();
    assert!(!found.is_empty(), "the disassembly shows no lock at all");
    found
}

fn table_file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/heap_paths.txt")
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [work, path, turns] = &arguments[..]
        && work == "--work"
    {
        let (_, run, _) = PATHS.iter().find(|(name, ..)| name == path).expect("a path of the table");
        run(turns.parse().unwrap());
        return ExitCode::SUCCESS;
    }
    let record = arguments.iter().any(|argument| argument == "--record");
    let recorded = std::fs::read_to_string(table_file()).unwrap_or_default();
    let locking = locking();
    let (mut table, mut wrong, mut empty) = (String::new(), Vec::new(), 0.0);
    for (name, _, local) in PATHS {
        let ((few, ran_few), (many, ran_many)) = (profile(name, TURNS / 10), profile(name, TURNS));
        let turns = (TURNS - TURNS / 10) as f64;
        let each = (many - few) as f64 / turns - empty;
        let locked = |ran: &Profile| -> u64 {
            ran.iter().filter(|(at, _)| locking.contains(at)).map(|(_, times)| times).sum()
        };
        let locks = (locked(&ran_many) as f64 - locked(&ran_few) as f64) / turns;
        if name == PATHS[0].0 {
            empty = each;
        }
        let before = recorded.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let before: Option<f64> = before.and_then(|figures| figures.split_whitespace().next()?.parse().ok());
        println!("{name:<45} {each:>8.1} instructions, {locks:.2} locked; recorded {before:?}");
        writeln!(table, "{name}: {each:.1} instructions, {locks:.2} locked").unwrap();
        if !record && before.is_none_or(|before| each > before + SLACK) {
            wrong.push(format!("{name}: {each:.1} instructions, recorded are {before:?}"));
        }
        // A span is made now and then, which is no part of a path.
        if local && locks > 0.01 {
            wrong.push(format!("{name}: {locks:.2} locked instructions a turn"));
        }
    }
    if record {
        let head = "Instructions a turn on the fast paths of the process heap (x86-64, fat LTO), beyond the loop's own.\n\
                    Written by `cargo bench --bench heap_paths -- --record`, checked without `--record`.\n\n";
        std::fs::write(table_file(), format!("{head}{table}")).expect("the table is writable");
    }
    wrong.iter().for_each(|wrong| eprintln!("{wrong}"));
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

//! Runs every program of this package, interleaved, and prints the medians: `compare [ROUNDS] [WORKLOAD…]`.
//! Beside the table it writes `heap-peers.svg` into the current folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use heap_peers::{Unit, WORKLOADS, Workload};

const PROGRAMS: [&str; 8] =
    ["system", "mimalloc", "jemalloc", "snmalloc", "rpmalloc", "rusty", "tcmalloc", "ours"];

/// Samples by row and program.
type Samples = BTreeMap<(usize, usize), Vec<f64>>;

fn main() {
    let mut arguments = std::env::args().skip(1).peekable();
    let rounds =
        arguments.peek().and_then(|first| first.parse().ok()).inspect(|_: &usize| _ = arguments.next());
    let wanted: Vec<String> = arguments.collect();
    let chosen: Vec<&Workload> = WORKLOADS
        .iter()
        .filter(|workload| wanted.is_empty() || wanted.iter().any(|name| name == workload.name))
        .collect();
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    let mut rows: Vec<(&str, Unit)> = Vec::new();
    let mut samples = Samples::new();
    for workload in &chosen {
        let first = rows.len();
        rows.extend(workload.rows);
        // Interleaved, so that a slow minute of the machine falls on all programs alike, and in another order each
        // round: memory that was scattered by one program is put together again in the time of the next.
        for round in 0..rounds.unwrap_or(5) {
            for program in order(round) {
                for (row, figure) in run(&folder, PROGRAMS[program], workload).into_iter().enumerate() {
                    samples.entry((first + row, program)).or_default().push(figure);
                }
            }
        }
        eprintln!("{}", workload.name);
    }
    let medians: Vec<Vec<Option<f64>>> = (0..rows.len())
        .map(|row| (0..PROGRAMS.len()).map(|program| median(samples.get(&(row, program)))).collect())
        .collect();
    print_table(&rows, &medians);
    std::fs::write("heap-peers.svg", picture(&rows, &medians)).expect("the current folder is writable");
}

/// All programs, in another order each round, so that none always comes after the same one.
fn order(round: usize) -> impl Iterator<Item = usize> {
    // The multiples of a number come in another order for each number, where they are taken modulo a prime.
    const PRIME: usize = 11;
    const _: () = assert!(PROGRAMS.len() < PRIME);
    (1..PRIME)
        .map(move |place| place * (round % (PRIME - 1) + 1) % PRIME - 1)
        .filter(|&at| at < PROGRAMS.len())
}

/// The figures of one run; none where the program was built without its allocator or failed.
fn run(folder: &Path, program: &str, workload: &Workload) -> Vec<f64> {
    let path: PathBuf = folder.join(program);
    let Ok(output) = Command::new(path).arg(workload.name).output() else { return Vec::new() };
    if !output.status.success() {
        if output.status.code() != Some(3) {
            eprintln!("{program} {}: {}", workload.name, output.status);
        }
        return Vec::new();
    }
    String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| line.parse().ok()).collect()
}

fn median(samples: Option<&Vec<f64>>) -> Option<f64> {
    let mut sorted = samples?.clone();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

fn print_table(rows: &[(&str, Unit)], medians: &[Vec<Option<f64>>]) {
    println!("| work | {} | ours / best peer | ours / median peer |", PROGRAMS.join(" | "));
    println!("|---{}|---|---|", "|---".repeat(PROGRAMS.len()));
    let mimalloc = PROGRAMS.iter().position(|name| *name == "mimalloc").unwrap();
    let ours = PROGRAMS.len() - 1;
    let mut against_mimalloc = Vec::new();
    for ((name, unit), row) in rows.iter().zip(medians) {
        let mut peers: Vec<f64> = row[..ours].iter().flatten().copied().collect();
        peers.sort_by(f64::total_cmp);
        let against = |peer: Option<&f64>| match (row[ours], peer) {
            (Some(figure), Some(peer)) => format!("{:.2}", figure / peer),
            _ => "–".into(),
        };
        let cells: Vec<String> =
            row.iter().map(|cell| cell.map_or("–".into(), |figure| format!("{figure:.1}"))).collect();
        let (best, median) = (against(peers.first()), against(peers.get(peers.len() / 2)));
        println!("| {name}, {} | {} | {best} | {median} |", unit.name(), cells.join(" | "));
        if let (Some(a), Some(b), true) = (row[ours], row[mimalloc], *unit != Unit::Mebibytes) {
            against_mimalloc.push((a / b).ln());
        }
    }
    if !against_mimalloc.is_empty() {
        let mean = (against_mimalloc.iter().sum::<f64>() / against_mimalloc.len() as f64).exp();
        println!("\nGeometric mean of the time rows, ours against mimalloc: {mean:.2}");
    }
}

/// Bars a row, each as long as its figure against the row's largest.
fn picture(rows: &[(&str, Unit)], medians: &[Vec<Option<f64>>]) -> String {
    const COLOURS: [&str; 8] =
        ["#9aa5b1", "#7b8794", "#c3b091", "#b08968", "#a3b18a", "#84a59d", "#cdb4db", "#d1495b"];
    const BAR: usize = 9;
    const LEFT: usize = 210;
    const WIDTH: usize = 560;
    let height = rows.len() * (PROGRAMS.len() * BAR + 14) + 40;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"10\">\n",
        LEFT + WIDTH + 90
    );
    let mut y = 12;
    for (index, name) in PROGRAMS.iter().enumerate() {
        let x = LEFT + index * 72;
        svg += &format!("<rect x=\"{x}\" y=\"4\" width=\"9\" height=\"9\" fill=\"{}\"/>", COLOURS[index]);
        svg += &format!("<text x=\"{}\" y=\"12\">{name}</text>\n", x + 12);
    }
    for ((name, unit), row) in rows.iter().zip(medians) {
        y += 14;
        let unit = unit.name();
        svg += &format!("<text x=\"4\" y=\"{}\">{name}, {unit}</text>\n", y + 30);
        let most = row.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
        for (index, figure) in row.iter().enumerate() {
            if let Some(figure) = figure {
                let width = (figure / most * WIDTH as f64).max(1.0);
                svg += &format!(
                    "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.0}\" height=\"{}\" fill=\"{}\"/>\
                     <text x=\"{:.0}\" y=\"{}\" font-size=\"8\">{figure:.1}</text>\n",
                    BAR - 1,
                    COLOURS[index],
                    LEFT as f64 + width + 4.0,
                    y + 7
                );
            }
            y += BAR;
        }
    }
    svg + "</svg>\n"
}

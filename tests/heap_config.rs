//! Each setting of the process heap, in programs of its own: this test starts itself again with an environment.

mod children;

use std::hint::black_box;
use std::process::{Command, Output};

use allocator_api2::vec::Vec as PoolVec;
use memory_pool::{GlobalPool, Hardening, HeapConfig, HugeUse, Purge};

const LIMIT: usize = 1 << 40;

#[global_allocator]
static POOL: GlobalPool = GlobalPool::with_config(HeapConfig { limit: LIMIT, ..HeapConfig::new() });

/// Before `main`, and before the allocator is used for anything else: the handle's word counts for nothing, since
/// the program's allocator has one of its own.
extern "C" fn early() {
    let early = GlobalPool::with_config(HeapConfig::new().limit(1 << 20).purge(Purge::Never));
    let mut list = PoolVec::new_in(early);
    list.extend(0..1000u32);
    assert_eq!(list.iter().sum::<u32>(), 499_500);
}

#[used]
// SAFETY: the linker's table of functions to run before `main`, which take arguments or ignore them.
#[cfg_attr(target_os = "linux", unsafe(link_section = ".init_array"))]
static EARLY: extern "C" fn() = early;

/// Runs `case` in a process of its own.
fn run(case: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_case_in_its_own_process", "--nocapture"]).env("HEAP_CONFIG_CASE", case);
    let output = children::output_of(command.envs(variables.iter().copied())).unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{case} {variables:?}: {:?}\n{stdout}\n{stderr}", output.status);
    output
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What the other tests start; does nothing by itself.
#[test]
fn a_case_in_its_own_process() {
    let Ok(case) = std::env::var("HEAP_CONFIG_CASE") else { return };
    let config = GlobalPool::config();
    match case.as_str() {
        "defaults" => assert_eq!(config, HeapConfig::new().limit(LIMIT)),
        "hardened" => assert_eq!(config.hardened, Hardening::FULL),
        "limit" => limit(),
        "purge eager" => assert!(resident_after_everything_is_freed() < 4 << 20),
        "purge balanced" => assert!(resident_after_everything_is_freed() < 12 << 20),
        "purge never" => {
            assert!(resident_after_everything_is_freed() > 60 << 20);
            GlobalPool::trim();
            assert!(resident_heap() < 4 << 20);
        }
        "huge never" => assert!(!huge_pages_are_asked_for(64 << 20)),
        "huge when large" => {
            assert!(!huge_pages_are_asked_for(4 << 20) && huge_pages_are_asked_for(64 << 20))
        }
        "huge always" => assert!(huge_pages_are_asked_for(1 << 20)),
        "nothing" => {}
        "leak" => _ = std::hint::black_box(Box::leak(Box::new([1u8; 8000]))),
        other => panic!("no case {other}"),
    }
}

/// The limit is reached with small blocks and large ones; each time the program goes on.
fn limit() {
    assert_eq!(GlobalPool::config().limit, 64 << 20);
    assert!(Vec::<u8>::new().try_reserve_exact(100 << 20).is_err());
    for size in [400usize, 5000, 300_000, 3 << 20] {
        let mut kept: Vec<Vec<u8>> = Vec::new();
        kept.try_reserve_exact((70 << 20) / size).unwrap();
        while kept.len() < kept.capacity() {
            let mut block = Vec::new();
            if block.try_reserve_exact(size).is_err() {
                break;
            }
            block.resize(size, 1);
            kept.push(block);
        }
        let (held, intact) = (kept.len() * size, kept.iter().all(|block| block[size - 1] == 1));
        let committed = GlobalPool::stats().committed;
        // Only now is there memory for a message.
        drop(kept);
        assert!(held > 40 << 20 && held <= 64 << 20, "{held} bytes in blocks of {size}");
        assert!(committed <= 64 << 20 && intact, "{committed}");
    }
    assert!(Vec::<u8>::new().try_reserve_exact(40 << 20).is_ok());
}

fn resident_after_everything_is_freed() -> usize {
    let blocks: Vec<Vec<u8>> = (0..64 << 10).map(|_| vec![1; 1000]).collect();
    assert!(GlobalPool::stats().committed > 60 << 20);
    drop(black_box(blocks));
    resident_heap()
}

/// Resident bytes of the mappings that hold the heap's segments.
fn resident_heap() -> usize {
    let mut resident = 0;
    each_mapping(|start, fields| {
        if GlobalPool::owns(std::ptr::without_provenance(start)) {
            resident += fields("Rss:").split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10;
        }
    });
    resident
}

/// Whether the mapping behind small blocks that are `bytes` together asks for huge pages.
fn huge_pages_are_asked_for(bytes: usize) -> bool {
    let blocks: Vec<Box<[u8; 1000]>> = (0..bytes / 1000).map(|n| Box::new([n as u8; 1000])).collect();
    let large = vec![1u8; bytes.max(16 << 20)];
    let mut asked = false;
    each_mapping(|start, fields| {
        asked |= GlobalPool::owns(std::ptr::without_provenance(start))
            && fields("VmFlags:").split_whitespace().any(|flag| flag == "hg");
    });
    // A large block of its own is above the bound in any case, so only what is small tells small programs.
    let own = bytes < 16 << 20 && GlobalPool::config().huge_pages == HugeUse::WhenLarge;
    drop(black_box((blocks, large)));
    asked && !own
}

fn each_mapping(mut visit: impl FnMut(usize, &dyn Fn(&str) -> String)) {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let start = usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        let mut fields = Vec::new();
        while let Some(field) = lines.next_if(|line| line.split_whitespace().next().unwrap().ends_with(':')) {
            fields.push(field);
        }
        visit(start, &|name| {
            let field = fields.iter().find(|field| field.starts_with(name)).unwrap_or(&"");
            field.trim_start_matches(name).trim().to_owned()
        });
    }
}

#[test]
fn the_allocator_of_the_program_decides_and_the_environment_adds() {
    run("defaults", &[]);
    run("defaults", &[("MEMORY_POOL_HARDENED", "0")]);
    let output = run("hardened", &[("MEMORY_POOL_HARDENED", "1")]);
    assert_eq!(stderr(&output), "");
}

#[test]
fn nonsense_in_the_environment_is_named_once_and_changes_nothing() {
    for (name, value) in [
        ("MEMORY_POOL_LIMIT", "64 monkeys"),
        ("MEMORY_POOL_PURGE", "sometimes"),
        ("MEMORY_POOL_HUGE_PAGES", "2M"),
        ("MEMORY_POOL_HARDENED", "very"),
        ("MEMORY_POOL_ZERO_ON_FREE", ""),
        ("MEMORY_POOL_HEAP_DEBUG", "full"),
        ("MEMORY_POOL_REPORT", "stdout"),
    ] {
        let line = stderr(&run("defaults", &[(name, value)]));
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(
            line.starts_with(&format!("memory-pool: {name}=\"{value}\" is ignored; allowed: ")),
            "{line}"
        );
    }
}

#[test]
fn a_limit_holds_for_every_size() {
    run("limit", &[("MEMORY_POOL_LIMIT", "64M")]);
}

#[test]
fn memory_goes_back_as_configured() {
    run("purge eager", &[("MEMORY_POOL_PURGE", "eager")]);
    run("purge balanced", &[]);
    run("purge never", &[("MEMORY_POOL_PURGE", "never")]);
}

#[cfg(target_os = "linux")]
#[test]
fn huge_pages_are_asked_for_as_configured() {
    let offered = std::fs::read_to_string("/proc/self/smaps").is_ok_and(|text| text.contains("VmFlags:"))
        && std::path::Path::new("/sys/kernel/mm/transparent_hugepage/enabled").exists();
    if !offered {
        eprintln!("this system has no transparent huge pages, or does not tell");
        return;
    }
    run("huge never", &[("MEMORY_POOL_HUGE_PAGES", "never")]);
    run("huge when large", &[]);
    run("huge always", &[("MEMORY_POOL_HUGE_PAGES", "always")]);
}

#[test]
fn the_report_comes_when_the_program_exits() {
    assert_eq!(stderr(&run("nothing", &[])), "");
    let report = stderr(&run("leak", &[("MEMORY_POOL_REPORT", "1")]));
    assert!(report.starts_with("memory-pool, at exit:\n"), "{report}");
    for part in ["reserved", "committed", "remote frees", "refills", "\n        8192            1 "] {
        assert!(report.contains(part), "no {part:?} in:\n{report}");
    }
}

/// A program with more rights than its caller takes no orders from its caller's environment.
#[cfg(target_os = "linux")]
#[test]
fn a_setuid_program_ignores_the_environment() {
    use std::os::unix::fs::{PermissionsExt, chown};
    // SAFETY: no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("only root can make a setuid program of another user");
        return;
    }
    let copy = std::env::temp_dir().join(format!("memory-pool-setuid-{}", std::process::id()));
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    chown(&copy, Some(65534), Some(65534)).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o4755)).unwrap();
    let mut command = Command::new(&copy);
    command.args(["--exact", "a_case_in_its_own_process", "--nocapture"]).envs([
        ("HEAP_CONFIG_CASE", "defaults"),
        ("MEMORY_POOL_LIMIT", "1G"),
        ("MEMORY_POOL_PURGE", "nonsense"),
    ]);
    let output =
        children::output_of(&mut command).inspect_err(|_| drop(std::fs::remove_file(&copy))).unwrap();
    std::fs::remove_file(&copy).unwrap();
    assert!(output.status.success() && stderr(&output).is_empty(), "{}", stderr(&output));
}

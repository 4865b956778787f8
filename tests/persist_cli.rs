//! The program's commands on pool files: `cargo test --features cli --test persist_cli`.
#![cfg(feature = "cli")]

mod children;

use std::process::{Command, Output};

use memory_pool::persist::{Durability, PersistentConfig, PersistentPool};

fn run(arguments: &[&str]) -> Output {
    children::output_of(Command::new(env!("CARGO_BIN_EXE_memory-pool")).args(arguments)).unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn damage_is_found_described_and_repaired() {
    let dir = std::env::temp_dir().join(format!("memory-pool-cli-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("pool");
    let file = path.to_str().unwrap();
    let config = PersistentConfig::new(1 << 20).layout("cli").durability(Durability::ProcessCrash);
    let pool = PersistentPool::create(&path, config).unwrap();
    pool.transaction(|tx| {
        let number = tx.alloc(5u64)?;
        tx.set_root("answer", &number)
    })
    .unwrap();
    assert!(!run(&["check", file]).status.success(), "a pool in use is not checked");
    pool.close().unwrap();

    let whole = run(&["check", file]);
    assert!(whole.status.success() && text(&whole).contains("whole"), "{}", text(&whole));
    let dump = text(&run(&["dump", file]));
    assert!(dump.contains("answer") && dump.contains("u64") && dump.contains("cli"), "{dump}");

    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let damaged = run(&["check", file]);
    assert!(!damaged.status.success() && text(&damaged).contains("repair:"), "{}", text(&damaged));
    let dry = run(&["repair", file]);
    assert!(text(&dry).contains("--yes") && std::fs::read(&path).unwrap() == bytes);
    let repaired = run(&["repair", "--yes", file]);
    assert!(repaired.status.success(), "{}", text(&repaired));
    assert!(run(&["check", file]).status.success());

    let copy = dir.join("copy");
    let backup = run(&["backup", "--to", copy.to_str().unwrap(), file]);
    assert!(backup.status.success(), "{}", text(&backup));
    let pool = PersistentPool::open(&copy, "cli").unwrap();
    assert_eq!(pool.read(|r| Ok(*r.root::<u64>("answer")?)).unwrap(), 5);
    assert!(!run(&["check", dir.join("absent").to_str().unwrap()]).status.success());
    std::fs::remove_dir_all(&dir).unwrap();
}

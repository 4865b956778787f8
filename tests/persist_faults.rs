//! Faults of a real system: a disk that is full, limits, missing permissions, files that are no pool or half of one,
//! a second writer. Each is an error that says what to do, and costs nothing that was there.

mod children;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use memory_pool::Error;
use memory_pool::persist::{Durability, PVec, PersistentConfig, PersistentPool, check};

/// Names the test and the folder for a child.
const CHILD: &str = "MEMORY_POOL_FAULTS_CHILD";

/// A folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("memory-pool-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// This program again, for one test and in that folder; `before` are words put before it.
fn child(before: &[&str], test: &str, folder: &Path) -> (bool, String) {
    let itself = std::env::current_exe().unwrap();
    let mut words: Vec<&std::ffi::OsStr> = before.iter().map(std::ffi::OsStr::new).collect();
    words.push(itself.as_os_str());
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).args([test, "--exact", "--nocapture"]).env(CHILD, folder);
    let output = children::output_of(&mut command).unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

fn in_child() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

fn create(path: &Path, size: u64, durability: Durability) -> memory_pool::Result<PersistentPool> {
    PersistentPool::create(path, PersistentConfig::new(size).layout("faults").durability(durability))
}

fn holds(pool: &PersistentPool, count: usize) {
    let found = pool.read(|r| {
        let mut live = 0;
        r.for_each::<[u64; 512]>(|_, object| {
            assert!(object.iter().all(|&word| word == object[0]));
            live += 1;
            true
        })?;
        Ok(live)
    });
    assert_eq!(found.unwrap(), count);
}

/// Fills a file system of 5 MiB with a pool of 64.
fn fill_the_disk(folder: &Path) {
    for durability in [Durability::ProcessCrash, Durability::Power] {
        let path = folder.join("pool");
        let pool = create(&path, 64 << 20, durability).unwrap();
        let push = |number: u64| {
            pool.transaction(|tx| {
                let numbers = match tx.root_handle::<PVec<u64>>("numbers") {
                    Ok(numbers) => numbers,
                    Err(_) => {
                        let numbers = PVec::new(tx)?;
                        tx.set_root("numbers", &numbers)?;
                        numbers
                    }
                };
                numbers.push(tx, number)?;
                tx.alloc([number; 512]).map(drop)
            })
        };
        let mut count = 0;
        let error = loop {
            match push(count) {
                Ok(()) => count += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        assert!(count > 500, "{count}");
        assert!(push(count).is_err());
        holds(&pool, count as usize);
        // Neither a backup nor a longer file finds room, and neither leaves anything behind.
        assert!(pool.backup(folder.join("copy")).is_err() && !folder.join("copy").exists());
        let size = pool.size();
        let grown = pool.grow(1 << 30);
        assert!(matches!(grown, Err(Error::OutOfMemory { .. } | Error::Io(_))), "{grown:?}");
        // What is freed can be had again.
        let some = pool.read(|r| {
            let mut first = None;
            r.for_each::<[u64; 512]>(|pointer, _| {
                first = Some(pointer);
                false
            })?;
            Ok(first.unwrap())
        });
        pool.transaction(|tx| tx.free(some.unwrap())).unwrap();
        holds(&pool, count as usize - 1);
        pool.transaction(|tx| tx.alloc([7u64; 512]).map(drop)).unwrap();
        pool.close().unwrap();
        let report = check(&path).unwrap();
        assert!(report.is_whole(), "{report}");
        // An opening takes no room that it needs.
        let pool = PersistentPool::open(&path, "faults").unwrap();
        assert_eq!(pool.size(), size);
        holds(&pool, count as usize);
        drop(pool);
        std::fs::remove_file(&path).unwrap();
        let huge = create(&folder.join("huge"), 1 << 40, durability);
        assert!(huge.is_err() && !folder.join("huge").exists(), "a disk too small for the tables");
    }
    println!("filled");
}

#[test]
fn a_full_disk_is_an_error_and_what_was_stored_stays() {
    if let Some(folder) = in_child() {
        return fill_the_disk(&folder);
    }
    let folder = Folder::new("full");
    // A file system of its own, where the system lets us mount one.
    let mount = format!("mount -t tmpfs -o size=5m tmpfs '{}' && exec \"$@\"", folder.0.display());
    for how in [["unshare", "-Urm"], ["unshare", "-m"]] {
        let probe = Command::new(how[0]).arg(how[1]).args(["sh", "-c", &mount, "sh", "true"]).output();
        if probe.is_ok_and(|output| output.status.success()) {
            let before = [how[0], how[1], "sh", "-c", &mount, "sh"];
            let test = "a_full_disk_is_an_error_and_what_was_stored_stays";
            let (fine, said) = child(&before, test, &folder.0);
            assert!(fine && said.contains("filled"), "{said}");
            return;
        }
    }
    println!("no file system could be mounted: not tested here");
}

#[test]
fn a_limit_on_file_sizes_is_an_error_and_no_signal() {
    if let Some(folder) = in_child() {
        let limit = libc::rlimit { rlim_cur: 2 << 20, rlim_max: 2 << 20 };
        // SAFETY: a system call on our own limits.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
        let path = folder.join("large");
        let error = create(&path, 64 << 20, Durability::Power).unwrap_err();
        assert!(error.to_string().contains("os error 27") && !path.exists(), "{error}");
        let pool = create(&folder.join("pool"), 1 << 20, Durability::Power).unwrap();
        pool.transaction(|tx| tx.alloc([1u64; 512]).map(drop)).unwrap();
        assert!(pool.grow(4 << 20).is_err());
        pool.transaction(|tx| tx.alloc([2u64; 512]).map(drop)).unwrap();
        holds(&pool, 2);
        pool.grow(1).unwrap();
        pool.transaction(|tx| tx.alloc([3u64; 512]).map(drop)).unwrap();
        pool.close().unwrap();
        assert!(check(folder.join("pool")).unwrap().is_whole());
        println!("limited");
        return;
    }
    let folder = Folder::new("limit");
    let (fine, said) = child(&[], "a_limit_on_file_sizes_is_an_error_and_no_signal", &folder.0);
    assert!(fine && said.contains("limited"), "{said}");
}

#[test]
fn files_that_may_not_be_written_or_read_say_what_helps() {
    if let Some(folder) = in_child() {
        // Permissions mean nothing to root.
        // SAFETY: a system call.
        if unsafe { libc::geteuid() } == 0 {
            // SAFETY: as above.
            assert_eq!(unsafe { libc::setuid(65_534) }, 0);
        }
        let path = folder.join("pool");
        let error = PersistentPool::open(&path, "faults").unwrap_err().to_string();
        assert!(error.contains("permission denied") && error.contains("open_read_only"), "{error}");
        let pool = PersistentPool::open_read_only(&path, "faults").unwrap();
        holds(&pool, 1);
        let refused = pool.transaction(|tx| tx.alloc(1u64).map(drop)).unwrap_err().to_string();
        assert!(refused.contains("read-only") && refused.contains("open it for writing"), "{refused}");
        assert!(pool.allocate(std::alloc::Layout::new::<u64>()).is_err() && pool.grow(1).is_err());
        assert!(check(&path).unwrap().is_whole());
        let secret = PersistentPool::open_read_only(folder.join("secret"), "faults").unwrap_err().to_string();
        assert!(secret.contains("permission denied") && secret.contains("chmod"), "{secret}");
        let made = create(&folder.join("new"), 1 << 20, Durability::Power).unwrap_err().to_string();
        assert!(made.contains("permission denied"), "{made}");
        println!("denied");
        return;
    }
    let folder = Folder::new("denied");
    let path = folder.0.join("pool");
    let pool = create(&path, 1 << 20, Durability::Power).unwrap();
    pool.transaction(|tx| tx.alloc([1u64; 512]).map(drop)).unwrap();
    pool.close().unwrap();
    let mode =
        |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    std::fs::copy(&path, folder.0.join("secret")).unwrap();
    mode(&path, 0o444);
    mode(&folder.0.join("secret"), 0o000);
    mode(&folder.0, 0o555);
    let before = std::fs::read(&path).unwrap();
    let (fine, said) = child(&[], "files_that_may_not_be_written_or_read_say_what_helps", &folder.0);
    mode(&folder.0, 0o755);
    assert!(fine && said.contains("denied"), "{said}");
    assert!(std::fs::read(&path).unwrap() == before, "a file opened for reading was written to");
}

#[test]
fn files_that_are_no_pool_or_half_of_one_say_so_and_are_not_touched() {
    let folder = Folder::new("foreign");
    let path = folder.0.join("pool");
    let pool = create(&path, 2 << 20, Durability::Power).unwrap();
    pool.transaction(|tx| tx.alloc([1u64; 512]).map(drop)).unwrap();
    pool.close().unwrap();
    let whole = std::fs::read(&path).unwrap();
    let other = folder.0.join("other");
    let mut newer = whole.clone();
    // Another version, in both copies, with a checksum that does not hold: it is not looked at before.
    newer[8] ^= 0xFF;
    newer[4096 + 8] ^= 0xFF;
    let text = "a text, and no pool at all".repeat(400).into_bytes();
    let cases: [(&str, &[u8], &[&str]); 6] = [
        ("empty", &[], &["expected", "found", "no pool"]),
        ("short", &whole[..100], &["expected", "truncated"]),
        ("foreign", &text, &["expected the magic", "found", "something else"]),
        ("another byte order", &newer, &["expected the endianness mark", "found"]),
        ("half", &whole[..whole.len() / 2], &["expected a file as long as its zones", "restore a backup"]),
        ("one byte short", &whole[..whole.len() - 1], &["expected a file as long as its zones"]),
    ];
    for (what, bytes, expected) in cases {
        std::fs::write(&other, bytes).unwrap();
        let errors = [
            PersistentPool::open(&other, "faults").unwrap_err(),
            PersistentPool::open_read_only(&other, "faults").unwrap_err(),
        ];
        for error in errors {
            let said = error.to_string();
            assert!(expected.iter().all(|part| said.contains(part)), "{what}: {said}");
        }
        let report = check(&other).unwrap();
        assert!(!report.is_whole() && !report.to_string().is_empty(), "{what}");
        assert!(std::fs::read(&other).unwrap() == bytes, "{what} was written to");
    }
    let wrong = PersistentPool::open(&path, "orders").unwrap_err().to_string();
    assert!(wrong.contains("\"faults\""), "{wrong}");
    let absent = PersistentPool::open(folder.0.join("absent"), "faults").unwrap_err().to_string();
    assert!(absent.contains("not found") && absent.contains("create"), "{absent}");
    let exists = create(&path, 1 << 20, Durability::Power).unwrap_err().to_string();
    assert!(exists.contains("exists") && exists.contains("open it"), "{exists}");
    assert!(std::fs::read(&path).unwrap() == whole, "a refused creation wrote");
    let dir = PersistentPool::open_read_only(&folder.0, "faults").unwrap_err().to_string();
    assert!(dir.contains("a regular file"), "{dir}");
}

#[test]
fn a_second_writer_is_refused_in_this_process_and_in_another() {
    if let Some(folder) = in_child() {
        let path = folder.join("pool");
        let error = PersistentPool::open(&path, "faults").unwrap_err().to_string();
        assert!(error.contains("open elsewhere") && error.contains("close it"), "{error}");
        assert!(PersistentPool::open_read_only(&path, "faults").is_err(), "no reader beside a writer");
        assert!(check(&path).is_err());
        println!("refused");
        return;
    }
    let folder = Folder::new("second");
    let path = folder.0.join("pool");
    let pool = create(&path, 1 << 20, Durability::Power).unwrap();
    assert!(PersistentPool::open(&path, "faults").is_err());
    let (fine, said) = child(&[], "a_second_writer_is_refused_in_this_process_and_in_another", &folder.0);
    assert!(fine && said.contains("refused"), "{said}");
    pool.close().unwrap();
    let readers = [(); 2].map(|()| PersistentPool::open_read_only(&path, "faults").unwrap());
    assert!(PersistentPool::open(&path, "faults").is_err(), "no writer beside readers");
    drop(readers);
    PersistentPool::open(&path, "faults").unwrap();
}

#[test]
fn a_read_only_file_system_says_what_helps() {
    if let Some(folder) = in_child() {
        let path = folder.join("pool");
        let error = PersistentPool::open(&path, "faults").unwrap_err().to_string();
        assert!(error.contains("os error 30") && error.contains("open_read_only"), "{error}");
        let made = create(&folder.join("new"), 1 << 20, Durability::Power).unwrap_err().to_string();
        assert!(made.contains("os error 30"), "{made}");
        let pool = PersistentPool::open_read_only(&path, "faults").unwrap();
        holds(&pool, 1);
        assert!(pool.backup(folder.join("copy")).is_err());
        let elsewhere = std::env::temp_dir().join(format!("memory-pool-erofs-copy-{}", std::process::id()));
        pool.backup(&elsewhere).unwrap();
        drop(pool);
        assert!(check(&path).unwrap().is_whole());
        holds(&PersistentPool::open(&elsewhere, "faults").unwrap(), 1);
        std::fs::remove_file(&elsewhere).unwrap();
        println!("read only");
        return;
    }
    let folder = Folder::new("erofs");
    let pool = create(&folder.0.join("pool"), 1 << 20, Durability::ProcessCrash).unwrap();
    pool.transaction(|tx| tx.alloc([1u64; 512]).map(drop)).unwrap();
    pool.close().unwrap();
    let place = folder.0.display();
    let mount =
        format!("mount --bind '{place}' '{place}' && mount -o remount,ro,bind '{place}' && exec \"$@\"");
    for how in [["unshare", "-Urm"], ["unshare", "-m"]] {
        let probe = Command::new(how[0]).arg(how[1]).args(["sh", "-c", &mount, "sh", "true"]).output();
        if probe.is_ok_and(|output| output.status.success()) {
            let before = [how[0], how[1], "sh", "-c", &mount, "sh"];
            let (fine, said) = child(&before, "a_read_only_file_system_says_what_helps", &folder.0);
            assert!(fine && said.contains("read only"), "{said}");
            return;
        }
    }
    println!("no file system could be mounted: not tested here");
}

#[test]
fn a_sparse_copy_is_a_pool() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new("sparse");
    let path = folder.0.join("pool");
    for durability in [Durability::ProcessCrash, Durability::Power] {
        let pool = create(&path, 8 << 20, durability).unwrap();
        // Zeros are what a copy makes holes of, also where objects lie.
        for fill in [0u64, 1, 0] {
            pool.transaction(|tx| (0..100).try_for_each(|_| tx.alloc([fill; 512]).map(drop))).unwrap();
        }
        let backup = folder.0.join("backup");
        pool.backup(&backup).unwrap();
        pool.close().unwrap();
        let sparse = folder.0.join("sparse");
        let copied = Command::new("cp").arg("--sparse=always").args([&path, &sparse]).status();
        if !copied.is_ok_and(|status| status.success()) {
            std::fs::copy(&path, &sparse).unwrap();
        }
        for copy in [&backup, &sparse] {
            let metadata = std::fs::metadata(copy).unwrap();
            assert!(metadata.blocks() * 512 < metadata.len() / 2, "{} blocks", metadata.blocks());
            assert!(check(copy).unwrap().is_whole());
            let pool = PersistentPool::open(copy, "faults").unwrap();
            holds(&pool, 300);
            // In the holes, too.
            let mut all = Vec::new();
            let list = |pointer, _: &[u64; 512]| {
                all.push(pointer);
                true
            };
            pool.read(|r| r.for_each::<[u64; 512]>(list)).unwrap();
            pool.transaction(|tx| all.iter().try_for_each(|pointer| tx.set(pointer, [9; 512]))).unwrap();
            pool.transaction(|tx| (0..100).try_for_each(|_| tx.alloc([3u64; 512]).map(drop))).unwrap();
            pool.close().unwrap();
            holds(&PersistentPool::open(copy, "faults").unwrap(), 400);
            std::fs::remove_file(copy).unwrap();
        }
        std::fs::remove_file(&path).unwrap();
    }
}

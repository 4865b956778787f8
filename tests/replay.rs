//! Damaged, foreign and impossible input to `memory-pool replay`, given as a person would give it: every time an error
//! that names the file and the place in it, a status that is not 0, and never a panic.
#![cfg(feature = "cli")]

mod children;

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output};

use memory_pool::trace::Trace;

/// A file that is gone when the test is.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, contents: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("memory-pool-replay-{}-{name}", std::process::id()));
        fs::write(&path, contents).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn program(words: &[&str]) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_memory-pool"));
    program.arg("replay").args(words);
    program
}

/// The status and what is said on stderr.
fn replay(words: &[&str]) -> (i32, String) {
    let Output { status, stdout, stderr } = children::output_of(&mut program(words)).unwrap();
    let said = String::from_utf8_lossy(&stderr).into_owned();
    assert!(!said.contains("panicked"), "{words:?}: {said}");
    let status = status.code().unwrap_or_else(|| panic!("{words:?} was killed: {said}"));
    assert_eq!(status == 0, !stdout.is_empty(), "a result or an error: {words:?}: {said}");
    (status, said)
}

/// Replays a file of these contents, which must fail with words that name the file and all of `says`.
fn refused(name: &str, contents: &[u8], says: &[&str]) {
    let file = Scratch::new(name, contents);
    for more in [&[][..], &["--pool", "device", "--driver", "sim"]] {
        let (status, said) = replay(&[&[file.path()], more].concat());
        assert_eq!(status, 1, "{name}: {said}");
        assert!(said.contains(file.path()), "{name}: {said}");
        says.iter().for_each(|word| assert!(said.contains(word), "{name}: no `{word}` in: {said}"));
    }
}

fn record(kind: u8, stream: u8, id: u32, bytes: u64) -> Vec<u8> {
    [&[kind, stream, 0, 0][..], &id.to_le_bytes(), &bytes.to_le_bytes()].concat()
}

fn records() -> Vec<u8> {
    let alloc = (0..40).map(|id| record(0, (id % 3) as u8, id, 512 + u64::from(id) * 100));
    let free = (0..40).map(|id| record(1, (id % 3) as u8, id, 512 + u64::from(id) * 100));
    alloc.chain(free).collect::<Vec<_>>().concat()
}

fn zipped(plain: &[u8]) -> Vec<u8> {
    let mut into = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    into.write_all(plain).unwrap();
    into.finish().unwrap()
}

const HEADER: &str = "Thread,Time,Action,Pointer,Size,Stream\n";

fn log(lines: &[&str]) -> Vec<u8> {
    [HEADER.as_bytes(), lines.join("\n").as_bytes(), b"\n"].concat()
}

/// What `pickle.dumps` writes, protocol 2, for a dictionary whose `key` is a list with one list of events.
fn pickled(key: &str, events: &[&[(&str, Value)]]) -> Vec<u8> {
    let text = |text: &str| [&[b'X'][..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let value = |value: &Value| match value {
        Value::Text(words) => text(words),
        Value::Number(number) => [&[b'J'][..], &number.to_le_bytes()].concat(),
    };
    let mut bytes = b"\x80\x02}".to_vec();
    bytes.extend(text(key));
    bytes.extend(b"](](");
    for event in events {
        bytes.extend(b"}(");
        event.iter().for_each(|(name, field)| bytes.extend([text(name), value(field)].concat()));
        bytes.push(b'u');
    }
    bytes.extend(b"ees.");
    bytes
}

#[derive(Clone, Copy)]
enum Value {
    Text(&'static str),
    Number(u32),
}

fn event(action: &'static str, at: u32) -> [(&'static str, Value); 4] {
    use Value::{Number, Text};
    [("action", Text(action)), ("addr", Number(at)), ("size", Number(4096)), ("stream", Number(0))]
}

fn snapshot() -> Vec<u8> {
    let events =
        [event("alloc", 1), event("alloc", 2), event("free_requested", 1), event("free_completed", 1)];
    pickled("device_traces", &events.each_ref().map(|event| &event[..]))
}

#[test]
fn the_good_files_are_good() {
    let logged = log(&["1,0,allocate,0x10,64,0x0", "1,0,allocate,0x20,64,0x0", "1,0,free,0x10,64,0x0"]);
    for (name, contents) in [
        ("records", records()),
        ("zipped", zipped(&records())),
        ("twice-zipped", [zipped(&records()[..640]), zipped(&records()[640..])].concat()),
        ("snapshot", snapshot()),
        ("log with a block that is never freed", logged),
    ] {
        let file = Scratch::new(name, &contents);
        for more in [&["--json"][..], &["--pool", "device", "--driver", "sim"]] {
            let (status, said) = replay(&[&[file.path()], more].concat());
            assert_eq!((status, said.as_str()), (0, ""), "{name}");
        }
    }
}

#[test]
fn damaged_gzip() {
    let whole = zipped(&records());
    for cut in [3, 12, whole.len() / 2, whole.len() - 9, whole.len() - 1] {
        refused(&format!("cut-{cut}"), &whole[..cut], &["an intact gzip stream", "unpacked"]);
    }
    for trailer in [8, 3] {
        let mut wrong = whole.clone();
        let at = wrong.len() - trailer;
        wrong[at] ^= 0x55;
        refused("checksum", &wrong, &["an intact gzip stream"]);
    }
    refused("behind", &[&whole[..], b"and more"].concat(), &["an intact gzip stream"]);
    refused("inside", &zipped(b"no trace at all, but well packed"), &["16-byte records", "record 1"]);
    refused("nothing-inside", &zipped(b""), &["the file is empty"]);
}

#[test]
fn foreign_files() {
    let own = fs::read(env!("CARGO_BIN_EXE_memory-pool")).unwrap();
    refused("elf", &own[..own.len().min(1 << 20)], &["16-byte records", "record 1"]);
    refused("png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", &["16-byte records"]);
    refused("json", b"{\"traceEvents\": [{\"ph\": \"X\", \"ts\": 1}]}", &["16-byte records"]);
    refused("prose", "Ein Satz, der keine Spur ist.".as_bytes(), &["16-byte records"]);
    refused("empty", b"", &["the file is empty"]);
    refused("another-log", b"Time,Action,Pointer,Size\n1,allocate,0x1,5\n", &["16-byte records"]);
}

#[test]
fn damaged_records() {
    let whole = records();
    refused("cut", &whole[..whole.len() - 5], &["cut short", "record 80"]);
    refused("twice", &[record(0, 0, 7, 1), record(0, 0, 7, 1)].concat(), &["not live already", "record 2"]);
    refused("never", &[record(0, 0, 1, 8), record(1, 0, 2, 8)].concat(), &["live allocation", "record 2"]);
    let freed_twice = [record(0, 0, 1, 8), record(1, 0, 1, 8), record(1, 0, 1, 8)].concat();
    refused("freed-twice", &freed_twice, &["live allocation", "record 3"]);
    refused("kind", &[record(0, 0, 1, 8), record(9, 0, 1, 8)].concat(), &["record kind", "record 2"]);
    refused("endless", &[record(0, 0, 1, u64::MAX), record(0, 0, 2, 2)].concat(), &["2^64", "record 2"]);
}

#[test]
fn damaged_logs_of_rmm() {
    let good = "1,0,allocate,0x10,64,0x0";
    for (name, lines, says) in [
        ("action", &[good, "1,0,explode,0x10,64,0x0"][..], &["an action", "line 3"]),
        ("few", &[good, "1,0,free"], &["six fields", "line 3"]),
        ("many", &[good, good, "1,0,free,0x10,64,0x0,7"], &["not live already", "line 3"]),
        ("more", &["1,0,allocate,0x10,64,0x0,7"], &["six fields", "line 2"]),
        ("number", &["1,0,allocate,0x10,sixty,0x0"], &["numbers", "line 2"]),
        ("negative", &["1,0,allocate,0x10,-64,0x0"], &["numbers", "line 2"]),
        ("never", &[good, "1,0,free,0x11,64,0x0"], &["live allocation", "line 3"]),
        ("twice", &[good, "1,0,free,0x10,64,0x0", "1,0,free,0x10,64,0x0"], &["live allocation", "line 4"]),
        ("nothing", &[], &["at least one allocation", "line 1"]),
    ] {
        refused(&format!("log-{name}"), &log(lines), says);
    }
    let columns = b"Thread,Time,Action,Pointer,Size,Stream,Color\n1,0,allocate,0x1,4,0,red\n";
    refused("log-columns", columns, &["the header", "line 1"]);
    refused("log-bytes", &[HEADER.as_bytes(), b"1,0,allocate,\xFF\xFE,4,0\n"].concat(), &["UTF-8", "line 2"]);
}

#[test]
fn damaged_snapshots() {
    let whole = snapshot();
    for cut in [3, 10, whole.len() / 2, whole.len() - 1] {
        refused(&format!("pickle-{cut}"), &whole[..cut], &["an intact pickle"]);
    }
    refused("pickle-key", &pickled("tensors", &[]), &["device_traces"]);
    refused("pickle-list", b"\x80\x02]q\0(K\x01K\x02e.", &["device_traces"]);
    refused("pickle-class", b"\x80\x02ccollections\nOrderedDict\nq\0)Rq\x01.", &["device_traces"]);
    let missing = [&event("alloc", 1)[..], &event("alloc", 2)[..2]];
    refused("pickle-event", &pickled("device_traces", &missing), &["addr, size and stream", "event 2"]);
    let again = [event("alloc", 1), event("alloc", 1)];
    let again = again.each_ref().map(|event| &event[..]);
    refused("pickle-twice", &pickled("device_traces", &again), &["not live already", "event 2"]);
    refused("pickle-nothing", &pickled("device_traces", &[]), &["at least one allocation"]);
    refused("pickle-opcode", b"\x80\x02](\xF0e.", &["an intact pickle", "protocols 2 to 5"]);
    refused("pickle-operand", b"\x80\x02]a.", &["an intact pickle", "not there"]);
    refused("pickle-fill", b"\x80\x02K\x05K\x06a.", &["an intact pickle", "no container"]);
    refused("pickle-length", b"\x80\x04\x8D\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F.", &["cut short"]);
    // A list in a list in a list …, five million deep: alone, and as what an event has for a size.
    let nested = [vec![b']'; 5_000_000], vec![b'a'; 4_999_999]].concat();
    refused("pickle-deep", &[&b"\x80\x02"[..], &nested, b"."].concat(), &["device_traces"]);
    let (head, tail) = (pickled("device_traces", &[&event("alloc", 1)[..2]]), b"ees.");
    let head = head.strip_suffix(&[b"u", &tail[..]].concat()[..]).unwrap();
    let deep = [head, b"X\x04\0\0\0size", &nested, b"u", tail].concat();
    refused("pickle-deep-size", &deep, &["addr, size and stream", "event 1"]);
    // A list that is in itself.
    refused("pickle-loop", b"\x80\x02]q\0h\0a.", &["device_traces"]);
}

#[test]
fn more_than_fits() {
    let streams = |count: u32| {
        let lines = (0..count).map(|at| format!("1,0,allocate,{:#x},64,{at:#x}\n", 16 + at));
        [HEADER.to_owned(), lines.collect()].concat()
    };
    let file = Scratch::new("streams", streams(5000).as_bytes());
    let (status, said) = replay(&[file.path(), "--pool", "device", "--driver", "sim"]);
    assert!(status == 1 && said.contains("5000 streams are more than"), "{said}");
    refused("streams-16-bits", streams(70_000).as_bytes(), &["at most 65535 streams", "line 65537"]);

    let large = Scratch::new("large", &[record(0, 0, 0, 1 << 30), record(0, 0, 1, 3 << 30)].concat());
    for pool in ["device", "cuda-malloc"] {
        let (status, said) = replay(&[large.path(), "--pool", pool, "--memory", "3"]);
        assert!(status == 1 && said.contains("4294967296 bytes live at once"), "{said}");
    }
    // It fits by its bytes, and not in whole pieces of the device's memory.
    let tight = Scratch::new("tight", &[record(0, 0, 0, (1 << 30) - 1), record(0, 0, 1, 1)].concat());
    let (status, said) = replay(&[tight.path(), "--pool", "device", "--memory", "1"]);
    assert!(status == 0 || status == 1 && said.contains("out of memory"), "{said}");
    // No machine has that much.
    refused("endless-one", &record(0, 0, 0, u64::MAX / 2), &[]);
}

#[test]
fn files_that_cannot_be_read_and_output_that_cannot_be_written() {
    let directory = std::env::temp_dir();
    let (status, said) = replay(&[directory.to_str().unwrap()]);
    assert!(status == 1 && said.contains(directory.to_str().unwrap()), "{said}");
    let (status, said) = replay(&["/nonexistent/trace"]);
    assert!(status == 1 && said.contains("/nonexistent/trace"), "{said}");
    let file = Scratch::new("unreadable", &records());
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&file.0, fs::Permissions::from_mode(0o000)).unwrap();
        // Root reads it all the same.
        if File::open(&file.0).is_err() {
            let (status, said) = replay(&[file.path()]);
            assert!(status == 1 && said.contains(file.path()) && said.contains("permission"), "{said}");
        }
        fs::set_permissions(&file.0, fs::Permissions::from_mode(0o600)).unwrap();
    }
    if std::path::Path::new("/dev/full").exists() {
        for more in ["", "--json"] {
            let mut shell = Command::new("sh");
            let line = "\"$0\" replay \"$1\" $2 > /dev/full";
            shell.args(["-c", line, env!("CARGO_BIN_EXE_memory-pool"), file.path(), more]);
            let Output { status, stderr, .. } = children::output_of(&mut shell).unwrap();
            let said = String::from_utf8_lossy(&stderr);
            assert!(status.code() == Some(1) && said.contains("output: "), "{said}");
            assert!(!said.contains("panicked"), "{said}");
        }
    }
}

#[test]
fn a_card_that_is_not_there() {
    if memory_pool::GpuDevice::count() > 0 {
        return;
    }
    let file = Scratch::new("cardless", &records());
    for pool in ["device", "cuda-async", "cuda-malloc"] {
        let (status, said) = replay(&[file.path(), "--pool", pool, "--driver", "cuda"]);
        assert!(status == 1 && said.contains("no CUDA driver"), "{said}");
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit.max(1)
    }
}

/// Flips, cuts, repeats and inserts a few bytes.
fn damaged(whole: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        let end = (at + random.below(24)).min(bytes.len());
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            3 => bytes.insert(at, random.below(256) as u8),
            _ if at < bytes.len() => {
                bytes[at] = [0, 0xFF, b',', b'(', random.below(256) as u8][random.below(5)]
            }
            _ => {}
        }
    }
    bytes
}

#[test]
fn whatever_the_bytes_nothing_panics() {
    let logged = log(&["1,0,allocate,0x10,64,0x0", "2,1,allocate,0x20,0,0x1", "1,2,free,0x10,64,0x0"]);
    let mut random = Random(7);
    let mut read = 0;
    for whole in [records(), zipped(&records()), logged, snapshot()] {
        for _ in 0..20_000 {
            let bytes = damaged(&whole, &mut random);
            match Trace::parse(&bytes) {
                Ok(trace) => {
                    read += 1;
                    assert!(trace.allocations() > 0);
                }
                Err(error) => assert!(Trace::place(&bytes, &error).is_some(), "{error}"),
            }
        }
        // A few of them through the program, where they are replayed if they can be.
        for _ in 0..8 {
            let file = Scratch::new("damaged", &damaged(&whole, &mut random));
            let (status, said) = replay(&[file.path(), "--pool", "device", "--driver", "sim"]);
            assert!(status == 0 || said.contains(file.path()) || said.contains("memory"), "{said}");
        }
    }
    assert!(read > 1000, "some of the damage leaves a trace that can be read: {read}");
}

//! Programs that nobody here wrote do the same on this heap as on their own.

use std::path::Path;
use std::process::Command;

use crate::children::output_told;
use crate::{library, text};

/// A program, what it is told, and what it reads.
struct Case {
    program: &'static str,
    arguments: &'static [&'static str],
    input: &'static str,
}

const fn case(program: &'static str, arguments: &'static [&'static str], input: &'static str) -> Case {
    Case { program, arguments, input }
}

#[rustfmt::skip]
const CASES: [Case; 12] = [
    case(
        "/bin/sh",
        &["-c", "x=a; for i in 1 2 3 4 5 6 7; do x=$x$x; done; echo ${#x}; (echo in a child) | cat"],
        "",
    ),
    case("sort", &["-r"], "pear\napple\nfig\n"),
    case(
        "awk",
        &[
            "BEGIN { for (i = 0; i < 20000; i++) a[i] = i \"x\"; n = 0; for (k in a) n += length(a[k]); print n }",
        ],
        "",
    ),
    case("sed", &["-n", "s/a\\(.*\\)e/<\\1>/p"], "apple\npear\nabove\n"),
    case(
        "python3",
        &[
            "-c",
            "import json, threading, subprocess\n\
             def work(): json.loads(json.dumps([{str(i): [i] * (i % 50)} for i in range(3000)]))\n\
             t = [threading.Thread(target=work) for _ in range(3)]\n\
             [x.start() for x in t]; [x.join() for x in t]\n\
             print(subprocess.check_output(['/bin/echo', 'from a child']), sum(range(10**5)))",
        ],
        "",
    ),
    // Modules of its own test suite.
    case(
        "python3",
        &[
            "-c",
            "import unittest\n\
             for name in ['test.test_dict', 'test.test_json', 'test.test_deque']:\n\
             \x20   result = unittest.TestResult()\n\
             \x20   unittest.defaultTestLoader.loadTestsFromName(name).run(result)\n\
             \x20   print(name, result.testsRun, result.failures, result.errors)",
        ],
        "",
    ),
    case(
        "node",
        &[
            "-e",
            "let m = new Map(); for (let i = 0; i < 30000; i++) m.set('k' + i, { a: i, b: [i, i + 1] }); \
             let s = JSON.stringify([...m]); console.log(s.length, JSON.parse(s).length)",
        ],
        "",
    ),
    case(
        "/bin/sh",
        &[
            "-c",
            "set -e; d=$(mktemp -d); redis-server --port 0 --unixsocket $d/s --save '' >/dev/null & p=$!; \
             for i in 1 2 3 4 5 6 7 8 9 10; do [ -S $d/s ] && break; sleep 0.2; done; \
             redis-cli -s $d/s eval \"for i = 1, 5000 do redis.call('set', 'k' .. i, string.rep('x', i % 300)) end \
             return redis.call('dbsize')\" 0; kill $p; wait $p || true; rm -r $d",
        ],
        "",
    ),
    case("git", &["log", "--stat", "-3", "--format=%H %s"], ""),
    case(
        "sqlite3",
        &[
            ":memory:",
            "create table t(x); with recursive c(i) as (select 1 union all select i+1 from c where i<5000) \
          insert into t select hex(i*i) from c; select count(*), max(length(x)) from t; select x from t order by x desc limit 2;",
        ],
        "",
    ),
    case(
        "perl",
        &["-e", "my %h; $h{$_} = 'x' x ($_ % 300) for 1..20000; print scalar(keys %h), qq(\\n)"],
        "",
    ),
    case(
        "gcc",
        &["-x", "c", "-O2", "-S", "-o", "-", "-"],
        "int f(int *a, int n) { int s = 0; for (int i = 0; i < n; i++) s += a[i]; return s; }\n",
    ),
];

/// What the program says, and whether that was a success.
fn run(case: &Case, preload: Option<(&Path, &str)>) -> std::io::Result<(String, String, bool)> {
    let mut command = Command::new(case.program);
    command.args(case.arguments).current_dir(env!("CARGO_MANIFEST_DIR")).env("LC_ALL", "C");
    if let Some((library, hardened)) = preload {
        command.env("LD_PRELOAD", library).env("MEMORY_POOL_HARDENED", hardened);
    }
    let output = output_told(&mut command, case.input)?;
    Ok((text(&output.stdout), text(&output.stderr), output.status.success()))
}

#[test]
fn foreign_programs_do_the_same_on_this_heap() {
    let library = library();
    let mut ran = 0;
    for case in &CASES {
        let Ok(expected) = run(case, None) else {
            println!("left out, not on this machine: {}", case.program);
            continue;
        };
        if !expected.2 {
            println!("left out, fails without the library as well: {}: {}", case.program, expected.1);
            continue;
        }
        for hardened in ["0", "1"] {
            let said = run(case, Some((&library, hardened))).unwrap();
            assert_eq!(said, expected, "{}, hardened: {hardened}", case.program);
        }
        ran += 1;
    }
    assert!(ran > 0, "/bin/sh is everywhere");
}

/// Exceptions pass through `operator new`, and the program's new-handler is called.
#[test]
fn cxx_programs_catch_what_new_throws() {
    const PROGRAM: &str = include_str!("operators.cpp");
    let folder = std::env::temp_dir().join(format!("memory-pool-operators-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let binary = folder.join("operators");
    let mut compiler = Command::new("g++");
    compiler.args(["-std=c++17", "-O1", "-x", "c++", "-", "-o"]).arg(&binary);
    match output_told(&mut compiler, PROGRAM) {
        Ok(compiled) => {
            assert!(compiled.status.success(), "{}", text(&compiled.stderr));
            let output = output_told(Command::new(&binary).env("LD_PRELOAD", library()), "").unwrap();
            let (out, err) = (text(&output.stdout), text(&output.stderr));
            assert!(output.status.success() && out == "all is well\n", "{}\n{out}\n{err}", output.status);
        }
        Err(error) => println!("left out: no C++ compiler: {error}"),
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

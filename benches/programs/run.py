#!/usr/bin/env python3
"""Programs on this heap and on others: time and peak memory, interleaved, as medians.

    cargo build --release --example malloc_preload
    benches/programs/run.py                 # the C programs of this folder
    benches/programs/run.py --real          # programs that nobody here wrote, as far as they are installed
    benches/programs/run.py large stress    # some of either
    benches/programs/run.py --rounds 5 --threads 16

The others are found where Debian puts them (libjemalloc2, libtcmalloc-minimal4, libmimalloc2.0). mimalloc 3 and
rpmalloc are built from the sources in the crates `libmimalloc-sys` and `rpmalloc-sys`, once cargo has fetched them
(`cargo fetch` in benches/peers/heap).
Time is what the program took (`wall`) or used (`cpu`, of all its threads and children, for machines that do other
things as well); memory is the peak of its largest process.
"""
import argparse
import glob
import math
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BUILT = os.path.join(ROOT, "target", "programs")
OURS = os.path.join(ROOT, "target", "release", "examples", "libmalloc_preload.so")
DEBIAN = "/usr/lib/x86_64-linux-gnu"
LIMIT = 120  # seconds a program may take


def from_crate(name, folder, arguments):
    """The library `name`, built of C sources that a crate brings along; None where cargo has not fetched it."""
    library = os.path.join(BUILT, f"lib{name}.so")
    for home in filter(None, [os.environ.get("CARGO_HOME"), os.path.expanduser("~/.cargo")]):
        for source in glob.glob(f"{home}/registry/src/*/{folder}"):
            if not os.path.exists(library):
                subprocess.run(["gcc", "-O3", "-DNDEBUG", "-fPIC", "-shared", "-ftls-model=initial-exec",
                                "-fvisibility=hidden", "-fno-builtin-malloc", "-w", "-o", library,
                                *(part.format(source) for part in arguments), "-lpthread"], check=True)
            return [library]
    return [library] if os.path.exists(library) else []


def mimalloc3():
    return from_crate("mimalloc3", "libmimalloc-sys-*/c_src/mimalloc/v3", [
        "-DMI_SHARED_LIB", "-DMI_SHARED_LIB_EXPORT", "-DMI_MALLOC_OVERRIDE", "-I", "{}/include", "{}/src/static.c"])


def rpmalloc():
    return from_crate("rpmalloc", "rpmalloc-sys-*/rpmalloc/rpmalloc", [
        "-D_GNU_SOURCE", "-DENABLE_PRELOAD=1", "-DENABLE_OVERRIDE=1", "-I", "{}", "{}/rpmalloc.c"])


def allocators(peers):
    """Name and library of all that are here. `hardened` is the same heap, configured so. glibc goes first as well, since
    some programs bring an allocator along: Debian's Redis is linked with jemalloc."""
    os.makedirs(BUILT, exist_ok=True)
    if not os.path.exists(OURS):
        sys.exit("first: cargo build --release --example malloc_preload")
    found = {"memory-pool": OURS, "hardened": OURS, "glibc": "".join(glob.glob(DEBIAN + "/libc.so.6"))}
    others = {
        "jemalloc": glob.glob(peers + "/libjemalloc.so.2"),
        "tcmalloc": glob.glob(peers + "/libtcmalloc_minimal.so.4"),
        "mimalloc 2": glob.glob(peers + "/libmimalloc.so.2"),
        "mimalloc 3": mimalloc3(),
        "rpmalloc": rpmalloc(),
    }
    for name, paths in others.items():
        if paths:
            found[name] = paths[0]
        else:
            print(f"left out, not on this machine: {name}", file=sys.stderr)
    return found


def c_programs(threads):
    """The programs of the folder `c`, each with its argument."""
    commands = {}
    takes_threads = {"server", "stress", "handover", "mixed", "scratch", "sizes", "swaps"}
    for source in sorted(glob.glob(os.path.join(HERE, "c", "*.c"))):
        name, binary = os.path.basename(source)[:-2], compiled(source)
        commands[name] = lambda name=name, binary=binary: [binary] + (
            [str(threads)] if threads and name in takes_threads else [])
    return commands


SQL = """
create table t(id integer primary key, name text, amount real);
with recursive c(i) as (select 1 union all select i + 1 from c where i < 200000)
insert into t select i, hex(i * 7919 % 100003), i * 1.5 from c;
create index by_name on t(name);
select count(distinct name), sum(amount) from t;
select name, count(*) from t group by name order by 2 desc, 1 limit 5;
update t set name = name || 'x' where id % 3 = 0;
delete from t where id % 7 = 0;
select group_concat(name) from (select name from t order by name limit 10);
"""


def real_programs(scratch):
    """Programs of others, as far as they are here. Each takes a second or a few."""
    has = shutil.which
    commands = {}
    if has("python3"):
        modules = ["test_json", "test_dict", "test_list", "test_re", "test_collections"]
        commands["python tests"] = lambda: ["python3", "-m", "test", "-q", *modules]
        work = ("import json;d=[{'k%d'%i:[i]*(i%40),'s':str(i)*3} for i in range(40000)];"
                "s=json.dumps(d);print(len(s),sum(len(x) for x in json.loads(s)))")
        commands["python json"] = lambda: ["python3", "-c", work]
    if has("git"):
        repository = history(scratch)
        commands["git log"] = lambda: ["git", "-C", repository, "log", "--stat", "-M", "--all"]
        commands["git repack"] = lambda: ["git", "-C", repository, "-c", "pack.threads=2", "repack", "-adfq"]
    if has("sqlite3"):
        commands["sqlite3"] = lambda: ["sqlite3", ":memory:", SQL]
    if has("node"):
        script = ("let m=new Map();for(let i=0;i<300000;i++)m.set('k'+i,{a:i,b:[i,i+1],c:'x'.repeat(i%50)});"
                  "let s=JSON.stringify([...m]);console.log(s.length,JSON.parse(s).length)")
        commands["node"] = lambda: ["node", "-e", script]
    if has("gcc"):
        source = os.path.join(scratch, "many.c")
        with open(source, "w") as text:
            text.write("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n")
            for i in range(400):
                text.write(f"int f{i}(int *a, int n) {{ int s = {i}; for (int k = 0; k < n; k++) "
                           f"s += a[k] * (k ^ {i}); return s > {i} ? s : f{max(i - 1, 0)}(a, n / 2); }}\n")
        commands["gcc -O2"] = lambda: ["gcc", "-O2", "-c", source, "-o", os.path.join(scratch, "many.o")]
    if has("redis-server") and has("redis-benchmark"):
        commands["redis"] = lambda: [sys.executable, __file__, "--redis", scratch]
    if has("initdb") and has("postgres") and has("pgbench"):
        commands["initdb, pgbench"] = lambda: [sys.executable, __file__, "--postgres", scratch]
    if has("cargo"):
        # What it depends on is checked before, so that every run does the same.
        subprocess.run(["cargo", "check", "--lib", "--quiet", "--offline"], cwd=ROOT, check=True)
        commands["cargo check"] = lambda: [
            "sh", "-c", f"cd '{ROOT}' && touch src/lib.rs && cargo check --lib --quiet --offline"]
    return commands


def history(scratch):
    """A repository of two thousand commits over forty files."""
    path = os.path.join(scratch, "history")
    subprocess.run(["git", "init", "-q", path], check=True)
    stream = []
    for n in range(2000):
        text = "".join(f"line {k} of {n * 31 % 977}\n" for k in range(n % 200 + 50))
        stream.append(f"commit refs/heads/main\ncommitter A <a@b.c> {1700000000 + n} +0000\n"
                      f"data 8\nstep{n:04}\nM 644 inline file{n % 40}.txt\ndata {len(text)}\n{text}\n")
    subprocess.run(["git", "-C", path, "fast-import", "--quiet"], input="".join(stream), text=True, check=True)
    return path


def redis(scratch):
    """A server under the benchmark that comes with it; only the server is on the heap under test."""
    preload = os.environ.pop("LD_PRELOAD", "")
    socket = os.path.join(scratch, "redis.sock")
    server = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", socket, "--save", ""],
                              env={**os.environ, "LD_PRELOAD": preload}, stdout=subprocess.DEVNULL, cwd=scratch)
    while not os.path.exists(socket):
        time.sleep(0.02)
    subprocess.run(["redis-benchmark", "-s", socket, "-t", "set,get,lpush,hset", "-n", "100000", "-r", "100000", "-d", "200",
                    "-P", "8", "-q"], check=True, stdout=subprocess.DEVNULL)
    server.terminate()
    server.wait()


def postgres(scratch):
    """A cluster made, filled and used; refuses to run as root, so another user does where need be."""
    data = tempfile.mkdtemp(dir=scratch)
    preload = os.environ.pop("LD_PRELOAD", "")
    user = "postgres" if os.getuid() == 0 else None
    if user:
        shutil.chown(data, user)
    script = (f"set -e; {'export LD_PRELOAD=' + preload if preload else ':'}; initdb -D {data}/db >/dev/null; "
              f"pg_ctl -D {data}/db -o '-k {data} -c listen_addresses=' -w start >/dev/null; "
              f"pgbench -h {data} -i -q -s 3 postgres 2>/dev/null; "
              f"pgbench -h {data} -n -S -c 2 -t 3000 postgres >/dev/null 2>&1; "
              f"pg_ctl -D {data}/db -m fast -w stop >/dev/null")
    subprocess.run(["sh", "-c", script], check=True, user=user)


def compiled(source):
    """The program of a C file."""
    os.makedirs(BUILT, exist_ok=True)
    binary = os.path.join(BUILT, os.path.basename(source)[:-2])
    if not os.path.exists(binary) or os.path.getmtime(binary) < os.path.getmtime(source):
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", binary, source, "-lpthread"], check=True)
    return binary


def measure(command, name, library):
    """Wall and processor time in seconds and peak memory in MiB of one run."""
    launcher = compiled(os.path.join(HERE, "measure.c"))
    environment = dict(os.environ, LC_ALL="C")
    if name == "hardened":
        environment["MEMORY_POOL_HARDENED"] = "1"
    with subprocess.Popen([launcher, library, *command], env=environment, stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            said = run.communicate(timeout=LIMIT)[1]
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            sys.exit(f"{command} with {name} still ran after {LIMIT} s")
    if run.returncode:
        sys.exit(f"{command} with {name} failed:\n{said[-2000:]}")
    wall, cpu, peak = map(float, said.split()[-3:])
    return wall, cpu, peak / 1024


def main():
    if sys.argv[1:2] == ["--redis"]:
        return redis(sys.argv[2])
    if sys.argv[1:2] == ["--postgres"]:
        return postgres(sys.argv[2])
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("programs", nargs="*", help="names of programs; all by default")
    options.add_argument("--real", action="store_true", help="programs of others")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, default=0, help="for those that take a number")
    options.add_argument("--time", choices=["wall", "cpu"], default="wall")
    options.add_argument("--against", default="mimalloc 3", help="what the means compare with")
    options.add_argument("--peers", default=DEBIAN, help="the folder of Debian's libraries, on other machines")
    options.add_argument("--only", nargs="*", help="names of allocators")
    chosen = options.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        report(chosen, real_programs(scratch) if chosen.real else c_programs(chosen.threads))


def report(chosen, programs):
    libraries = {name: path for name, path in allocators(chosen.peers).items() if not chosen.only or name in chosen.only}
    clock = 0 if chosen.time == "wall" else 1
    print(f"| {chosen.time} s (peak MiB) | " + " | ".join(libraries) + " |")
    print("|---" * (len(libraries) + 1) + "|", flush=True)
    ratios = {name: ([], []) for name in libraries}
    for program, command in programs.items():
        if chosen.programs and program not in chosen.programs:
            continue
        runs = {name: [] for name in libraries}
        for _ in range(chosen.rounds):
            for name, library in libraries.items():
                runs[name].append(measure(command(), name, library))
        times = {name: statistics.median(run[clock] for run in runs[name]) for name in libraries}
        peaks = {name: statistics.median(run[2] for run in runs[name]) for name in libraries}
        print(f"| {program} | " + " | ".join(f"{times[n]:.2f} ({peaks[n]:.1f})" for n in libraries) + " |", flush=True)
        for name in libraries:
            if chosen.against in libraries:
                ratios[name][0].append(times[name] / times[chosen.against])
                ratios[name][1].append(peaks[name] / peaks[chosen.against])
    if chosen.against in libraries and ratios[chosen.against][0]:
        mean = lambda values: math.exp(sum(map(math.log, values)) / len(values))
        cells = (f"{mean(ratios[n][0]):.2f} ({mean(ratios[n][1]):.2f})" for n in libraries)
        print(f"| *geometric mean against {chosen.against}* | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

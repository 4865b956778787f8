"""Runs the README's snippets for PyTorch, CuPy and RMM as they stand there, each followed by a use of what it set up.

    cargo build --release --example gpu_plugin
    python3 examples/gpu_plugin/readme.py

in the repository's root. Needs a card, PyTorch and CuPy; for RMM nvcc, and RMM_WHEELS, a folder with the unpacked wheels
of librmm and rapids-logger. What is missing is said, and not run.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile

USE_TORCH = """
assert pool.stats()["allocated"] >= 4 << 20, pool.stats()
assert (x + x).sum().item() == 2 << 20
"""

USE_STATS = """
import json
assert json.loads(text.value)["allocated"] == pool.stats()["allocated"]
"""

USE_CUPY = """
before = pool.stats()["allocations"]
with stream:
    a = cupy.arange(1 << 20, dtype=cupy.float32)
    b = a * 2 + 1
    assert float(b[-1]) == 2 * ((1 << 20) - 1) + 1
    del a, b
stream.synchronize()
after = pool.stats()
assert after["allocations"] > before and after["failures"] == 0, after
pool.check()
"""

BEFORE_RMM = """
#include <rmm/cuda_stream.hpp>
#include <rmm/device_uvector.hpp>
#include <rmm/mr/callback_memory_resource.hpp>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" std::ptrdiff_t memory_pool_gpu_stats_json(int, char *, std::size_t);
"""

USE_RMM = """
int main() {
    rmm::cuda_stream stream;
    for (int round = 0; round < 100; ++round) {
        rmm::device_uvector<int> numbers(1 << 20, stream, pool);
        std::vector<int> sent(numbers.size(), round), back(numbers.size());
        cudaMemcpyAsync(numbers.data(), sent.data(), sent.size() * sizeof(int), cudaMemcpyDefault, stream.value());
        cudaMemcpyAsync(back.data(), numbers.data(), back.size() * sizeof(int), cudaMemcpyDefault, stream.value());
        stream.synchronize();
        if (back != sent) return 1;
    }
    char text[4096] = {};
    memory_pool_gpu_stats_json(0, text, sizeof text);
    std::puts(text);
    return std::strstr(text, "\\"allocations\\":100,") ? 0 : 1;
}
"""


def snippets():
    """The section's snippets, by language."""
    with open("README.md", encoding="utf-8") as file:
        section = file.read().split("### Under PyTorch, CuPy and RMM")[1].split("\n## ")[0]
    found = re.findall(r"^```(\w+)\n(.*?)^```", section, re.S | re.M)
    python = [body for language, body in found if language == "python"]
    (cpp,) = [body for language, body in found if language == "cpp"]
    torch, cupy, stats = python
    return torch, cupy, stats, cpp


def python(name, *parts):
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-c", "\n".join(parts)], check=True, timeout=120)


def rmm(snippet, wheels):
    print("== RMM", flush=True)
    headers = [f"{wheels}/librmm/include", f"{wheels}/librmm/include/rapids", f"{wheels}/rapids_logger/include"]
    libraries = [f"{wheels}/librmm/lib64", f"{wheels}/rapids_logger/lib64"]
    built = os.path.abspath("target/release/examples")
    with tempfile.TemporaryDirectory() as place:
        source, program = os.path.join(place, "rmm.cu"), os.path.join(place, "rmm")
        with open(source, "w", encoding="utf-8") as file:
            file.write(BEFORE_RMM + snippet + USE_RMM)
        command = ["nvcc", "-std=c++20", source, "-o", program, "-lrmm", "-lrapids_logger", "-lgpu_plugin"]
        command += [f"-I{folder}" for folder in headers] + [f"-L{folder}" for folder in [*libraries, built]]
        subprocess.run(command, check=True, timeout=300)
        path = ":".join([*libraries, built, os.environ.get("LD_LIBRARY_PATH", "")])
        subprocess.run([program], check=True, timeout=60, env=dict(os.environ, LD_LIBRARY_PATH=path))


def main():
    torch, cupy, stats, cpp = snippets()
    python("PyTorch, and the statistics by ctypes alone", torch, USE_TORCH, stats, USE_STATS)
    if importlib.util.find_spec("cupy"):
        python("PyTorch and CuPy on one pool", torch, USE_TORCH, cupy, USE_CUPY)
    else:
        print("no CuPy here: its snippet was not run")
    wheels = os.environ.get("RMM_WHEELS")
    if wheels and shutil.which("nvcc"):
        rmm(cpp, wheels)
    else:
        print("no RMM_WHEELS or no nvcc here: RMM's snippet was not run")
    print("every snippet that was run did what it says")


if __name__ == "__main__":
    main()

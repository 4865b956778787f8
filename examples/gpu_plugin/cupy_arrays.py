"""CuPy on the plugin: the same program on CuPy's own pool, on the plugin with one stream named, and on the plugin with
no stream named, in alternation. Checks the sums, prints microseconds a step and peak reserved bytes.

    python3 examples/gpu_plugin/cupy_arrays.py target/release/examples/libgpu_plugin.so
"""

import os
import statistics
import subprocess
import sys
import time


def run(library, allocator):
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import cupy
    import numpy

    plugin = None
    if allocator != "cupy":
        import memory_pool_gpu

        plugin = memory_pool_gpu.Plugin(library)
        chosen = plugin.cupy_allocator(memory_pool_gpu.LEGACY_STREAM if allocator == "plugin" else 0)
        cupy.cuda.set_allocator(chosen.malloc)
    choice = numpy.random.default_rng(1)
    sizes = choice.integers(1 << 8, 1 << 20, 3000)
    held, total, times = [], 0.0, []
    for step, size in enumerate(sizes):
        start = time.perf_counter()
        a = cupy.full(int(size), 1.0, dtype=cupy.float32)
        b = a * 2 + 1
        held.append(b)
        if len(held) > 32:
            total += float(held.pop(step % 32).sum())
        times.append(time.perf_counter() - start)
    total += sum(float(b.sum()) for b in held)
    wrong = abs(total - 3.0 * float(sizes.sum())) > 1.0
    reserved = plugin.stats()["peak_reserved"] if plugin else cupy.get_default_memory_pool().total_bytes()
    if plugin:
        plugin.check()
        failed = plugin.stats()["failures"]
        assert failed == 0, failed
    print(f"{allocator:<16} {statistics.median(times[500:]) * 1e6:8.2f} us a step, {reserved / 2**20:8.1f} MiB reserved,"
          f" sum {'WRONG' if wrong else 'right'}", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run(sys.argv[1], sys.argv[2])
    for _ in range(2):
        for name in ["cupy", "plugin", "plugin-settled"]:
            subprocess.run([sys.executable, __file__, sys.argv[1], name], check=True)

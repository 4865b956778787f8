"""PyTorch's caching allocator on the traces that `memory-pool replay` replays, and on pairs: a line of JSON a result.

    python3 torch_replay.py [--build] traces as they are (gzip)

With PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it is the other mode. `--build` compiles the module and ends.
"""

import gzip
import json
import os
import sys

import torch
from torch.utils.cpp_extension import load_inline

SOURCE = r"""
#include <torch/extension.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <chrono>
namespace allocator = c10::cuda::CUDACachingAllocator;
using Clock = std::chrono::steady_clock;
struct Event { uint8_t frees, stream; uint16_t zero; uint32_t id; uint64_t bytes; };

double since(Clock::time_point start) {
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

/// Nanoseconds an operation of two rounds, and what was live and reserved at 64 points of the first.
std::pair<std::vector<double>, std::vector<std::pair<uint64_t, uint64_t>>> replay(pybind11::bytes bytes) {
    std::string text = bytes;
    const auto *trace = reinterpret_cast<const Event *>(text.data());
    const size_t count = text.size() / sizeof(Event), chunk = (count + 63) / 64;
    std::vector<c10::cuda::CUDAStream> streams{c10::cuda::getDefaultCUDAStream()};
    for (int at = 0; at < 31; at++) streams.push_back(c10::cuda::getStreamFromPool());
    uint32_t ids = 0;
    for (size_t at = 0; at < count; at++) ids = std::max(ids, trace[at].id + 1);
    std::vector<std::pair<void *, uint64_t>> blocks(ids, {nullptr, 0});
    std::vector<double> times;
    std::vector<std::pair<uint64_t, uint64_t>> curve;
    for (int round = 0; round < 2; round++) {
        double time = 0;
        uint64_t live = 0;
        for (size_t from = 0; from < count; from += chunk) {
            const size_t to = std::min(from + chunk, count);
            const auto start = Clock::now();
            for (size_t at = from; at < to; at++) {
                const Event &event = trace[at];
                auto &block = blocks[event.id];
                if (!event.frees) {
                    const uint64_t size = std::max<uint64_t>(event.bytes, 1);
                    block = {allocator::raw_alloc_with_stream(size, streams[event.stream % 32]), size};
                    live += size;
                } else {
                    allocator::raw_delete(block.first);
                    live -= block.second;
                    block.first = nullptr;
                }
            }
            time += since(start);
            if (round == 0) curve.push_back({live, allocator::getDeviceStats(0).reserved_bytes[0].current});
        }
        times.push_back(time / count);
        for (auto &block : blocks) {
            if (block.first) allocator::raw_delete(block.first);
            block.first = nullptr;
        }
    }
    return {times, curve};
}

double pair(uint64_t bytes) {
    std::vector<double> runs;
    for (int run = 0; run < 5; run++) {
        const auto start = Clock::now();
        for (int at = 0; at < 5000; at++) allocator::raw_delete(allocator::raw_alloc(bytes));
        runs.push_back(since(start) / 5000);
    }
    std::sort(runs.begin(), runs.end());
    return runs[2];
}
"""


def main():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    module = load_inline(
        "memory_pool_torch_replay", cpp_sources=SOURCE, functions=["replay", "pair"], with_cuda=True,
        extra_cflags=["-O3"],
    )
    if sys.argv[1:] == ["--build"]:
        return
    expandable = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    pool = "torch-expandable" if expandable else "torch"
    torch.empty(1, device="cuda")
    for size in (512, 1 << 20, 256 << 20):
        print(json.dumps({"pool": pool, "pair_bytes": size, "ns": round(module.pair(size), 1)}), flush=True)
    for path in sys.argv[1:]:
        with gzip.open(path) as file:
            trace = file.read()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        (cold, warm), curve = module.replay(trace)
        live, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(json.dumps({
            "pool": pool, "trace": path, "peak_live": live, "peak_reserved": reserved,
            "reserved_over_live": round(reserved / live, 4), "cold_ns": round(cold, 1), "warm_ns": round(warm, 1),
            "live_reserved_fragmentation": curve,
        }), flush=True)


if __name__ == "__main__":
    main()

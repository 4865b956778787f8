// The GPU's other allocators on the traces that `memory-pool replay` replays, and on pairs: CUDA's stream-ordered pool,
// CUB's caching allocator, RMM's pool and arena. One line of JSON a result, in the words of `memory-pool replay --json`.
//
//   nvcc -O3 -std=c++20 -arch=sm_90 -x cu peers.cu -o peers $RMM -lcuda -Xcompiler -pthread
//
// RMM holds what its wheels need: -DRMM -I<librmm/include> -I<librmm/include/rapids> -I<rapids_logger/include>
// -L<both lib64> -lrmm -lrapids_logger; without it RMM is left out. Arguments: unpacked traces.

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cub/util_allocator.cuh>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#ifdef RMM
#include <rmm/mr/arena_memory_resource.hpp>
#include <rmm/mr/cuda_memory_resource.hpp>
#include <rmm/mr/pool_memory_resource.hpp>
#endif

using Clock = std::chrono::steady_clock;

struct Event {
    uint8_t frees, stream;
    uint16_t zero;
    uint32_t id;
    uint64_t bytes;
};
static_assert(sizeof(Event) == 16);

constexpr size_t SAMPLES = 64;
cudaStream_t streams[256];

double since(Clock::time_point start) {
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

// What a peer offers: null where it has no memory.
struct Peer {
    const char *name;
    std::function<void *(size_t, cudaStream_t)> take;
    std::function<void(void *, size_t, cudaStream_t)> give;
    std::function<size_t()> reserved;
};

std::vector<Event> load(const char *path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    std::vector<Event> trace(file ? static_cast<size_t>(file.tellg()) / sizeof(Event) : 0);
    file.seekg(0);
    file.read(reinterpret_cast<char *>(trace.data()), trace.size() * sizeof(Event));
    if (trace.empty() || !file) {
        std::fprintf(stderr, "%s: no trace\n", path);
        std::exit(1);
    }
    for (auto &event : trace) event.bytes = std::max<uint64_t>(event.bytes, 1);
    return trace;
}

// Twice, as `memory-pool replay` does: with nothing, and with what that left. The samples take no time.
void replay(const char *path, const std::vector<Event> &trace, const Peer &peer) {
    uint32_t ids = 0;
    for (auto &event : trace) ids = std::max(ids, event.id + 1);
    struct Block {
        void *at;
        uint64_t bytes;
        uint8_t stream;
    };
    std::vector<Block> blocks(ids, Block{});
    double times[2];
    uint64_t live = 0, peak_live = 0, peak_reserved = 0;
    std::string curve;
    const size_t chunk = (trace.size() + SAMPLES - 1) / SAMPLES;
    for (int round = 0; round < 2; round++) {
        times[round] = 0;
        for (size_t from = 0; from < trace.size(); from += chunk) {
            const size_t to = std::min(from + chunk, trace.size());
            const auto start = Clock::now();
            for (size_t at = from; at < to; at++) {
                const Event &event = trace[at];
                Block &block = blocks[event.id];
                if (!event.frees) {
                    block = {peer.take(event.bytes, streams[event.stream]), event.bytes, event.stream};
                    if (!block.at) {
                        std::printf("{\"pool\":\"%s\",\"trace\":\"%s\",\"failed_at\":%zu}\n", peer.name, path, at);
                        return;
                    }
                    live += event.bytes;
                    peak_live = std::max(peak_live, live);
                } else {
                    peer.give(block.at, block.bytes, streams[block.stream]);
                    live -= block.bytes;
                    block.at = nullptr;
                }
            }
            times[round] += since(start);
            if (round == 0) {
                const uint64_t reserved = peer.reserved();
                peak_reserved = std::max(peak_reserved, reserved);
                curve += (curve.empty() ? "[" : ",[") + std::to_string(live) + "," + std::to_string(reserved) + "]";
            }
        }
        for (auto &block : blocks) {
            if (block.at) peer.give(block.at, block.bytes, streams[block.stream]);
            block.at = nullptr;
        }
        live = 0;
        cudaDeviceSynchronize();
    }
    std::printf("{\"pool\":\"%s\",\"trace\":\"%s\",\"peak_live\":%zu,\"peak_reserved\":%zu,\"reserved_over_live\":%.4f,"
                "\"cold_ns\":%.1f,\"warm_ns\":%.1f,\"live_reserved_fragmentation\":[%s]}\n",
                peer.name, path, (size_t)peak_live, (size_t)peak_reserved, (double)peak_reserved / peak_live,
                times[0] / trace.size(), times[1] / trace.size(), curve.c_str());
    std::fflush(stdout);
}

// Nanoseconds a pair: one thread and several sizes, then threads with a stream each and 1 MiB.
void pairs(const Peer &peer) {
    auto run = [&](size_t bytes, cudaStream_t stream, int count) {
        const auto start = Clock::now();
        for (int at = 0; at < count; at++) {
            void *block = peer.take(bytes, stream);
            if (block) peer.give(block, bytes, stream);
        }
        return since(start) / count;
    };
    for (size_t bytes : {size_t(512), size_t(1) << 20, size_t(256) << 20}) {
        run(bytes, streams[0], 100);
        std::vector<double> runs;
        for (int at = 0; at < 5; at++) runs.push_back(run(bytes, streams[0], 2000));
        std::sort(runs.begin(), runs.end());
        std::printf("{\"pool\":\"%s\",\"pair_bytes\":%zu,\"ns\":%.1f}\n", peer.name, bytes, runs[2]);
    }
    for (int count : {4, 16}) {
        std::vector<std::thread> threads;
        const auto start = Clock::now();
        for (int at = 0; at < count; at++)
            threads.emplace_back([&, at] { run(1 << 20, streams[at], 5000); });
        for (auto &thread : threads) thread.join();
        std::printf("{\"pool\":\"%s\",\"threads\":%d,\"ns\":%.1f}\n", peer.name, count, since(start) / 5000);
        cudaDeviceSynchronize();
    }
    std::fflush(stdout);
}

// Each peer is made anew for each piece of work, and gone after it.
void with_driver(const std::function<void(const Peer &)> &work) {
    cudaMemPoolProps wishes = {};
    wishes.allocType = cudaMemAllocationTypePinned;
    wishes.location.type = cudaMemLocationTypeDevice;
    cudaMemPool_t pool;
    cudaMemPoolCreate(&pool, &wishes);
    uint64_t all = UINT64_MAX;
    cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all);
    work({"cuda-async",
          [&](size_t bytes, cudaStream_t stream) {
              void *block = nullptr;
              return cudaMallocFromPoolAsync(&block, bytes, pool, stream) == cudaSuccess ? block : nullptr;
          },
          [&](void *block, size_t, cudaStream_t stream) { cudaFreeAsync(block, stream); },
          [&] {
              uint64_t reserved = 0;
              cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemCurrent, &reserved);
              return (size_t)reserved;
          }});
    cudaDeviceSynchronize();
    cudaMemPoolDestroy(pool);
}

void with_cub(const std::function<void(const Peer &)> &work) {
    cub::CachingDeviceAllocator pool(2, 8, 31);
    work({"cub",
          [&](size_t bytes, cudaStream_t stream) {
              void *block = nullptr;
              return pool.DeviceAllocate(&block, bytes, stream) == cudaSuccess ? block : nullptr;
          },
          [&](void *block, size_t, cudaStream_t) { pool.DeviceFree(block); },
          [&] { return pool.cached_bytes[0].free + pool.cached_bytes[0].live; }});
    pool.FreeAllCached();
    cudaGetLastError();
}

#ifdef RMM
template <class Pool>
Peer of(const char *name, Pool &pool, std::function<size_t()> reserved) {
    return {name,
            [&](size_t bytes, cudaStream_t stream) -> void * {
                try {
                    return pool.allocate(cuda::stream_ref{stream}, bytes, 256);
                } catch (const std::exception &) {
                    return nullptr;
                }
            },
            [&](void *block, size_t bytes, cudaStream_t stream) {
                pool.deallocate(cuda::stream_ref{stream}, block, bytes, 256);
            },
            reserved};
}

void with_rmm_pool(const std::function<void(const Peer &)> &work) {
    rmm::mr::cuda_memory_resource card;
    rmm::mr::pool_memory_resource pool{card, size_t(64) << 20};
    work(of("rmm-pool", pool, [&] { return pool.pool_size(); }));
}

// It takes its memory at once; how much of it the work needs it does not say.
void with_rmm_arena(const std::function<void(const Peer &)> &work) {
    rmm::mr::cuda_memory_resource card;
    const size_t size = size_t(100) << 30;
    rmm::mr::arena_memory_resource pool{card, size};
    work(of("rmm-arena", pool, [] { return size; }));
}
#endif

int main(int count, char **arguments) {
    cudaFree(nullptr);
    for (auto &stream : streams) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    std::vector<void (*)(const std::function<void(const Peer &)> &)> peers = {with_driver, with_cub};
#ifdef RMM
    peers.push_back(with_rmm_pool);
    peers.push_back(with_rmm_arena);
#endif
    for (auto with : peers) {
        try {
            with(pairs);
            for (int at = 1; at < count; at++) {
                const auto trace = load(arguments[at]);
                with([&](const Peer &peer) { replay(arguments[at], trace, peer); });
            }
        } catch (const std::exception &error) {
            std::fprintf(stderr, "a peer failed: %s\n", error.what());
        }
    }
}

"""Trains a small transformer and a small convolutional network on PyTorch's own allocator, on the same with expandable
segments, and on the plugin, in alternation, and compares step times, peak reserved memory and losses.

    cargo build --release --example gpu_plugin
    python3 examples/gpu_plugin/train.py target/release/examples/libgpu_plugin.so [--rounds 3] [--steps 60] \
        [--curves curves.json] [--record DIRECTORY]

`--curves` writes what was live and reserved in every step of the first round; `--record` keeps PyTorch's own allocator's
calls as traces for `memory-pool replay`.

Every run is a process of its own. Batches and sequence lengths change from step to step, as in real training. The seeds
and the kernels are the same in all runs, so the losses must be equal bit for bit. Exits with 1 where they are not.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import time

ALLOCATORS = ["native", "expandable", "plugin"]


def transformer(torch):
    """A language model of 24 million parameters, and a batch for it."""
    from torch import nn
    from torch.nn import functional as f

    width, heads, layers, words = 512, 8, 6, 8192

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = (
                part.view(batch, length, heads, -1).transpose(1, 2) for part in self.mix(self.before(x)).chunk(3, -1)
            )
            # Written out, so that its kernels are deterministic and its large intermediate values are allocated.
            score = (q @ k.transpose(-1, -2)) * (width // heads) ** -0.5
            score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), float("-inf"))
            mixed = (score.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
            x = x + self.out(mixed)
            return x + self.down(f.gelu(self.up(self.between(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(words, width), nn.Embedding(1024, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.head = nn.Linear(width, words)

        def forward(self, x):
            return self.head(self.blocks(self.words(x) + self.places.weight[: x.shape[1]]))

    def batch(choice):
        rows, length = choice.randint(4, 24), choice.randrange(64, 513)
        x = torch.randint(words, (rows, length + 1)).cuda()
        return x[:, :-1], x[:, 1:].reshape(-1)

    return Model(), batch, lambda out, y: f.cross_entropy(out.reshape(-1, words).float(), y)


def convolution(torch):
    """A residual network for images, and a batch for it."""
    from torch import nn
    from torch.nn import functional as f

    class Block(nn.Module):
        def __init__(self, inside, outside, stride):
            super().__init__()
            self.one = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            self.two = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
            self.skip = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.norms = nn.ModuleList(nn.BatchNorm2d(outside) for _ in range(2))

        def forward(self, x):
            y = f.relu(self.norms[0](self.one(x)))
            return f.relu(self.norms[1](self.two(y)) + self.skip(x))

    widths = [3, 64, 64, 128, 128, 256, 256, 512]
    strides = [1, 1, 2, 1, 2, 1, 2]
    blocks = [Block(*pair, stride) for pair, stride in zip(zip(widths, widths[1:]), strides)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))

    def batch(choice):
        rows, side = choice.randint(16, 96), choice.choice([48, 56, 64, 72, 80, 96])
        return torch.randn(rows, 3, side, side).cuda(), torch.randint(100, (rows,)).cuda()

    return model, batch, f.cross_entropy


def write_trace(events, path):
    """Writes PyTorch's record of allocations and frees as records of 16 bytes, which `memory-pool replay` reads."""
    streams, live, made = {}, {}, 0
    with gzip.open(path, "wb") as file:
        for event in events:
            stream = streams.setdefault(event["stream"], len(streams))
            if event["action"] == "alloc":
                live[event["addr"]] = made
                file.write(struct.pack("<BBHIQ", 0, stream, 0, made, event["size"]))
                made += 1
            elif event["action"] == "free_requested" and event["addr"] in live:
                file.write(struct.pack("<BBHIQ", 1, stream, 0, live.pop(event["addr"]), event["size"]))


def run(allocator, library, steps, record):
    """One run of both models in this process; prints a line of JSON for each."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import torch

    plugin = None
    if allocator == "plugin":
        import memory_pool_gpu

        plugin = memory_pool_gpu.Plugin(library)
        plugin.use_in_torch()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

    def held():
        """Bytes reserved now, and most live since the last call."""
        if plugin:
            stats = plugin.stats()
            plugin.reset_peak()
            return stats["reserved"], stats["peak_reserved"], stats["peak_allocated"]
        most = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved(), *most

    for name, make in {"transformer": transformer, "convolution": convolution}.items():
        if record:
            torch.cuda.memory._record_memory_history(context=None, stacks="python", max_entries=10_000_000)
        torch.manual_seed(1)
        choice = random.Random(1)
        model, batch, loss_of = make(torch)
        model = model.cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        held()
        losses, times, curve = [], [], []
        for _ in range(steps):
            x, y = batch(choice)
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            losses.append(loss.item())
            curve.append(held())
        if plugin:
            plugin.check()
        if record:
            events = torch.cuda.memory._snapshot()["device_traces"][0]
            write_trace(events, os.path.join(record, name + ".trace.gz"))
            torch.cuda.memory._record_memory_history(enabled=None)
        # The first steps load kernels and fill the caches.
        warm = times[steps // 4 :]
        result = {
            "model": name,
            "allocator": allocator,
            "step_ms": statistics.median(warm) * 1e3,
            "total_ms": sum(warm) * 1e3,
            "peak_reserved": max(most for _, most, _ in curve),
            "peak_live": max(live for _, _, live in curve),
            "curve": [[live, reserved] for reserved, _, live in curve],
            "losses": [loss.hex() for loss in losses],
        }
        print(json.dumps(result), flush=True)
        del model, optimizer, loss, x, y
        torch.cuda.empty_cache()


def start(options, allocator, *more):
    """A run in a process of its own."""
    environment = dict(os.environ, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    if allocator == "expandable":
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    command = [sys.executable, __file__, options.library, "--run", allocator, "--steps", str(options.steps), *more]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="libgpu_plugin.so")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--run", choices=ALLOCATORS, help=argparse.SUPPRESS)
    parser.add_argument("--curves", help="a JSON file to write")
    parser.add_argument("--record", help="a directory for traces")
    options = parser.parse_args()
    if options.run:
        return run(options.run, options.library, options.steps, options.record)

    results = []
    for turn in range(options.rounds):
        # Another one begins in each round.
        for allocator in ALLOCATORS[turn % 3 :] + ALLOCATORS[: turn % 3]:
            results += start(options, allocator)
    if options.record:
        # Recording takes time, so this run counts for nothing else.
        start(options, "native", "--record", options.record)

    if options.curves:
        first = {}
        for result in results:
            first.setdefault(result["model"], {}).setdefault(result["allocator"], result["curve"])
        with open(options.curves, "w") as file:
            json.dump(first, file)
    agree = True
    print(f"{'model':<12} {'allocator':<11} {'step ms':>8} {'all steps':>10} {'reserved':>10} {'live MiB':>9} {'losses'}")
    for model in ["transformer", "convolution"]:
        of = {name: [r for r in results if (r["model"], r["allocator"]) == (model, name)] for name in ALLOCATORS}
        for name, runs in of.items():
            middle = {key: statistics.median(r[key] for r in runs) for key in runs[0] if key not in ("model", "allocator", "losses", "curve")}
            same = all(r["losses"] == of["native"][0]["losses"] for r in runs)
            agree &= same
            print(
                f"{model:<12} {name:<11} {middle['step_ms']:>8.2f} {middle['total_ms']:>10.1f}"
                f" {middle['peak_reserved'] / 2**20:>10.0f} {middle['peak_live'] / 2**20:>9.0f}"
                f" {'equal' if same else 'DIFFER'}"
            )
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()

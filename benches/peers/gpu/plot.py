"""What `run.sh` measured: a table, and with a second argument pictures of what each pool reserved over what was live.

    python3 benches/peers/gpu/plot.py OUT/results.jsonl [benches/plots/gpu]
"""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../examples/gpu_plugin"))
import plot  # noqa: E402

DRAWN = {"device": "plugin", "cuda-async": "driver", "rmm-pool": "rmm", "torch": "native", "torch-expandable": "expandable"}


def main():
    traces, pairs = {}, {}
    with open(sys.argv[1]) as file:
        for line in map(json.loads, file):
            if "trace" in line:
                name = os.path.basename(line["trace"]).removesuffix(".trace.gz")
                # Of several runs the fastest when warm.
                best = traces.setdefault(name, {}).get(line["pool"])
                if best is None or line.get("warm_ns", 0) < best.get("warm_ns", 0):
                    traces[name][line["pool"]] = line
            else:
                what = f'{line["pair_bytes"]} B' if "pair_bytes" in line else f'{line["threads"]} threads'
                pairs.setdefault(line["pool"], {})[what] = line["ns"]
    for pool, row in pairs.items():
        print(f"{pool:>18} pair, ns:", ", ".join(f"{what} {ns:.0f}" for what, ns in row.items()))
    for name, pools in traces.items():
        print(name)
        for pool, line in pools.items():
            if "failed_at" in line:
                print(f'{pool:>18} out of memory at operation {line["failed_at"]}')
                continue
            ratio, cold, warm = line["reserved_over_live"], line["cold_ns"], line["warm_ns"]
            print(f"{pool:>18} reserved {ratio:.3f} of the live, {cold:.0f} ns an operation cold, {warm:.0f} warm")
        if len(sys.argv) > 2:
            curves = {
                drawn: [point[:2] for point in pools[pool]["live_reserved_fragmentation"]]
                for pool, drawn in DRAWN.items() if "live_reserved_fragmentation" in pools.get(pool, {})
            }
            title = f"The trace {name}: GiB reserved by each pool, over what is live"
            with open(f"{sys.argv[2]}_{name}.svg", "w") as file:
                file.write(plot.draw(title, "part of the trace, %", 100, 2**30, curves))


if __name__ == "__main__":
    main()

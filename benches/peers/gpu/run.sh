#!/bin/bash
# This crate's pool and its peers on one card, in one run: pairs, and traces with what is reserved over time.
#
#     benches/peers/gpu/run.sh OUT TRACE.gz...
#
# needs nvcc and PyTorch; RMM as well where RMM_WHEELS names a folder with the unpacked wheels librmm-cu13 and
# rapids-logger. PROGRAMS is where memory-pool and examples/gpu_pairs are (target/release).
# OUT/results.jsonl has a line a result; plot.py draws them.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
programs=${PROGRAMS:-target/release}
mkdir -p "$out/plain"
results=$out/results.jsonl
: >"$results"

# What compiles, compiles at once and before anything is timed.
flags=(-lcuda -Xcompiler -pthread)
if [ -n "${RMM_WHEELS:-}" ]; then
    flags+=(-DRMM "-I$RMM_WHEELS/librmm/include" "-I$RMM_WHEELS/librmm/include/rapids"
        "-I$RMM_WHEELS/rapids_logger/include" "-L$RMM_WHEELS/librmm/lib64" "-L$RMM_WHEELS/rapids_logger/lib64"
        -lrmm -lrapids_logger)
    export LD_LIBRARY_PATH=$RMM_WHEELS/librmm/lib64:$RMM_WHEELS/rapids_logger/lib64:${LD_LIBRARY_PATH:-}
fi
timeout 200 nvcc -O3 -std=c++20 -arch=sm_90 -x cu "$here/peers.cu" -o "$out/peers" "${flags[@]}" 2>"$out/nvcc.log" &
nvcc=$!
timeout 200 python3 "$here/torch_replay.py" --build >"$out/torch.log" 2>&1 || cat "$out/torch.log"
wait $nvcc || { tail -20 "$out/nvcc.log"; exit 1; }

plain=()
for trace in "$@"; do
    name=$(basename "$trace" .trace.gz)
    gunzip -c "$trace" >"$out/plain/$name"
    plain+=("$out/plain/$name")
done

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
timeout 100 "$programs/examples/gpu_pairs" | tee "$out/pairs.txt"
for trace in "$@"; do
    for round in 1 2; do
        timeout 60 "$programs/memory-pool" replay "$trace" --pool device --driver cuda --json |
            sed "s|^{|{\"trace\":\"$trace\",|" >>"$results"
    done
done
timeout 200 "$out/peers" "${plain[@]}" >>"$results" || echo "a peer failed"
timeout 100 python3 "$here/torch_replay.py" "$@" >>"$results" || echo "PyTorch failed"
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True timeout 100 python3 "$here/torch_replay.py" "$@" >>"$results" ||
    echo "PyTorch with expandable segments failed"
rm -r "$out/plain" "$out/peers"
python3 "$here/plot.py" "$results"

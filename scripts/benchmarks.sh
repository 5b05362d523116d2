#!/usr/bin/env bash
# Measure what docs/performance.md shows on this machine, and write that page anew.
#   scripts/benchmarks.sh [DEVICE]      cpu or cuda (of which the page shows the peers and the iteration);
#                                       "make benchmarks" runs it on the CPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=${1:-cpu}
python=${PYTHON:-.venv/bin/python}
results=benchmarks/results
day=$(date -u +%F)

bench() {   # NAME OPTIONS...
    local name=$1
    shift
    "$python" -m megatron_came.tools.cli bench --device "$device" --json "$results/$day-$device-$name.json" "$@"
    echo
}

for run in 1 2 3; do
    bench "peers-$run" --model gpt2-small
done
# From ten to a thousand million parameters, each for several seconds, in runs that lie minutes apart: of
# a shared machine the bandwidth changes meanwhile
for run in 1 2 3 4 5; do
    for model in "nanogpt-char --steps 500" "gpt2-nano --steps 500" "gpt2-mini --steps 400" "gpt2-small --steps 50" \
        "gpt2-medium --steps 20" gpt2-large "gpt2-xl --layers 30"; do
        # shellcheck disable=SC2086 # a model and its options
        bench "models-${model%% *}-$run" --model $model --only "came, fused" "adamw, fused"
    done
done
for layers in 1 6 12 24 48; do
    bench "layers-$layers" --model gpt2-small --layers "$layers" --only "came, fused" "adamw, fused"
done
for ranks in 8 64 512 4096; do
    bench "ranks-$ranks" --model gpt2-medium --ranks "$ranks"
done
bench iteration --iteration --model gpt2-small --steps 5 -- --seq-length 128 --max-position-embeddings 128
"$python" scripts/performance_page.py

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

bench peers --model gpt2-small
for model in gpt2-nano gpt2-mini gpt2-small gpt2-medium gpt2-large; do
    bench "size-$model" --model "$model" --only "came, fused" "adamw, fused"
done
# A thousand million parameters
bench size-gpt2-xl-30 --model gpt2-xl --layers 30 --only "came, fused" "adamw, fused"
for layers in 1 6 12 24 48; do
    bench "layers-$layers" --model gpt2-small --layers "$layers" --only "came, fused" "adamw, fused"
done
for ranks in 8 64 512 4096; do
    bench "ranks-$ranks" --model gpt2-medium --ranks "$ranks"
done
bench iteration --iteration --model gpt2-small --steps 5 -- --seq-length 128 --max-position-embeddings 128
"$python" scripts/performance_page.py

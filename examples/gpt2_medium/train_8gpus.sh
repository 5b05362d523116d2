#!/usr/bin/env bash
# GPT-2 Medium on the eight GPUs of a machine: data parallel, with the distributed optimizer.
#
#     DATA_PATH=my/data OUTPUT=my/run examples/gpt2_medium/train_8gpus.sh [MEGATRON'S FLAGS]
#
# Variables: examples/README.md. GPUS_PER_NODE=4 takes four.
set -euo pipefail
# shellcheck source=examples/gpt2_medium/model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
SMOKE_PROCESSES=2

MODEL_PARALLEL_ARGS=(
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

launch "$@"

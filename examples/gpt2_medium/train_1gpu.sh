#!/usr/bin/env bash
# GPT-2 Medium on one GPU.
#
#     DATA_PATH=my/data OUTPUT=my/run examples/gpt2_medium/train_1gpu.sh [MEGATRON'S FLAGS]
#
# Variables: examples/README.md.
set -euo pipefail
# shellcheck source=examples/gpt2_medium/model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

GPUS_PER_NODE=1
SMOKE_PROCESSES=1

MODEL_PARALLEL_ARGS=(
    # On one GPU it shards nothing, but its checkpoints can be resumed on more.
    --use-distributed-optimizer
)

launch "$@"

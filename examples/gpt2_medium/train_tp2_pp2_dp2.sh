#!/usr/bin/env bash
# GPT-2 Medium on eight GPUs: tensor parallel 2 x pipeline parallel 2 x data parallel 2.
#
# The model is small enough for one GPU; this is the layout to start from for larger ones.
#
#     DATA_PATH=my/data OUTPUT=my/run examples/gpt2_medium/train_tp2_pp2_dp2.sh [MEGATRON'S FLAGS]
#
# Variables: examples/README.md.
set -euo pipefail
# shellcheck source=examples/gpt2_medium/model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

GPUS_PER_NODE=8
SMOKE_PROCESSES=4

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --sequence-parallel
    --pipeline-model-parallel-size 2
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

launch "$@"

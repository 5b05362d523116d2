#!/usr/bin/env bash
# A mixture of 8 experts, 1.2 billion parameters, on eight GPUs: expert parallel 8 x data parallel 8.
#
#     DATA_PATH=my/data TOKENIZER_MODEL=my/tokenizer OUTPUT=my/run examples/moe/train_8gpus.sh
#
# Variables: examples/README.md. CAME keeps row and column statistics of each expert's matrices.
# With Transformer Engine, --moe-grouped-gemm is faster; CAME was not tested with it.
set -euo pipefail
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

NAME=moe
VOCABULARY=32000
schedule 100000 100000 2000   # iterations of training, decay and warm-up

GPUS_PER_NODE=8
SMOKE_PROCESSES=2

MODEL_ARGS=(
    --num-layers 16
    --hidden-size 1024
    --ffn-hidden-size 2816
    --num-attention-heads 16
    --seq-length 2048
    --max-position-embeddings 2048
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
    --make-vocab-size-divisible-by 64
    --num-experts 8
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-token-dispatcher-type alltoall
)

TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-2}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-256}"
    --train-iters "$TRAIN_ITERS"
    --lr-decay-style cosine
    --lr-decay-iters "$LR_DECAY_ITERS"
    --lr-warmup-iters "$WARMUP_ITERS"
    --weight-decay 0.1
    --clip-grad 1.0
    --bf16
)

ADAM_ARGS=(
    --lr 3e-4
    --min-lr 3e-5
    --adam-beta1 0.9
    --adam-beta2 0.95
)

# Two thirds of AdamW's rate; the betas are those that CAME's authors used for Llama-1B on C4.
CAME_ARGS=(
    --lr 2e-4
    --min-lr 2e-5
    --came-beta1 0.9
    --came-beta2 0.95
    --came-beta3 0.995
)

MODEL_SMOKE_ARGS=(
    --ffn-hidden-size 128
    --num-experts 4
    --expert-model-parallel-size 2
)

MODEL_PARALLEL_ARGS=(
    --expert-model-parallel-size 8
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

launch "$@"

#!/usr/bin/env bash
# A Llama of 1.2 billion parameters on eight GPUs: data parallel, with the distributed optimizer.
#
#     DATA_PATH=my/data TOKENIZER_MODEL=my/tokenizer OUTPUT=my/run examples/llama/train_8gpus.sh
#
# Variables: examples/README.md. The shape is that of Llama 3.2 1B: RMSNorm, SwiGLU, rotary
# positions, grouped queries, no biases. CAME takes it as it takes GPT-2.
set -euo pipefail
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

NAME=llama
VOCABULARY=128256
schedule 100000 100000 2000   # iterations of training, decay and warm-up

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
SMOKE_PROCESSES=2

MODEL_ARGS=(
    --num-layers 16
    --hidden-size 2048
    --ffn-hidden-size 8192
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 64
    --seq-length 4096
    --max-position-embeddings 4096
    --position-embedding-type rope
    --rotary-base 500000
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --attention-dropout 0
    --hidden-dropout 0
    --make-vocab-size-divisible-by 64
)

TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-1}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-128}"
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
    --num-query-groups 2
    --kv-channels 16
)

MODEL_PARALLEL_ARGS=(
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

launch "$@"

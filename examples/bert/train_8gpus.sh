#!/usr/bin/env bash
# BERT-Large on the eight GPUs of a machine: data parallel, with the distributed optimizer.
#
#     MEGATRON_LM=path/to/Megatron-LM DATA_PATH=my/data TOKENIZER_MODEL=my/tokenizer OUTPUT=my/run \
#         examples/bert/train_8gpus.sh [MEGATRON'S FLAGS]
#
# Variables and data: examples/README.md. This is the recipe of CAME's paper for a batch of 32,768
# sequences of 128 tokens, as the authors' script has it (run_came_pretraining.sh in
# huawei-noah/Pretrained-Language-Model), but for bf16 where they have fp16.
set -euo pipefail
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

NAME=bert
KIND=bert
VOCABULARY=30522
WORDPIECE=BertWordPieceLowerCase
SPECIAL_TOKENS_ARGS=()
schedule 20000 20000 4000   # iterations of training, decay and warm-up

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
SMOKE_PROCESSES=2

MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --seq-length 128
    --max-position-embeddings 512
    --attention-backend auto   # Megatron's BERT takes no "unfused" where layers are its own
    --attention-dropout 0.1
    --hidden-dropout 0.1
    --init-method-std 0.02
    # 30522 -> 30528 rows, the authors' too, at tensor-parallel sizes of 1 and 2.
    --make-vocab-size-divisible-by 32
)

TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-16}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-32768}"
    --train-iters "$TRAIN_ITERS"
    --lr-decay-style linear
    --lr-decay-iters "$LR_DECAY_ITERS"
    --lr-warmup-iters "$WARMUP_ITERS"
    --weight-decay 0.01
    --clip-grad 1.0
    --bf16
)

# The authors' script names CAME's rate alone, which is two thirds of this one.
ADAM_ARGS=(
    --lr 3.6e-4
    --min-lr 0
    --adam-beta1 0.9
    --adam-beta2 0.999
)

CAME_ARGS=(
    --lr 2.4e-4
    --min-lr 0
    --came-beta1 0.9
    --came-beta2 0.999
    --came-beta3 0.9999
)

# Of a short sequence Megatron may mask nothing: alone in a micro-batch its loss is 0/0.
MODEL_SMOKE_ARGS=(
    --short-seq-prob 0
)

MODEL_PARALLEL_ARGS=(
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

launch "$@"

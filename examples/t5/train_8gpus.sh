#!/usr/bin/env bash
# T5 of 220 million parameters on eight GPUs: data parallel, with the distributed optimizer.
#
#     MEGATRON_LM=path/to/Megatron-LM DATA_PATH=my/data TOKENIZER_MODEL=my/tokenizer OUTPUT=my/run \
#         examples/t5/train_8gpus.sh [MEGATRON'S FLAGS]
#
# Variables and data: examples/README.md. The model and its training are those of Megatron's own
# example, examples/t5/train_t5_220m_distributed.sh. Its T5 has tensor and no pipeline parallelism.
set -euo pipefail
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

NAME=t5
KIND=t5
VOCABULARY=28996
WORDPIECE=BertWordPieceCase
# The marks that masked spans leave; with VOCAB_FILE Megatron adds them by itself.
SPECIAL_TOKENS_ARGS=(--tokenizer-special-tokens)
for number in {0..99}; do
    SPECIAL_TOKENS_ARGS+=("<extra_id_$number>")
done
schedule 1000000 1000000 10000   # iterations of training, decay and warm-up

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
SMOKE_PROCESSES=2

MODEL_ARGS=(
    --num-layers 12   # of the encoder, and of the decoder
    --hidden-size 768
    --num-attention-heads 12
    --kv-channels 64
    --ffn-hidden-size 3072
    --seq-length 512
    --decoder-seq-length 128
    --max-position-embeddings 512
    --attention-dropout 0.1
    --hidden-dropout 0.1
    --init-method-std 0.015
    # 29096 -> 29120 rows at tensor-parallel sizes of 1 and 2.
    --make-vocab-size-divisible-by 32
)

TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-64}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-512}"
    --train-iters "$TRAIN_ITERS"
    --lr-decay-style linear
    --lr-decay-iters "$LR_DECAY_ITERS"
    --lr-warmup-iters "$WARMUP_ITERS"
    --weight-decay 0.01
    --clip-grad 1.0
    --bf16
)

ADAM_ARGS=(
    --lr 1e-4
    --min-lr 1e-5
    --adam-beta1 0.9
    --adam-beta2 0.999
)

# Two thirds of AdamW's rate, at both ends of the decay: docs/tuning.md.
CAME_ARGS=(
    --lr 6.7e-5
    --min-lr 6.7e-6
    --came-beta1 0.9
    --came-beta2 0.999
    --came-beta3 0.9999
)

MODEL_SMOKE_ARGS=(
    --ffn-hidden-size 128
    --kv-channels 16
    --decoder-seq-length 32
)

MODEL_PARALLEL_ARGS=(
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

launch "$@"

# shellcheck shell=bash
# GPT-2 Medium and the recipe that trains it; the scripts beside this file add the layout.
#
# 24 layers of 1024, 16 heads, 1024 tokens, tied embeddings: 354.9 million parameters. The model and
# its training are those of Megatron's GPT-2 345M examples (v2.0 to core_v0.4.0), but for bf16 where
# they have fp16.

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

NAME=gpt2_medium
VOCABULARY=50257
schedule 500000 320000 3200   # iterations of training, decay and warm-up

MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --seq-length 1024
    --max-position-embeddings 1024
    --position-embedding-type learned_absolute
    --init-method-std 0.02
    --attention-dropout 0.1
    --hidden-dropout 0.1
    # 50257 -> 50304 rows. Megatron pads to a multiple of this times the tensor-parallel size, and
    # its default of 128 gives 50304 rows at size 1 but 50432 at size 2: another model, which could
    # not be compared with the first, nor loaded into it. 64 gives 50304 at both.
    --make-vocab-size-divisible-by 64
)

TRAINING_ARGS=(
    # One batch size for every layout, so that their loss curves can be compared. Megatron's
    # examples of this recipe have 8 sequences for each data-parallel rank: 64 is theirs on 8 GPUs.
    --micro-batch-size "${MICRO_BATCH_SIZE:-4}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-64}"
    --train-iters "$TRAIN_ITERS"
    --lr-decay-style cosine
    --lr-decay-iters "$LR_DECAY_ITERS"
    --lr-warmup-iters "$WARMUP_ITERS"
    --weight-decay 0.01
    --clip-grad 1.0
    --bf16
)

# AdamW at Megatron's rate for this model, with Megatron's default betas (0.9, 0.999).
ADAM_ARGS=(
    --lr 1.5e-4
    --min-lr 1e-5
    --adam-beta1 0.9
    --adam-beta2 0.999
)

# Two thirds of AdamW's rate, at both ends of the decay, and the authors' betas for a beta2 of 0.999, which want a
# warm-up: Megatron's of 3200 is long enough. The reasons are in docs/tuning.md.
CAME_ARGS=(
    --lr 1e-4
    --min-lr 6.7e-6
    --came-beta1 0.9
    --came-beta2 0.999
    --came-beta3 0.9999
)

MODEL_SMOKE_ARGS=()

# shellcheck shell=bash
# What the launch scripts share: settings from the environment, data, logging, SMOKE=1, and the
# start itself. It is sourced; examples/README.md lists the variables that it reads.

set -euo pipefail

EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

OPTIMIZER=${OPTIMIZER:-came}
DRY_RUN=${DRY_RUN:-0}   # 1: print the command, run nothing
SMOKE=${SMOKE:-0}       # 1: a shrunken model, a few iterations, on whatever is there
SMOKE_ITERS=4
EVAL_ITERS=10

# Which of Megatron's scripts trains: pretrain_gpt.py, unless a script says bert or t5.
KIND=gpt

# One node, unless a script says otherwise: on a free port, under a name that every machine knows.
NODES=1
LAUNCHER=()
RENDEZVOUS_ARGS=(--standalone --local-addr localhost)

say() {
    echo "${0##*/}: $*" >&2
}

fail() {
    say "$*"
    exit 1
}

# Variables reach arithmetic ("$((...))" runs what stands in an array's index), so that all of them
# are checked here, before anything else. An unset or empty one takes its default.
for name in DRY_RUN SMOKE; do
    [[ ${!name} == [01] ]] || fail "$name must be 0 or 1, not ${!name}."
done
for name in TRAIN_ITERS MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE GPUS_PER_NODE SLURM_GPUS_ON_NODE \
    SLURM_JOB_NUM_NODES OMP_NUM_THREADS; do
    [[ -z ${!name:-} || ${!name} =~ ^[1-9][0-9]{0,8}$ ]] ||
        fail "$name must be a whole number from 1 to 999999999, not ${!name}."
done
for name in MASTER_PORT SLURM_JOB_ID; do
    [[ -z ${!name:-} || ${!name} =~ ^[1-9][0-9]{0,17}$ ]] ||
        fail "$name must be a whole number above 0, not ${!name}."
done
((${MASTER_PORT:-1} < 65536)) || fail "MASTER_PORT must be below 65536, not $MASTER_PORT."
case ${MEGATRON_CAME_CPU:-} in
    "" | 0 | 1) ;;
    *) fail "MEGATRON_CAME_CPU must be 0 or 1, not $MEGATRON_CAME_CPU." ;;
esac

# The schedules below follow from TRAIN_ITERS, so it is set before a model's file is read.
if ((SMOKE)); then
    TRAIN_ITERS=100
fi

# Sets TRAIN_ITERS, LR_DECAY_ITERS and WARMUP_ITERS. A run of the recipe's own length decays and
# warms up as the recipe says; a shorter one decays over the same part of its length and warms up
# over a tenth of that, or over the recipe's part. CAME has no bias correction, and so needs a
# warm-up however short the run.
# shellcheck disable=SC2034  # the models' files use them
schedule() {
    local train=$1 decay=$2 warmup=$3
    TRAIN_ITERS=${TRAIN_ITERS:-$train}
    LR_DECAY_ITERS=$((TRAIN_ITERS >= train ? decay : (TRAIN_ITERS * decay + train - 1) / train))
    WARMUP_ITERS=$((warmup * 10 <= LR_DECAY_ITERS ? warmup : LR_DECAY_ITERS / 10))
    ((WARMUP_ITERS * decay >= LR_DECAY_ITERS * warmup)) ||
        WARMUP_ITERS=$((LR_DECAY_ITERS * warmup / decay))
}

# Sets TORCHRUN and PYTHON to the ones on the PATH, or else to those that "make venv" built.
find_programs() {
    if ! TORCHRUN=$(type -P torchrun); then
        TORCHRUN=$EXAMPLES/../.venv/bin/torchrun
        [[ -x $TORCHRUN ]] ||
            fail "There is no torchrun: activate the environment that megatron_came is installed" \
                "in, or run \"make venv\" in the repository."
        TORCHRUN=$(cd "${TORCHRUN%/*}" && pwd)/torchrun
    fi
    PYTHON=${TORCHRUN%/*}/python
    [[ -x $PYTHON ]] || PYTHON=python3
}

# Whether PYTHON has a package; nothing is imported.
has_package() {
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec(sys.argv[1]))' "$1"
}

# Sets PROGRAM: the script of a Megatron-LM checkout, or for GPT models the one that pip installs.
choose_program() {
    local script=pretrain_$KIND.py folder
    has_package megatron_came ||
        fail "$PYTHON has no megatron_came: run \"pip install .\" in the repository with it, or" \
            "\"make venv\"."
    if [[ -n ${MEGATRON_LM:-} ]]; then
        folder=$MEGATRON_LM
        [[ -f $folder/$script ]] || folder=$MEGATRON_LM/examples/$KIND   # from 0.18 on
        [[ -f $folder/$script ]] ||
            fail "MEGATRON_LM=$MEGATRON_LM has no $script: name a checkout of Megatron-LM."
        PROGRAM=(-m megatron_came.launch "$folder/$script")
    elif [[ $KIND == gpt ]]; then
        PROGRAM=(-m megatron_came.pretrain_gpt)
    else
        fail "No package has $script: name a checkout of Megatron-LM with MEGATRON_LM."
    fi
    IMPLEMENTATION_ARGS=()
    if ! has_package transformer_engine; then
        say "Transformer Engine is not installed: using Megatron's own layers, which are slower."
        IMPLEMENTATION_ARGS=(
            --transformer-impl local
            --no-persist-layer-norm
            --no-masked-softmax-fusion
            --no-gradient-accumulation-fusion
            --no-rope-fusion
        )
        [[ $KIND != bert ]] || IMPLEMENTATION_ARGS+=(--spec local)
    fi
}

# Sets PROCESSES (on each node) and ENVIRONMENT. Where there are too few GPUs, SMOKE=1 takes the CPU.
choose_devices() {
    local gpus=0 needed=$GPUS_PER_NODE
    ENVIRONMENT=(CUDA_DEVICE_MAX_CONNECTIONS=1)   # Megatron insists on it for tensor parallelism
    if ((SMOKE)); then
        needed=$SMOKE_PROCESSES
    fi
    PROCESSES=$needed
    if [[ ${MEGATRON_CAME_CPU:-} != 1 ]]; then
        if ((DRY_RUN && !SMOKE)); then
            return
        fi
        gpus=$("$PYTHON" -c 'import torch; print("GPUs:", torch.cuda.device_count())')
        gpus=${gpus##*GPUs: }   # whatever else the import has printed
        [[ $gpus =~ ^[0-9]{1,4}$ ]] || fail "PyTorch of $PYTHON does not say how many GPUs there are."
        if ((gpus >= needed)); then
            [[ $KIND != bert ]] || has_package transformer_engine ||
                fail "Megatron's pretrain_bert.py imports Transformer Engine's layers: install it, or" \
                    "try the script on the CPU with SMOKE=1 and MEGATRON_CAME_CPU=1."
            return
        fi
        ((SMOKE)) ||
            fail "GPUs needed $needed, there are $gpus: take another script, or try this one with" \
                "SMOKE=1. (MEGATRON_CAME_CPU=1 trains the whole model on the CPU, which would take years.)"
        say "SMOKE=1: GPUs needed $needed, there are $gpus: this runs on the CPU."
    fi
    ENVIRONMENT+=(MEGATRON_CAME_CPU=1 "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
}

# Sets OPTIMIZER_ARGS from the model's CAME_ARGS and ADAM_ARGS.
choose_optimizer() {
    case $OPTIMIZER in
        came) OPTIMIZER_ARGS=(--optimizer came "${CAME_ARGS[@]}") ;;
        adam) OPTIMIZER_ARGS=(--optimizer adam "${ADAM_ARGS[@]}") ;;
        *)
            OPTIMIZER_ARGS=(--optimizer "$OPTIMIZER")
            [[ " $* " == *" --lr"[\ =]* ]] ||
                fail "No learning rate is known for OPTIMIZER=$OPTIMIZER: add --lr and --min-lr."
            ;;
    esac
}

# Sets OUTPUT, CHECKPOINTS and TENSORBOARD. The optimizer is part of the default's name, since no
# run can resume from another optimizer's checkpoint.
choose_output() {
    OUTPUT=${OUTPUT:-$PWD/output/$NAME-$OPTIMIZER}
    CHECKPOINTS=${CHECKPOINTS:-$OUTPUT/checkpoints}
    TENSORBOARD=${TENSORBOARD:-$OUTPUT/tensorboard}
    if ((SMOKE)); then
        # Beside the checkpoints of the real model, which could not be loaded.
        CHECKPOINTS=$CHECKPOINTS-smoke
        TENSORBOARD=$TENSORBOARD-smoke
        if [[ -e $CHECKPOINTS/latest_checkpointed_iteration.txt ]]; then
            say "SMOKE=1: resuming from $CHECKPOINTS; remove it to start afresh."
        fi
    fi
}

# Sets DATA_ARGS. VOCABULARY is the size of the vocabulary that the model is made for.
choose_data() {
    local maker="\"megatron-came data\""
    if [[ $KIND != gpt ]]; then
        maker="Megatron's tools/preprocess_data.py, as examples/README.md says"
        [[ -n ${DATA_PATH:-} ]] || make_up_sentences
    fi
    if [[ -z ${DATA_PATH:-} ]]; then
        say "DATA_PATH is not set: training on made-up tokens (--mock-data). Make a dataset of your" \
            "own text with \"megatron-came data\", and name it with DATA_PATH."
        DATA_ARGS=(--mock-data --split "95,5,0")
        DATA_ARGS+=(--tokenizer-type NullTokenizer --vocab-size "$VOCABULARY")
    else
        if [[ -f ${DATA_PATH}_train.idx && -f ${DATA_PATH}_valid.idx ]]; then
            DATA_ARGS=(--train-data-path "${DATA_PATH}_train" --valid-data-path "${DATA_PATH}_valid")
        else
            [[ -f $DATA_PATH.idx ]] || ((DRY_RUN)) ||
                fail "DATA_PATH=$DATA_PATH names no dataset, as there is no $DATA_PATH.idx: make one" \
                    "with $maker."
            split_data
        fi
        if [[ $KIND == gpt ]]; then
            choose_tokenizer
        else
            choose_wordpiece
        fi
    fi
    # The folder of the data may be read-only, and the index of samples belongs to this run.
    DATA_ARGS+=(--data-cache-path "$OUTPUT/data-cache")
}

# Sets DATA_PATH and TOKENIZER_MODEL: Megatron has no --mock-data for BERT and T5.
make_up_sentences() {
    local folder=$OUTPUT/made-up
    say "DATA_PATH is not set: training on made-up sentences. Make a dataset of your own text with" \
        "$maker, and name it with DATA_PATH."
    DATA_PATH=$folder/sentences
    TOKENIZER_MODEL=$folder/tokenizer
    ((DRY_RUN)) || "$PYTHON" -W ignore "$EXAMPLES/made_up_sentences.py" "$folder" "$VOCABULARY"
}

# Holds a twentieth of the documents back for validation, if there are enough. (Megatron loops for
# ever over a part without documents: its examples' 949,50,1 needs 500 of them.)
split_data() {
    local documents
    DATA_ARGS=(--data-path "$DATA_PATH" --split "95,5,0")
    if [[ -s $DATA_PATH.idx ]]; then
        documents=$(od -An -t u8 -j 26 -N 8 "$DATA_PATH.idx" 2>&1 | tr -d ' ') || true
        [[ $documents =~ ^[0-9]{1,18}$ ]] ||
            fail "DATA_PATH=$DATA_PATH is no dataset: $DATA_PATH.idx has no header; make one with" \
                "$maker."
        documents=$((documents - 1))   # its header counts where they begin, and the end
        if ((documents < 20)); then
            say "DATA_PATH=$DATA_PATH has $documents documents, too few to hold some back: there will" \
                "be no validation."
            DATA_ARGS=(--data-path "$DATA_PATH" --split "100,0,0")
            EVAL_ITERS=0
        fi
    fi
}

# Adds the tokenizer to DATA_ARGS: the one that the dataset was made with.
choose_tokenizer() {
    local model=${TOKENIZER_MODEL:-}
    if [[ -z $model && -z ${VOCAB_FILE:-} && -f $DATA_PATH.model ]]; then
        model=$DATA_PATH.model   # where "megatron-came data --train-tokenizer" writes it
    fi
    if [[ -n ${VOCAB_FILE:-} && -n ${MERGE_FILE:-} ]]; then
        has_package transformers ||
            fail "Megatron's GPT2BPETokenizer needs the package transformers: install it, or leave" \
                "VOCAB_FILE and MERGE_FILE out, since GPT-2's needs no files in training."
        DATA_ARGS+=(--tokenizer-type GPT2BPETokenizer)
        DATA_ARGS+=(--vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE")
    elif [[ -d $model ]]; then
        DATA_ARGS+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$model")
    elif [[ -n $model ]]; then
        DATA_ARGS+=(--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$model")
    else
        # Training on a dataset needs no more of a tokenizer than the size of its vocabulary and
        # the token that ends a document, which NullTokenizer takes to be the last one.
        say "No tokenizer is named (TOKENIZER_MODEL, or VOCAB_FILE and MERGE_FILE): the dataset must" \
            "have $VOCABULARY tokens, of which the last ends a document, as GPT-2's does."
        DATA_ARGS+=(--tokenizer-type NullTokenizer --vocab-size "$VOCABULARY")
    fi
}

# Adds the tokenizer of BERT or T5 to DATA_ARGS: masking asks for its special tokens.
choose_wordpiece() {
    has_package transformers || ((DRY_RUN)) ||
        fail "Megatron's tokenizers for BERT and T5 need the package transformers: install it."
    if [[ -n ${TOKENIZER_MODEL:-} ]]; then
        DATA_ARGS+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER_MODEL")
        DATA_ARGS+=("${SPECIAL_TOKENS_ARGS[@]}")
    elif [[ -n ${VOCAB_FILE:-} ]]; then
        DATA_ARGS+=(--tokenizer-type "$WORDPIECE" --vocab-file "$VOCAB_FILE")
    else
        fail "DATA_PATH=$DATA_PATH needs the tokenizer that it was made with: name its folder with" \
            "TOKENIZER_MODEL, or its vocabulary with VOCAB_FILE."
    fi
}

# Sets SMOKE_ARGS, which come after the model's and so win over them.
shrink() {
    SMOKE_ARGS=(
        --num-layers 4
        --hidden-size 64
        --num-attention-heads 4
        --seq-length 64
        --max-position-embeddings 64
        --micro-batch-size 1
        --global-batch-size 4
        --log-interval 1
        --eval-iters "$((EVAL_ITERS ? 1 : 0))"
        --exit-interval "$SMOKE_ITERS"
        "${MODEL_SMOKE_ARGS[@]}"
    )
}

# Prints what SMOKE_ARGS change in the arguments given here.
announce_smoke() {
    local i flag before word changes=()
    for ((i = 0; i < ${#SMOKE_ARGS[@]}; i += 2)); do
        flag=${SMOKE_ARGS[i]} before="" word=""
        for word in "$@"; do
            if [[ $before == "$flag" && $word != "${SMOKE_ARGS[i + 1]}" ]]; then
                changes+=("$flag $word -> ${SMOKE_ARGS[i + 1]}")
            fi
            before=$word
        done
    done
    say "SMOKE=1: processes $((GPUS_PER_NODE * NODES)) -> $((PROCESSES * NODES)), iterations ->" \
        "$SMOKE_ITERS, of a schedule of $TRAIN_ITERS$(printf ', %s' "${changes[@]}")."
}

# Prints COMMAND as it can be pasted into a shell, a flag a line.
print_command() {
    local word
    for word in "${COMMAND[@]}"; do
        if [[ $word == --* ]]; then
            printf '\\\n    '
        fi
        if [[ $word =~ ^[A-Za-z0-9_./,:=-]+$ ]]; then   # %q would quote commas
            printf '%s ' "$word"
        else
            printf '%q ' "$word"
        fi
    done
    printf '\n'
}

# Starts the training. The model's file has set NAME, VOCABULARY, MODEL_ARGS, TRAINING_ARGS,
# ADAM_ARGS, CAME_ARGS and MODEL_SMOKE_ARGS, and for BERT and T5 KIND, WORDPIECE and
# SPECIAL_TOKENS_ARGS; the script GPUS_PER_NODE, SMOKE_PROCESSES, MODEL_PARALLEL_ARGS and, for
# several nodes, NODES, LAUNCHER and RENDEZVOUS_ARGS. The arguments are Megatron's, and win over all
# others.
launch() {
    find_programs
    choose_program
    choose_devices
    choose_optimizer "$@"
    choose_output
    choose_data

    DISTRIBUTED_ARGS=("${RENDEZVOUS_ARGS[@]}" --nproc-per-node "$PROCESSES")
    EVAL_AND_LOGGING_ARGS=(
        --log-interval 10
        --eval-interval 1000
        --eval-iters "$EVAL_ITERS"
        --save-interval 1000
        --save "$CHECKPOINTS"
        --load "$CHECKPOINTS"                 # resumes, if there is something to resume from
        --dist-ckpt-optim-fully-reshardable   # ... with any of these scripts
        --tensorboard-dir "$TENSORBOARD"
        --log-memory-to-tensorboard
        --log-validation-ppl-to-tensorboard
        --log-throughput
    )
    ARGUMENTS=(
        "${MODEL_ARGS[@]}"
        "${TRAINING_ARGS[@]}"
        "${OPTIMIZER_ARGS[@]}"
        "${MODEL_PARALLEL_ARGS[@]}"
        "${IMPLEMENTATION_ARGS[@]}"
        "${DATA_ARGS[@]}"
        "${EVAL_AND_LOGGING_ARGS[@]}"
    )
    if ((SMOKE)); then
        shrink
        announce_smoke "${ARGUMENTS[@]}"
        ARGUMENTS+=("${SMOKE_ARGS[@]}")
    fi
    COMMAND=(
        "${LAUNCHER[@]}" env "${ENVIRONMENT[@]}"
        "$TORCHRUN" "${DISTRIBUTED_ARGS[@]}" "${PROGRAM[@]}" "${ARGUMENTS[@]}" "$@"
    )
    print_command
    if ((DRY_RUN)); then
        return
    fi
    exec "${COMMAND[@]}"
}

#!/usr/bin/env bash
# What the words after "docker run ... IMAGE" do.
set -euo pipefail

readonly PROJECT=/opt/megatron-came

usage() {
    cat <<'END'
usage: docker run ... IMAGE WORD [ARGUMENTS]

  gpt2-medium   train GPT-2 Medium on the GPUs there are; arguments are Megatron's flags
  quickstart    train a small GPT-2 with CAME and AdamW and compare them, without a GPU too
  data          make a dataset of text: "data --help"
  bench         measure the optimizer: "bench --help"
  memory        predict and measure its memory: "memory --help"
  test          run the tests; arguments are pytest's
  bash          a shell; or any other program

Mounts: /data, /checkpoints and /logs. Variables of gpt2-medium, as in -e OPTIMIZER=adam, -e SMOKE=1,
-e DATA_PATH=/data/text: examples/README.md.
END
}

# Fails if this user cannot write where the host's folder was mounted.
need_writable() {
    local folder
    for folder in "$@"; do
        [[ -w $folder ]] || {
            echo "$folder cannot be written by user $(id -u): change the owner of the folder that is" \
                "mounted there, or add --user \"\$(id -u):\$(id -g)\" to docker run." >&2
            exit 1
        }
    done
}

# LAYOUT names one of the scripts; without it the GPUs decide.
gpt2_medium() {
    local gpus layout=${LAYOUT:-} run=gpt2_medium-${OPTIMIZER:-came}
    case $layout in
        "" | 1gpu | 8gpus | tp2_pp2_dp2 | slurm) ;;
        *)
            echo "LAYOUT must be 1gpu, 8gpus, tp2_pp2_dp2 or slurm, not $layout." >&2
            exit 1
            ;;
    esac
    need_writable /checkpoints /logs
    if [[ -z $layout ]]; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
        layout=1gpu
        if ((gpus > 1)); then
            layout=8gpus
            export GPUS_PER_NODE=${GPUS_PER_NODE:-$gpus}
        fi
    fi
    export OUTPUT=${OUTPUT:-/checkpoints/$run} TENSORBOARD=${TENSORBOARD:-/logs/$run}
    if [[ -d /opt/megatron-lm ]]; then
        export MEGATRON_LM=${MEGATRON_LM:-/opt/megatron-lm}
    fi
    exec "$PROJECT/examples/gpt2_medium/train_$layout.sh" "$@"
}

word=${1:-help}
shift || true
case $word in
    gpt2-medium) gpt2_medium "$@" ;;
    quickstart)
        need_writable "$PWD"
        exec python -m megatron_came.quickstart "$@"
        ;;
    data | bench | memory | inspect | repair) exec megatron-came "$word" "$@" ;;
    test)
        cd "$PROJECT"
        # The tests start several processes of their own.
        export OMP_NUM_THREADS=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
        exec python -m pytest -q -p no:cacheprovider "$@"
        ;;
    help | -h | --help) usage ;;
    *)
        type -P "$word" >/dev/null || {
            echo "There is no word or program $word." >&2
            usage >&2
            exit 2
        }
        exec "$word" "$@"
        ;;
esac

#!/usr/bin/env bash
#SBATCH --job-name=gpt2-medium
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
# GPT-2 Medium on several nodes under SLURM: data parallel, with the distributed optimizer.
#
# From the root of the repository, on a file system that all nodes see:
#
#     DATA_PATH=/my/data OUTPUT=/my/run sbatch examples/gpt2_medium/train_slurm.sh [MEGATRON'S FLAGS]
#
# Variables: examples/README.md. Each node runs one torchrun; they meet at the first node's
# MASTER_PORT. The training saves and ends ten minutes before four hours are over: submit the same
# command again and it goes on. (With another --time, give another --exit-duration-in-mins.)
set -euo pipefail

# SLURM runs a copy of this file that lies elsewhere.
here=$(dirname "${BASH_SOURCE[0]}")
if [[ ! -e $here/model.sh ]]; then
    here=${SLURM_SUBMIT_DIR:-.}/examples/gpt2_medium
fi
if [[ ! -e $here/model.sh ]]; then
    echo "train_slurm.sh: there is no $here: submit from the root of the repository." >&2
    exit 1
fi
# shellcheck source=examples/gpt2_medium/model.sh
source "$here/model.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
NODES=${SLURM_JOB_NUM_NODES:-2}

MODEL_PARALLEL_ARGS=(
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --exit-duration-in-mins 230
)

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    # Unbound, so that a node's one task, the torchrun, has all cores for its processes.
    LAUNCHER=(srun --nodes "$NODES" --ntasks-per-node 1 --cpu-bind none)
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${hosts%%$'\n'*}
    SMOKE_PROCESSES=1   # on each node
elif ((SMOKE || DRY_RUN)); then
    say "There is no SLURM job here, so this is the command of one node."
    NODES=1
    first=localhost
    SMOKE_PROCESSES=2
else
    fail "This wants to be a SLURM job: start it with sbatch, or try it with SMOKE=1."
fi
RENDEZVOUS_ARGS=(
    --nnodes "$NODES"
    --rdzv-backend c10d
    --rdzv-id "${SLURM_JOB_ID:-none}"
    --rdzv-endpoint "$first:${MASTER_PORT:-29500}"
)

launch "$@"

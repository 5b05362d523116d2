"""Launches whose memory is predicted."""

from megatron_came.memory import megatron_flags
from megatron_came.memory.prediction import Launch

DATA = "--tokenizer-type NullTokenizer --mock-data --train-iters 10 --lr 1e-4 --micro-batch-size 1 "
MEDIUM = (
    DATA
    + "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 "
    + "--max-position-embeddings 1024 --vocab-size 50257 --global-batch-size 64 "
)
SMALL = (
    DATA
    + "--num-layers 4 --hidden-size 48 --num-attention-heads 4 --seq-length 32 "
    + "--max-position-embeddings 32 --vocab-size 255 --make-vocab-size-divisible-by 32 "
    + "--global-batch-size 64 "
)
EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-grouped-gemm --swiglu "
    "--disable-bias-linear --moe-token-dispatcher-type alltoall "
)
DO = "--use-distributed-optimizer "
BF16 = "--bf16 "


def tp(size):
    return f"--tensor-model-parallel-size {size} "


def pp(size):
    return f"--pipeline-model-parallel-size {size} "


def launch(flags, ranks=1):
    """A launch of these flags on so many ranks; megatron_came must be installed in Megatron."""
    return Launch(megatron_flags.parse(flags.split(), ranks))

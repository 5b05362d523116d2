"""Measure what a checkpoint's digests cost: of the time of a save, and of its bytes.

    torchrun --nproc-per-node 2 scripts/checkpoint_cost.py FOLDER [FLAGS OF MEGATRON...]

trains GPT-2 small for a few iterations of one short sequence, saves a checkpoint into FOLDER after
each, and prints the least time of the digests and of a whole save, and the share of the one in the
other; the first save, in which kernels may be compiled, is left out.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_came.launch import prepare

prepare()  # before anything imports Megatron

from megatron_came import pretrain_gpt  # noqa: E402
from megatron_came.core.records import pack  # noqa: E402
from megatron_came.megatron.checkpoints.digests import saving  # noqa: E402

FLAGS = """
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 64
    --max-position-embeddings 1024 --tokenizer-type NullTokenizer --vocab-size 50256
    --make-vocab-size-divisible-by 64 --mock-data --micro-batch-size 1 --train-iters 7
    --eval-iters 0 --eval-interval 1000 --lr 1e-4 --lr-warmup-iters 1 --optimizer came
    --use-distributed-optimizer --no-save-rng --save-interval 1
"""


def timed(function: Callable[..., Any], seconds: list[float], results: list[Any]) -> Any:
    """Return a function that writes down how long it takes and what it returns."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        results.append(result)
        return result

    return measured


def main(folder: Path, flags: list[str]) -> None:
    """Train, and print what was measured."""
    from megatron.training import training

    digests: list[float] = []
    saves: list[float] = []
    records: list[Any] = []
    saving.record_of = timed(saving.record_of, digests, records)
    training.save_checkpoint = timed(training.save_checkpoint, saves, [])
    size = os.environ.get("WORLD_SIZE", "1")
    sys.argv = ["pretrain_gpt", *FLAGS.split(), "--global-batch-size", size, "--save", str(folder)]
    sys.argv += flags
    pretrain_gpt.main()
    if os.environ.get("RANK", "0") != "0":
        return
    digest, save = min(digests[1:]), min(saves[1:])
    latest = max(folder.glob("iter_*"))
    total = sum(file.stat().st_size for file in latest.rglob("*") if file.is_file())
    record = len(pack(records[-1][0]))
    print(
        f"digests {1e3 * digest:.0f} ms of a save of {1e3 * save:.0f} ms: {digest / save:.2%}; "
        f"{record} of {total} bytes: {record / total:.4%}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""What ``--came-log-diagnostics`` costs in a training run: iterations with it beside such without.

One process trains a GPT-2 of 12 layers in Megatron's training loop. Blocks of as many iterations as
``--log-interval`` take turns: without, with, with, without. CPU time is compared, since others may
use the machine. Needs no GPU; start it as torchrun --nproc-per-node 1 scripts/diagnostics_cost.py
"""

import argparse
import statistics
import sys
import tempfile
import time
from typing import Any

import torch

from megatron_came.launch import prepare

INTERVAL = 10
WARM_UP = 2  # blocks
FLAGS = f"""
    --num-layers 12 --hidden-size 256 --num-attention-heads 8 --max-position-embeddings 128
    --seq-length 128 --tokenizer-type NullTokenizer --vocab-size 8191 --mock-data
    --eval-iters 0 --eval-interval 100000 --lr 1e-4 --lr-decay-style constant --weight-decay 0.1
    --clip-grad 1.0 --attention-dropout 0 --hidden-dropout 0 --seed 5 --log-interval {INTERVAL}
    --optimizer came --came-log-diagnostics
"""


def compared(without: list[float], with_: list[float], spent: list[float]) -> str:
    """Say what was found: seconds of an iteration, by block, and of the figures by themselves."""
    pairs = [a / b - 1 for a, b in zip(with_, without, strict=True)]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return (
        f"CPU time of an iteration, median of {len(with_)} blocks of {INTERVAL}: "
        f"{1e3 * statistics.median(without):.1f} ms without and "
        f"{1e3 * statistics.median(with_):.1f} ms with diagnostics; "
        f"pairs differ by {statistics.median(pairs):+.2%} "
        f"(mean {statistics.mean(pairs):+.2%}, standard error {error:.2%}). "
        f"The figures take {1e3 * statistics.median(spent):.1f} ms once in {INTERVAL} iterations, "
        f"{statistics.median(spent) / INTERVAL / statistics.median(without):.2%} of all."
    )


def main() -> None:
    """Train, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=24, help="of each kind")
    parser.add_argument("--sequences", type=int, default=8, help="of an iteration")
    options = parser.parse_args()
    prepare()
    torch.set_num_threads(1)
    from megatron.training import training

    from megatron_came import pretrain_gpt
    from megatron_came.megatron import diagnostics

    kinds: tuple[list[float], list[float]] = ([], [])  # without, with
    block: list[float] = []
    original, count = training.train_step, 2 * options.blocks + WARM_UP

    def train_step(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        settings = get_args()
        number = settings.curr_iteration // INTERVAL
        settings.came_log_diagnostics = is_with = number % 4 in (0, 3)
        begin = time.process_time()
        result = original(*args, **kwargs)
        block.append(time.process_time() - begin)
        if len(block) == INTERVAL:
            if number >= WARM_UP:
                kinds[is_with].append(sum(block) / INTERVAL)
            block.clear()
        return result

    spent: list[float] = []
    figures_of = diagnostics.figures_of

    def timed(*args: Any) -> Any:
        begin = time.process_time()
        figures = figures_of(*args)
        spent.append(time.process_time() - begin)
        return figures

    training.train_step, diagnostics.figures_of = train_step, timed
    batch = f"--micro-batch-size {options.sequences} --global-batch-size {options.sequences}"
    with tempfile.TemporaryDirectory() as folder:
        more = f"{batch} --train-iters {count * INTERVAL} --tensorboard-dir {folder}"
        sys.argv = ["pretrain_gpt", *FLAGS.split(), *more.split()]
        pretrain_gpt.main()
    print(compared(*kinds, spent))


if __name__ == "__main__":
    main()

"""A whole iteration of Megatron, with CAME and with Adam."""

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_came.bench.shapes import GPT2, MODELS
from megatron_came.cpu_megatron.switch import VARIABLE
from megatron_came.terminal.progress import Progress
from megatron_came.terminal.sentences import CommandError
from megatron_came.training_log import TrainingError, follow

_WARM_UP = 3  # iterations: kernels are compiled, and memory is taken


@dataclass(frozen=True, slots=True)
class Iteration:
    """Medians over the iterations after the first few, in milliseconds.

    Megatron's timers wait for a GPU at the beginning and the end of what they time.
    """

    optimizer: str  # ``--optimizer``
    milliseconds: float  # of a whole iteration
    forward_milliseconds: float  # of it, in the forward passes
    backward_milliseconds: float  # in the backward passes
    # In the optimizer's own step. The rest is data, the reduction and clipping of gradients, and
    # the like.
    step_milliseconds: float
    iterations: int  # that were timed


def measure_iterations(
    model: str,
    *,
    device: torch.device,
    layers: int | None,
    ranks: int,
    iterations: int,
    flags: Sequence[str],
) -> list[Iteration]:
    """Train one of ``GPT2``, or with other layers, on made-up data, with CAME and with Adam.

    Each GPU, or process on the CPU, is a data-parallel rank; more flags of Megatron's come last.

    Raises:
        CommandError: the model is not a whole one, or a training failed.
    """
    if model not in GPT2:
        raise CommandError(
            f"--iteration needs a whole model: --model {model} is not one of {', '.join(GPT2)} "
            f"(without --iteration: {', '.join(MODELS)})."
        )
    usual, hidden = GPT2[model]
    # A head has 64 elements. The vocabulary is padded to GPT-2's 50304; older tokenizers add one
    # word.
    common = f"""
        --lr 1e-5 --use-distributed-optimizer --num-layers {layers or usual} --hidden-size {hidden}
        --num-attention-heads {hidden // 64} --seq-length 1024 --max-position-embeddings 1024
        --micro-batch-size 1 --global-batch-size {ranks} --train-iters {iterations + _WARM_UP}
        --eval-iters 0 --eval-interval 1000 --mock-data --tokenizer-type NullTokenizer
        --vocab-size 50303 --log-interval 1 --timing-log-level 2
    """.split()
    environment = {**os.environ, VARIABLE: "1" if device.type == "cpu" else "0"}
    results = []
    with Progress("Training", 2 * (iterations + _WARM_UP), sys.stderr) as progress:
        for optimizer in ("came", "adam"):
            try:
                with tempfile.TemporaryFile("w+") as log:
                    found = follow(
                        [*common, *flags, "--optimizer", optimizer],
                        ranks=ranks,
                        port=None,
                        environment=environment,
                        log=log,
                        advance=lambda _: progress.advance(1),
                    )
            except TrainingError as error:
                raise CommandError(f"--optimizer {optimizer} failed:\n{error}") from error
            timers = ("forward-compute", "backward-compute", "optimizer-inner-step")
            times = [found.milliseconds, *(found.timers[timer] for timer in timers)]
            whole, forward, backward, step = (statistics.median(each[_WARM_UP:]) for each in times)
            results.append(Iteration(optimizer, whole, forward, backward, step, iterations))
    return results

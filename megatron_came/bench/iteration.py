"""A whole iteration of Megatron, with CAME and with Adam."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_came.bench.shapes import MODELS
from megatron_came.cpu_megatron.switch import VARIABLE
from megatron_came.terminal.progress import Progress

# layers, hidden size, attention heads
_SIZES = {
    "gpt2-small": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
_WARM_UP = 3
_WHOLE = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
# Megatron's timers: of the ranks' least and greatest time, the greatest.
_PARTS = [
    re.compile(rf"{timer}[ .]*: \([\d.]+, ([\d.]+)\)")
    for timer in ("forward-compute", "backward-compute", "optimizer-inner-step")
]


@dataclass(frozen=True, slots=True)
class Iteration:
    """Medians over the iterations after the first few, in milliseconds.

    Megatron's timers wait for a GPU at the beginning and the end of each part.

    Attributes:
        optimizer: ``--optimizer``.
        milliseconds: of a whole iteration.
        forward_milliseconds: of it, in the forward passes.
        backward_milliseconds: in the backward passes.
        step_milliseconds: in the optimizer's own step. The rest is data, the reduction and clipping
            of gradients, and the like.
        iterations: that were timed.
    """

    optimizer: str
    milliseconds: float
    forward_milliseconds: float
    backward_milliseconds: float
    step_milliseconds: float
    iterations: int


def measure_iterations(
    model: str,
    *,
    device: torch.device,
    layers: int | None,
    ranks: int,
    iterations: int,
    flags: Sequence[str],
) -> list[Iteration]:
    """Train on made-up data with CAME and with Adam.

    Args:
        model: one of the GPT-2 sizes of ``MODELS``.
        device: a GPU, whose every rank has one, or the CPU.
        layers: instead of the model's own number.
        ranks: processes, as data-parallel ranks.
        iterations: to time.
        flags: more of Megatron's.

    Raises:
        ValueError: the model is not a whole one.
        RuntimeError: a run failed; the message ends with its output.
    """
    if model not in _SIZES:
        raise ValueError(
            f"--iteration needs a whole model: --model {model} is not one of {', '.join(_SIZES)} "
            f"(without --iteration: {', '.join(MODELS)})."
        )
    usual, hidden, heads = _SIZES[model]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "megatron_came.pretrain_gpt"),
        *("--lr", "1e-5", "--use-distributed-optimizer"),
        *("--num-layers", str(layers or usual), "--hidden-size", str(hidden)),
        *("--num-attention-heads", str(heads)),
        *("--seq-length", "1024", "--max-position-embeddings", "1024"),
        *("--micro-batch-size", "1", "--global-batch-size", str(ranks)),
        *("--train-iters", str(iterations + _WARM_UP)),
        *("--eval-iters", "0", "--eval-interval", "1000"),
        *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "50303"),
        *("--log-interval", "1", "--timing-log-level", "2"),
        *flags,
    ]
    environment = {**os.environ, VARIABLE: "1" if device.type == "cpu" else "0"}
    runs = [(optimizer, [*command, "--optimizer", optimizer]) for optimizer in ("came", "adam")]
    total = len(runs) * (iterations + _WARM_UP)
    with Progress("Training", total, sys.stderr) as progress:
        return [_measure(optimizer, words, environment, progress) for optimizer, words in runs]


def _measure(
    optimizer: str, command: Sequence[str], environment: Mapping[str, str], progress: Progress
) -> Iteration:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    output = ""
    try:
        for line in process.stdout or ():
            output += line
            if _WHOLE.search(line):
                progress.advance(1, f", {optimizer}")
    finally:
        process.terminate()  # if this was interrupted; nothing happens to one that has ended
        status = process.wait()
    times = [
        [float(number) for number in pattern.findall(output)][_WARM_UP:]
        for pattern in (_WHOLE, *_PARTS)
    ]
    if status or not all(times):
        raise RuntimeError(f"The run with --optimizer {optimizer} failed:\n{output[-2000:]}")
    whole, forward, backward, step = (statistics.median(each) for each in times)
    return Iteration(optimizer, whole, forward, backward, step, len(times[0]))

"""What fits into a GPU: the largest micro-batch, and the fewest GPUs."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_came.memory.pages import gpus
from megatron_came.memory.precisions import Optimizer
from megatron_came.memory.prediction import Launch
from megatron_came.memory.text import human
from megatron_came.terminal.console import table

_UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
# Without a global batch size there is no other limit to look within.
_LARGEST = 2**16


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits, of one optimizer.

    Attributes:
        optimizer: its name.
        total: bytes of the fullest rank of the launch as it is.
        micro_batch: largest micro-batch size at the launch's number of GPUs; None where none fits.
        gpus: fewest GPUs at the launch's micro-batch size; None likewise.
    """

    optimizer: str
    total: int
    micro_batch: int | None
    gpus: int | None


def parse_size(said: str) -> int:
    """Read a size such as 80GiB or 80GB.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w+)", said)
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(
            f"--fit {said} is no size: give a number with {', '.join(_UNITS)}, such as 80GiB."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def fit(launch: Launch, optimizer: Optimizer, budget: int) -> Fit:
    """Find what fits, everything else left as the launch has it.

    A micro-batch size must divide each rank's part of the global batch.

    Args:
        launch: the run.
        optimizer: what it is trained with.
        budget: bytes of a GPU.
    """

    def fits(data: int, micro_batch: int) -> bool:
        stages = launch.stages_at(data, micro_batch)
        return max(stage.total(optimizer) for stage in stages) <= budget

    data, micro_batch = launch.grid.data, launch.args.micro_batch_size
    batch = launch.args.global_batch_size if launch.has_global_batch else None
    in_flight = launch.grid.pipeline if launch.grid.virtual else 1  # at least so many
    micro_batches = [
        size
        for size in _divisors(None if batch is None else batch // data)[::-1]
        if batch is None or batch // (data * size) >= in_flight
    ]
    datas = [
        size
        for size in _divisors(None if batch is None else batch // micro_batch)
        if _is_possible(launch, size)
        and (batch is None or batch // (micro_batch * size) >= in_flight)
    ]
    smallest = _first(datas, lambda size: fits(size, micro_batch))
    return Fit(
        optimizer=optimizer.name,
        total=max(stage.total(optimizer) for stage in launch.stages),
        micro_batch=_first(micro_batches, lambda size: fits(data, size)),
        gpus=None if smallest is None else smallest * launch.grid.world // data,
    )


def _divisors(number: int | None) -> list[int]:
    if number is None:
        return [2**power for power in range(_LARGEST.bit_length())]
    return [size for size in range(1, number + 1) if number % size == 0]


def _is_possible(launch: Launch, data: int) -> bool:
    try:
        launch.grid.with_data(data)
    except ValueError:
        return False
    return True


def _first(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first size that fits; all those behind it fit as well."""
    place = bisect_left(sizes, True, key=fits)
    return sizes[place] if place < len(sizes) else None


def text(launch: Launch, fits: Sequence[Fit], budget: int, trained: Optimizer) -> list[str]:
    """Describe what fits, a line for each optimizer, and what would help where nothing does.

    Args:
        launch: the run.
        fits: what fits, of each optimizer.
        budget: bytes of a GPU.
        trained: the optimizer of the launch; its line is marked.
    """
    size = launch.args.micro_batch_size
    rows = [["", "it needs", "left", "micro-batch", "GPUs"]]
    for each in fits:
        rows.append(
            [
                each.optimizer + (" *" if each.optimizer == trained.name else ""),
                human(each.total),
                human(budget - each.total),
                str(each.micro_batch or "none"),
                "none" if each.gpus is None else f"{each.gpus} ({_layout(launch, each.gpus)})",
            ]
        )
    lines = [
        f"What fits into {human(budget)} of each GPU:",
        "",
        *table(rows),
        "",
        f"it needs, left: --micro-batch-size {size} on {gpus(launch.grid.world)}",
        f"micro-batch: the largest --micro-batch-size on {gpus(launch.grid.world)}",
        f"GPUs: the fewest at --micro-batch-size {size}, only data parallelism changed",
        "*: as in this launch",
    ]
    needs = max(stage.total(trained) for stage in launch.stages)
    if needs > budget:
        what = f"{human(needs - budget)} more than there are"
        lines += ["", f"This launch does not fit: it needs {what}. What would help:"]
        lines += [f"  {hint}" for hint in _hints(launch, trained)]
    return lines


def _layout(launch: Launch, world: int) -> str:
    """The parallel sizes of so many GPUs, such as "tensor 2 x data 4"."""
    grid = launch.grid
    sizes = {"tensor": grid.tensor, "context": grid.context, "pipeline": grid.pipeline}
    sizes["data"] = world // (grid.tensor * grid.context * grid.pipeline)
    said = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " x ".join(said) or "data 1"


def _hints(launch: Launch, trained: Optimizer) -> list[str]:
    """Flags that make this launch smaller, those that cost least first."""
    args, grid = launch.args, launch.grid
    sixteen_bits = args.bf16 or args.fp16
    could_shard = grid.data * grid.context > 1 and not grid.sharded
    remainders = args.bf16 and (grid.sharded or could_shard)
    hints = {
        "--bf16": not sixteen_bits,
        "--use-distributed-optimizer": could_shard,
        "--optimizer came": not trained.name.startswith("CAME"),
        "--came-momentum-dtype int8, with --optimizer came": "int8" not in trained.name,
        "--came-main-params remainder, with --optimizer came": remainders
        and "rem." not in trained.name,
        "--grad-reduce-in-bf16": args.bf16 and args.accumulate_allreduce_grads_in_fp32,
        f"a --micro-batch-size below {args.micro_batch_size}": args.micro_batch_size > 1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": (
            args.recompute_granularity != "full"
        ),
        "more GPUs, with data parallelism": grid.sharded or could_shard,
        "a larger --tensor-model-parallel-size or --pipeline-model-parallel-size": True,
    }
    return [hint for hint, helps in hints.items() if helps]

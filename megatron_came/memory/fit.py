"""What fits into a GPU: the largest micro-batch, and the fewest GPUs."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_came.memory.optimizers import Optimizer
from megatron_came.memory.pages import human, sizes_of
from megatron_came.memory.prediction import Launch
from megatron_came.terminal.console import counted, table, wrapped

_UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
# Sizes to try where no global batch size says which there are.
_POWERS = [2**power for power in range(17)]


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits, of one optimizer."""

    optimizer: str
    total: int  # bytes of the fullest rank of the launch as it is, in a step or at a checkpoint
    # Largest micro-batch size at the launch's number of GPUs; None where none fits.
    micro_batch: int | None
    gpus: int | None  # fewest GPUs at the launch's micro-batch size; None likewise


def parse_size(said: str, flag: str = "--fit") -> int:
    """Read a size such as 80GiB or 80GB, which was given to a flag.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w+)", said)
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(
            f"{flag} {said} is no size: give a number with {', '.join(_UNITS)}, such as 80GiB."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def fit(launch: Launch, optimizer: Optimizer, budget: int) -> Fit:
    """Find what fits into so many bytes, everything else left as the launch has it.

    A micro-batch size must divide the batch of each data-parallel rank.
    """
    grid, micro_batch = launch.grid, launch.args.micro_batch_size
    group = grid.pipeline if grid.virtual else 1  # micro-batches come in so many

    def sizes(other: int) -> list[int]:
        if not launch.has_global_batch:
            return _POWERS
        most = launch.args.global_batch_size // other
        return [n for n in range(1, most + 1) if most % (n * group) == 0]

    def is_possible(data: int) -> bool:
        try:
            return bool(grid.with_data(data))
        except ValueError:  # experts do not fit into so few ranks
            return False

    def fits(data: int, micro_batch: int) -> bool:
        stages = launch.stages_at(data, micro_batch)
        return max(stage.peak(optimizer) for stage in stages) <= budget

    datas = [size for size in sizes(micro_batch) if is_possible(size)]
    data = _first(datas, lambda size: fits(size, micro_batch))
    return Fit(
        optimizer=optimizer.name,
        total=launch.peak(optimizer),
        # The largest first: those behind one that fits are smaller.
        micro_batch=_first(sizes(grid.data)[::-1], lambda size: fits(grid.data, size)),
        gpus=None if data is None else grid.with_data(data).world,
    )


def _first(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first size that fits; all those behind it fit as well."""
    index = bisect_left(sizes, True, key=fits)
    return sizes[index] if index < len(sizes) else None


def text(launch: Launch, fits: Sequence[Fit], budget: int, trained: Optimizer) -> list[str]:
    """Describe what fits into so many bytes, a line for each optimizer; the trained is marked."""
    size, grid = launch.args.micro_batch_size, launch.grid
    world = counted(grid.world, "GPU")
    rows = [["", "it needs", "left", "micro-batch", "GPUs"]]
    for each in fits:
        layout = "none"
        if each.gpus is not None:
            layout = f"{each.gpus} ({sizes_of(replace(grid, world=each.gpus)) or 'data 1'})"
        name = each.optimizer + (" *" if each.optimizer == trained.name else "")
        left, micro_batch = human(budget - each.total), str(each.micro_batch or "none")
        rows.append([name, human(each.total), left, micro_batch, layout])
    lines = [
        f"What fits into {human(budget)} of each GPU:",
        "",
        *table(rows),
        "",
        f"it needs, left: --micro-batch-size {size} on {world}, in a step or at a checkpoint",
        f"micro-batch: the largest --micro-batch-size on {world}",
        f"GPUs: the fewest at --micro-batch-size {size}, only data parallelism changed",
        "*: as in this launch",
    ]
    needs = launch.peak(trained)
    if needs > budget:
        said = f"This launch does not fit: it needs {human(needs - budget)} more than there are."
        lines += ["", *wrapped(f"{said} --advise says what would help.")]
    return lines

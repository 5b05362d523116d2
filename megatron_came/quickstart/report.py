"""The summary of both runs, as text."""

import statistics
from collections.abc import Mapping

from megatron_came.quickstart.settings import QuickstartError, Settings
from megatron_came.quickstart.train import Result

LAST = 10  # iterations averaged for the loss at the end
_WARM_UP = 2  # iterations that are slower than the rest
_SAME = 2e-6  # relative; Megatron prints seven digits


def check_same_start(results: Mapping[str, Result]) -> None:
    """Checks that all runs began with the same weights and data.

    Raises:
        QuickstartError: If their first losses differ.
    """
    firsts = {name: result.losses[0] for name, result in results.items()}
    smallest, largest = min(firsts.values()), max(firsts.values())
    if largest - smallest > _SAME * largest:
        shown = ", ".join(f"{name} {loss:.6f}" for name, loss in firsts.items())
        raise QuickstartError(
            f"The runs did not start from the same weights and data (first losses: {shown}):"
            " run make clean-quickstart and start again."
        )


def summary(settings: Settings, results: Mapping[str, Result], device: str) -> str:
    """Returns the table of what the runs measured, by optimizer name.

    Args:
        settings: What was trained.
        results: Each optimizer's result.
        device: Where, as in "on the CPU".
    """
    runs = list(results.values())
    weights = sum(rank.weights for rank in runs[0].ranks)
    last = min(LAST, settings.iterations)
    # A step waits for the slowest rank, and the fullest one decides what fits.
    fullest = [max(run.ranks, key=lambda rank: rank.memory) for run in runs]
    optimizer_ms = [1000 * max(rank.step_seconds for rank in run.ranks) for run in runs]
    precision = "bf16" if settings.bf16 else "fp32"
    ranks = f"{settings.ranks} rank{'s' if settings.ranks > 1 else ''}"
    rows = [
        ("", list(results), ""),
        (
            "loss at the start",
            [f"{run.losses[0]:.4f}" for run in runs],
            "the same weights and data",
        ),
        (
            "loss at the end",
            [f"{statistics.mean(run.losses[-last:]):.4f}" for run in runs],
            f"mean of the last {last} iterations",
        ),
        ("optimizer memory per rank", [_mib(rank.memory) for rank in fullest], ""),
        (
            "  main weights",
            [_mib(rank.main_weights) for rank in fullest],
            "" if settings.bf16 else "fp32: they are the model's own",
        ),
        ("  momentum", [_mib(rank.momentum) for rank in fullest], ""),
        (
            "  second moment or factors",
            [_mib(rank.second_moment) for rank in fullest],
            "CAME has the factors",
        ),
        ("time per step", [f"{_step_ms(run):.0f} ms" for run in runs], "median"),
        ("  of it in the optimizer", [f"{ms:.1f} ms" for ms in optimizer_ms], ""),
    ]
    title = (
        f"GPT-2 of {weights / 1e6:.1f} M weights, {precision}, {settings.iterations} iterations of"
        f" {settings.global_batch} x {settings.sequence} tokens, {ranks} {device}"
    )
    lines = [
        f"{label:27}{''.join(f'{v:>12}' for v in values)}   {note}" for label, values, note in rows
    ]
    return "\n".join([title, "", *(line.rstrip() for line in lines)])


def _step_ms(run: Result) -> float:
    return statistics.median(run.milliseconds[_WARM_UP:] or run.milliseconds)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"

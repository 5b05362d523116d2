"""The summary of both runs, as text and as a picture of their losses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_came.data.files import whole_files
from megatron_came.quickstart.settings import QuickstartError, Settings
from megatron_came.quickstart.train import Result

LAST = 10  # iterations averaged for the loss at the end
_WARM_UP = 2  # iterations that are slower than the rest
_SAME = 2e-6  # relative; Megatron prints seven digits


def check_same_start(results: Mapping[str, Result]) -> None:
    """Check that all runs began with the same weights and data.

    Raises:
        QuickstartError: their first losses differ.
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
    """Return the table of what the runs measured.

    Args:
        settings: what was trained.
        results: by name of the optimizer.
        device: where, as in "on the CPU".
    """
    runs = list(results.values())
    last = min(LAST, settings.iterations)

    def row(label: str, form: str, values: Sequence[float], note: str = "") -> str:
        cells = "".join(f"{form.format(value):>12}" for value in values)
        return f"{label:27}{cells}   {note}".rstrip()

    def mib(label: str, key: str, note: str = "") -> str:
        return row(label, "{:.2f} MiB", [getattr(run.memory, key) / 2**20 for run in runs], note)

    whole = [_median(run.milliseconds) for run in runs]
    steps = [_median(run.step_milliseconds) for run in runs]
    own = "" if settings.bf16 else "fp32: they are the model's own"
    starts = [run.losses[0] for run in runs]
    ends = [statistics.mean(run.losses[-last:]) for run in runs]
    ranks = f"{settings.ranks} rank{'s' if settings.ranks > 1 else ''}"
    return "\n".join(
        [
            f"GPT-2 of {runs[0].weights / 1e6:.1f} M weights, "
            f"{'bf16' if settings.bf16 else 'fp32'}, {settings.iterations} iterations of "
            f"{settings.global_batch} x {settings.sequence} tokens, {ranks} {device}",
            "",
            f"{'':27}{''.join(f'{name:>12}' for name in results)}",
            row("loss at the start", "{:.4f}", starts, "the same weights and data"),
            row("loss at the end", "{:.4f}", ends, f"mean of the last {last} iterations"),
            mib("optimizer memory per rank", "state"),
            mib("  main weights", "main_weights", own),
            mib("  momentum", "momentum"),
            mib("  second moment or factors", "second_moment", "CAME has the factors"),
            row("time per step", "{:.0f} ms", whole, "median"),
            row("  of it in the optimizer", "{:.1f} ms", steps),
        ]
    )


def _median(times: Sequence[float]) -> float:
    return statistics.median(times[_WARM_UP:] or times)


def plot_losses(losses: Mapping[str, Sequence[float]], picture: Path) -> None:
    """Draw each optimizer's loss over the iterations into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set_xlabel("iteration")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_files(picture) as (partial,):
        figure.savefig(partial, format="png", dpi=150)

"""The summary of both runs."""

import statistics
from collections.abc import Mapping, Sequence

from megatron_came.quickstart.settings import Settings
from megatron_came.quickstart.train import Result
from megatron_came.terminal.sentences import CommandError

LAST = 10  # iterations averaged for the loss at the end
_WARM_UP = 2  # iterations that are slower than the rest
_SAME = 2e-6  # relative; Megatron prints seven digits


def check_same_start(results: Mapping[str, Result]) -> None:
    """Check that all runs began with the same weights and data.

    Raises:
        CommandError: their first losses differ.
    """
    firsts = {name: result.losses[0] for name, result in results.items()}
    smallest, largest = min(firsts.values()), max(firsts.values())
    if largest - smallest > _SAME * largest:
        shown = ", ".join(f"{name} {loss:.6f}" for name, loss in firsts.items())
        raise CommandError(
            f"The runs did not start from the same weights and data (first losses: {shown}):"
            " run make clean-quickstart and start again."
        )


def summary(settings: Settings, results: Mapping[str, Result], device: str) -> str:
    """Return the table of what the runs measured, by optimizer, "on the CPU" or elsewhere."""
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

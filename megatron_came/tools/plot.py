"""``megatron-came plot RUN ...``: loss, rate and other scalars of Megatron's TensorBoard logs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_came.terminal.paths import named_path
from megatron_came.terminal.quiet import quiet

type Curve = tuple[list[int], list[float]]
_FIRST = ("lm loss", "learning-rate", "grad-norm")  # the rest follows, by name
_TWICE = " vs samples"  # Megatron writes most scalars by samples as well
_COLUMNS = 3


class PlotError(Exception):
    """Why nothing can be drawn; the message is one sentence with the remedy."""


def scalars(run: Path) -> dict[str, Curve]:
    """Return steps and values of a run's scalars, by name.

    Raises:
        PlotError: it has none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = sorted(run.rglob("events.out.tfevents.*")) if run.is_dir() else []
    folders = list(dict.fromkeys(file.parent for file in found))
    if not folders:
        what = "holds no TensorBoard logs" if run.is_dir() else "is no folder"
        raise PlotError(f"{run} {what}: name the --tensorboard-dir of a training run.")
    if len(folders) > 1:
        raise PlotError(f"{run} holds the logs of several runs: name {folders[0]} or another one.")
    events = EventAccumulator(str(folders[0]), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for name in events.Tags()["scalars"]:
        if not name.endswith(_TWICE):
            points = {event.step: event.value for event in events.Scalars(name)}
            curves[name] = (sorted(points), [points[step] for step in sorted(points)])
    if not curves:
        raise PlotError(f"{run} holds no scalars: let the run go on, or name another.")
    return curves


def _readable_scalars(run: Path) -> dict[str, Curve]:
    """See :func:`scalars`; what cannot be read is no fault of the picture's.

    Raises:
        PlotError: likewise.
    """
    try:
        return scalars(run)
    except OSError as error:
        reason = (error.strerror or "unknown error").lower()
        raise PlotError(
            f"{error.filename or run} cannot be read ({reason}): let the user of this process "
            "read it, or name another run."
        ) from error


def names_of(runs: Iterable[Mapping[str, Curve]], words: Sequence[str]) -> list[str]:
    """Return the scalars to draw: those of any run that have one of the words, if there are words.

    Raises:
        PlotError: none has.
    """
    every = dict.fromkeys(name for run in runs for name in run)
    chosen = [name for name in every if not words or any(word in name for word in words)]
    if not chosen:
        raise PlotError(f"No scalar has {' or '.join(words)}: there are {', '.join(every)}.")
    order = {name: place for place, name in enumerate(_FIRST)}
    return sorted(chosen, key=lambda name: (order.get(name, len(order)), name))


def draw(runs: Mapping[str, Mapping[str, Curve]], names: Sequence[str], file: Path) -> None:
    """Draw a panel for each scalar, with a line for each run that has it."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5 * columns, 3.5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for name, axes in zip(names, panels, strict=False):
        for run, curves in runs.items():
            if name in curves:
                axes.plot(*curves[name], label=run)
        axes.set(title=name, xlabel="iteration")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.savefig(file, dpi=100)


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(argv)
    try:
        for package in ("tensorboard", "matplotlib"):
            if importlib.util.find_spec(package) is None:
                raise PlotError(f"{package} is not installed: pip install {package}.")
        with quiet():
            runs = {str(run): _readable_scalars(run) for run in options.runs}
        names = names_of(runs.values(), options.scalars)
        draw(runs, names, options.output)
    except PlotError as error:
        print(f"megatron-came plot: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        print(
            f"megatron-came plot: {options.output} cannot be written ({reason}): name another"
            " --output.",
            file=sys.stderr,
        )
        return 2
    print(f"{len(names)} scalars of {len(runs)} runs: {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-came plot",
        description="Draw loss, learning rate and whatever else Megatron wrote with "
        "--tensorboard-dir, of one run or of several.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=named_path, metavar="RUN", help="a folder of TensorBoard logs")
    add("--output", type=named_path, default=Path("runs.png"), metavar="FILE", help="(%(default)s)")
    add("--scalars", nargs="+", default=[], metavar="WORD", help="those with one of these words")
    return parser

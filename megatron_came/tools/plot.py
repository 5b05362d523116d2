"""``megatron-came plot RUN ...``: loss, rate and other scalars of Megatron's TensorBoard logs."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_came.terminal.console import counted
from megatron_came.terminal.paths import named_path
from megatron_came.terminal.pictures import Line, draw_lines
from megatron_came.terminal.quiet import quiet
from megatron_came.terminal.sentences import CommandError, require, status_of, writing

_FIRST = ("lm loss", "learning-rate", "grad-norm")  # the rest follows, by name
_TWICE = " vs samples"  # Megatron writes most scalars by samples as well


def scalars(run: Path) -> dict[str, Line]:
    """Return steps and values of a run's scalars, by name.

    Raises:
        CommandError: it has none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = sorted(run.rglob("events.out.tfevents.*")) if run.is_dir() else []
    folders = list(dict.fromkeys(file.parent for file in found))
    if not folders:
        what = "holds no TensorBoard logs" if run.is_dir() else "is no folder"
        raise CommandError(f"{run} {what}: name the --tensorboard-dir of a training run.")
    if len(folders) > 1:
        raise CommandError(f"{run} holds the logs of several runs: name {folders[0]} or another.")
    # 0 is all points; by default TensorBoard keeps a sample of them.
    events = EventAccumulator(str(folders[0]), size_guidance={"scalars": 0})
    try:
        events.Reload()
    except ValueError as error:  # of numbers that TensorBoard cannot read
        raise CommandError(f"{run} cannot be read ({error}): name another run.") from error
    curves = {}
    for name in events.Tags()["scalars"]:
        if not name.endswith(_TWICE):
            # Of a step that was taken again after a resume, the last.
            points = {event.step: event.value for event in events.Scalars(name)}
            curves[name] = Line(sorted(points), [points[step] for step in sorted(points)])
    if not curves:
        raise CommandError(f"{run} holds no scalars: let the run go on, or name another.")
    return curves


def names_of(runs: Iterable[Mapping[str, Line]], words: Sequence[str]) -> list[str]:
    """Return the scalars to draw: those of any run that have one of the words, if there are words.

    Raises:
        CommandError: none has.
    """
    every = dict.fromkeys(name for run in runs for name in run)
    chosen = [name for name in every if not words or any(word in name for word in words)]
    if not chosen:
        raise CommandError(f"No scalar has {' or '.join(words)}: there are {', '.join(every)}.")
    order = {name: place for place, name in enumerate(_FIRST)}
    return sorted(chosen, key=lambda name: (order.get(name, len(order)), name))


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(argv)

    def work() -> None:
        for package in ("tensorboard", "matplotlib"):
            require(package, "megatron-came plot")
        with quiet():
            runs = {str(run): scalars(run) for run in options.runs}
        names = names_of(runs.values(), options.scalars)
        panels = {
            name: {run: lines[name] for run, lines in runs.items() if name in lines}
            for name in names
        }
        with writing(options.output, "--output"):
            draw_lines(panels, options.output, x="iteration")
        print(f"{counted(len(names), 'scalar')} of {counted(len(runs), 'run')}: {options.output}")

    remedy = "let the user of this process read it, or name another run"
    return status_of(work, "megatron-came plot: ", remedy=remedy)


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

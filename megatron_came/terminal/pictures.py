"""Pictures that commands draw, with matplotlib, which is imported for them alone."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_came.terminal.paths import write_whole

_DPI = 150


class Line(NamedTuple):
    """Points of a line, and half the lengths of their error bars, if they have some."""

    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None


def draw_lines(
    panels: Mapping[str, Mapping[str, Line]],
    file: Path,
    *,
    x: str,
    y: str = "",
    size: tuple[float, float] = (5, 3.5),
    beside: bool = False,
    log: bool = False,
) -> None:
    """Draw panels, at most three side by side.

    Args:
        panels: by title, the lines by name.
        file: of the picture; its suffix is the format.
        x: label of the axis.
        y: likewise.
        size: of a panel, in inches.
        beside: whether one legend beside the panels is that of all.
        log: whether the scale of ``x`` is logarithmic.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no such format.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = size[0] * columns + 2 * beside
    figure = Figure(figsize=(width, size[1] * rows), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for (title, lines), axes in zip(panels.items(), every, strict=False):
        for name, (xs, ys, errors) in lines.items():
            if errors is None:
                axes.plot(xs, ys, label=name)
            else:
                axes.errorbar(xs, ys, errors, label=name, marker="o", capsize=2)
        axes.set(title=title, xlabel=x, ylabel=y, xscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        if not beside:
            axes.legend(fontsize="small")
    if beside:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    _save(figure, file)


def draw_losses(losses: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw the training losses of runs over their iterations, from 1 on, into a file."""
    lines = {name: Line(range(1, 1 + len(values)), values) for name, values in losses.items()}
    draw_lines({"": lines}, file, x="iteration", y="training loss", size=(7, 4.5))


def draw_bars(bars: Mapping[str, Mapping[str, float]], unit: str, file: Path) -> None:
    """Draw stacked bars, with the total above each, into a file; its suffix is the format.

    The bars are by name, their heights by label, from the bottom up; the same labels in each.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no such format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(9, 1.1 * len(bars)), 5), layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(bars)
    for label in next(iter(bars.values())):
        heights = [bar[label] for bar in bars.values()]
        axes.bar(list(bars), heights, bottom=bottom, label=label)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for index, total in enumerate(bottom):
        axes.text(index, total, f"{total:.2f}", ha="center", va="bottom")
    axes.set_ylabel(unit)
    axes.tick_params(axis="x", labelsize="small")
    axes.set_ylim(0, 1.08 * max(bottom))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    # Without its date a picture that has not changed is the same file.
    kind = file.suffix[1:].lower() or "png"
    metadata = {"Date": None} if kind == "svg" else None
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=_DPI, metadata=metadata)
    write_whole(file, picture.getvalue())

"""Stacked bars of memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_came.memory.launch_command import LaunchError
from megatron_came.memory.optimizers import LABELS, Optimizer
from megatron_came.memory.pages import ACTIVATIONS, unit_of

if TYPE_CHECKING:
    from megatron_came.memory.stages import Stage


def check_installed() -> None:
    """Make sure that there is something to draw with.

    Raises:
        LaunchError: there is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LaunchError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def draw(stage: Stage, optimizers: Sequence[Optimizer], path: Path) -> None:
    """Draw what a rank holds with each optimizer.

    Args:
        stage: the rank's.
        optimizers: a bar each.
        path: of the picture; its suffix is the format.

    Raises:
        LaunchError: the picture cannot be written.
    """
    name, unit = unit_of(max(stage.total(optimizer) for optimizer in optimizers))
    more = {each.name: stage.working(each) - stage.activations for each in optimizers}
    bars = {}
    for optimizer in optimizers:
        components = stage.components(optimizer)
        heights = {label: getattr(components, key) / unit for key, label in LABELS.items()}
        heights[ACTIVATIONS] = stage.activations / unit
        if any(more.values()):
            heights["what a step's copies take more"] = more[optimizer.name] / unit
        bars[optimizer.name.replace(" ", "\n", 1)] = heights
    try:
        draw_bars(bars, f"{name} on the fullest rank", path)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise LaunchError(
            f"--plot {path} cannot be written ({reason}): name another file."
        ) from error


def draw_bars(bars: Mapping[str, Mapping[str, float]], unit: str, path: Path) -> None:
    """Draw stacked bars, with the total above each.

    Args:
        bars: by name, the heights by label, from the bottom up; the same labels in each.
        unit: of the heights.
        path: of the picture; its suffix is the format.
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
    # Without its date a picture that has not changed is the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=metadata)

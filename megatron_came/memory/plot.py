"""A prediction as stacked bars."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from megatron_came.memory.components import LABELS
from megatron_came.memory.launch_command import LaunchError
from megatron_came.memory.precisions import Optimizer
from megatron_came.memory.prediction import Stage
from megatron_came.memory.text import unit_of


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
    from matplotlib.figure import Figure

    name, unit = unit_of(max(stage.total(optimizer) for optimizer in optimizers))
    parts: list[tuple[str, list[float]]] = [
        (label, [stage.components(optimizer).as_dict()[key] / unit for optimizer in optimizers])
        for key, label in LABELS.items()
    ]
    parts.append(("activations (estimate)", [stage.activations / unit] * len(optimizers)))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    labels = [_label(optimizer) for optimizer in optimizers]
    bottom = [0.0] * len(optimizers)
    for label, heights in parts:
        axes.bar(labels, heights, bottom=bottom, label=label)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for place, total in enumerate(bottom):
        axes.text(place, total, f"{total:.2f}", ha="center", va="bottom")
    axes.set_ylabel(f"{name} on the fullest rank")
    axes.margins(y=0.08)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise LaunchError(
            f"--plot {path} cannot be written ({reason}): name another file."
        ) from error


def _label(optimizer: Optimizer) -> str:
    return optimizer.name.replace(" ", "\n", 1)

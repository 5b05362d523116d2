"""What a rank has measured and what was predicted of it, as a JSON file and as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_came.memory.components import LABELS, Components
from megatron_came.memory.text import bytes_table, human

# Of the file; to be raised by whoever changes its keys.
FORMAT = 1

_ALLOCATOR = {
    "peak_before": "peak before the optimizer step",
    "before": "as the step begins",
    "peak_during": "peak during the step",
    "after": "as it ends",
}


@dataclass(frozen=True, slots=True)
class Record:
    """A rank's memory.

    Attributes:
        rank: its number.
        stage: number of its pipeline stage.
        optimizer: what it trains with, as the columns of predictions are named.
        parameters: elements of its weights.
        measured: bytes of its tensors.
        predicted: what was expected of them; None where it cannot be predicted.
        activations: predicted bytes of activations; None likewise.
        allocator: bytes by :class:`~megatron_came.memory.measurement.Allocated`'s names; None
            without CUDA.
        problem: why there is no prediction.
    """

    rank: int
    stage: int
    optimizer: str
    parameters: int
    measured: Components
    predicted: Components | None = None
    activations: int | None = None
    allocator: dict[str, int] | None = None
    problem: str | None = None

    def write(self, folder: Path) -> None:
        """Write the rank's file into a folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {"format": FORMAT, **asdict(self)}
        path = folder / f"rank-{self.rank:05d}.json"
        path.write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a rank's file.

        Raises:
            ValueError: it is none, or of another format.
            OSError: it cannot be read.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            if values.pop("format") != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}")
            for key in ("measured", "predicted"):
                if values[key] is not None:
                    values[key] = Components.from_dict(values[key])
            return cls(**values)
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(
                f"{path} is no report of --came-report-memory ({error}): name the files that a run "
                "has written."
            ) from error

    @property
    def difference(self) -> float | None:
        """Of the static bytes, measured less predicted, relative to predicted."""
        if self.predicted is None or not self.predicted.static:
            return None
        return self.measured.static / self.predicted.static - 1


def fullest(records: Sequence[Record]) -> Record:
    """The record of the rank that holds most."""
    return max(records, key=lambda record: record.measured.total)


def describe(record: Record) -> list[str]:
    """A rank's table: what was measured, and what was predicted."""
    measured, predicted = record.measured, record.predicted

    def row(label: str, key: str) -> tuple[str, list[int | None]]:
        return label, [getattr(measured, key), predicted and getattr(predicted, key)]

    rows = [row(label, key) for key, label in LABELS.items() if key != "buffers"]
    rows.append(row("static", "static"))
    rows.append(row(LABELS["buffers"], "buffers"))
    if record.activations is not None:
        rows.append(("activations (estimate)", [None, record.activations]))
    if predicted is not None and record.activations is not None:
        rows.append(("total", [None, predicted.total + record.activations]))
    if record.allocator is not None:
        for key, label in _ALLOCATOR.items():
            rows.append((f"allocator, {label}", [record.allocator[key], None]))
    lines = [f"rank {record.rank}, pipeline stage {record.stage}, {record.optimizer}"]
    lines += bytes_table(["measured", "predicted"], rows)
    if record.problem:
        lines.append(f"There is no prediction: {record.problem}")
    if record.allocator is None:
        lines.append("Tensors alone were measured: there is no CUDA allocator to ask.")
    return lines


def line(record: Record) -> str:
    """A rank in one line."""
    said = f"rank {record.rank:>5}, stage {record.stage:>3}: "
    said += f"{human(record.measured.static)} static"
    if record.predicted is not None and record.difference is not None:
        said += f", predicted {human(record.predicted.static)} ({record.difference:+.2%})"
    if record.allocator is not None:
        peak = max(record.allocator["peak_before"], record.allocator["peak_during"])
        said += f"; allocator's peak {human(peak)}"
    return said

"""What a rank has measured and what was predicted of it, as a JSON file and as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_came.memory.optimizers import ROWS, Components
from megatron_came.memory.pages import bytes_table, human

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
    """A rank's memory, in bytes.

    Attributes:
        rank: its number.
        stage: number of its pipeline stage.
        optimizer: what it trains with, as the columns of predictions are named.
        parameters: elements of its weights.
        measured: its tensors.
        predicted: what was expected of them; None where it cannot be predicted.
        activations: predicted activations; None likewise.
        allocator: what CUDA's allocator had given out around the optimizer step, by the keys of
            ``_ALLOCATOR``; None without CUDA.
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
        (folder / f"rank-{self.rank:05d}.json").write_text(json.dumps(values, indent=2) + "\n")

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
                values[key] = values[key] and Components(**values[key])
            return cls(**values)
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(
                f"{path} is no report of --came-report-memory ({error}): name the files that a run "
                "has written."
            ) from error

    def table(self) -> list[str]:
        """What was measured, and what was predicted."""
        measured, predicted = self.measured, self.predicted
        rows: list[tuple[str, list[int | None]]] = [
            (label, [getattr(measured, key), getattr(predicted, key, None)])
            for key, label in ROWS.items()
        ]
        if predicted is not None and self.activations is not None:
            rows.append(("activations (estimate)", [None, self.activations]))
            rows.append(("total", [None, predicted.total + self.activations]))
        for key, size in (self.allocator or {}).items():
            rows.append((f"allocator, {_ALLOCATOR[key]}", [size, None]))
        lines = [f"rank {self.rank}, pipeline stage {self.stage}, {self.optimizer}"]
        lines += bytes_table(["measured", "predicted"], rows)
        if self.problem:
            lines.append(f"There is no prediction: {self.problem}")
        if self.allocator is None:
            lines.append("Tensors alone were measured: there is no CUDA allocator to ask.")
        return lines

    def line(self) -> str:
        """The same in one line."""
        measured = self.measured.static
        said = f"rank {self.rank:>5}, stage {self.stage:>3}: {human(measured)} static"
        if self.predicted is not None and (predicted := self.predicted.static):
            said += f", predicted {human(predicted)} ({measured / predicted - 1:+.2%})"
        if self.allocator is not None:
            peak = max(self.allocator["peak_before"], self.allocator["peak_during"])
            said += f"; allocator's peak {human(peak)}"
        return said


def fullest(records: Sequence[Record]) -> Record:
    """The record of the rank that holds most."""
    return max(records, key=lambda record: record.measured.total)

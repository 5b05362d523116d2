"""Tables and pictures of what was compared."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_came.compare.runs import Run
from megatron_came.terminal.paths import write_whole
from megatron_came.terminal.pictures import Line, draw_lines

# Student's t at 97.5%, by degrees of freedom; of more the normal distribution's, corrected.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> float:
    """Return half the width of the mean's 95% confidence interval; NaN of one value."""
    freedom = len(values) - 1
    if freedom < 1 or not all(map(math.isfinite, values)):
        return math.nan
    t = _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.372 / freedom + 2.82 / freedom**2
    return t * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Cell:
    """The runs of an optimizer with one rate and batch, by seed."""

    optimizer: str
    batch: int
    rate: float
    runs: dict[int, Run]

    def values(self, name: str) -> list[float]:
        """Return a number of every run."""
        return [getattr(run, name) for run in self.runs.values()]

    @property
    def final(self) -> float:
        """Mean of the final losses; infinite if one diverged."""
        return statistics.mean(self.values("final"))

    def differences(self, other: "Cell") -> list[float]:
        """Return how much larger final losses are than another's of the same seeds."""
        shared = self.runs.keys() & other.runs.keys()
        return [self.runs[seed].final - other.runs[seed].final for seed in sorted(shared)]


def cells(runs: Iterable[Run]) -> list[Cell]:
    """Sort runs into cells, in the order in which they come, batch by batch."""
    found: dict[tuple[str, int, float], Cell] = {}
    for run in sorted(runs, key=lambda run: (run.batch, run.rate, run.seed)):
        key = run.optimizer, run.batch, run.rate
        found.setdefault(key, Cell(*key, {})).runs[run.seed] = run
    return list(found.values())


def chosen(every: Sequence[Cell], optimizers: Sequence[str]) -> list[Cell]:
    """Return each optimizer's cell with the smallest final loss, for every batch."""
    return [
        min(mine, key=lambda cell: cell.final)
        for batch in sorted({cell.batch for cell in every})
        for name in optimizers
        if (mine := [cell for cell in every if (cell.optimizer, cell.batch) == (name, batch)])
    ]


def _with_interval(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return f"diverged ({sum(map(math.isinf, values))} of {len(values)})"
    half = interval(values)
    spread = "" if math.isnan(half) else f" ± {half:.4f}"
    return f"{statistics.mean(values):.4f}{spread}"


def summary(every: Sequence[Cell], optimizers: Sequence[str]) -> list[list[str]]:
    """Return rows of the table of optimizers at their best rates, its head first."""
    first = optimizers[0]
    head = ["optimizer", "batch", "rate", "seeds", "final loss", f"less {first}'s, by seed"]
    rows = [[*head, "best loss", "seconds", "of it in steps", "state, bytes a weight"]]
    best = chosen(every, optimizers)
    bases = {cell.batch: cell for cell in best if cell.optimizer == first}
    for cell in best:
        base = bases.get(cell.batch)
        off = cell.differences(base) if base and base is not cell else []
        first_run = next(iter(cell.runs.values()))
        rows.append(
            [
                cell.optimizer,
                str(cell.batch),
                f"{cell.rate:g}",
                str(len(cell.runs)),
                _with_interval(cell.values("final")),
                _with_interval(off) if off and all(map(math.isfinite, off)) else "",
                _with_interval(cell.values("best")),
                f"{statistics.mean(cell.values('seconds')):.2f}",
                f"{statistics.mean(cell.values('step_seconds')):.2f}",
                f"{first_run.state_bytes / first_run.weights:.2f}",
            ]
        )
    return rows


def by_rate(every: Sequence[Cell], optimizers: Sequence[str]) -> list[list[str]]:
    """Return rows of the table of mean final losses at all rates, its head first."""
    rates = sorted({cell.rate for cell in every})
    found = {(cell.optimizer, cell.batch, cell.rate): cell.final for cell in every}
    rows = [["optimizer", "batch", *(f"{rate:g}" for rate in rates)]]
    for cell in chosen(every, optimizers):
        losses = [found.get((cell.optimizer, cell.batch, rate)) for rate in rates]
        rows.append([cell.optimizer, str(cell.batch), *map(_short, losses)])
    return rows


def _short(loss: float | None) -> str:
    if loss is None:
        return ""
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    head, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others])


def write(folder: Path, every: Sequence[Cell], optimizers: Sequence[str], about: str) -> None:
    """Write the tables as Markdown and CSV, and the pictures."""
    tables = [markdown(make(every, optimizers)) for make in (summary, by_rate)]
    heads = ["Each at the rate with the smallest mean final loss", "Mean final loss by rate"]
    text = [f"{head}:\n\n{rows}\n" for head, rows in zip(heads, tables, strict=True)]
    write_whole(folder / "results.md", "\n".join([about + "\n", *text]).encode())
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    measures = ("final", "best", "seconds", "step_seconds", "state_bytes")
    ends = [f"{name}{end}" for name in measures for end in ("", "_95%")]
    writer.writerow(["optimizer", "batch", "rate", "seeds", *ends])
    for cell in every:
        numbers = []
        for name in measures:
            values = cell.values(name)
            numbers += [statistics.mean(values), interval(values)]
        writer.writerow([cell.optimizer, cell.batch, cell.rate, len(cell.runs), *numbers])
    write_whole(folder / "results.csv", file.getvalue().encode())
    _draw(folder, every, optimizers)


def _draw(folder: Path, every: Sequence[Cell], optimizers: Sequence[str]) -> None:
    """Draw, of each batch, held-out loss by iteration and by time, and final loss by rate."""
    titles = {batch: f"batch of {batch}" for batch in sorted({cell.batch for cell in every})}
    pictures = {"loss-by-step": (0, "iteration"), "loss-by-time": (1, "seconds of training")}
    shape: dict[str, Any] = {"y": "held-out loss", "size": (5, 4.5), "beside": True}
    for name, (column, label) in pictures.items():
        panels: dict[str, dict[str, Line]] = {title: {} for title in titles.values()}
        for cell in chosen(every, optimizers):
            points = list(zip(*(run.curve for run in cell.runs.values())))  # noqa: B905
            means = [[statistics.mean(each) for each in zip(*at)] for at in points]  # noqa: B905
            line = Line([at[column] for at in means], [at[3] for at in means])
            panels[titles[cell.batch]][f"{cell.optimizer}, {cell.rate:g}"] = line
        draw_lines(panels, folder / f"{name}.png", x=label, **shape)
    by_rate: dict[str, dict[str, Line]] = {title: {} for title in titles.values()}
    for batch, title in titles.items():
        for optimizer in optimizers:
            mine = [cell for cell in every if (cell.optimizer, cell.batch) == (optimizer, batch)]
            mine = [cell for cell in mine if math.isfinite(cell.final)]
            error = [interval(cell.values("final")) for cell in mine]
            error = [0.0 if math.isnan(half) else half for half in error]
            rates, finals = [cell.rate for cell in mine], [cell.final for cell in mine]
            by_rate[title][optimizer] = Line(rates, finals, error)
    file = folder / "loss-by-rate.png"
    draw_lines(by_rate, file, x="highest learning rate", log=True, **shape)

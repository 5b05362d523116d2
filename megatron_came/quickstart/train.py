"""Trains with one optimizer and keeps what was measured."""

import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megatron_came.memory.optimizers import Components
from megatron_came.memory.report import Report
from megatron_came.quickstart.settings import Optimizer, Settings
from megatron_came.terminal.paths import write_whole
from megatron_came.terminal.progress import Progress
from megatron_came.terminal.sentences import CommandError
from megatron_came.training_log import TrainingError, follow


@dataclass(frozen=True)
class Result:
    """What a run measured."""

    losses: list[float]  # of every iteration
    milliseconds: list[float]  # that each iteration took
    step_milliseconds: list[float]  # of them, in the optimizer's own step on the slowest rank
    memory: Components  # of the rank that keeps most, as ``--came-report-memory`` measured it
    weights: int  # number of the model's parameters

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what :meth:`save` wrote."""
        saved = json.loads(file.read_text())
        return cls(**{**saved, "memory": Components(**saved["memory"])})

    def save(self, file: Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_whole(file, json.dumps(asdict(self)).encode())


def train(settings: Settings, optimizer: Optimizer) -> None:
    """Train with one optimizer and save the result.

    Raises:
        CommandError: the run failed; the message ends with the log's last words.
    """
    folder = settings.run_folder(optimizer)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    name = f"Training with {optimizer.name}"
    with (
        (folder / "log.txt").open("w+", encoding="utf-8") as log,
        Progress(name, settings.iterations) as progress,
    ):
        try:
            found = follow(
                [*settings.megatron_flags(optimizer), "--came-memory-dir", str(folder)],
                ranks=settings.ranks,
                port=settings.port,
                environment=_environment(settings),
                log=log,
                advance=lambda so_far: progress.advance(
                    1, f"  iteration {len(so_far.losses)}, loss {so_far.losses[-1]:.3f}"
                ),
            )
        except TrainingError as error:
            raise CommandError(f"{name} failed (the whole log is {log.name}):\n{error}") from error
    if not all(math.isfinite(loss) for loss in found.losses):
        raise CommandError(f"{name} gave a loss of NaN: see {log.name}.")
    reports = [Report.read(path) for path in folder.glob("rank-*.json")]
    fullest = max(reports, key=lambda report: report.measured.state)
    Result(
        losses=found.losses,
        milliseconds=found.milliseconds,
        step_milliseconds=found.timers["optimizer-inner-step"],
        memory=fullest.measured,
        weights=fullest.parameters,
    ).save(settings.result(optimizer))


def _environment(settings: Settings) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // settings.ranks)),
        # All ranks are on this machine: no need to find out what its name resolves to.
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    return defaults | os.environ

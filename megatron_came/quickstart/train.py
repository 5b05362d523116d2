"""Starts one training run, shows its progress and gathers what it measured."""

import dataclasses
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from megatron_came.data.files import whole_files
from megatron_came.quickstart.meter import Measured
from megatron_came.quickstart.settings import Optimizer, QuickstartError, Settings
from megatron_came.terminal.progress import Progress

_ITERATION = re.compile(
    r"iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+) .*lm loss: (\S+) "
)
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|error): .*)")
# The other ranks fail in turn, and then torchrun sums up; neither says why.
_CONSEQUENCE = re.compile(r"Connection (closed|reset)")
_TORCHRUN = re.compile(r"^[EW]\d{4} .*torch/distributed/elastic", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        losses: Each iteration's loss.
        milliseconds: Each iteration's time.
        ranks: Each rank's optimizer.
    """

    losses: list[float]
    milliseconds: list[float]
    ranks: list[Measured]

    @classmethod
    def load(cls, file: Path) -> Self:
        """Reads what :meth:`save` wrote."""
        saved = json.loads(file.read_text())
        saved["ranks"] = [Measured(**rank) for rank in saved["ranks"]]
        return cls(**saved)

    def save(self, file: Path) -> None:
        """Writes a JSON file, whole or not at all."""
        with whole_files(file) as (partial,):
            partial.write_text(json.dumps(dataclasses.asdict(self)))


def choose_port(port: int | None) -> int:
    """Returns a free TCP port: ``port``, or any if that is None.

    Raises:
        QuickstartError: If ``port`` is in use.
    """
    with socket.socket() as probe:
        # As torchrun does it: a port in its last minute of life after a run counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port or 0))
        except OSError as error:
            raise QuickstartError(
                f"Port {port} cannot be used ({(error.strerror or '').lower()}): name another one,"
                " or none to have a free one chosen."
            ) from error
        chosen: int = probe.getsockname()[1]
        return chosen


def read_iteration(line: str) -> tuple[int, float, float] | None:
    """Returns iteration, milliseconds and loss if a line of Megatron's log reports them."""
    found = _ITERATION.search(line)
    return (int(found[1]), float(found[2]), float(found[3])) if found else None


def last_words(log: str) -> str:
    """Returns the lines of a failed run's log that tell most: its errors, or else its end."""
    program, *torchrun = _TORCHRUN.split(log, maxsplit=1)
    lines = list(dict.fromkeys(line.rstrip() for line in program.splitlines() if line.strip()))
    errors = [found[1] for line in lines if (found := _ERROR.match(line))]
    causes = [line for line in errors if not _CONSEQUENCE.search(line)]
    words = list(dict.fromkeys(causes))[:3] or errors[:3] or lines[-3:]
    if any("exitcode: -9" in line for line in torchrun):
        words.append("The system killed it, most likely because memory ran out.")
    return "\n".join(f"  {line}" for line in words)


def train(settings: Settings, optimizer: Optimizer) -> None:
    """Trains with one optimizer and saves the result.

    Raises:
        QuickstartError: If the run fails; the message ends with the log's last words and its path.
    """
    folder = settings.run_folder(optimizer)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    with log.open("w+", encoding="utf-8") as file:
        process = subprocess.Popen(
            _command(settings, optimizer),
            env=_environment(settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            losses, milliseconds = _follow(settings, optimizer, process, file)
        finally:
            process.terminate()  # if this was interrupted; nothing happens to one that has ended
            code = process.wait()
    if code != 0 or len(losses) != settings.iterations:
        raise QuickstartError(
            f"Training with {optimizer.name} failed (the whole log is {log}):\n"
            + last_words(log.read_text(encoding="utf-8"))
        )
    if not all(math.isfinite(loss) for loss in losses):
        raise QuickstartError(f"Training with {optimizer.name} gave a loss of NaN: see {log}.")
    ranks = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(settings.ranks)]
    result = Result(losses, milliseconds, [Measured(**rank) for rank in ranks])
    result.save(settings.result(optimizer))


def _follow(
    settings: Settings, optimizer: Optimizer, process: subprocess.Popen[str], log: IO[str]
) -> tuple[list[float], list[float]]:
    losses: list[float] = []
    milliseconds: list[float] = []
    if process.stdout is None:
        raise QuickstartError("The training process has no output to read.")
    with Progress(f"Training with {optimizer.name}", settings.iterations) as progress:
        for line in process.stdout:
            log.write(line)
            iteration = read_iteration(line)
            if iteration is not None:
                losses.append(iteration[2])
                milliseconds.append(iteration[1])
                progress.advance(1, f"  iteration {iteration[0]}, loss {iteration[2]:.3f}")
        process.wait()
    return losses, milliseconds


def _command(settings: Settings, optimizer: Optimizer) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    where = ["--nproc-per-node", str(settings.ranks), "--master-addr", "127.0.0.1"]
    port = ["--master-port", str(choose_port(settings.port))]
    worker = ["-m", "megatron_came.quickstart.worker", str(settings.run_folder(optimizer))]
    return [*launcher, *where, *port, *worker, *settings.megatron_flags(optimizer)]


def _environment(settings: Settings) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // settings.ranks)),
        # All ranks are on this machine: no need to find out what its name resolves to.
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    return defaults | os.environ

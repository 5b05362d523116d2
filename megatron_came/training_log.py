"""Trainings of this package's own GPT script, in processes of their own, followed by their log."""

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_came.terminal.children import end_with_parent
from megatron_came.terminal.interrupts import half_made

# A step that an overflow skips has no loss.
_ITERATION = re.compile(
    r"iteration +\d+/ *(\d+) .*elapsed time per iteration \(ms\): ([\d.]+)(?:.* lm loss: (\S+))?"
)
# Of the ranks' least and greatest milliseconds, the greatest.
_TIMER = re.compile(r"^ *([a-z-]+)[ .]*: \([\d.]+, ([\d.]+)\)")
# Of Python, and of argparse, before whose it writes the program's name.
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?(?:[\w.]+\.py: )?([\w.]*(?:Error|Exception|error): .*)")
# Of Megatron's checks, whose class says nothing; without words their source has to do.
_ASSERTION = re.compile(r"^(?:\[rank\d+\]: ?)?AssertionError(?:: ?(.*))?$")
_SOURCE = re.compile(r"^(?:\[rank\d+\]: ?)? {4}(assert .*)$")
# The other ranks fail in turn, and then torchrun sums up; neither says why.
_CONSEQUENCE = re.compile(r"Connection (closed|reset)")
_TORCHRUN = re.compile(r"^[EW]\d{4} .*torch/distributed/elastic", re.MULTILINE)


class TrainingError(Exception):
    """A training failed or cannot start; the message says why."""


@dataclass
class TrainingLog:
    """What Megatron logs of each iteration, in milliseconds but for the losses."""

    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)  # that iterations took
    timers: dict[str, list[float]] = field(default_factory=dict)  # by name, on the slowest rank
    iterations: int = 0  # how many there are to be

    def read(self, line: str) -> bool:
        """Take up a line; return whether it ends an iteration."""
        if iteration := _ITERATION.search(line):
            self.iterations = int(iteration[1])
            self.milliseconds.append(float(iteration[2]))
            self.losses.append(float(iteration[3] or "nan"))
        elif timer := _TIMER.match(line):
            self.timers.setdefault(timer[1], []).append(float(timer[2]))
        return iteration is not None


def choose_port(port: int | None) -> int:
    """Return a free TCP port: ``port``, or any if that is None.

    Raises:
        TrainingError: ``port`` is in use.
    """
    with socket.socket() as probe:
        # As torchrun does it: a port in its last minute of life after a run counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port or 0))
        except OSError as error:
            raise TrainingError(
                f"Port {port} cannot be used ({(error.strerror or '').lower()}): name another one,"
                " or none to have a free one chosen."
            ) from error
        return int(probe.getsockname()[1])


def follow(
    flags: Sequence[str],
    *,
    ranks: int,
    port: int | None,
    environment: Mapping[str, str],
    log: IO[str],
    advance: Callable[[TrainingLog], None],
) -> TrainingLog:
    """Train on this machine, and read the log meanwhile.

    Args:
        flags: Megatron's, with ``--log-interval 1``.
        ranks: number of processes.
        port: on which they meet; None for a free one.
        environment: all of theirs.
        log: for all that they say; open for reading as well.
        advance: is called after each iteration.

    Raises:
        TrainingError: it failed; the message is what tells most in its log.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(choose_port(port))]
    # It makes a folder for logs, also for none, and would leave one of its own behind.
    folder = Path(tempfile.mkdtemp(prefix="megatron_came_"))
    half_made.add(folder)
    command += ["--log-dir", str(folder), "-m", "megatron_came.pretrain_gpt", *flags]
    found, parent = TrainingLog(), os.getpid()
    process = subprocess.Popen(
        command,
        # Its timers are logged at this level, which packages that log before it does would raise.
        env={**environment, "MEGATRON_LOGGING_LEVEL": str(logging.INFO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        # torchrun ends its ranks then
        preexec_fn=lambda: end_with_parent(parent, signal.SIGTERM),
    )
    try:
        for line in process.stdout or ():
            log.write(line)
            if found.read(line):
                advance(found)
    finally:
        process.terminate()  # if this was interrupted; nothing happens to one that has ended
        status = process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        half_made.discard(folder)
    if status or not found.losses or len(found.losses) != found.iterations:
        log.seek(0)
        raise TrainingError(last_words(log.read()))
    return found


def last_words(log: str) -> str:
    """Return the lines of a failed run's log that tell most: its errors, or else its end."""
    program, *torchrun = _TORCHRUN.split(log, maxsplit=1)
    lines = list(dict.fromkeys(line.rstrip() for line in program.splitlines() if line.strip()))
    errors, source = [], ""
    for line in lines:
        if found := _SOURCE.match(line):
            source = f"Megatron stops at {found[1]!r}"
        elif found := _ASSERTION.match(line):
            errors.append(found[1] or source)
        elif found := _ERROR.match(line):
            errors.append(found[1])
    causes = [line for line in errors if not _CONSEQUENCE.search(line)]
    # Ranks say the same; of what differs the first few are enough.
    words = list(dict.fromkeys(causes))[:3] or errors[:3] or lines[-3:]
    if any("exitcode: -9" in line for line in torchrun):  # by SIGKILL
        words.append("The system killed it, most likely because memory ran out.")
    return "\n".join(f"  {line}" for line in words)

"""From a launch script, a torchrun command or bare flags to Megatron's flags and a world size."""

import contextlib
import io
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_came.terminal.children import run_alone
from megatron_came.terminal.sentences import CommandError

_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_SECONDS = 60


@dataclass(frozen=True, slots=True)
class LaunchCommand:
    """A launch of Megatron.

    Attributes:
        flags: Megatron's.
        ranks: how many torchrun would start; None where it is not named.
        script: the training script; empty where it is not named.
    """

    flags: list[str]
    ranks: int | None
    script: str = ""


def from_script(script: Path, words: list[str]) -> LaunchCommand:
    """Ask a launch script for its command, with ``DRY_RUN=1``.

    Args:
        script: run by bash; it finds the programs of this Python first.
        words: its arguments.

    Raises:
        CommandError: it is missing, fails, or prints no torchrun command.
    """
    said = f"--script {script}"
    if script.is_dir():
        raise CommandError(f"{said} is a folder: name the launch script in it.")
    if not script.exists():
        raise CommandError(f"{said} does not exist: name a launch script.")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    environment = {**os.environ, "DRY_RUN": "1", "PATH": path}
    try:
        result = run_alone(["bash", str(script), *words], environment=environment, seconds=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CommandError(
            f"{said} did not end within {_SECONDS} s: with DRY_RUN=1 it must print its torchrun "
            "command and start nothing."
        ) from error
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        raise CommandError(f"{said} ended with status {result.returncode}: {last}")
    for line in result.stdout.replace("\\\n", " ").splitlines():
        with contextlib.suppress(ValueError):  # a quotation that does not end is no command
            command = from_words(shlex.split(line))
            if command.ranks is not None:
                return command
    raise CommandError(
        f"{said} printed no torchrun command: with DRY_RUN=1 it must print the command that it "
        "would run."
    )


def from_words(words: list[str]) -> LaunchCommand:
    """Read Megatron's flags, behind a torchrun command or alone.

    Raises:
        CommandError: a torchrun command without a script or with a number of ranks that only the
            machine knows.
    """
    for index, word in enumerate(words, 1):
        if Path(word).name == "torchrun" or word in _MODULES:
            return _behind_torchrun(words[index:])
    return _behind_script(words, None)


def _behind_script(words: list[str], ranks: int | None, script: str = "") -> LaunchCommand:
    """Read scripts, of which the last is Megatron's, and the flags that follow."""
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return LaunchCommand(words[first:], ranks, words[first - 1] if first else script)


def _behind_torchrun(words: list[str]) -> LaunchCommand:
    from torch.distributed.run import get_args_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = get_args_parser().parse_args(words)
    except SystemExit as error:
        raise CommandError(
            "the torchrun command cannot be read: name its options before the script, and the "
            "script before Megatron's flags."
        ) from error
    per_node = options.nproc_per_node
    nodes = options.nnodes.rpartition(":")[2]  # of a range the most
    if not (per_node.isdecimal() and nodes.isdecimal()):
        raise CommandError(
            f"torchrun --nproc-per-node {per_node} --nnodes {nodes} does not say how many ranks "
            "there are: add --gpus N."
        )
    ranks = int(per_node) * int(nodes)
    return _behind_script(options.training_script_args, ranks, options.training_script)

"""From a launch script, a torchrun command or bare flags to Megatron's flags and a world size."""

import contextlib
import math
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_came.terminal.children import run_alone
from megatron_came.terminal.interrupts import half_made
from megatron_came.terminal.sentences import CommandError

_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_SECONDS, _GRACE = 60, 2  # until a script has printed its command, and what it started has ended
# Stands in for what starts a training, since many scripts know nothing of DRY_RUN: it notes the
# command and ends. What SLURM would start elsewhere runs here, and so does any other Python.
_STAND_IN = """#!/usr/bin/env bash
trap - DEBUG
case "${0##*/} $*" in
srun* | sbatch*)
    for _; do
        case "${1##*/}" in
        torchrun | python* | bash | sh | env) exec "$@" ;;
        *.sh | *.sbatch | *.slurm) exec bash "$@" ;;
        esac
        shift
    done ;;
torchrun* | *" -m torch.distributed."* | *" --num-layers"* | *" --micro-batch-size"*)
    set -C # the first is kept
    { printf '%s\\0' "${0##*/}" "$@" >"${0%/*}/command"; } 2>/dev/null
    exit 0 ;;
*) exec "$(PATH=${PATH//"${0%/*}:"/} type -P "${0##*/}")" "$@" ;;
esac
"""
_STARTERS = ("torchrun", "python", "python3", "srun", "sbatch")
# They come first wherever a script looks for programs, after "conda activate" too.
_FIRST = """set -T; trap '[[ $PATH == "{0}":* ]] || PATH="{0}:$PATH"' DEBUG\n"""


@dataclass(frozen=True, slots=True)
class LaunchCommand:
    """A launch of Megatron."""

    flags: list[str]  # Megatron's
    ranks: int | None  # how many torchrun would start; None where it is not named
    script: str = ""  # the training script; empty where it is not named


def from_script(script: Path, words: list[str]) -> LaunchCommand:
    """Ask a launch script for its command, with ``DRY_RUN=1``, and start none.

    Args:
        script: run by bash; it finds the programs of this Python first.
        words: its arguments.

    Raises:
        CommandError: it is missing, fails, or neither calls torchrun nor prints a command of it.
    """
    said = f"--script {script}"
    if script.is_dir():
        raise CommandError(f"{said} is a folder: name the launch script in it.")
    if not script.exists():
        raise CommandError(f"{said} does not exist: name a launch script.")
    with tempfile.TemporaryDirectory(prefix="megatron-came-") as folder:
        half_made.add(Path(folder))
        for name in _STARTERS:
            (Path(folder) / name).write_text(_STAND_IN)
            (Path(folder) / name).chmod(0o700)  # a program
        first, noted = Path(folder) / "first", Path(folder) / "command"
        first.write_text(_FIRST.format(folder))
        programs = (folder, str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
        more = {"DRY_RUN": "1", "PATH": os.pathsep.join(programs), "BASH_ENV": str(first)}
        try:
            result = run_alone(
                ["bash", str(script), *words],
                environment=os.environ | more,
                seconds=_SECONDS,
                grace=_GRACE,
            )
        except subprocess.TimeoutExpired as error:
            if not noted.exists():  # else it watches its log, say
                raise CommandError(
                    f"{said} did not end within {_SECONDS} s: with DRY_RUN=1 it must print its "
                    "torchrun command and start nothing."
                ) from error
        if noted.exists():
            return from_words([*map(os.fsdecode, noted.read_bytes().split(b"\0")[:-1])])
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        raise CommandError(f"{said} ended with status {result.returncode}: {last}")
    for line in result.stdout.replace("\\\n", " ").splitlines():
        with contextlib.suppress(ValueError):  # a quotation that does not end is no command
            found = shlex.split(line)
            if any(map(_is_torchrun, found)):
                return from_words(found)
    raise CommandError(
        f"{said} printed no torchrun command: with DRY_RUN=1 it must print the command that it "
        "would run."
    )


def _is_torchrun(word: str) -> bool:
    return Path(word).name == "torchrun" or word in _MODULES


def from_words(words: list[str]) -> LaunchCommand:
    """Read Megatron's flags, behind a torchrun command or alone.

    Raises:
        CommandError: a torchrun command without a script.
    """
    for index, word in enumerate(words, 1):
        if _is_torchrun(word):
            return _behind_torchrun(words[index:])
    return _behind_script(words, None)


def _behind_script(words: list[str], ranks: int | None, script: str = "") -> LaunchCommand:
    """Read scripts, of which the last is Megatron's, and the flags that follow."""
    first = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    return LaunchCommand(words[first:], ranks, words[first - 1] if first else script)


def _behind_torchrun(words: list[str]) -> LaunchCommand:
    from torch.distributed.run import get_args_parser

    def stop(message: str) -> NoReturn:
        raise CommandError(
            f"the torchrun command cannot be read ({message}): name its options before the script, "
            "the script before Megatron's flags, and set variables that a job would have."
        )

    parser = get_args_parser()
    parser.error = stop  # type: ignore[method-assign]  # not an exit of this program
    options = parser.parse_args(words)
    sizes = options.nproc_per_node, options.nnodes.rpartition(":")[2]  # of a range the most
    # Else only the machine knows.
    ranks = math.prod(map(int, sizes)) if all(map(str.isdecimal, sizes)) else None
    return _behind_script(options.training_script_args, ranks, options.training_script)

"""Run a script of a Megatron-LM checkout with ``--optimizer came``.

    torchrun ... -m megatron_came.launch path/to/pretrain_gpt.py FLAGS...

The script runs unmodified, as if it had been started itself: its folder is first on the search
path, and its checkout before what is installed, so that it imports the ``megatron`` package of its
own checkout wherever in it the script lies; and it takes all its flags.
What is added is the choice ``came`` of ``--optimizer``, and machines without a GPU (see
:mod:`megatron_came.cpu_megatron`).
"""

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from megatron_came.terminal.interrupts import end_at_once, end_in_an_exception

if __name__ == "__main__":
    end_at_once()  # Ctrl-C during the imports that follow, which take seconds

from megatron_came import cpu_megatron, megatron, memory, waiting
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.search_path import other_megatron, use_checkout_of
from megatron_came.versions import MegatronError, check_version, has_training_loop
from megatron_came.voice import PREFIX, say, stop

_INTERRUPTED = 130  # what a shell gives a program that SIGINT has ended

_USAGE = """\
usage: torchrun ... -m megatron_came.launch SCRIPT FLAGS...

Runs SCRIPT, such as the pretrain_gpt.py of a Megatron-LM checkout, with the megatron package of
that checkout, and passes FLAGS to it: those that it has, and --optimizer came. On a machine without
a GPU it trains on the CPU; MEGATRON_CAME_CPU=1 asks for the CPU where there is a GPU,
MEGATRON_CAME_CPU=0 forbids it. SCRIPT --help lists the flags of the script."""


def prepare(*, training_loop: bool = False) -> None:
    """Enable the CPU where it is wanted, and make ``came`` known to Megatron.

    The ``megatron`` package that is to train must be the first on ``sys.path``.

    Raises:
        SystemExit: With status 2, if ``MEGATRON_CAME_CPU`` is set to nonsense, this Megatron is not
            one that CAME can be added to, or it lacks a training loop that it is to have.
    """
    waiting.stop()
    try:
        cpu_megatron.enable()  # first: what follows imports Megatron, which finds stand-ins then
        megatron.install()
        memory.install()
    except (ValueError, MegatronError) as error:
        _stop(f"{PREFIX}{error}")
    if training_loop and not has_training_loop():
        _stop(
            f"{PREFIX}megatron-core {check_version()} of pip has no training loop: install 0.17 or "
            "newer, or use -m megatron_came.launch with the script of a Megatron-LM checkout."
        )


@contextlib.contextmanager
def refusals_in_a_sentence() -> Iterator[None]:
    """End the program with a sentence where a model is not one that CAME can train."""
    end_in_an_exception()
    try:
        yield
    except UnsupportedError as error:
        stop(str(error), error)
    except KeyboardInterrupt:  # of which torchrun says enough
        raise SystemExit(_INTERRUPTED) from None


def _stop(problem: str) -> NoReturn:
    print(problem, file=sys.stderr)
    raise SystemExit(2)


def _script(arguments: list[str]) -> Path:
    """The script that ``arguments`` name first; stops the program if there is none."""
    if not arguments:
        problem = "name the script to run, such as path/to/Megatron-LM/pretrain_gpt.py."
    elif arguments[0].startswith("-"):
        problem = f"name the script to run before its flags, not {arguments[0]}."
    else:
        script = Path(arguments[0])
        if script.is_file():
            return script
        what = "is no file" if script.exists() else "does not exist"
        what = "is a directory: name the script in it" if script.is_dir() else what
        problem = f"{script} {what}."
    _stop(f"megatron_came.launch: {problem}")


def main(arguments: list[str]) -> None:
    """Run the script that ``arguments`` (``sys.argv`` without its first entry) name first.

    Raises:
        SystemExit: With status 2, if they name none; or as the script ends.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    script = _script(arguments)
    sys.argv = [str(script), *arguments[1:]]  # as if the script had been started itself
    checkout = use_checkout_of(script)
    prepare()
    if other := other_megatron(checkout):
        say(other)
    with refusals_in_a_sentence():
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

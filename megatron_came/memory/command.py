"""``megatron-came memory``: predict the memory of a launch, or compare reports with predictions."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_came.memory.launch_command import LaunchCommand, LaunchError, from_script, from_words
from megatron_came.terminal.console import show

_STDOUT = "-"


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    options, words = _parser().parse_known_args(argv)
    if words[:1] == ["--"]:
        words = words[1:]
    # No GPU is needed, so none is taken from others.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with _quiet():
        from megatron_came import megatron, memory
        from megatron_came.megatron.errors import UnsupportedError
        from megatron_came.versions import MegatronError

        try:
            if options.compare:
                _compare(options.compare, words)
            else:
                megatron.install()
                memory.install()
                _predict(options, words)
        except (MegatronError, LaunchError, OSError, UnsupportedError, ValueError) as error:
            print(f"megatron-came memory: {_sentence(error)}", file=sys.stderr)
            return 2
    return 0


def _sentence(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    reason = (error.strerror or "unknown error").lower()
    return f"{error.filename or 'a file'} cannot be used ({reason}): name another file."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Megatron from saying what is not installed, and what it derives from flags."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-came memory",
        usage="%(prog)s [OPTIONS] --gpus N FLAGS...\n"
        "       %(prog)s [OPTIONS] torchrun ... FLAGS...\n"
        "       %(prog)s [OPTIONS] --script SCRIPT [FLAGS...]\n"
        "       %(prog)s --compare FILE...",
        description="Predict the memory of every GPU from the flags of a Megatron launch, without "
        "a GPU, for CAME, AdamW, Adafactor and SGD. FLAGS are Megatron's.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs of the launch")
    parser.add_argument(
        "--script",
        type=Path,
        help="a launch script, which prints its torchrun command with DRY_RUN=1; FLAGS are passed "
        "to it",
    )
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="find the largest micro-batch and the fewest GPUs that fit into SIZE, such as 80GiB",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw stacked bars, such as a .png"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="write everything as JSON; without FILE, instead of the text",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="compare prediction and measurement in reports of --came-report-memory",
    )
    return parser


def _launch_command(options: argparse.Namespace, words: list[str]) -> LaunchCommand:
    command = from_script(options.script, words) if options.script else from_words(words)
    ranks = options.gpus if options.gpus is not None else command.ranks
    if not command.flags:
        raise LaunchError("name the flags of a launch, or --script SCRIPT.")
    if ranks is None:
        raise LaunchError("the flags do not say how many GPUs there are: add --gpus N.")
    if ranks < 1:
        raise LaunchError(f"--gpus {ranks} is not allowed: give at least 1.")
    return LaunchCommand(command.flags, ranks)


def _predict(options: argparse.Namespace, words: list[str]) -> None:
    from megatron_came.memory import fit, megatron_flags, pages, plot
    from megatron_came.memory.precisions import compared, of_launch
    from megatron_came.memory.prediction import Launch, fullest

    command = _launch_command(options, words)
    budget = fit.parse_size(options.fit) if options.fit else None
    if options.plot:
        plot.check_installed()
    args = megatron_flags.parse(command.flags, command.ranks or 1)
    launch = Launch(args)
    optimizers = compared(args)
    trained = of_launch(args) or optimizers[0]
    if trained not in optimizers:
        optimizers.insert(0, trained)
    result: dict[str, Any] = pages.as_json(launch, optimizers, trained)
    lines = pages.text(launch, optimizers, trained)
    if budget is not None:
        fits = [fit.fit(launch, optimizer, budget) for optimizer in optimizers]
        result["fit"] = {"bytes": budget, "optimizers": [asdict(each) for each in fits]}
        lines += ["", *fit.text(launch, fits, budget, trained)]
    if options.plot:
        plot.draw(fullest(launch.stages, trained), optimizers, options.plot)
        lines += ["", f"Plot: {options.plot}"]
    if options.json == _STDOUT:
        print(json.dumps(result, indent=2))
        return
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
        lines += ["", f"JSON: {options.json}"]
    show(lines)


def _compare(paths: list[Path], words: list[str]) -> None:
    from megatron_came.memory.records import Record, describe, fullest, line

    if words:
        raise LaunchError(f"--compare takes files alone, not {words[0]}: leave it out.")
    records = sorted((Record.read(path) for path in paths), key=lambda record: record.rank)
    print("\n".join(describe(fullest(records))))
    print()
    print("\n".join(line(record) for record in records))

"""``megatron-came memory``: predict the memory of a launch, or compare reports with predictions."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_came.memory.launch_command import LaunchCommand, from_script, from_words
from megatron_came.terminal.console import show, width, wrapped
from megatron_came.terminal.paths import named_path, write_whole
from megatron_came.terminal.pictures import draw_bars
from megatron_came.terminal.quiet import quiet
from megatron_came.terminal.sentences import CommandError, require, status_of, writing

_STDOUT = Path("-")
_MOST_RANKS = 10**7  # a prediction looks at every one


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    options, words = _parser().parse_known_args(argv)
    if words[:1] == ["--"]:
        words = words[1:]
    # No GPU is needed, so none is taken from others.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with quiet():
        from megatron_came.megatron.errors import UnsupportedError
        from megatron_came.versions import MegatronError

        return status_of(
            lambda: (
                _compare(options.compare, words) if options.compare else _predict(options, words)
            ),
            "megatron-came memory: ",
            *(MegatronError, UnsupportedError, ValueError),
            remedy="name another file",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-came memory",
        usage="%(prog)s [OPTIONS] --gpus N [SCRIPT] FLAGS...\n"
        "       %(prog)s [OPTIONS] torchrun ... FLAGS...\n"
        "       %(prog)s [OPTIONS] --script SCRIPT [FLAGS...]\n"
        "       %(prog)s --compare FILE...",
        description="Predict the memory of every GPU from the flags of a Megatron launch, without "
        "a GPU, for CAME, Adam in all its forms, Adafactor, SGD, Lion and Muon. FLAGS are "
        "Megatron's.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=int, metavar="N", help="number of GPUs of the launch")
    help = "a launch script, to which FLAGS are passed; it is run, with DRY_RUN=1, but torchrun,"
    add("--script", type=named_path, help=f"{help} srun, sbatch and python start no training")
    help = "find the largest micro-batch and the fewest GPUs that fit into SIZE, such as 80GiB"
    add("--fit", metavar="SIZE", help=help)
    help = "name the cheapest changes of the launch after which it fits into SIZE, and their costs"
    add("--advise", metavar="SIZE", help=help)
    add("--plot", type=named_path, metavar="FILE", help="draw stacked bars, such as a .png")
    help = "write everything as JSON; without FILE, instead of the text"
    add("--json", nargs="?", const=_STDOUT, type=named_path, metavar="FILE", help=help)
    help = "compare prediction and measurement in reports of --came-report-memory"
    add("--compare", nargs="+", type=named_path, metavar="FILE", help=help)
    return parser


def _launch_command(options: argparse.Namespace, words: list[str]) -> LaunchCommand:
    command = from_script(options.script, words) if options.script else from_words(words)
    ranks = options.gpus if options.gpus is not None else command.ranks
    if not command.flags:
        raise CommandError("name the flags of a launch, or --script SCRIPT.")
    if ranks is None:
        raise CommandError("the flags do not say how many GPUs there are: add --gpus N.")
    if ranks < 1:
        raise CommandError(f"--gpus {ranks} is not allowed: give at least 1.")
    if ranks > _MOST_RANKS:
        raise CommandError(f"--gpus {ranks} is not allowed: give {_MOST_RANKS} at most.")
    return LaunchCommand(command.flags, ranks, command.script)


def _predict(options: argparse.Namespace, words: list[str]) -> None:
    from megatron_came import megatron, memory

    memory.check_release()  # before what older releases lack is imported
    from megatron_came.memory import advise, fit, megatron_flags, pages
    from megatron_came.memory.optimizers import compared, of_launch
    from megatron_came.memory.prediction import Launch

    megatron.install()
    memory.install()
    command = _launch_command(options, words)
    budget = fit.parse_size(options.fit) if options.fit is not None else None
    room = fit.parse_size(options.advise, "--advise") if options.advise is not None else None
    if options.plot:
        require("matplotlib", "--plot")
    launch = Launch(megatron_flags.parse(command.flags, command.ranks or 1, command.script))
    optimizers = compared(launch.args)
    trained = of_launch(launch.args) or optimizers[0]
    if trained not in optimizers:
        optimizers.insert(0, trained)
    result: dict[str, Any] = pages.as_json(launch, optimizers, trained)
    lines = pages.text(launch, optimizers, trained)
    if budget is not None:
        fits = [fit.fit(launch, optimizer, budget) for optimizer in optimizers]
        result["fit"] = {"bytes": budget, "optimizers": [asdict(each) for each in fits]}
        lines += ["", *fit.text(launch, fits, budget, trained)]
    if room is not None:
        advice = advise.advise(command, launch, trained, room)
        result["advice"] = asdict(advice)
        lines += ["", *advise.text(advice, command, trained)]
    if options.plot:
        bars = pages.bars(launch.fullest(trained), optimizers)
        with writing(options.plot, "--plot"):
            draw_bars(*bars, options.plot)
        lines += ["", f"Plot: {options.plot}"]
    if options.json == _STDOUT:
        print(json.dumps(result, indent=2))
        return
    if options.json:
        with writing(options.json, "--json"):
            write_whole(options.json, (json.dumps(result, indent=2) + "\n").encode())
        lines += ["", f"JSON: {options.json}"]
    columns = width()
    show(part for line in lines for part in ([line] if len(line) <= columns else wrapped(line)))


def _compare(paths: list[Path], words: list[str]) -> None:
    from megatron_came.memory.report import Report, fullest

    if words:
        raise CommandError(f"--compare takes files alone, not {words[0]}: leave it out.")
    reports = sorted((Report.read(path) for path in paths), key=lambda report: report.rank)
    show([*fullest(reports).table(), "", *(report.line() for report in reports)])

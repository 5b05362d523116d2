"""One experiment: what is trained of a preset, in which order, and what is left of it."""

import argparse
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_came.bench.machine import describe
from megatron_came.compare import report
from megatron_came.compare.optimizers import Contender, parse
from megatron_came.compare.presets import PRESETS, Preset
from megatron_came.compare.runs import Key, Results, train
from megatron_came.compare.tasks import TASKS
from megatron_came.data.files import locked
from megatron_came.terminal.console import show, table
from megatron_came.terminal.progress import Progress
from megatron_came.terminal.sentences import CommandError, require

_MOST = {"seeds": 1000, "iterations": 10**7, "batches": 2**16, "rates": math.inf}
_MORE_RUNS = ("about", "optimizers", "rates", "seeds", "batches")


def run(options: argparse.Namespace, folder: Path) -> None:
    """Train what is left of it, and write tables and pictures.

    Raises:
        CommandError: it is refused, before anything is trained.
    """
    preset = _preset(options)
    contenders = _contenders(preset, required=options.optimizers is not None)
    task = TASKS[preset.task](preset, options.text)
    folder.mkdir(parents=True, exist_ok=True)
    # Those left out may differ from call to call: they only say which runs there are.
    shared = {key: value for key, value in asdict(preset).items() if key not in _MORE_RUNS}
    device = torch.device("cuda" if preset.gpu else "cpu")
    with locked(folder / "runs.jsonl"):
        results = Results(folder, {**shared, "data": task.data, **describe(device)})
        keys = _keys(preset, contenders)
        left = [key for key in keys if key not in results.runs]
        amount = sum(_cost(preset, key) for key in left)
        by_name = {each.name: each for each in contenders}
        for each in {key.optimizer: key for key in left}.values():  # compilers run in no run
            train(task, replace(preset, iterations=2), by_name[each.optimizer], each)
        done = 0.0
        with Progress("Training", amount) as progress:
            for number, key in enumerate(left, start=1):
                note = f"  {number}/{len(left)}: {key.optimizer}, {key.rate:g}"
                told = partial(_tell, progress, done, _cost(preset, key), note)
                results.add(train(task, preset, by_name[key.optimizer], key, told))
                done += _cost(preset, key)
                progress.reach(done, note)  # what a run that diverged leaves, too
        runs = [results.runs[key] for key in keys]
        about = f"{preset.task}, {runs[0].weights} weights, {preset.iterations} iterations"
        cells = report.cells(runs)
        report.write(folder, cells, list(by_name), about)
    rows = report.summary(cells, list(by_name))
    show([*table(rows), "", f"Tables, pictures and runs: {folder.resolve()}"])


def _tell(bar: Progress, done: float, cost: float, note: str, share: float, loss: float) -> None:
    """Move the bar on to a share of a run that costs so much and began at ``done``."""
    bar.reach(done + share * cost, f"{note}, loss {loss:.3f}")


def _cost(preset: Preset, key: Key) -> float:
    """What a run takes, in some unit: an iteration is some work whatever its batch."""
    return preset.iterations * (8 + key.batch)


def _keys(preset: Preset, contenders: list[Contender]) -> list[Key]:
    """All runs; what slows the machine for a while slows every optimizer."""
    return [
        Key(each.name, rate, seed, batch)
        for seed in range(1, preset.seeds + 1)
        for batch in preset.batches
        for number in range(max(len(preset.rates or each.rates) for each in contenders))
        for each in contenders
        for rate in (preset.rates or each.rates)[number : number + 1]
    ]


def _preset(options: argparse.Namespace) -> Preset:
    """The preset as the flags change it.

    Raises:
        CommandError: what is refused before anything is trained.
    """
    changes: dict[str, Any] = {}
    for name in ("optimizers", "rates", "batches", "seeds", "iterations"):
        if (value := getattr(options, name)) is not None:
            changes[name] = tuple(dict.fromkeys(value)) if isinstance(value, list) else value
    preset = replace(PRESETS[options.preset], **changes)
    for name, most in _MOST.items():
        value = getattr(preset, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not 0 < each < math.inf:
                raise CommandError(f"--{name} {each} is not allowed: give what is above 0.")
            if each is not None and each > most:
                raise CommandError(f"--{name} {each} is not allowed: give {most} at most.")
    if preset.gpu and not torch.cuda.is_available():
        raise CommandError(
            f"The preset {options.preset} needs a GPU, and PyTorch sees none here: take nano."
        )
    if options.text and preset.task not in ("gpt", "bert"):
        raise CommandError(f"The preset {options.preset} reads no text: leave out --text.")
    require("matplotlib", "megatron-came compare")
    return preset


def _contenders(preset: Preset, *, required: bool) -> list[Contender]:
    found = []
    for each in map(parse, preset.optimizers):
        if each.missing and required:
            raise CommandError(f"{each.missing}.")
        if each.missing:
            print(f"Left out: {each.missing}.")
        else:
            found.append(each)
    return found

"""What ``megatron-came bench`` times and prints."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_came.bench.contenders import contenders
from megatron_came.bench.iteration import measure_iterations
from megatron_came.bench.machine import describe
from megatron_came.bench.measure import Result, copy_bandwidth, measure, parameters
from megatron_came.bench.shapes import Shape, shapes_of
from megatron_came.terminal.console import show, table, wrapped
from megatron_came.terminal.paths import write_whole
from megatron_came.terminal.sentences import CommandError, writing

# Of a result: heads of the columns, attributes and how they are written; None is a dash.
_COLUMNS = {
    "ms": ("milliseconds", ".2f"),
    "fastest": ("fastest", ".2f"),
    "ns/param": ("ns_per_parameter", ".3f"),
    "floor, B": ("floor_bytes_per_parameter", ".1f"),
    "GB/s": ("gigabytes_per_second", ".0f"),
    "of floor": ("fraction_of_floor", ".0%"),
    "extra MiB": ("extra_mebibytes", ".1f"),
}
_SENT = {"collectives": ("collectives", "d"), "MiB sent": ("mebibytes_sent", ".2f")}


def run(options: argparse.Namespace) -> None:
    """Time what the options name.

    Raises:
        CommandError: it cannot be.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.flags and not options.iteration:
        given = options.flags[0]
        raise CommandError(f"bench takes no {given}: flags after -- are for --iteration alone.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda, but there is no GPU: use cpu.")
    if options.json:
        with writing(options.json, "--json"):
            is_new = not options.json.exists()
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()  # that it can be, before anything is timed
            if is_new:
                options.json.unlink()
    report: dict[str, Any] = {
        "model": options.model,
        "layers": options.layers,
        "ranks": options.ranks,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(device),
    }
    if options.iteration:
        report |= _iterations(options, device)
    else:
        report |= _steps(options, device, report)
    if options.json:
        with writing(options.json, "--json"):
            write_whole(options.json, (json.dumps(report, indent=1) + "\n").encode())


def _iterations(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    results = measure_iterations(
        options.model,
        device=device,
        layers=options.layers,
        ranks=options.ranks,
        iterations=options.steps,
        flags=options.flags,
    )
    heads = ["ms an iteration", "whole", "forward", "backward", "optimizer's step", "of whole"]
    rows = []
    for one in results:
        times = (one.milliseconds, one.forward_milliseconds, one.backward_milliseconds)
        step = [f"{one.step_milliseconds:.1f}", f"{one.step_milliseconds / one.milliseconds:.0%}"]
        rows.append([one.optimizer, *(f"{time:.0f}" for time in times), *step])
    show(table([heads, *rows]))
    return {"flags": options.flags, "iterations": [asdict(result) for result in results]}


def _steps(
    options: argparse.Namespace, device: torch.device, circumstances: dict[str, Any]
) -> dict[str, Any]:
    """Time steps; print and return the results.

    Raises:
        CommandError: --only names nobody.
    """
    entrants = [
        one
        for one in contenders(device)
        if (options.ranks == 1 or one.sharded)
        and (not options.only or any(word.lower() in one.name.lower() for word in options.only))
    ]
    if not entrants:
        names = ", ".join(repr(one.name) for one in contenders(device))
        raise CommandError(f"--only matches none of {names}.")
    if options.ranks > 1:
        rank = options.ranks // 2  # one that has neighbours, as most have
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=options.ranks)
    bandwidth = 0.0 if device.type == "cpu" else copy_bandwidth(device)  # see ``floors``
    shapes = shapes_of(options.model, options.layers)
    if device.type == "cpu":
        _check_room(options, shapes, len(entrants))
    params, shards = parameters(shapes, device, options.ranks)
    results = measure(entrants, params, shards, steps=options.steps, bandwidth=bandwidth)
    report = {
        **circumstances,
        "parameters": sum(torch.Size(shape).numel() for shape in shapes),
        "collectives": "simulated: counted, not carried out" if options.ranks > 1 else "none",
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "results": [asdict(result) for result in results],
    }
    _print(report, results)
    return report


def _check_room(options: argparse.Namespace, shapes: Sequence[Shape], entrants: int) -> None:
    """Refuse what the system would end for want of memory, this process or another one.

    Raises:
        CommandError: tensors that there is no room for.
    """
    # Parameters and gradients, and of each optimizer about one state of their size.
    needed = 4 * (2 + entrants) * sum(map(math.prod, shapes)) // options.ranks
    total = psutil.virtual_memory().total
    if needed > total:
        raise CommandError(
            f"--model {options.model} of {options.layers or 'all its'} layers needs about "
            f"{needed >> 30} GiB and there are {total >> 30}: give fewer --layers, or --only NAME."
        )


def _print(report: dict[str, Any], results: list[Result]) -> None:
    machine, speed = report["machine"], report["copy_gigabytes_per_second"]
    floor = f"copies of {speed:.0f} GB/s" if speed else "bare loops with the same traffic"
    show(
        wrapped(
            f"{report['model']}, {report['parameters'] / 1e6:.1f} M parameters, fp32, rank of "
            f"{report['ranks']}, on {machine['device']} ({machine['threads']} threads), PyTorch "
            f"{machine['torch']}; the floor is {floor}"
        )
    )
    columns = _COLUMNS | (_SENT if report["ranks"] > 1 else {})  # one rank sends nothing
    rows = [["", *columns]]
    for result in results:
        cells = [(getattr(result, key), form) for key, form in columns.values()]
        rows.append([result.name, *("-" if v is None else format(v, form) for v, form in cells)])
    show(["", *table(rows)])
    ours = next((one for one in results if one.name == "CAME, fused"), None)
    if ours is not None:
        print()
        for other in results:
            if other is not ours:
                ratio = other.milliseconds / ours.milliseconds
                print(f"{other.name} takes {ratio:.2f} times as long as CAME, fused.")

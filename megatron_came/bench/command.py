"""The command line of ``megatron-came bench``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_came.bench.contenders import contenders
from megatron_came.bench.iteration import measure_iterations
from megatron_came.bench.machine import describe
from megatron_came.bench.measure import Result, copy_bandwidth, measure, parameters
from megatron_came.bench.shapes import MODELS, shapes_of
from megatron_came.terminal.console import show, table, wrapped


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-came bench",
        description="Time a step of CAME beside a step of other optimizers, fp32, same gradients.",
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="gpt2-small",
        metavar="MODEL",
        help=f"one of {', '.join(MODELS)} (default: gpt2-small)",
    )
    parser.add_argument("--layers", type=_positive, help="instead of the model's own number")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--ranks",
        type=_positive,
        default=1,
        help="time what one of so many data-parallel ranks computes; its collectives are counted "
        "and cost nothing (PyTorch's fake process group)",
    )
    parser.add_argument("--steps", type=_positive, default=15, help="timed ones (default: 15)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="parts of contenders' names (default: all; their states are in memory together)",
    )
    parser.add_argument(
        "--iteration",
        action="store_true",
        help="time whole iterations of Megatron instead, with CAME and with Adam, on so many "
        "--ranks; flags after -- go to Megatron",
    )
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser


def main(argv: list[str]) -> int:
    """Run the benchmark; return the exit status."""
    options = _parser().parse_args(argv)
    if options.flags and not options.iteration:
        print("megatron-came bench: flags after -- are for --iteration alone.", file=sys.stderr)
        return 2
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("megatron-came bench: --device cuda, but there is no GPU: use cpu.", file=sys.stderr)
        return 2
    if options.iteration and device.index is not None:
        print(
            f"megatron-came bench: --iteration with --device {device}: give --device cuda, and "
            "choose GPUs with CUDA_VISIBLE_DEVICES.",
            file=sys.stderr,
        )
        return 2
    try:
        report = _iterations(options, device) if options.iteration else _steps(options, device)
    except (ValueError, RuntimeError) as error:
        print(f"megatron-came bench: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _circumstances(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "model": options.model,
        "layers": options.layers,
        "ranks": options.ranks,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(device),
    }


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
    rows = [
        [
            result.optimizer,
            f"{result.milliseconds:.0f}",
            f"{result.forward_milliseconds:.0f}",
            f"{result.backward_milliseconds:.0f}",
            f"{result.step_milliseconds:.1f}",
            f"{result.step_milliseconds / result.milliseconds:.0%}",
        ]
        for result in results
    ]
    show(table([heads, *rows]))
    return {
        **_circumstances(options, device),
        "flags": options.flags,
        "iterations": [asdict(result) for result in results],
    }


def _steps(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time steps; print and return the results.

    Raises:
        ValueError: --only names nobody.
    """
    entrants = [
        one
        for one in contenders(device)
        if (options.ranks == 1 or one.sharded)
        and (not options.only or any(part.lower() in one.name.lower() for part in options.only))
    ]
    if not entrants:
        names = ", ".join(repr(one.name) for one in contenders(device))
        raise ValueError(f"--only matches none of {names}.")
    if options.ranks > 1:
        _fake_process_group(options.ranks)
    bandwidth = copy_bandwidth(device)
    shapes = shapes_of(options.model, options.layers)
    params, shards = parameters(shapes, device, options.ranks)
    results = measure(entrants, params, shards, steps=options.steps, bandwidth=bandwidth)
    report = {
        **_circumstances(options, device),
        "parameters": sum(torch.Size(shape).numel() for shape in shapes),
        "collectives": "simulated: counted, not carried out" if options.ranks > 1 else "none",
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "results": [asdict(result) for result in results],
    }
    _print(report, results)
    return report


def _fake_process_group(ranks: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)


def _print(report: dict[str, Any], results: list[Result]) -> None:
    machine = report["machine"]
    show(
        wrapped(
            f"{report['model']}, {report['parameters'] / 1e6:.1f} M parameters, fp32, rank of "
            f"{report['ranks']}, on {machine['device']} ({machine['threads']} threads), PyTorch "
            f"{machine['torch']}; copy bandwidth {report['copy_gigabytes_per_second']:.0f} GB/s"
        )
    )
    heads = ["", "ms", "fastest", "ns/param", "floor, B", "GB/s", "of floor"]
    heads += ["extra MiB", "collectives", "MiB sent"]
    shown = None if report["ranks"] > 1 else -2  # one rank sends nothing
    rows = [heads, *(_cells(result) for result in results)]
    show(["", *table([row[:shown] for row in rows])])
    ours = next((one for one in results if one.name == "CAME, fused"), None)
    if ours is not None:
        print()
        for other in results:
            if other is not ours:
                ratio = other.milliseconds / ours.milliseconds
                print(f"{other.name} takes {ratio:.2f} times as long as CAME, fused.")


def _cells(result: Result) -> list[str]:
    def known(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        result.name,
        f"{result.milliseconds:.2f}",
        f"{result.fastest:.2f}",
        f"{result.ns_per_parameter:.3f}",
        known(result.floor_bytes_per_parameter, ".1f"),
        known(result.gigabytes_per_second, ".0f"),
        known(result.fraction_of_floor, ".0%"),
        f"{result.extra_mebibytes:.1f}",
        str(result.collectives),
        f"{result.mebibytes_sent:.2f}",
    ]

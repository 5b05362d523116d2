"""Trains a small GPT-2 on real text in every precision of CAME's state, with several seeds.

Writes the losses as JSON and prints a table: how far each final loss is from that of the same seed
with fp32 state. Needs no GPU; about 25 minutes on one core.
"""

import argparse
import json
import statistics
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from megatron_came.bench.machine import describe
from megatron_came.quickstart.prepare import prepare
from megatron_came.quickstart.settings import OPTIMIZERS, Settings
from megatron_came.quickstart.train import Result, train
from megatron_came.terminal.sentences import CommandError

_CAME = next(optimizer for optimizer in OPTIMIZERS if optimizer.key == "came")
_LAST = 20  # iterations whose mean is the final loss
_SMALLEST = ("--came-momentum-dtype", "int8", "--came-main-params", "remainder")
# By name: whether the model is bf16, flags, and the mode that it is held against.
MODES: dict[str, tuple[bool, tuple[str, ...], str]] = {
    "fp32": (False, (), "fp32"),
    "fp32, bf16 momentum": (False, ("--came-momentum-dtype", "bf16"), "fp32"),
    "fp32, int8 momentum": (False, ("--came-momentum-dtype", "int8"), "fp32"),
    "bf16": (True, (), "bf16"),
    "bf16, remainders": (True, ("--came-main-params", "remainder"), "bf16"),
    "bf16, int8 momentum, remainders, bf16 gradients": (
        True,
        (*_SMALLEST, "--grad-reduce-in-bf16"),
        "bf16",
    ),
}


def losses(settings: Settings, mode: str, seed: int) -> list[float]:
    """Train once; return the loss of every iteration."""
    bf16, flags, _ = MODES[mode]
    own = replace(settings, bf16=bf16)
    flags = (*_CAME.flags, *flags, "--seed", str(seed))
    optimizer = replace(_CAME, name=f"{mode}, seed {seed}", flags=flags)
    train(own, optimizer)
    return Result.load(own.result(optimizer)).losses


def table(finals: dict[str, list[float]]) -> list[str]:
    """Lines of a Markdown table: final losses, and how far they are from their baseline's."""
    lines = ["| state | final loss, mean | from seed to seed | from fp32 state, by seed |"]
    lines.append("|---|---|---|---|")
    for mode, values in finals.items():
        base = finals[MODES[mode][2]]
        off = [f"{100 * (a / b - 1):+.2f}%" for a, b in zip(values, base, strict=True)]
        lines.append(
            f"| {mode} | {statistics.mean(values):.4f} | {min(values):.4f} to {max(values):.4f} | "
            f"{', '.join(off) if MODES[mode][2] != mode else ''} |"
        )
    return lines


def main() -> None:
    """Train all modes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("quickstart/precision"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    options = parser.parse_args()
    settings = Settings(
        folder=options.folder, ranks=1, iterations=options.iterations,
        hidden=128, sequence=128, global_batch=16, micro_batch=16,
    )  # fmt: skip
    settings.folder.mkdir(parents=True, exist_ok=True)
    try:
        prepare(settings)
        runs = {
            mode: {seed: losses(settings, mode, seed) for seed in options.seeds} for mode in MODES
        }
    except CommandError as error:
        raise SystemExit(str(error)) from error
    finals = {
        mode: [statistics.mean(by_seed[seed][-_LAST:]) for seed in options.seeds]
        for mode, by_seed in runs.items()
    }
    print("\n".join(table(finals)))
    if options.json:
        result = {
            "command": "scripts/momentum_precision.py",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe(torch.device("cpu")),
            "final_is_the_mean_of_iterations": _LAST,
            "flags": {mode: list(flags) for mode, (_, flags, _) in MODES.items()},
            "base_flags": settings.megatron_flags(_CAME),
            "final": finals,
            "losses": runs,
        }
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""The quick start's command line; ``--help`` lists its options."""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import megatron_came
from megatron_came import cpu_megatron
from megatron_came.data.errors import DataError
from megatron_came.quickstart.plot import plot_losses
from megatron_came.quickstart.prepare import prepare
from megatron_came.quickstart.report import check_same_start, summary
from megatron_came.quickstart.settings import OPTIMIZERS, QuickstartError, Settings
from megatron_came.quickstart.steps import Steps
from megatron_came.quickstart.train import Result, choose_port, train


def run(settings: Settings, device: str) -> None:
    """Makes what is missing, trains with every optimizer and prints the summary.

    Args:
        settings: What to train.
        device: Where, as in "on the CPU".

    Raises:
        DataError: If the text cannot be used.
        QuickstartError: If anything else stands in the way.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    choose_port(settings.port)  # before the work that a port in use would waste
    steps = Steps(settings.folder / "steps.json")
    dataset = prepare(settings, steps)
    for optimizer in OPTIMIZERS:
        inputs = {
            "dataset": dataset,
            "ranks": settings.ranks,
            "device": device,
            "flags": settings.megatron_flags(optimizer),
            "version": megatron_came.__version__,
        }
        steps.run(
            f"Training with {optimizer.name}",
            inputs,
            [settings.result(optimizer)],
            partial(train, settings, optimizer),
        )
    results = {each.name: Result.load(settings.result(each)) for each in OPTIMIZERS}
    check_same_start(results)
    plot_losses(results, settings.plot)
    print(f"\n{summary(settings, results, device)}\n\nLoss curves: {settings.plot.resolve()}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        gpus = _gpus()
        if gpus and options.ranks > gpus:
            print(f"{options.ranks} ranks need as many GPUs: training on the {gpus} here.")
        settings = Settings(
            folder=options.folder,
            text=tuple(options.text),
            ranks=min(options.ranks, gpus) if gpus else options.ranks,
            port=options.port,
            bf16=bool(gpus) if options.precision == "auto" else options.precision == "bf16",
            iterations=options.iterations,
        )
        run(settings, "on GPUs" if gpus else "on the CPU")
    except (DataError, QuickstartError) as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads on, as in "make quickstart | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        fault = (error.strerror or "unknown error").lower()
        print(
            f"{error.filename or options.folder} cannot be used ({fault}): put that right, or"
            " choose another folder with --folder.",
            file=sys.stderr,
        )
        return 1
    return 0


def _gpus() -> int:
    """How many GPUs there are to train on; 0 for the CPU."""
    import torch

    return 0 if cpu_megatron.wanted() else torch.cuda.device_count()


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m megatron_came.quickstart",
        description="Trains a small GPT-2 from the same weights with AdamW and with CAME, on text"
        " of yours or on the Python library's sources, and compares them. What a previous run has"
        " made is not made again.",
    )
    add = parser.add_argument
    add(
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="text files, folders of them, or .jsonl files (the Python library's sources)",
    )
    add("--folder", type=Path, default=defaults.folder, help="where everything goes (%(default)s)")
    add("--ranks", type=int, default=defaults.ranks, help="processes to train with (%(default)s)")
    add("--port", type=int, help="TCP port on which they meet (a free one)")
    add("--iterations", type=int, default=defaults.iterations, help="training steps (%(default)s)")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto is bf16 on GPUs and fp32 on a CPU, where bf16 is slow without special support",
    )
    return parser

"""The quick start's command line; ``--help`` lists its options."""

import argparse
import os
import sys
from functools import partial

import megatron_came
from megatron_came import cpu_megatron
from megatron_came.data.files import locked
from megatron_came.quickstart.prepare import prepare, run_once
from megatron_came.quickstart.report import check_same_start, summary
from megatron_came.quickstart.settings import OPTIMIZERS, Settings
from megatron_came.quickstart.train import Result, train
from megatron_came.terminal.paths import named_path
from megatron_came.terminal.pictures import draw_losses
from megatron_came.terminal.sentences import CommandError, status_of
from megatron_came.training_log import TrainingError, choose_port


def run(settings: Settings, device: str) -> None:
    """Make what is missing, train with every optimizer "on the CPU", say, and print the summary.

    Raises:
        CommandError: the text cannot be used; a training failed, or began with something else.
        TrainingError: the port is in use.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    choose_port(settings.port)  # before the work that a port in use would waste
    with locked(settings.steps):
        dataset = prepare(settings)
        for optimizer in OPTIMIZERS:
            inputs = {
                "dataset": dataset,
                "ranks": settings.ranks,
                "device": device,
                "flags": settings.megatron_flags(optimizer),
                "version": megatron_came.__version__,
            }
            make = partial(train, settings, optimizer)
            name, result = f"Training with {optimizer.name}", settings.result(optimizer)
            run_once(settings.steps, name, inputs, [result], make)
        results = {each.name: Result.load(settings.result(each)) for each in OPTIMIZERS}
        check_same_start(results)
        picture = settings.folder / "loss.png"
        draw_losses({name: result.losses for name, result in results.items()}, picture)
        print(f"\n{summary(settings, results, device)}\n\nLoss curves: {picture.resolve()}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    import torch

    options = _parser().parse_args(arguments)

    def work() -> None:
        try:
            gpus = 0 if cpu_megatron.wanted() else torch.cuda.device_count()
        except ValueError as error:
            raise CommandError(str(error)) from error
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

    remedy = "put that right, or choose another folder with --folder"
    try:
        return status_of(work, "", TrainingError, status=1, remedy=remedy, place=options.folder)
    except BrokenPipeError:  # nobody reads on, as in "make quickstart | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_came.quickstart",
        description="Trains a small GPT-2 from the same weights with AdamW and with CAME, on text"
        " of yours or on the Python library's sources, and compares them. What a previous run has"
        " made is not made again.",
    )
    add, defaults = parser.add_argument, Settings()
    sources = "text files, folders of them, or .jsonl files (the Python library's sources)"
    add("--text", nargs="+", type=named_path, default=[], metavar="PATH", help=sources)
    help = "where everything goes (%(default)s)"
    add("--folder", type=named_path, default=defaults.folder, help=help)
    add("--ranks", type=int, default=defaults.ranks, help="processes to train with (%(default)s)")
    add("--port", type=int, help="TCP port on which they meet (a free one)")
    add("--iterations", type=int, default=defaults.iterations, help="training steps (%(default)s)")
    help = "auto is bf16 on GPUs and fp32 on a CPU, where bf16 is slow without special support"
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=help)
    return parser

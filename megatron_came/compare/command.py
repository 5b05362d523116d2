"""``megatron-came compare PRESET``: several optimizers, the same weights and data."""

import argparse
from pathlib import Path

from megatron_came.compare.presets import PRESETS
from megatron_came.terminal.paths import named_path
from megatron_came.terminal.sentences import status_of


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(argv)
    folder = options.output or Path("compare") / options.preset
    from megatron_came.compare import experiment  # with PyTorch: after the help

    return status_of(
        lambda: experiment.run(options, folder),
        "megatron-came compare: ",
        remedy="name another --output",
        place=folder,
    )


def _parser() -> argparse.ArgumentParser:
    presets = "\n".join(f"  {name:<12} {preset.about}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="megatron-came compare",
        description="Train one model from the same weights on the same data with several\n"
        "optimizers, rates and seeds, in plain PyTorch. Runs that are finished are\nnot repeated.",
        epilog=f"presets:\n{presets}\n\nan optimizer is came, adamw, adafactor, sgd, lion or muon; "
        "of came also\ncame+OPTION...: no-confidence, cautious, bias-correction, int8, bf16,\n"
        "beta2=X, beta3=X",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("preset", choices=PRESETS, metavar="PRESET", help="one of those below")
    add("--output", type=named_path, metavar="FOLDER", help="where results go (compare/PRESET)")
    add("--optimizers", nargs="+", metavar="NAME", help="instead of the preset's")
    add("--rates", nargs="+", type=float, metavar="X", help="for all optimizers")
    add("--seeds", type=int, metavar="N", help="how many, from 1 on")
    add("--batches", nargs="+", type=int, metavar="N", help="samples a step")
    add("--iterations", type=int, metavar="N", help="steps of a run")
    add("--text", nargs="+", type=named_path, default=[], metavar="PATH", help="text of your own")
    return parser

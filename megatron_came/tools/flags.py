"""``megatron-came flags``: what CAME adds to a launch of Megatron, flags and variables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_came.terminal.console import Head, show, width, wrapped

# Name, default and meaning of each variable that the launchers and the optimizer read.
_LAUNCH = (
    ("MEGATRON_CAME_CPU", "unset", "1 trains on the CPU, 0 never does; unset: where no GPU is"),
    ("OMP_NUM_THREADS", "PyTorch's", "threads of a step on a CPU; torchrun sets 1 for each rank"),
    ("TRITON_INTERPRET", "0", "1 runs Triton's kernels in its interpreter: slow, without a GPU"),
    ("NO_COLOR", "unset", "anything: no bold letters and no colours of megatron-came's commands"),
    ("COLUMNS", "the terminal's", "how wide the commands' tables and lines may be"),
)
_EXAMPLES = (
    ("OPTIMIZER", "came", "adam trains the baseline"),
    ("DATA_PATH", "made-up tokens", "dataset, as megatron-came data --output-prefix named it"),
    ("TOKENIZER_MODEL", "DATA_PATH.model", "SentencePiece model or Hugging Face folder"),
    ("VOCAB_FILE", "unset", "GPT-2's vocab.json"),
    ("MERGE_FILE", "unset", "GPT-2's merges.txt"),
    ("OUTPUT", "output/NAME-OPTIMIZER", "folder of checkpoints, logs and the index of the data"),
    ("CHECKPOINTS", "OUTPUT/checkpoints", "checkpoints elsewhere"),
    ("TENSORBOARD", "OUTPUT/tensorboard", "TensorBoard's logs elsewhere"),
    ("TRAIN_ITERS", "the recipe's", "iterations; decay and warm-up shrink with a shorter run"),
    ("MICRO_BATCH_SIZE", "the recipe's", "sequences that a GPU takes at a time"),
    ("GLOBAL_BATCH_SIZE", "the recipe's", "sequences of a step, over all GPUs"),
    ("MEGATRON_LM", "unset", "checkout of Megatron-LM whose pretrain_gpt.py is to run"),
    ("GPUS_PER_NODE", "8", "ranks on a machine, of the data-parallel scripts"),
    ("MASTER_PORT", "29500", "port on which the machines of a SLURM job meet"),
    ("DRY_RUN", "0", "1 prints the command and does nothing"),
    ("SMOKE", "0", "1 runs a few iterations of a shrunken model on whatever is there"),
)


def came_flags() -> list[argparse.Action]:
    """Ask the code that adds CAME's flags to Megatron's parser which they are."""
    from megatron_came.megatron.arguments import with_flags

    parser = argparse.ArgumentParser(add_help=False)
    optimizer = parser.add_argument("--optimizer", choices=["adam", "sgd"])
    with_flags(lambda parser: parser)(parser)
    return [action for action in parser._actions if action is not optimizer]


def _flag(action: argparse.Action) -> tuple[str, str, str]:
    values = "|".join(map(str, action.choices or ())) or action.metavar
    default = "off" if action.nargs == 0 else action.default
    meaning = (action.help or "").replace("%%", "%").partition(" (default: ")[0]
    name = action.option_strings[0] + (f" {values}" if values else "")
    return name, "" if default is None else str(default), meaning


def text(columns: int) -> list[str]:
    """List flags and variables, in lines of at most so many columns."""
    lines: list[str] = []
    for title, entries in (
        ("Flags of --optimizer came, with their defaults", map(_flag, came_flags())),
        ("Environment variables of launches and commands", _LAUNCH),
        ("Environment variables of the scripts in examples/", _EXAMPLES),
    ):
        lines += [*([""] if lines else []), Head(title)]
        for name, default, meaning in entries:
            lines.append(f"  {name}  ({default})" if default else f"  {name}")
            lines += wrapped(f"      {meaning}", columns)
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-came flags",
        description="List the flags that --optimizer came adds to a launch of Megatron, and the "
        "environment variables that launches, commands and examples read.",
    )
    parser.parse_args(argv)
    show(text(width()))
    return 0

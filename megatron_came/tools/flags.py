"""``megatron-came flags``: what CAME adds to a launch of Megatron, flags and variables."""

import argparse
from collections.abc import Iterable, Mapping, Sequence

from megatron_came.terminal.console import Head, show, width, wrapped
from megatron_came.terminal.quiet import quiet
from megatron_came.versions import SUPPORTED

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
    """The flags that this package adds to Megatron's parser, from the code that adds them."""
    from megatron_came.megatron import arguments
    from megatron_came.memory import report

    parser = argparse.ArgumentParser(add_help=False)
    optimizer = parser.add_argument("--optimizer", choices=["adam", "sgd"])  # gets a choice more
    for add in (arguments.with_flags, report.with_flags):  # they wrap one that adds flags
        add(lambda parser: parser, parser)
    return [action for action in parser._actions if action is not optimizer]


def _flag(action: argparse.Action) -> tuple[str, str, str]:
    values = "|".join(map(str, action.choices or ())) or action.metavar
    default = "off" if action.nargs == 0 or action.default is None else action.default
    meaning = (action.help or "").replace("%%", "%").partition(" (default: ")[0]
    name = action.option_strings[0] + (f" {values}" if values else "")
    return name, "" if default is None else str(default), meaning


def text(columns: int) -> list[str]:
    """List flags and variables, in lines of at most so many columns."""
    return _listed(
        {
            "Flags of --optimizer came, with their defaults": map(_flag, came_flags()),
            "Environment variables of launches and commands": _LAUNCH,
            "Environment variables of the scripts in examples/": _EXAMPLES,
        },
        columns,
    )


def replaced(columns: int) -> list[str]:
    """List the names of Megatron's that are replaced, likewise."""
    from megatron_came import memory
    from megatron_came.cpu_megatron.install import REPLACEMENTS as OF_CPU
    from megatron_came.megatron.install import REPLACEMENTS

    tables = {
        "Replaced for --optimizer came": REPLACEMENTS,
        "Replaced on a machine without a GPU": OF_CPU,
        "Replaced for memory": memory.REPLACEMENTS,
    }
    return _listed(
        {
            title: (
                (
                    row.target,
                    "" if row.releases == SUPPORTED else ", ".join(row.releases),
                    f"by {row.by}: {row.why}",
                )
                for row in rows
            )
            for title, rows in tables.items()
        },
        columns,
    )


def _listed(sections: Mapping[str, Iterable[tuple[str, str, str]]], columns: int) -> list[str]:
    """List names with a remark and a meaning, each section under its title."""
    lines: list[str] = []
    for title, entries in sections.items():
        lines += [*([""] if lines else []), *map(Head, wrapped(title, columns))]
        for name, remark, meaning in entries:
            head = f"  {name}  ({remark})" if remark else f"  {name}"
            lines += wrapped(head, columns, hang="    ", whole=False)
            lines += wrapped(f"      {meaning}", columns, whole=False)
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-came flags",
        description="List the flags that --optimizer came adds to a launch of Megatron, and the "
        "environment variables that launches, commands and examples read.",
    )
    parser.add_argument(
        "--replaced",
        action="store_true",
        help="list instead the names of Megatron's that are replaced: by what and why, and in "
        "which releases",
    )
    options = parser.parse_args(argv)
    with quiet():
        lines = replaced(width()) if options.replaced else text(width())
    show(lines)
    return 0

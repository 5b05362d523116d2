"""The command line of ``megatron-came bench``."""

import argparse

from megatron_came.bench.shapes import MODELS
from megatron_came.terminal.paths import named_path
from megatron_came.terminal.sentences import status_of

_MOST = 10**6  # of layers, ranks or steps


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    if int(text) > _MOST:
        raise argparse.ArgumentTypeError(f"{text} is too large: give {_MOST} at most")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-came bench",
        description="Time a step of CAME beside a step of other optimizers, fp32, same gradients.",
    )
    add = parser.add_argument
    help = f"one of {', '.join(MODELS)} (default: gpt2-small)"
    add("--model", choices=MODELS, default="gpt2-small", metavar="MODEL", help=help)
    add("--layers", type=_positive, help="instead of the model's own number")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    help = "time what one of so many data-parallel ranks computes; its collectives are counted and"
    add("--ranks", type=_positive, default=1, help=f"{help} cost nothing (a fake process group)")
    add("--steps", type=_positive, default=15, help="timed ones (default: 15)")
    help = "words of contenders' names (default: all; their states are in memory together)"
    add("--only", nargs="+", metavar="NAME", help=help)
    help = "time whole iterations of Megatron instead, with CAME and with Adam, on so many --ranks;"
    add("--iteration", action="store_true", help=f"{help} flags after -- go to Megatron")
    add("flags", nargs="*", metavar="-- FLAG", help=argparse.SUPPRESS)
    add("--json", type=named_path, metavar="FILE", help="write the results there")
    return parser


def main(argv: list[str]) -> int:
    """Run the benchmark; return the exit status."""
    options = _parser().parse_args(argv)
    from megatron_came.bench import timing  # its imports take seconds, which the help need not

    return status_of(lambda: timing.run(options), "megatron-came bench: ", ValueError, RuntimeError)

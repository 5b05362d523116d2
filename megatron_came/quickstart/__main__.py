"""``python -m megatron_came.quickstart``, the program of ``make quickstart``."""

import sys

from megatron_came.terminal.console import open_streams
from megatron_came.terminal.interrupts import in_one_line


def _run() -> int:
    from megatron_came.quickstart.command import main  # imports PyTorch, which takes a while

    return main()


if __name__ == "__main__":
    open_streams()
    sys.exit(in_one_line(_run, "Interrupted: run it again to go on from here."))

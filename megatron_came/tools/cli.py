"""The command ``megatron-came``."""

from __future__ import annotations

import sys

_USAGE = """\
usage: megatron-came COMMAND ...

commands:
  bench                time a step of CAME beside a step of other optimizers
  data INPUT ...       make a dataset for Megatron of text
  inspect CHECKPOINT   list what a checkpoint of Megatron holds
  memory FLAGS...      predict the memory of every GPU from the flags of a launch
  patch CHECKOUT       make --optimizer came work in a Megatron-LM checkout's own pretrain_gpt.py"""


def main() -> int:
    """Run the command that the command line names; return its exit status."""
    command, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    if command == "bench":
        from megatron_came.tools.bench import command as bench

        return bench.main(rest)
    if command == "data":
        from megatron_came.tools import prepare_data

        return prepare_data.main(rest)
    if command == "inspect":
        from megatron_came.tools import inspect_checkpoint

        return inspect_checkpoint.main(rest)
    if command == "memory":
        from megatron_came.tools import memory

        return memory.main(rest)
    if command == "patch":
        from megatron_came.tools import patch_checkout

        return patch_checkout.main(rest)
    print(f"megatron-came: there is no command {command}.\n{_USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

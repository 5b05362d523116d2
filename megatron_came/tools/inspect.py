"""``megatron-came inspect CHECKPOINT``: what a checkpoint of Megatron holds, and if it is sound.

Nothing in a checkpoint is run: see :mod:`megatron_came.checkpoint_files`.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from typing import TYPE_CHECKING

from megatron_came.checkpoint_files.errors import CheckpointError, NoCheckpointError
from megatron_came.terminal.console import show, wrapped
from megatron_came.terminal.paths import named_path
from megatron_came.terminal.sentences import reason_of

# What needs PyTorch is imported in functions, after the help.
if TYPE_CHECKING:
    from megatron_came.checkpoint_files.folder import Checkpoint


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-came inspect", description="List what a checkpoint of Megatron holds."
    )
    help = "folder of --save, or of one iteration in it"
    parser.add_argument("checkpoint", type=named_path, help=help)
    parser.add_argument("--summary", action="store_true", help="leave out the single tensors")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="prove that it is what was saved, and name what is damaged; the exit status is then "
        "0 if nothing is damaged and 1 otherwise",
    )
    options = parser.parse_args(argv)
    from megatron_came.checkpoint_files.folder import find, opened
    from megatron_came.tools.checkpoints import listing

    try:
        with opened(find(options.checkpoint)) as checkpoint:
            if options.verify:
                return _verify(checkpoint)
            for line in listing.report(checkpoint, details=not options.summary):
                _print(line)
    except (CheckpointError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EPIPE, errno.ENOSPC):  # of what is printed
            raise
        said = str(error)
        if isinstance(error, OSError):
            name = error.filename or options.checkpoint
            said = f"{name} cannot be read ({reason_of(error)}): name another."
        print(f"megatron-came inspect: {said}", file=sys.stderr)
        # What --verify cannot read is damaged; where there is nothing, a wrong name was given.
        is_damaged = options.verify and not isinstance(error, NoCheckpointError)
        return 1 if is_damaged else 2
    return 0


def _verify(checkpoint: Checkpoint) -> int:
    from megatron_came.tools.checkpoints import listing
    from megatron_came.tools.checkpoints.verifying import verify

    verdict = verify(checkpoint)
    for line in (*listing.head(checkpoint), ""):
        _print(line)
    for damage in verdict.damages:
        _print(f"damaged: {damage}")
    for remark in verdict.remarks:
        _print(remark)
    if not verdict.damages:
        _print("It is sound." if verdict.is_proved else "No damage was found.")
        return 0
    _print(f"It is damaged: {_remedy(checkpoint, only_main=verdict.is_of_main_weights)}.")
    return 1


def _print(line: str) -> None:
    # In a pipe or a file that nobody gives a width, a line is a tensor or a sentence.
    is_fitted = sys.stdout.isatty() or bool(os.environ.get("COLUMNS"))
    show(wrapped(line, hang="    ", whole=False) if is_fitted else [line])


def _remedy(checkpoint: Checkpoint, *, only_main: bool) -> str:
    earlier = "resume from an earlier iteration with --ckpt-step ITERATION"
    if only_main and checkpoint.folder.is_distributed:
        has_buckets = any(tensor.is_bucket for tensor in checkpoint.tensors)
        if has_buckets or not checkpoint.has_summary:  # of Megatron-FSDP: repair takes neither
            return f"{earlier}, or start the optimizer afresh from its weights with --no-load-optim"
        return (
            f"{earlier}, or make its main weights anew from the model's with megatron-came repair "
            f"{checkpoint.folder.path} OUTPUT (Megatron 0.16 to 0.19.2 saves fully reshardable "
            "checkpoints so, NVIDIA/Megatron-LM#5077)"
        )
    return f"{earlier}, or take its files from a copy"

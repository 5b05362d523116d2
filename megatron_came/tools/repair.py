"""``megatron-came repair CHECKPOINT OUTPUT``: main weights made anew from the model's weights."""

import argparse
import errno
from pathlib import Path

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.terminal.paths import named_path
from megatron_came.terminal.sentences import CommandError, reason_of, status_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # also where the file that is read is named


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-came repair",
        description="Write a copy of a checkpoint in which main weights that are damaged are made "
        "anew from the model's weights, and momentum that is lost with them begins at zero. Such "
        "are the fully reshardable checkpoints that Megatron 0.16 to 0.19.2 saved shifted "
        "(NVIDIA/Megatron-LM#5077).",
    )
    help = "folder of --save, or of one iteration in it"
    parser.add_argument("checkpoint", type=named_path, help=help)
    help = "folder to write, for --load; must not be there"
    parser.add_argument("output", type=named_path, help=help)
    options = parser.parse_args(argv)
    from megatron_came.tools.checkpoints.copying import repair  # after the help: needs PyTorch

    lines: list[str] = []

    def work() -> None:
        try:
            lines.extend(repair(options.checkpoint, options.output))
        except BrokenPipeError:  # of who reads what is said
            raise
        except OSError as error:
            at = Path(error.filename or options.output)
            if not at.is_relative_to(options.output) and error.errno not in _FULL:
                raise
            raise CommandError(
                f"{options.output} cannot be written ({reason_of(error)}), and nothing was: name a "
                "folder where there is room."
            ) from error

    said = "megatron-came repair: ", CheckpointError
    status = status_of(work, *said, status=1, remedy="name another checkpoint")
    for line in lines:
        print(line)
    return status

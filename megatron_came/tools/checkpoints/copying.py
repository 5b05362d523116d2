"""The repaired copy of a checkpoint."""

import shutil
import stat
from pathlib import Path

from megatron_came.checkpoint_files.errors import CheckpointError, printable
from megatron_came.checkpoint_files.folder import TRACKER, Checkpoint, Folder, find, opened
from megatron_came.core import records
from megatron_came.terminal.children import signals_held_back
from megatron_came.tools.checkpoints import repairing
from megatron_came.tools.checkpoints.listing import progress, word
from megatron_came.tools.checkpoints.proofs import pairs
from megatron_came.tools.checkpoints.verifying import verify

_WEIGHTS = "start afresh from its weights with --no-load-optim"


def repair(source: Path, output: Path) -> list[str]:
    """Write a repaired copy; returns the lines that say what was lost.

    Raises:
        CheckpointError: nothing is damaged, or more than can be made anew.
        OSError: the copy cannot be written.
    """
    if output.exists():
        raise CheckpointError(f"{output} is there already: name a folder that is not.")
    folder = find(source)
    with opened(folder) as checkpoint:
        _refuse(checkpoint)
        text = checkpoint.common.get(records.KEY)
        record = None if text is None else records.unpack(text)
        if not repairing.losses(checkpoint, record):
            raise CheckpointError(f"{folder.path} is not damaged, so nothing was written: load it.")
    try:
        return _written(folder, record, output)
    except BaseException:  # Ctrl-C too
        with signals_held_back():
            shutil.rmtree(output, ignore_errors=True)
        raise


def _written(folder: Folder, record: records.Record | None, output: Path) -> list[str]:
    """Write the copy and repair it; return the lines that say what was lost."""
    copy = Folder(output / folder.path.name)
    _copy(folder.path, copy.path)
    with opened(copy) as checkpoint:
        losses = repairing.losses(checkpoint, record)
        repairing.apply(losses)
        if record is not None:
            repairing.renew_digests(checkpoint, record)
    with opened(copy) as checkpoint:  # anew: its files are others now
        wrong = verify(checkpoint).damages
        iteration = checkpoint.common["iteration"]
    if wrong:
        raise CheckpointError(
            f"a copy of {folder.path} would still be damaged, so nothing was written: {wrong[0]}."
        )
    name = "release" if folder.path.name == "release" else str(iteration)
    (output / TRACKER).write_text(name)
    momenta = sum(bool(loss.momentum) for loss in losses)
    return [
        *(printable(loss.line()) for loss in losses),
        f"{output} holds iteration {iteration} with {sum(loss.numel for loss in losses)} main "
        f"weights made anew, in {len(losses)} parts, of which {momenta} have lost their momentum; "
        "factors and the model's weights are as they were: give it to --load.",
    ]


def _refuse(checkpoint: Checkpoint) -> None:
    """Raise what repair cannot do anything about."""
    path, optimizer = checkpoint.folder.path, checkpoint.args.get("optimizer")
    if not checkpoint.folder.is_distributed:
        raise CheckpointError(
            f"{path} is of --ckpt-format torch, whose main weights have no names: {_WEIGHTS}."
        )
    if optimizer != "came":
        raise CheckpointError(
            f"{path} is of --optimizer {word(optimizer)}, whose other state is lost "
            f"with the main weights: {_WEIGHTS}."
        )
    if checkpoint.args.get("fp8_param_gather"):
        raise CheckpointError(
            f"{path} has weights in fp8, of which main weights cannot be made anew: if it is "
            "damaged, resume from an earlier iteration."
        )
    verdict = verify(checkpoint)
    if verdict.damages and not verdict.is_of_main_weights:
        listed = f"megatron-came inspect --verify {path}"
        raise CheckpointError(
            f"{path} is damaged beyond its main weights, as {listed} lists: resume from an earlier "
            "iteration."
        )
    if not any(True for _ in pairs(checkpoint)):
        raise CheckpointError(
            f"{path} holds no main weights by name, since it is not of "
            f"--dist-ckpt-optim-fully-reshardable: if it is damaged, {_WEIGHTS}."
        )


def _copy(source: Path, target: Path) -> None:
    """Copy the files of one iteration."""
    files = sorted(path for path in source.rglob("*") if not path.is_dir())
    for path in files:  # a pipe would never end
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is no file: remove it.")
    with progress("Copying", sum(path.stat().st_size for path in files)) as advance:
        for path in files:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            advance(path.stat().st_size)

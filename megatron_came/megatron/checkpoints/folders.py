"""Folders of checkpoints that a run cannot resume from, found before Megatron opens a file.

Megatron takes a tracker file that it cannot read for the end of the run, with exit status 0, and a
missing one for a first start. Here names and sizes of files are looked at, and pickles as data.
"""

import functools
import zipfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.folder import (
    SUMMARY,
    TRACKER,
    complete,
    ends_as_archive,
    ends_as_pickle,
    says_distributed,
    summary_problem,
)
from megatron_came.checkpoint_files.legacy import OPTIMIZER_FILE
from megatron_came.checkpoint_files.stored import CheckpointTensor, Item
from megatron_came.checkpoint_files.torch_dist import METADATA, Layout, is_fsdp, read_layout
from megatron_came.megatron.rule_conditions import EMPTY, has_empty_weights
from megatron_came.megatron.sharding import chain_of
from megatron_came.rules import Settings

_REMOVE = "or remove the folder's contents to start from scratch"


def folder_problem(load_dir: Any, args: Any) -> str | None:
    """Say in one sentence why a run cannot resume from the folder of ``--load``, or None.

    None also where there is nothing to resume from, which is how every first start looks: launch
    scripts give the same folder to ``--load`` and ``--save``.
    """
    if _is_elsewhere(load_dir, args) or "://" in str(load_dir):
        return None  # in an object store Megatron looks by itself
    folder, step = Path(str(load_dir)), getattr(args, "ckpt_step", None)
    try:
        place = Path(folder_to_load(load_dir, args))
        if place != folder and step and tracked(place) != str(step):
            return (
                f"--ckpt-step {step} with --non-persistent-ckpt-type global: {place} holds a newer "
                f"checkpoint, of iteration {tracked(place)}, which Megatron would take all the "
                "same: move that folder away."
            )
        has_fsdp = bool(getattr(args, "use_megatron_fsdp", False))
        problem = _problem(place, step, has_fsdp)
        if problem is None and tracked(place) is None and not step:
            problem = _no_weights(args)
    except OSError as error:
        place = folder
        problem = (
            f": {error.filename or folder} cannot be read ({error.strerror}): let the user of this "
            "run read it, or resume from a copy."
        )
    if problem is None or place == folder:
        return problem and f"--load {folder}{problem}"
    # A second remedy, in place of the sentence's full stop.
    return f"{place}{problem[:-1]}; or move that folder away, to go on from --load {folder}."


def _is_elsewhere(load_dir: Any, args: Any) -> bool:
    """Whether no folder of ``--load`` is read: each rank has local checkpoints of its own."""
    return load_dir is None or args.non_persistent_ckpt_type not in (None, "global")


def folder_to_load(load_dir: Any, args: Any) -> str:
    """The folder with the checkpoint that Megatron takes: ``--load``, or one saved in between.

    It takes the newer one of both, even where ``--ckpt-step`` names another.
    """
    if args.non_persistent_ckpt_type != "global" or "://" in str(load_dir):
        return str(load_dir)
    between = getattr(args, "non_persistent_global_ckpt_dir", None) or f"{load_dir}/non_persistent"
    newest, step = tracked(between), getattr(args, "ckpt_step", None)
    if newest is None:
        return str(load_dir)
    # Megatron counts a release as iteration 0, and none as -1.
    named = str(step or tracked(load_dir) or -1).replace("release", "0")
    try:
        return str(between if int(newest) >= int(named) else load_dir)
    except ValueError:  # one of them names no iteration
        return str(load_dir if newest.isdigit() else between)


def _no_weights(args: Any) -> str | None:
    if not has_empty_weights(Settings(args)):
        return None
    return (
        f" holds no checkpoint, which alone would fill weights with {EMPTY}: leave them "
        "out for the first start."
    )


def tracked(load_dir: Any) -> str | None:
    """What Megatron's tracker file names as the latest checkpoint of a folder; None without it."""
    tracker = Path(str(load_dir)) / TRACKER
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else None


def _problem(folder: Path, step: int | None, has_fsdp: bool) -> str | None:
    if folder.exists() and not folder.is_dir():
        return " is a file: name the folder with the checkpoints of all iterations."
    if step == 0:
        return (
            ": --ckpt-step 0 is no checkpoint, and Megatron would take the latest one: name "
            f"another ({_there(folder)}), or leave it out."
        )
    named = tracked(folder)
    # Python refuses to read numbers of thousands of digits; iterations have far fewer.
    is_number = named is not None and named.isascii() and named.isdigit() and len(named) < 20
    if named not in (None, "release") and not is_number:  # --ckpt-step does not help
        shown = f"holds {named[:40]!r}" if named else "is empty"
        return (
            f": {TRACKER} {shown}, and no iteration: write the number of a complete checkpoint to "
            f"it ({_there(folder)}), {_REMOVE}."
        )
    if step:
        return _iteration_problem(folder, f"iter_{step:07d}", f"--ckpt-step {step}", has_fsdp)
    if named is None:
        found = complete(folder)
        if not found:
            return None
        newest = (_numbers(found) or found)[-1]
        return (
            f" holds checkpoints but no {TRACKER}, which says where to resume: write {newest} to "
            f"it ({_there(folder)}), {_REMOVE}."
        )
    name = f"iter_{int(named):07d}" if is_number else named
    return _iteration_problem(folder, name, f"its {TRACKER}", has_fsdp)


def _iteration_problem(folder: Path, name: str, named_by: str, has_fsdp: bool) -> str | None:
    where = folder / name
    if not where.is_dir():
        return (
            f": {named_by} names the checkpoint {name}, which is not there: name another with "
            f"--ckpt-step ({_there(folder)}), {_REMOVE}."
        )
    metadata = where / METADATA
    is_legacy = any(where.glob("mp_rank_*"))
    if has_fsdp and (is_legacy or says_distributed(where)):
        return (
            f": {name} is of --ckpt-format {'torch' if is_legacy else 'torch_dist'}, and "
            "--use-megatron-fsdp loads fsdp_dtensor alone: go on without that, or name another "
            "checkpoint."
        )
    # Megatron tells torch_dist by its metadata.json, which fsdp_dtensor does not have.
    if not (has_fsdp and metadata.is_file()) and not says_distributed(where):
        if metadata.is_file() and _is_of_fsdp(where):
            return (
                f": {name} is of --ckpt-format fsdp_dtensor, which --use-megatron-fsdp alone "
                "loads: add that, or name another checkpoint."
            )
        if metadata.is_file():
            return _damaged(folder, where / SUMMARY, "is missing")
        if is_legacy:
            return None  # each rank looks for its own file later: see :func:`missing_file`
        return _damaged(folder, where, "holds no complete checkpoint of Megatron")
    if not metadata.is_file():
        return _damaged(folder, metadata, "is missing")
    if not has_fsdp and (problem := summary_problem(where)):
        return _damaged(folder, where / SUMMARY, problem)
    return None if ends_as_pickle(metadata) else _damaged(folder, metadata, "is truncated")


def _is_of_fsdp(where: Path) -> bool:
    try:
        return is_fsdp(layout_of(str(where)).objects)
    except CheckpointError:  # what cannot be read says no format
        return False


@functools.lru_cache(1)
def layout_of(folder: str) -> Layout:
    """Return what a distributed checkpoint says of itself; nothing, of files of one rank each.

    It may be large, and is kept until the load ends.

    Raises:
        CheckpointError: it cannot be read, or names what Megatron does not write.
    """
    path = Path(folder)
    # Quick: Megatron unpickles the same right afterwards, in C.
    return read_layout(path, quick=True) if path.is_dir() else Layout({}, {})


def tensors_in(folder: str) -> list[CheckpointTensor]:
    """Return what a distributed checkpoint says of its tensors; see above."""
    return list(layout_of(folder).tensors.values())


def shapes_in(folder: str) -> dict[str, tuple[int, ...]]:
    """Return their shapes by name."""
    return {each.name: each.shape for each in tensors_in(folder)}


def misread(load_dir: Any, args: Any, *, opening: bool = False) -> str | None:
    """Say in one sentence what this rank cannot read of the checkpoint of ``--load``, or None.

    ``opening`` opens what it holds, and not its metadata alone; elements of tensors are not read.
    """
    if _is_elsewhere(load_dir, args):
        return None
    try:
        folder = name_of(load_dir, args, return_base_dir=True)  # needs no groups of ranks
        is_distributed = _has_metadata(Path(folder))
        files = [] if is_distributed or not opening else _own_files(name_of(load_dir, args))
    except (OSError, TypeError, ValueError):  # nothing to resume from
        return None
    try:
        layout = layout_of(folder) if is_distributed else Layout({}, {})
        # What cannot be read raises here.
        for item in (*layout.objects.values(), *files) if opening else ():
            item.load()
        for tensor in layout.tensors.values() if opening else ():
            for chunk in tensor.chunks:
                with tensor.opened(chunk):
                    pass
    except (CheckpointError, OSError) as error:
        return str(error)
    if opening and (gap := next(layout.gaps(), None)):
        return f"{folder}/{gap}: take it from a copy, or another iteration (--ckpt-step)."
    return None


def rewritten(file: str, *, is_legacy: bool) -> str | None:
    """Name the file whose pickle has another checksum than was written; PyTorch does not look.

    Raises:
        CheckpointError: it cannot be read.
    """
    if is_legacy:
        items: list[Item | None] = [*_own_files(file)]
    else:
        layout = layout_of(file)
        items = [*layout.objects.values()] if is_fsdp(layout.objects) else [layout.common]
    return next((item.name for item in items if item is not None and item.is_wrong()), None)


def _own_files(model: str) -> list[Item]:
    """What a rank has of a ``torch`` checkpoint, without files of times before checksums."""
    beside = Path(model).with_name(OPTIMIZER_FILE)
    return [Item(file) for file in (Path(model), beside) if zipfile.is_zipfile(file)]


def missing_file(load_dir: Any, args: Any, optimizer: Any = None) -> str | None:
    """Look for the file of a ``torch`` checkpoint that this rank is going to read; see above.

    It is that with the model, or with the state of a distributed ``optimizer``, if one is given.
    """
    from megatron.core import mpu
    from megatron.training import checkpointing

    if _is_elsewhere(load_dir, args):
        return None
    if not dist.is_initialized() or not mpu.model_parallel_is_initialized():
        return None  # a file's name has the rank in it
    try:
        base, file = (name_of(load_dir, args, return_base_dir=each) for each in (True, False))
    except (OSError, TypeError, ValueError):  # nothing to resume from
        return None
    if optimizer is None:
        return None if _has_metadata(Path(base)) else legacy_problem(load_dir, file)
    # One rank reads it for its data-parallel group.
    if not args.use_distributed_optimizer or not any(
        not each.is_stub_optimizer and each.data_parallel_group.rank() == 0
        for each in chain_of(optimizer)
    ):
        return None
    beside: str = checkpointing.get_distributed_optimizer_checkpoint_name(file)
    return legacy_problem(load_dir, beside)


def _has_metadata(folder: Path) -> bool:
    """Whether ranks share the files of a checkpoint."""
    return says_distributed(folder) or (folder / METADATA).is_file()


def name_of(load_dir: Any, args: Any, *, return_base_dir: bool = False) -> str:
    """Megatron's name of this rank's file of the checkpoint to load, or of its folder.

    Raises:
        ValueError: the tracker names no iteration.
    """
    from megatron.training import checkpointing

    load_dir = folder_to_load(load_dir, args)
    named = str(getattr(args, "ckpt_step", None) or tracked(load_dir))
    iteration = (0, True) if named == "release" else (int(named), False)  # is it a release?
    name: str = checkpointing.get_checkpoint_name(
        load_dir, *iteration, return_base_dir=return_base_dir
    )
    return name


def legacy_problem(load_dir: Any, name: str) -> str | None:
    """Say in one sentence that a file of a ``torch`` checkpoint of ``--load`` is gone or cut short.

    None if it is there.
    """
    folder, file = Path(str(load_dir)), Path(name)
    if file.is_file() and ends_as_archive(file):
        return None
    what = "is truncated or not PyTorch's" if file.is_file() else "is missing"
    return f"--load {folder}{_damaged(folder, file, what)}"


def _damaged(folder: Path, path: Path, what: str) -> str:
    return (
        f": {path.relative_to(folder)} {what}: take it from a copy, or resume from another "
        f"checkpoint with --ckpt-step ITERATION ({_there(folder)})."
    )


def _there(folder: Path) -> str:
    """Name the complete checkpoints of a folder."""
    found = complete(folder)
    numbers = _numbers(found)
    if not numbers:
        return "complete there: " + ("release alone" if found else "none")
    shown = numbers if len(numbers) < 6 else [*numbers[:2], "...", *numbers[-2:]]
    return f"complete there: {', '.join(shown)}"


def _numbers(names: list[str]) -> list[str]:
    return [name.removeprefix("iter_").lstrip("0") or "0" for name in names if name != "release"]

"""Folders of checkpoints that a run cannot resume from, found before Megatron opens a file.

Megatron takes a tracker file that it cannot read for the end of the run, with exit status 0, and a
missing one for a first start. Here only names and sizes of files are looked at.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
_REMOVE = "or remove the folder's contents to start from scratch"

# What torch.save(..., _use_new_zipfile_serialization=False) begins with, as old converters write.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def folder_problem(load_dir: Any, args: Any) -> str | None:
    """Say in one sentence why a run cannot resume from a folder, or None.

    None also where there is nothing to resume from, which is how every first start looks: launch
    scripts give the same folder to ``--load`` and ``--save``.

    Args:
        load_dir: what ``--load`` names.
        args: Megatron's arguments of this run.
    """
    if load_dir is None or "://" in str(load_dir) or args.non_persistent_ckpt_type is not None:
        return None
    folder = Path(str(load_dir))
    try:
        return _problem(folder, getattr(args, "ckpt_step", None), args)
    except OSError as error:
        return (
            f"--load {folder}: {error.filename or folder} cannot be read ({error.strerror}): let "
            "the user of this run read it, or resume from a copy."
        )


def tracked(load_dir: Any) -> str | None:
    """What Megatron's tracker file names as the latest checkpoint of a folder; None without it."""
    tracker = Path(str(load_dir)) / TRACKER
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else None


def _problem(folder: Path, step: int | None, args: Any) -> str | None:
    if folder.exists() and not folder.is_dir():
        return f"--load {folder} is a file: name the folder with the checkpoints of all iterations."
    if step:
        return _iteration_problem(folder, f"iter_{step:07d}", f"--ckpt-step {step}", args)
    named = tracked(folder)
    if named is None:
        complete = _complete(folder)
        if not complete:
            return None
        if "release" in complete and len(complete) == 1:
            return _no_tracker(folder, "release")
        return _no_tracker(folder, _numbers(complete)[-1])
    if named == "release":
        return _iteration_problem(folder, "release", f"its {TRACKER}", args)
    if not (named.isascii() and named.isdigit()):
        shown = f"holds {named[:40]!r}" if named else "is empty"
        return (
            f"--load {folder}: {TRACKER} {shown}, and no iteration: write the number of a "
            f"complete checkpoint to it ({_there(folder)}), {_REMOVE}."
        )
    return _iteration_problem(folder, f"iter_{int(named):07d}", f"its {TRACKER}", args)


def _no_tracker(folder: Path, newest: str) -> str:
    return (
        f"--load {folder} holds checkpoints but no {TRACKER}, which says where to resume: write "
        f"{newest} to it ({_there(folder)}), {_REMOVE}."
    )


def _iteration_problem(folder: Path, name: str, named_by: str, args: Any) -> str | None:
    place = folder / name
    if not place.is_dir():
        return (
            f"--load {folder}: {named_by} names the checkpoint {name}, which is not there: name "
            f"another with --ckpt-step ({_there(folder)}), {_REMOVE}."
        )
    if _is_distributed(place):
        metadata = place / ".metadata"
        if not metadata.is_file():
            return _damaged(folder, metadata, "is missing")
        return None if _is_pickle(metadata) else _damaged(folder, metadata, "is truncated")
    if (place / ".metadata").is_file():
        return _damaged(folder, place / "metadata.json", "is missing")
    if any(place.glob("mp_rank_*")):
        return None
    return _damaged(folder, place, "holds no complete checkpoint of Megatron")


def legacy_problem(load_dir: Any, files: list[str]) -> str | None:
    """Say in one sentence which file of a ``torch`` checkpoint is gone or cut short, or None.

    Args:
        load_dir: what ``--load`` names.
        files: what this rank is going to read.
    """
    for file in map(Path, files):
        if not file.is_file():
            return _damaged(Path(str(load_dir)), file, "is missing")
        if not _is_pytorchs(file):
            return _damaged(Path(str(load_dir)), file, "is truncated or not PyTorch's")
    return None


def _damaged(folder: Path, place: Path, what: str) -> str:
    return (
        f"--load {folder}: {place.relative_to(folder)} {what}: take it from a copy, or resume from "
        f"another checkpoint with --ckpt-step ITERATION ({_there(folder)})."
    )


def _there(folder: Path) -> str:
    """Name the complete checkpoints of a folder."""
    complete = _complete(folder)
    numbers = _numbers(complete)
    if not numbers:
        return "complete there: " + ("release alone" if complete else "none")
    shown = numbers if len(numbers) < 6 else [*numbers[:2], "...", *numbers[-2:]]
    return f"complete there: {', '.join(shown)}"


def _numbers(names: list[str]) -> list[str]:
    return [name.removeprefix("iter_").lstrip("0") or "0" for name in names if name != "release"]


def _complete(folder: Path) -> list[str]:
    """Names of folders with checkpoints whose saving was not interrupted, in order."""
    if not folder.is_dir():
        return []
    places = [*folder.glob("iter_*[0-9]"), folder / "release"]
    return sorted(place.name for place in places if place.is_dir() and _is_complete(place))


def _is_complete(place: Path) -> bool:
    if _is_distributed(place):
        metadata = place / ".metadata"  # written last
        return metadata.is_file() and _is_pickle(metadata)
    parts = [*place.glob("mp_rank_*")]
    files = [part / "model_optim_rng.pt" for part in parts] + [*place.glob("mp_rank_*/*.pt")]
    return bool(parts) and all(file.is_file() and _is_pytorchs(file) for file in files)


def _is_pytorchs(file: Path) -> bool:
    """Whether a file ends as PyTorch's do: a zip's directory is there. Old ones have none."""
    if zipfile.is_zipfile(file):
        return True
    with file.open("rb") as data:
        return data.read(len(_OLD)) == _OLD


def _is_pickle(file: Path) -> bool:
    """Whether a file ends as a pickle does; nothing is unpickled."""
    with file.open("rb") as data:
        data.seek(max(0, file.stat().st_size - 1))
        return data.read() == b"."


def _is_distributed(place: Path) -> bool:
    """As Megatron tells the formats apart."""
    return (place / "metadata.json").is_file()

"""Where a checkpoint lies, and what it is."""

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_came.checkpoint_files import legacy
from megatron_came.checkpoint_files.archives import OLD_MAGIC, Archive, open_regular
from megatron_came.checkpoint_files.errors import REMEDY, CheckpointError, NoCheckpointError, shown
from megatron_came.checkpoint_files.names import StandIn, class_of
from megatron_came.checkpoint_files.stored import CheckpointTensor, Item
from megatron_came.checkpoint_files.torch_dist import METADATA, Layout, is_fsdp, read_layout

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILE = "model_optim_rng.pt"
SUMMARY = "metadata.json"
# What Megatron writes there, of all its releases.
_VERSION = "sharded_backend_version"
_SUMMARY = {
    "sharded_backend": "torch_dist",
    _VERSION: 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of one iteration."""

    path: Path

    @property
    def iteration(self) -> int | None:
        """As the folder's name says."""
        # Far more digits than runs need; Python refuses to read thousands of them.
        found = re.fullmatch(r"iter_([0-9]{1,12})", self.path.name)
        return int(found[1]) if found else None

    @property
    def is_distributed(self) -> bool:
        """Whether it is of format torch_dist; else it is of format torch."""
        return (self.path / METADATA).exists() or not any(self.path.glob("mp_rank_*"))


def find(path: Path) -> Folder:
    """Return the folder of one iteration: ``path`` itself, or the latest below it.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise NoCheckpointError(f"{path} is not a folder: name a checkpoint's.")
    if (path / TRACKER).exists():
        tracked = _tracked(path / TRACKER)
        # Megatron's word for weights that were converted, and not saved by a run.
        name = tracked if tracked == "release" else f"iter_{int(tracked):07d}"
        if not (path / name).is_dir():
            raise CheckpointError(
                f"{path / TRACKER} names iteration {tracked}, and there is no folder {name}: write "
                f"an iteration that is there{_among(path)} into it, or name its folder."
            )
        path = path / name
    is_distributed, is_legacy = (path / METADATA).exists(), bool(_files_of_ranks(path))
    # With --dataloader-save to the same folder mp_rank_00 holds the dataloader's files alone.
    if is_distributed and any(path.glob(f"mp_rank_*/{MODEL_FILE}")):
        raise CheckpointError(
            f"{path} holds two checkpoints, {METADATA} (torch_dist) and mp_rank_* (torch), and "
            "Megatron may load the one that is not read here: remove what belongs to one of them."
        )
    if is_distributed or is_legacy:
        return Folder(path)
    if any(path.glob("*.distcp")) or (path / SUMMARY).exists():
        raise CheckpointError(
            f"{path / METADATA} is gone, without which nobody knows what the other files hold: "
            f"{REMEDY}"
        )
    raise NoCheckpointError(
        f"{path} holds no checkpoint of Megatron: neither {METADATA} (torch_dist) nor mp_rank_* "
        f"(torch) is in it{_among(path)}."
    )


def _tracked(tracker: Path) -> str:
    with open_regular(tracker) as file:
        written = file.read(100).decode("ascii", "replace").strip()  # it may be endless
    if written == "release" or re.fullmatch(r"[0-9]{1,12}", written):
        return written
    what = f"holds {written!r:.40}" if written else "is empty"
    raise CheckpointError(
        f"{tracker} {what} where an iteration should be: write an iteration that is there"
        f"{_among(tracker.parent)} into it, or name its folder."
    )


def _among(path: Path) -> str:
    names = complete(path)
    return f" (of {', '.join(names[-3:])})" if names else ""


def complete(path: Path) -> list[str]:
    """Names of the folders below one whose saving was not interrupted, in order.

    Names and ends of files alone are looked at; nothing is unpickled.
    """
    if not path.is_dir():
        return []
    folders = [*path.glob("iter_*[0-9]"), path / "release"]
    return sorted(each.name for each in folders if each.is_dir() and _is_complete(each))


def _is_complete(folder: Path) -> bool:
    metadata = folder / METADATA  # written last
    if says_distributed(folder) or metadata.is_file():
        return metadata.is_file() and ends_as_pickle(metadata)
    of_ranks = _files_of_ranks(folder)
    # Every rank's model, be it there or not.
    files = {rank / MODEL_FILE for rank in of_ranks}.union(*of_ranks.values())
    return bool(files) and all(file.is_file() and ends_as_archive(file) for file in files)


def says_distributed(folder: Path) -> bool:
    """Whether Megatron takes a folder for one of format torch_dist."""
    return (folder / SUMMARY).is_file()


def summary_problem(folder: Path) -> str | None:
    """Say what is wrong with the file by which Megatron knows format torch_dist, or None."""
    path = folder / SUMMARY
    if not path.is_file():
        return "is missing"
    try:
        with open_regular(path) as file:
            summary = json.loads(file.read(1 << 16).decode())  # Megatron takes no BOM, either
    except CheckpointError:
        return "cannot be opened"
    except (RecursionError, ValueError):
        return "is no JSON"
    if not isinstance(summary, dict) or "sharded_backend" not in summary:
        return "has no sharded_backend"
    unknown = sorted(summary.keys() - _SUMMARY.keys())
    if unknown and _VERSION not in summary:  # which every release writes; a newer one may add some
        return f"has {shown(unknown[0])} in place of {_VERSION}"
    for key, wanted in _SUMMARY.items():
        if (found := summary.get(key, wanted)) != wanted:
            return f"has {key} {shown(found)}, and not {wanted!r}"
    return None


def ends_as_archive(file: Path) -> bool:
    """Whether a file ends as PyTorch's do: a zip's directory is there. Old ones have none."""
    if zipfile.is_zipfile(file):
        return True
    with file.open("rb") as data:
        return data.read(len(OLD_MAGIC) + 2)[2:] == OLD_MAGIC


def ends_as_pickle(file: Path) -> bool:
    """Whether a file ends as a pickle does."""
    with file.open("rb") as data:
        data.seek(max(0, file.stat().st_size - 1))
        return data.read() == b"."


@dataclass
class Checkpoint:
    """An opened checkpoint."""

    folder: Folder
    common: dict[Any, Any]  # what is no tensor: arguments, iteration, the optimizer's settings
    tensors: list[CheckpointTensor]
    # Where things other than tensors lie, by name; of format torch, its files.
    objects: dict[str, Item] = field(default_factory=dict)
    # What files of the distributed optimizer hold; of format torch alone.
    optimizers: list[Any] = field(default_factory=list)
    # What of it is not named, in sentences; see ``Layout.gaps``.
    gaps: list[str] = field(default_factory=list)

    @property
    def has_summary(self) -> bool:
        """Whether Megatron knows its format by the file ``metadata.json``."""
        return self.folder.is_distributed and not is_fsdp(self.objects)

    @property
    def args(self) -> StandIn:
        """Megatron's arguments of the run that saved it; none if they are not there."""
        args = self.common.get("args")
        return args if isinstance(args, StandIn) else class_of("argparse.Namespace")()


@contextlib.contextmanager
def opened(folder: Folder) -> Iterator[Checkpoint]:
    """Open a checkpoint, whose tensors can be read until the context ends.

    Raises:
        CheckpointError: it cannot be read.
    """
    if folder.is_distributed:
        layout = read_layout(folder.path)
        tensors = sorted(layout.tensors.values(), key=lambda tensor: tensor.name)
        whole = _common(folder.path, layout)
        yield Checkpoint(folder, whole, tensors, layout.objects, gaps=[*layout.gaps()])
        return
    checkpoint = Checkpoint(folder, {}, [])
    with contextlib.ExitStack() as stack:
        for path in _legacy_files(folder.path):
            archive = stack.enter_context(Archive(path))
            state = archive.load()
            of_optimizer = path.name == legacy.OPTIMIZER_FILE
            if not isinstance(state, dict | list if of_optimizer else dict):
                raise CheckpointError(_no_dictionary(path, state, "a dictionary"))
            item = Item(path)
            checkpoint.objects[item.name] = item
            checkpoint.tensors += legacy.tensors_of(path, archive, state)
            if of_optimizer:
                checkpoint.optimizers.append(state)
            elif not checkpoint.common:
                checkpoint.common = state  # the first rank's: all have the same
        yield checkpoint


def _no_dictionary(path: Path, state: Any, what: str) -> str:
    return f"{path} holds a {type(state).__name__} where {what} should be: {REMEDY}"


def _files_of_ranks(folder: Path) -> dict[Path, list[Path]]:
    """The files of each rank that Megatron reads; what else is there is somebody else's."""
    names = legacy.OPTIMIZER_FILE, MODEL_FILE
    return {
        rank: [rank / name for name in names if os.path.lexists(rank / name)]
        for rank in sorted(folder.glob("mp_rank_*"))
        if rank.is_dir()
    }


def _legacy_files(folder: Path) -> list[Path]:
    """The files of all ranks, each of which has one with its model."""
    files = []
    for rank, of_rank in _files_of_ranks(folder).items():
        if rank / MODEL_FILE not in of_rank:
            raise CheckpointError(
                f"{rank} holds no model file: take the checkpoint from a copy, or another "
                "iteration's folder."
            )
        files += of_rank
    return files


def _common(folder: Path, layout: Layout) -> dict[Any, Any]:
    """What is no tensor."""
    item = layout.common
    if item is None and is_fsdp(layout.objects):
        return layout.entries()
    if item is None:
        raise CheckpointError(
            f"{folder} holds no common state, neither common.pt nor common_state in "
            f"{METADATA}: {REMEDY}"
        )
    state = item.load()
    # Before 0.19 it is a file of its own, then an object among the sharded ones: a list of one.
    state = state[0] if isinstance(state, list) and state else state
    if not isinstance(state, dict):
        what = "the common state, a dictionary,"
        raise CheckpointError(_no_dictionary(item.file, state, what))
    return state

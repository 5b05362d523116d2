"""Where a checkpoint lies, and what it is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_came.checkpoint_files import legacy, torch_dist
from megatron_came.checkpoint_files.archives import Archive, open_regular
from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.records import Record
from megatron_came.checkpoint_files.stored import Stored

TRACKER = "latest_checkpointed_iteration.txt"
_COMMON = "common.pt"


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of one iteration.

    Attributes:
        path: its path.
        tracked: what the tracker file named, if the folder was found by it.
    """

    path: Path
    tracked: str | None = None

    @property
    def iteration(self) -> int | None:
        """As the folder's name says."""
        found = re.fullmatch(r"iter_([0-9]{1,12})", self.path.name)
        return int(found[1]) if found else None

    @property
    def is_distributed(self) -> bool:
        """Whether it is of format torch_dist; else it is of format torch."""
        return (self.path / torch_dist.METADATA).exists() or not any(self.path.glob("mp_rank_*"))


def find(path: Path) -> Folder:
    """Return the folder of one iteration: ``path`` itself, or the latest below it.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name a checkpoint's.")
    tracked = None
    if (path / TRACKER).exists():
        tracked = _tracked(path / TRACKER)
        name = "release" if tracked == "release" else f"iter_{int(tracked):07d}"
        if not (path / name).is_dir():
            raise CheckpointError(
                f"{path / TRACKER} names iteration {tracked}, and there is no folder {name}: write "
                f"an iteration that is there{_iterations(path)} into it, or name its folder."
            )
        path = path / name
    if (path / torch_dist.METADATA).exists() or any(path.glob("mp_rank_*")):
        return Folder(path, tracked)
    if any(path.glob("*.distcp")) or (path / "metadata.json").exists():
        raise CheckpointError(
            f"{path / torch_dist.METADATA} is gone, without which nobody knows what the other "
            "files hold: take it from a copy, or another iteration's folder."
        )
    raise CheckpointError(
        f"{path} holds no checkpoint of Megatron: neither .metadata (torch_dist) nor mp_rank_* "
        f"(torch) is in it{_iterations(path)}."
    )


def _tracked(tracker: Path) -> str:
    with open_regular(tracker) as file:
        written = file.read(100).decode("ascii", "replace").strip()
    if written == "release" or re.fullmatch(r"[0-9]{1,12}", written):
        return written
    what = f"holds {written!r:.40}" if written else "is empty"
    raise CheckpointError(
        f"{tracker} {what} where an iteration should be: write an iteration that is there"
        f"{_iterations(tracker.parent)} into it, or name its folder."
    )


def _iterations(path: Path) -> str:
    names = sorted(each.name for each in path.glob("iter_*") if each.is_dir())
    return f" (of {', '.join(names[-3:])})" if names else ""


@dataclass
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: where it lies.
        common: what is no tensor: arguments, iteration, the optimizer's settings.
        tensors: in the order of their names.
        objects: where things other than tensors lie, by name; of format torch_dist alone.
    """

    folder: Folder
    common: dict[Any, Any]
    tensors: list[Stored]
    objects: dict[str, torch_dist.Item] = field(default_factory=dict)

    @property
    def args(self) -> Record:
        """Megatron's arguments of the run that saved it; none if they are not there."""
        args = self.common.get("args")
        return args if isinstance(args, Record) else Record("argparse.Namespace")


@contextlib.contextmanager
def opened(folder: Folder) -> Iterator[Checkpoint]:
    """Open a checkpoint, whose tensors can be read until the context ends.

    Raises:
        CheckpointError: it cannot be read.
    """
    if folder.is_distributed:
        layout = torch_dist.read_layout(folder.path)
        tensors = sorted(layout.tensors.values(), key=lambda tensor: tensor.name)
        yield Checkpoint(folder, _common(folder.path, layout), list(tensors), layout.objects)
        return
    with contextlib.ExitStack() as stack:
        common: dict[Any, Any] = {}
        found: list[Stored] = []
        for path in _legacy_files(folder.path):
            archive, state = legacy.open_file(path)
            stack.callback(archive.close)
            if not isinstance(state, dict):
                raise CheckpointError(
                    f"{path} holds a {type(state).__name__} where a dictionary should be: take the "
                    "file from a copy, or another iteration's folder."
                )
            found += legacy.tensors_of(path, state)
            if not common and path.name != legacy.OPTIMIZER_FILE:
                common = state
        yield Checkpoint(folder, common, found)


def _legacy_files(folder: Path) -> list[Path]:
    """The files of all ranks.

    Raises:
        CheckpointError: a rank has no file with its model.
    """
    files = []
    for rank in sorted(folder.glob("mp_rank_*")):
        of_rank = sorted(rank.glob("*.pt"))
        if not [path for path in of_rank if path.name != legacy.OPTIMIZER_FILE]:
            raise CheckpointError(
                f"{rank} holds no model file: take the checkpoint from a copy, or another "
                "iteration's folder."
            )
        files += of_rank
    return files


def _common(folder: Path, layout: torch_dist.Layout) -> dict[Any, Any]:
    """What is no tensor: in a file of its own before megatron-core 0.19, then among objects."""
    path = folder / _COMMON
    if path.exists():
        with Archive(path) as archive:
            state = archive.load()
    else:
        named = [name for name in layout.objects if name.startswith("common_state/")]
        if not named:
            raise CheckpointError(
                f"{folder} holds no common state, neither {_COMMON} nor common_state in "
                f"{torch_dist.METADATA}: take it from a copy, or another iteration's folder."
            )
        item = layout.objects[named[0]]
        path, state = item.file, item.load()
        state = state[0] if isinstance(state, list) and state else state
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__} where the common state, a dictionary, should "
            "be: take the file from a copy, or another iteration's folder."
        )
    return state

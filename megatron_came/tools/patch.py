"""``megatron-came patch``: make ``--optimizer came`` work in a Megatron-LM checkout's own script.

The patches, one for each release, are in ``patches/``; each adds the import of
:mod:`megatron_came.hook`. ``git apply`` applies them, so the folder may be a git checkout or not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

PATCHES = Path(str(resources.files("megatron_came"))) / "patches"

_VERSION = Path("megatron/core/package_info.py")
_HELP = """\
exit status: 0 if done, or with --check if the patch is applied; 1 if with
--check it is not, but could be; 2 if the tree is refused"""


class RefusedError(Exception):
    """The tree cannot be patched; the message is a sentence for the user."""


@dataclass(frozen=True)
class Patch:
    """The patch of one release series.

    Attributes:
        path: the file.
        files: what it touches, from the root of the tree.
        before: their contents as released, as git names them.
    """

    path: Path
    files: tuple[str, ...]
    before: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Patch:
        """Read the names of the files and of their contents from a patch with full object names."""
        text = path.read_text()
        return cls(
            path,
            tuple(re.findall(r"^--- a/(.+)$", text, re.MULTILINE)),
            tuple(re.findall(r"^index ([0-9a-f]{40})\.\.", text, re.MULTILINE)),
        )


def series(tree: Path) -> str:
    """Return the release series of a Megatron-LM checkout, such as ``0.19``.

    Raises:
        RefusedError: the folder is no checkout.
    """
    try:
        text = (tree / _VERSION).read_text()
    except OSError as error:
        raise RefusedError(
            f"{tree} is no Megatron-LM checkout, for {_VERSION} cannot be read: name the folder "
            "that holds pretrain_gpt.py and megatron/."
        ) from error
    numbers = dict(re.findall(r"^(MAJOR|MINOR) *= *(\d+)$", text, re.MULTILINE))
    if len(numbers) < 2:
        raise RefusedError(f"{tree / _VERSION} does not say which release it is.")
    return f"{numbers['MAJOR']}.{numbers['MINOR']}"


def find_patch(tree: Path, patches: Path) -> Patch:
    """Return the patch for the release of a checkout.

    Raises:
        RefusedError: there is none.
    """
    known = {
        ".".join(path.stem.removeprefix("core_v").split(".")[:2]): path
        for path in sorted(patches.glob("core_v*.patch"))
    }
    if not known:
        raise RefusedError(f"the patches are missing from {patches}: install megatron-came again.")
    found = series(tree)
    if found not in known:
        raise RefusedError(
            f"{tree} is Megatron-LM {found}, and there are patches for {', '.join(known)}: check "
            "one of these out, or start the script with python -m megatron_came.launch."
        )
    return Patch.read(known[found])


class Checkout:
    """A Megatron-LM checkout and its patch.

    Attributes:
        patched: whether the patch is applied.

    Args:
        tree: its folder.
        patch: for its release.

    Raises:
        RefusedError: the files are not such that the patch could be applied or undone.
    """

    def __init__(self, tree: Path, patch: Patch) -> None:
        self.tree, self.patch = tree, patch
        undone, applied = self._apply("--reverse"), self._apply()
        if undone is None and applied is None:
            raise RefusedError(
                f"{self._names} of {tree} is not as {patch.path.stem} has it where "
                f"{patch.path.name} changes it: put its added line into the file by hand, above "
                "the first import of Megatron."
            )
        self.patched = undone is not None
        self._other = undone or applied or {}

    @property
    def _names(self) -> str:
        return ", ".join(self.patch.files)

    def refuse_if_dirty(self) -> None:
        """Make sure that the touched files hold no changes but the patch.

        Raises:
            RefusedError: they do.
        """
        for name, released in zip(self.patch.files, self.patch.before, strict=True):
            current = (self.tree / name).read_bytes()
            candidates = {self._object(name, current)}
            if self.patched:
                candidates.add(self._object(name, self._other[name]))
            committed = self._git("rev-parse", "--verify", "--quiet", f"HEAD:./{name}")
            if committed.returncode == 0:
                clean, problem = committed.stdout.decode().strip(), "has changes: commit them"
            else:
                clean, problem = (
                    released,
                    f"is not that of {self.patch.path.stem}: commit it to git",
                )
            if clean not in candidates:
                raise RefusedError(
                    f"{name} of {self.tree} {problem} or take the changes back first."
                )

    def switch(self) -> None:
        """Apply the patch, or undo it if it is applied."""
        for name, content in self._other.items():
            (self.tree / name).write_bytes(content)
        self.patched = not self.patched

    def _apply(self, *options: str) -> dict[str, bytes] | None:
        """Return the touched files' contents with the patch applied, or None if it does not fit."""
        with tempfile.TemporaryDirectory() as folder:
            for name in self.patch.files:
                copy = Path(folder, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                try:
                    copy.write_bytes((self.tree / name).read_bytes())
                except OSError as error:
                    raise RefusedError(f"{self.tree / name} cannot be read ({error}).") from error
            command = ("apply", "--whitespace=nowarn", *options, str(self.patch.path.resolve()))
            if self._git(*command, folder=Path(folder)).returncode:
                return None
            return {name: Path(folder, name).read_bytes() for name in self.patch.files}

    def _object(self, name: str, content: bytes) -> str:
        """What git would call these contents of a file of the tree."""
        answer = self._git("hash-object", "--stdin", f"--path={name}", given=content)
        return answer.stdout.decode().strip()

    def _git(
        self, *arguments: str, folder: Path | None = None, given: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        folder = (folder or self.tree).resolve()
        environment = {key: value for key, value in os.environ.items() if key[:4] != "GIT_"}
        if folder != self.tree.resolve():  # a copy is in no repository
            environment["GIT_CEILING_DIRECTORIES"] = str(folder.parent)
        return subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, input=given, capture_output=True
        )


def run(tree: Path, *, check: bool, undo: bool, patches: Path = PATCHES) -> tuple[int, str]:
    """Apply, undo or look for the patch.

    Args:
        tree: a Megatron-LM checkout.
        check: change nothing.
        undo: take the patch back.
        patches: folder of the patches.

    Returns:
        Exit status and a sentence.

    Raises:
        RefusedError: the tree is not one that can be patched.
        OSError: a file cannot be written.
    """
    if not shutil.which("git"):
        raise RefusedError("git, which applies the patch, is not installed: install it.")
    patch = find_patch(tree, patches)
    checkout = Checkout(tree, patch)
    if checkout.patched and not undo:
        return 0, f"{patch.path.name} is applied to {tree}."
    checkout.refuse_if_dirty()
    if not checkout.patched and (check or undo):
        return int(check), f"{patch.path.name} is not applied to {tree}."
    checkout.switch()
    if undo:
        return 0, f"{patch.path.name} is undone: {', '.join(patch.files)} is as it was."
    return 0, (
        f"{patch.path.name} is applied: {tree / patch.files[0]} knows --optimizer came where "
        "megatron-came is installed."
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-came patch",
        description="Make --optimizer came work in a Megatron-LM checkout's own pretrain_gpt.py.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tree", type=Path, help="folder of the checkout")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="say whether the patch is applied")
    action.add_argument("--undo", action="store_true", help="take the patch back")
    given = parser.parse_args(arguments)
    try:
        status, sentence = run(given.tree, check=given.check, undo=given.undo)
    except (RefusedError, OSError) as error:
        print(f"megatron-came patch: {error}", file=sys.stderr)
        return 2
    print(f"megatron-came patch: {sentence}")
    return status

"""``megatron-came patch``: make ``--optimizer came`` work in a Megatron-LM checkout's own script.

The patches, one for each release, are in ``patches/``. Each adds one line, the import of
:mod:`megatron_came.hook`, and says above which other it goes.
"""

import argparse
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from megatron_came.terminal.paths import named_path, write_whole
from megatron_came.terminal.sentences import CommandError, status_of

PATCHES = Path(str(resources.files("megatron_came"))) / "patches"

_VERSION = "megatron/core/package_info.py"
_SCRIPT = "pretrain_gpt.py"
_HELP = """\
exit status: 0 if done, or with --check if the patch is applied; 1 if with
--check it is not, but could be; 2 if the tree is refused"""


def find_patch(tree: Path, patches: Path = PATCHES) -> Path:
    """Return the patch for the release of a Megatron-LM checkout.

    Raises:
        CommandError: the folder is no checkout, or there is no patch for it.
    """
    # core_v0.19.0.patch is for all of 0.19.
    known = {path.stem[6:].rpartition(".")[0]: path for path in sorted(patches.glob("core_v*"))}
    if not known:
        raise CommandError(f"the patches are missing from {patches}: install megatron-came again.")
    try:
        text = (tree / _VERSION).read_text()
    except OSError as error:
        raise CommandError(
            f"{tree} is no Megatron-LM checkout, for {_VERSION} cannot be read: name the folder "
            "that holds pretrain_gpt.py and megatron/."
        ) from error
    numbers = dict(re.findall(r"^(MAJOR|MINOR) *= *(\d+)$", text, re.MULTILINE))
    if len(numbers) < 2:
        raise CommandError(f"{tree / _VERSION} does not say which release it is.")
    found = f"{numbers['MAJOR']}.{numbers['MINOR']}"
    if found not in known:
        raise CommandError(
            f"{tree} is Megatron-LM {found}, and there are patches for {', '.join(known)}: check "
            "one of these out, or start the script with python -m megatron_came.launch."
        )
    return known[found]


def switched(content: bytes, patch: Path) -> tuple[bool, bytes | None]:
    """Return whether a script holds the line of a patch, and the script with that changed.

    The script is None where the line is missing, and the one that it goes above as well.
    """
    # The added line, and the next one, which it goes above.
    hunk = re.search(rb"^\+(import .*)\n (.*)$", patch.read_bytes(), re.MULTILINE)
    if hunk is None:
        raise CommandError(f"{patch} is damaged: install megatron-came again.")
    added, below = hunk.groups()
    lines = content.splitlines(keepends=True)
    bare = [line.rstrip(b"\r\n") for line in lines]
    if added in bare:
        return True, b"".join(lines[i] for i in range(len(lines)) if bare[i] != added)
    if below not in bare:
        return False, None
    index = bare.index(below)
    end = lines[index].removeprefix(below) or b"\n"  # the line's own, \n or \r\n
    return False, b"".join([*lines[:index], added, end, *lines[index:]])


def run(tree: Path, *, check: bool, undo: bool, patches: Path = PATCHES) -> tuple[int, str]:
    """Apply, undo or look for the patch of a Megatron-LM checkout.

    Returns:
        Exit status and a sentence.

    Raises:
        CommandError: the tree is not one that can be patched.
        OSError: the script cannot be read or written.
    """
    patch, script = find_patch(tree, patches), tree / _SCRIPT
    applied, other = switched(script.read_bytes(), patch)
    if other is None:
        raise CommandError(
            f"{_SCRIPT} of {tree} is not as {patch.stem} has it where {patch.name} changes it: put "
            "its added line into the file by hand, above the first import of Megatron."
        )
    if check or applied is not undo:
        status = int(check and not applied)
        return status, f"{patch.name} is {'' if applied else 'not '}applied to {tree}."
    write_whole(script, other)
    if undo:
        return 0, f"{patch.name} is undone: {_SCRIPT} is as it was."
    return 0, (
        f"{patch.name} is applied: {script} knows --optimizer came where megatron-came is "
        "installed."
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-came patch",
        description="Make --optimizer came work in a Megatron-LM checkout's own pretrain_gpt.py.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tree", type=named_path, help="folder of the checkout")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="say whether the patch is applied")
    action.add_argument("--undo", action="store_true", help="take the patch back")
    given = parser.parse_args(arguments)

    def work() -> int:
        status, sentence = run(given.tree, check=given.check, undo=given.undo)
        print(f"megatron-came patch: {sentence}")
        return status

    remedy = "name the folder of a checkout whose files you may change"
    return status_of(work, "megatron-came patch: ", remedy=remedy, place=given.tree)

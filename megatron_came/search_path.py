"""Which ``megatron`` package a script trains with: that of the checkout in which it lies."""

import os
import sys
from pathlib import Path


def use_checkout_of(script: Path) -> Path | None:
    """Let a script find the ``megatron`` package of its own checkout, in whatever folder it lies.

    The checkout comes after the script's folder and what PYTHONPATH names, which Python searches
    first, and before all that is installed.

    Returns:
        The nearest folder above the script that holds ``megatron/core``; None if none does.
    """
    folder = script.resolve().parent
    root = next((above for above in (folder, *folder.parents) if _holds_megatron(above)), None)
    if sys.path[:1] != [str(folder)]:  # as Python puts it there for a script
        sys.path.insert(0, str(folder))
    if root is not None and root != folder:
        entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        named = {os.path.abspath(entry) for entry in entries if entry}
        working = os.getcwd()
        if sys.path[1:2] in ([""], [working]) and working not in named:
            sys.path.pop(1)  # python -m has put it there; the script itself would not have it
            sys.path.insert(_after(named), working)
        sys.path.insert(_after(named), str(root))
    return root


def _after(named: set[str]) -> int:
    """The place on the search path after the script's folder and the folders that are named."""
    places = [place for place, folder in enumerate(sys.path) if os.path.abspath(folder) in named]
    return max(places, default=0) + 1


def _holds_megatron(folder: Path) -> bool:
    return (folder / "megatron" / "core" / "__init__.py").is_file()


def other_megatron(root: Path | None) -> str | None:
    """Say in one sentence which Megatron is used, if not that of :func:`use_checkout_of`."""
    import megatron.core

    used = Path(megatron.core.__file__).parents[2].resolve()  # above megatron/core/__init__.py
    if used == root:
        return None
    version = megatron.core.__version__
    if root is None:
        return f"the script lies in no checkout: it runs with Megatron {version} of {used}."
    return (
        f"the script runs with Megatron {version} of {used}, which PYTHONPATH or its own folder "
        f"names, and not with that of its checkout {root}."
    )

"""Where other releases of Megatron lie: wheels of megatron-core, and Megatron-LM checkouts."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

# Folder with one folder for each wheel, by version, and two named packages and
# frameworks; see the Makefile.
WHEELS = "MEGATRON_HOSTS"
# Folder with Megatron-LM checkouts, by tag.
CHECKOUTS = "MEGATRON_CHECKOUTS"


def wheel(version: str) -> list[Path]:
    """The search path of a release that pip offers; skips the test if it is not there."""
    return [_folder(WHEELS, version, "make test-hosts downloads it"), *_packages()]


def frameworks() -> Path:
    """Packages of hosts with training loops of their own; skips the test if they are not there."""
    return _folder(WHEELS, "frameworks", "make test-hosts downloads them")


def checkout(tag: str) -> Path:
    """A Megatron-LM checkout; skips the test if it is not there."""
    return _folder(CHECKOUTS, tag, "name a folder that holds Megatron-LM checkouts by tag")


def copy_of(tag: str, folder: Path) -> list[Path]:
    """The search path of a copy of a checkout that needs no compiler; skips if there is none.

    The copy has the data set helpers that the installed megatron-core brings.
    """
    tree, copy = checkout(tag), folder / tag
    copy.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "Makefile", "*.so")
    shutil.copytree(tree / "megatron", copy / "megatron", ignore=ignored)
    for script in (*tree.glob("*.py"), *tree.glob("examples/*/pretrain_*.py")):
        place = copy / script.relative_to(tree)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(script, place)
    for place in importlib.util.find_spec("megatron").submodule_search_locations:
        for helpers in Path(place, "core/datasets").glob("helpers_cpp*.so"):
            shutil.copy(helpers, copy / "megatron/core/datasets")
    return [copy, *_packages()]


def _folder(variable: str, name: str, hint: str) -> Path:
    parent = os.environ.get(variable)
    if not parent:
        pytest.skip(f"{variable} is not set: {hint}")
    folder = Path(parent, name).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: {hint}")
    return folder


def _packages() -> list[Path]:
    """What older training loops import, unless it is installed with everything else."""
    parent = os.environ.get(WHEELS)
    return [Path(parent, "packages").resolve()] if parent else []

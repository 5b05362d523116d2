"""Which Megatron a script runs with, wherever in a checkout it lies."""

import os
import sys
from pathlib import Path

import megatron.core
import pytest

from megatron_came import search_path
from tests.support.running import run_python

INSTALLED = Path(megatron.core.__file__).parents[1]
SCRIPT = """\
import sys
{first}
from beside import number
from megatron.training.arguments import parse_args
import megatron.core
if __name__ == '__main__':
    print('RAN', number, parse_args().optimizer)
    print('FROM', megatron.core.__file__)
"""


def checkout(folder: Path, where: str, first: str = "") -> tuple[Path, Path]:
    """Make a checkout with the installed Megatron, and a script in one of its folders."""
    (folder / "megatron").mkdir(parents=True)
    for package in ("core", "training"):
        (folder / "megatron" / package).symlink_to(INSTALLED / package)
    script = folder / where
    script.parent.mkdir(parents=True, exist_ok=True)
    script.with_name("beside.py").write_text("number = 7\n")
    script.write_text(SCRIPT.format(first=first))
    return folder, script


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A search path that is put back."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", ["/working", "/installed"])
    monkeypatch.setattr(search_path.os, "getcwd", lambda: "/working")
    return sys.path


@pytest.mark.parametrize("where", ["examples/t5/train.py", "a/b/c/train.py", "train.py"])
def test_the_checkout_comes_before_what_is_installed(path, tmp_path, where):
    root, script = checkout(tmp_path / "checkout", where)
    assert search_path.use_checkout_of(script) == root
    nested = script.parent != root
    first = [str(script.parent), *([str(root)] if nested else [])]
    assert sys.path == [*first, "/working", "/installed"]


def test_what_pythonpath_names_comes_first(path, tmp_path, monkeypatch):
    root, script = checkout(tmp_path / "checkout", "examples/bert/train.py")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/other", "", "/more/"]))
    sys.path[1:1] = ["/other", "/more/"]
    search_path.use_checkout_of(script)
    assert sys.path == [
        *(str(script.parent), "/other", "/more/", str(root), "/working", "/installed")
    ]


def test_a_working_folder_that_pythonpath_names_stays_where_it_is(path, tmp_path, monkeypatch):
    root, script = checkout(tmp_path / "checkout", "examples/bert/train.py")
    monkeypatch.setenv("PYTHONPATH", "/working")
    search_path.use_checkout_of(script)
    assert sys.path == [str(script.parent), "/working", str(root), "/installed"]


def test_a_checkout_inside_a_checkout_is_the_nearer_one(path, tmp_path):
    checkout(tmp_path / "outer", "train.py")
    inner, script = checkout(tmp_path / "outer" / "third_party" / "inner", "tools/train.py")
    assert search_path.use_checkout_of(script) == inner


def test_a_script_outside_of_checkouts_gets_its_own_folder_first(path, tmp_path):
    script = tmp_path / "train.py"
    assert search_path.use_checkout_of(script) is None
    assert sys.path == [str(tmp_path), "/working", "/installed"]
    said = search_path.other_megatron(None)
    assert said.startswith("the script lies in no checkout: it runs with Megatron ")
    assert said.endswith(f" of {INSTALLED.parent}.")


def test_a_patched_script_in_a_folder_of_a_checkout_runs_with_its_megatron(tmp_path):
    """The launcher does so, too: see ``test_cpu_megatron``."""
    hook = "import megatron_came.hook"
    root, script = checkout(tmp_path / "checkout", "examples/t5/train.py", hook)
    done = run_python(str(script), "--optimizer", "came")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "RAN 7 came" in done.stdout
    assert f"FROM {root}" in done.stdout
    assert "runs with Megatron" not in done.stdout


@pytest.mark.matrix
def test_another_megatron_on_pythonpath_is_used_and_said(tmp_path, monkeypatch):
    root, script = checkout(tmp_path / "checkout", "examples/t5/train.py")
    other, _ = checkout(tmp_path / "other", "train.py")
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(other), before])))
    done = run_python("-m", "megatron_came.launch", str(script), "--optimizer", "came")
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"FROM {other}" in done.stdout
    assert f"of {other}, which PYTHONPATH or its own folder names, and not" in done.stdout
    assert f"with that of its checkout {root}." in done.stdout

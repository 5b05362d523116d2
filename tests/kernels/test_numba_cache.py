"""Numba's cache may be damaged, full or nowhere: kernels are compiled all the same, with a line."""

import ast
import builtins
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_came.kernels import dispatch
from megatron_came.kernels.dispatch import choose

pytest.importorskip("numba")
ROOT = Path(__file__).parents[2]


def test_whatever_happens_to_what_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.numba_cache_probe", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stderr
    assert done.stderr == ""


def test_kernels_are_compiled_anew_where_what_they_are_made_from_has_changed() -> None:
    from megatron_came.kernels.cpu import keeping

    files = Path(keeping.__file__).parent.glob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    taken = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "megatron_came.core"
        for alias in node.names
    }
    assert taken
    assert taken <= {file.stem for file in keeping._FILES}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'numba'", name="numba"), "package numba is missing"),
        (
            ModuleNotFoundError("No module named 'llvmlite.ir'", name="llvmlite.ir"),
            "the package llvmlite is missing",
        ),
        (ImportError("Numba needs NumPy 2.4 or less. Got NumPy 3.0."), "less. Got NumPy 3.0)"),
        (OSError("Could not find/load shared object file"), "(Could not find/load shared"),
        (AttributeError(), "(its import ends in AttributeError)"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    really = builtins.__import__

    def imported(name: str, *args: object, **kwargs: object) -> object:
        if name == "megatron_came.kernels.cpu.launch":
            raise error
        return really(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", imported)
    chosen = choose("auto", torch.device("cpu"))
    assert chosen.backend.name == "plain"
    assert chosen.should_warn
    assert reason in chosen.reason
    assert chosen.reason.endswith("); pip install 'megatron-came[cpu]'.")
    with pytest.raises(ValueError, match=r"pip install 'megatron-came\[cpu\]'\.$"):
        choose("numba", torch.device("cpu"))


def test_numba_is_named_where_all_of_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("megatron_came.kernels.cpu")]:
        monkeypatch.delitem(sys.modules, module)
    for package in ("numba", "llvmlite"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="the package numba is missing"):
        choose("numba", torch.device("cpu"))


def test_every_kernel_has_its_command() -> None:
    assert set(dispatch._INSTALL) | {"auto", "plain"} == set(dispatch.CHOICES)

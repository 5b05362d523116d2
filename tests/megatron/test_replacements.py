"""Names of Megatron that are replaced: all in tables, once, and not in silence."""

import ast
import inspect
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_came
from megatron_came import memory, patching, versions
from megatron_came.cpu_megatron.install import REPLACEMENTS as OF_CPU
from megatron_came.megatron.install import REPLACEMENTS
from megatron_came.patching import Replacement, maker, put_in_place
from megatron_came.versions import MegatronError, check_version
from megatron_came.voice import say_once

PACKAGE = Path(megatron_came.__file__).parent
ROWS = [*REPLACEMENTS, *OF_CPU, *memory.REPLACEMENTS]
# A variable of Megatron's that a stand-in fills as the original does.
STATE = {"filesystem_async._results_queue"}
FAKE = "megatron.core.a_module_of_this_test"
CODE = """
def function(value):
    return value

class Methods:
    def plain(self, value):
        return value

    @classmethod
    def of_class(cls, value):
        return value

    @staticmethod
    def static(value):
        return value
"""


def assigned(tree):
    """What of the modules and classes that a file imports from Megatron it assigns to."""
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron"
        for alias in node.names
    } | {"megatron"}
    names |= {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname and alias.name.split(".")[0] == "megatron"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target = ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            target = ast.unparse(node.args[0])
        else:
            continue
        if target.split(".")[0] in names:
            yield target


def test_the_search_for_assignments_finds_them():
    code = """
from megatron.core import mappings
from megatron.core.transformer.moe import moe_utils as utils
import megatron.core.optimizer as o
import megatron.core
mappings.gather = 1
utils.Class.method = 2
setattr(o, "name", 3)
megatron.core.x = 4
mappings.f(y).z = mine.name = 5
"""
    expected = {"mappings.gather", "utils.Class.method", "o", "megatron.core.x"}
    assert expected <= set(assigned(ast.parse(code)))


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_nothing_but_the_tables_replaces_names(file):
    assert not set(assigned(ast.parse(file.read_text()))) - STATE


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.target} by {row.by}")
def test_rows_name_what_exists(row):
    assert inspect.isfunction(pkgutil.resolve_name(row.by))
    assert row.why
    assert set(row.releases) <= set(versions.SUPPORTED)
    if row.concerns(check_version(), training_loop=True):
        patching._find(row, check_version())


def test_rows_stand_once():
    for table in (REPLACEMENTS, OF_CPU, memory.REPLACEMENTS):
        keys = [(row.target, row.by, row.releases) for row in table]
        assert len(keys) == len(set(keys))


def doubled(original, *args):
    return 2 * original(*args)


def stand_in(value):
    return -value


@maker
def as_itself(original):
    return stand_in


@maker
def left_alone(original):
    return original


@pytest.fixture
def fake(monkeypatch):
    """A module of Megatron's with a function, and one that has imported the function."""
    module, other = ModuleType(FAKE), ModuleType(f"{FAKE}.other")
    module.__file__ = "/megatron/fake.py"
    exec(CODE, vars(module))
    other.function = module.function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, other.__name__, other)
    return module, other


def row(path, by="doubled", **more):
    return Replacement(f"{FAKE}:{path}", f"{__name__}:{by}", "this is a test", **more)


def test_a_function_is_replaced_once_and_wherever_it_is_imported(fake):
    module, other = fake
    for _ in range(2):
        put_in_place([row("function")])
    assert module.function(3) == 6
    assert other.function is module.function
    assert module.function.__name__ == "function"
    put_in_place([row("function", "as_itself")])
    assert other.function is stand_in  # found by its own name, as pickle does
    put_in_place([row("function", "left_alone"), row("function"), row("function")])
    assert other.function(3) == -3  # one and the same row stands for both


@pytest.mark.parametrize("name", ["plain", "of_class", "static"])
def test_methods_stay_of_their_kind(fake, name):
    owner = fake[0].Methods
    kind = type(vars(owner)[name])
    put_in_place([row(f"Methods.{name}")] * 2)
    assert isinstance(vars(owner)[name], kind)
    assert getattr(owner(), name)("a") == "aa"


def test_another_release_is_left_alone(fake):
    put_in_place([row("function", releases=("0.16",)), row("nothing", releases=("0.16",))])
    assert fake[0].function(3) == 3


def test_a_name_that_a_release_lacks_is_added(fake):
    put_in_place([row("missing", "left_alone", adds=True)] * 2)
    assert fake[0].missing is None
    put_in_place([row("missing", "as_itself", adds=True)])
    assert fake[0].missing is stand_in


@pytest.mark.parametrize("path", ["missing", "Missing.method", "Methods.missing"])
def test_a_missing_name_is_said_with_release_file_and_reason(fake, path):
    with pytest.raises(MegatronError) as error:
        put_in_place([row(path)])
    for words in (check_version(), f"/megatron/fake.py has no {path}", "this is a test"):
        assert words in str(error.value)


def test_a_missing_module_is_said():
    target = Replacement("megatron.core.nowhere:f", "x:y", "this is a test")
    with pytest.raises(MegatronError, match=r"its megatron\.core\.nowhere has no f"):
        put_in_place([target])


def test_what_somebody_else_has_replaced_is_said_with_release_and_file(fake, capsys):
    say_once.cache_clear()
    original = fake[0].function
    fake[0].function = lambda *args: doubled(original, *args)
    put_in_place([row("function"), row("function")])
    (line,) = capsys.readouterr().out.splitlines()
    for words in (FAKE, check_version(), f"already, by {__name__} ({__file__})"):
        assert words in line
    assert fake[0].function(3) == 12


def test_a_version_in_development_is_said_once(monkeypatch, capsys):
    say_once.cache_clear()
    put_in_place([])
    assert "development" not in capsys.readouterr().out
    monkeypatch.setattr(patching, "check_version", lambda: "0.20.0rc0")
    for _ in range(2):
        put_in_place([])
    assert capsys.readouterr().out.count("Megatron 0.20.0rc0 is a development version") == 1

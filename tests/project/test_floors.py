"""Imports point down only: the floors of the package are drawn from them."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from scripts.architecture import PACKAGE, ROOT, arrows, draw_floors, draw_step, floors, room_of

# What must not know of what: a room (or folder in it), and the rooms that it may import.
KNOWS_ONLY = {
    "core": {"core"},
    "kernels": {"core", "kernels", "voice"},
    "cpu_megatron": {"cpu_megatron", "patching", "rules", "versions", "voice"},
    "terminal": {"terminal"},
    "checkpoint_files": {"checkpoint_files", "core"},
}
NEVER_BELOW = {
    "megatron": {"memory", "bench", "tools", "data", "quickstart", "launch"},
    "optimizer": {"megatron", "cpu_megatron"},
    "memory": {"bench", "tools", "data", "quickstart"},
}


def circle(graph):
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]


def test_no_module_imports_in_a_circle():
    graph = {
        # A package's own file may import its modules, which is how they are offered.
        module: {name for name in imported if not name.startswith(module + ".")}
        for module, imported in arrows().items()
        if room_of(module) != "__init__"
    }
    packages = {module for module in graph if (ROOT / module.replace(".", "/")).is_dir()}
    graph = {module: imported - packages for module, imported in graph.items()}
    assert circle(graph) is None


def test_no_arrow_points_up():
    assert len(floors()) > 4  # raises where rooms import each other


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("room", KNOWS_ONLY)
def test_a_room_knows_only_what_is_below_it(room):
    strange = {
        (module, name)
        for module, imported in arrows().items()
        if room_of(module) == room
        for name in imported
        if room_of(name) not in KNOWS_ONLY[room] | {"__init__", "_version"}
    }
    assert not strange


@pytest.mark.parametrize("room", NEVER_BELOW)
def test_a_room_does_not_stand_on_those_above(room):
    strange = {
        (module, name)
        for module, imported in arrows().items()
        if room_of(module) == room
        for name in imported
        if room_of(name) in NEVER_BELOW[room]
    }
    assert not strange


def test_core_has_collectives_in_one_file():
    users = {
        file.name
        for file in (ROOT / PACKAGE / "core").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and "torch.distributed" in ast.unparse(node)
    }
    assert users <= {"sums.py"}


@pytest.mark.parametrize(("draw", "name"), [(draw_floors, "floors.svg"), (draw_step, "step.svg")])
def test_the_pictures_are_those_of_the_code(draw, name, tmp_path):
    draw(tmp_path / name)
    drawn, kept = (tmp_path / name).read_text(), (ROOT / "docs" / name).read_text()
    # Releases of matplotlib draw differently: compare the words alone.
    assert [line for line in drawn.splitlines() if line.strip().startswith("<!--")] == [
        line for line in kept.splitlines() if line.strip().startswith("<!--")
    ]

"""What keeps the house small enough to be held in one head."""

import ast
from pathlib import Path

import pytest

from scripts.check_mutations import FAULTS

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "megatron_came").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def name(path):
    return str(path.relative_to(ROOT))


def functions(path):
    """Functions of a file, each with its number of lines, decorators and docstring included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTIONS):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            yield node.name, node.end_lineno - first + 1


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_functions_are_short():
    long = [
        (name(path), function, lines)
        for path in PACKAGE
        for function, lines in functions(path)
        if lines > 60
    ]
    assert long == []


def test_files_are_short():
    lines = {name(path): len(path.read_text().splitlines()) for path in PACKAGE}
    assert {path: count for path, count in lines.items() if count > 400} == {}


def test_faults_that_are_put_in_on_purpose_have_their_place():
    counts = {f.name: (ROOT / "megatron_came" / f.file).read_text().count(f.before) for f in FAULTS}
    assert {fault: count for fault, count in counts.items() if count != 1} == {}


def test_no_test_imports_another():
    found = [
        (name(path), module)
        for path in [*TESTS, *(ROOT / "scripts").glob("*.py")]
        for module in imported(path)
        if any(word.startswith("test_") for word in module.split(".")[:-1])
        or (module.startswith("tests.") and module.split(".")[-1].startswith("test_"))
    ]
    assert found == []


def test_neither_package_nor_scripts_import_tests():
    files = [*PACKAGE, *(ROOT / "scripts").rglob("*.py")]
    found = [(name(path), module) for path in files for module in imported(path)]
    assert [each for each in found if each[1].split(".")[0] in ("tests", "pytest")] == []
    shipped = [each for each in found if each[0].startswith("megatron_came")]
    assert [each for each in shipped if each[1].startswith("unittest")] == []


@pytest.mark.parametrize(
    "room", [path.name for path in (ROOT / "tests").iterdir() if path.is_dir()]
)
def test_tests_mirror_the_rooms(room):
    rooms = {path.stem for path in (ROOT / "megatron_came").iterdir()}
    # Beside them: what tests share, whole runs, releases of Megatron, the project itself.
    assert room in rooms | {"support", "training", "releases", "project", "__pycache__"}

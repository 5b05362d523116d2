"""For all tests."""

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.support import interpreter

if not torch.cuda.is_available():
    interpreter.use()


# Those that take longest.
LONG = (
    "training",
    "test_dtensors.py",
    "test_quickstart.py",
    "test_example_runs.py",
    "test_hosts.py",
    "test_cuda_graphs.py",
    "test_bench.py",
    "test_smaller_state.py",
    "test_sharded.py",
    "test_cpu_megatron.py",
    "kernels",
    "test_command_line.py",
    "test_processes_end.py",
    "terminal",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files, so that two workers end at about the same time."""

    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(LONG) if name in item.path.parts), len(LONG))

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Collect without looking for garbage, and never look among what was made, then or later.

    Megatron and all tests are many objects that live to the end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def width(monkeypatch):
    """What is printed fits no terminal's width but the one that a test asks for."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)

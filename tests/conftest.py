"""For all tests."""

import pytest
import torch

from tests.support import interpreter

if not torch.cuda.is_available():
    interpreter.use()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files, so that two workers end at about the same time."""
    items.sort(key=lambda item: "training" not in item.path.parts)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)

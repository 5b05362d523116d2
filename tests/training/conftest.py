"""What several modules' tests look at, made once."""

import pytest

from tests.training import layouts as matrix


@pytest.fixture(scope="session")
def layouts_folder(tmp_path_factory):
    """Where ``layouts`` keeps logs and checkpoints."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="session")
def layouts(layouts_folder):
    """What the ranks of every layout saw."""
    return matrix.train(layouts_folder)

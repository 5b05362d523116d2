"""For all tests."""

import pytest
import torch

from tests.support import interpreter

if not torch.cuda.is_available():
    interpreter.use()


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)

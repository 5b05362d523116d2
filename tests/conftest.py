"""For all tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton's kernels are first imported; they then run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)

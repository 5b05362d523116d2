"""The algorithm as it is to be read, against the authors' class, and CAME against it."""

import pytest
import torch

from megatron_came import CAME
from tests.support.oracle import (
    BETAS,
    KINDS,
    distance,
    gradient_history,
    oracle_updates,
    reference_updates,
)

SHAPES = [(48, 80), (80, 48), (5, 1), (98,), (1,), (6, 14, 10), (2, 3, 7, 5)]
STEPS = 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", BETAS, ids=["default", "llama"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_authors_and_came_is_it(shape, betas, kind):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = gradient_history(shape, STEPS, kind, torch.float64, generator)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "clip_threshold": 0.7}
    reference = reference_updates(start, gradients, betas=betas, **settings)[-1]
    authors = oracle_updates(start, gradients, betas=betas, **settings)[-1]
    assert distance(reference, authors, start) <= 1e-14

    param = torch.nn.Parameter(start.clone())
    optimizer = CAME([param], betas=betas, **settings)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    assert distance(param.detach(), reference, start) <= 1e-12

"""Rows of millions of elements, as long vectors are, are summed as exactly as short ones."""

import pytest
import torch

from megatron_came import CAME

pytest.importorskip("numba")


@pytest.mark.parametrize("shape", [(10_000_000,)])
def test_updates_are_those_of_float64(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(shape)
    params = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())]
    kinds = ("numba", "plain")
    optimizers = [CAME([p], lr=1e-2, kernels=k) for p, k in zip(params, kinds, strict=True)]
    for _ in range(2):
        grad = torch.rand(shape, generator=generator) + 1  # sums that only grow
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            optimizer.step()
    ours, exact = (param.detach().double() for param in params)
    assert (ours - exact).norm() / exact.norm() < 2e-6

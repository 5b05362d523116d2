"""What docs/algorithm.md says of factors whose rank is above one."""

import pytest
import torch

from megatron_came import CAME, Shard
from megatron_came.core.reference import outer

SUMS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)


def sketched(v, omega, psi):
    y, w = v @ omega, v.T @ psi
    return y @ torch.linalg.inv(psi.T @ y) @ w.T


def test_a_sketch_with_ones_is_what_came_has():
    v = torch.rand(5, 7, dtype=torch.float64)
    ones = torch.ones(7, 1, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    torch.testing.assert_close(sketched(v, *ones), outer(v.mean(-1), v.mean(-2)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_sketch_is_exact_up_to_its_rank(rank):
    def rand(*shape):
        return torch.rand(shape, dtype=torch.float64)

    v = rand(9, rank) @ rand(rank, 8)
    torch.testing.assert_close(sketched(v, rand(8, rank), rand(9, rank)), v)


def test_a_sketch_is_not_positive():
    v = torch.tensor([[1, 1, 2], [1, 2, 2], [2, 2, 1]], dtype=torch.float64)
    expected = torch.tensor([[1, 1, 2], [1, 0.5, 3.5], [2, 3.5, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(sketched(v, SUMS, SUMS), expected)


def test_blocks_of_rows_have_factors_of_their_own():
    """Two blocks of rank one each are normalised exactly, of which the whole is not."""
    blocks = torch.rand(2, 4, 1, dtype=torch.float64) @ torch.rand(2, 1, 6, dtype=torch.float64)

    def first_update(shape):
        weight = torch.nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
        weight.grad = blocks.reshape(8, 6)
        shards = {weight: Shard.whole(shape)}
        CAME([weight], lr=1.0, no_confidence=True, shards=shards).step()
        return weight.detach()

    torch.testing.assert_close(first_update((2, 4, 6)), torch.full_like(first_update((8, 6)), -0.1))
    assert first_update((8, 6)).std() > 1e-3

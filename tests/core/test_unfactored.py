"""Matrices with ``factored=False``: the authors' update of a vector of the same elements."""

import came_pytorch
import pytest
import torch

from megatron_came import CAME, Shard
from scripts.cases.slices import Layout
from tests.support.oracle import BETAS, TOLERANCE, on_every_path
from tests.support.slices import MID_ROW, worst_distance

CASES = {
    "matrix": Layout((48, 80), None, MID_ROW, factored=False),
    "rows": Layout((48, 80), 0, MID_ROW, factored=False),
    "columns": Layout((48, 80), 1, MID_ROW, factored=False),
    "batch": Layout((6, 14, 10), 0, MID_ROW, factored=False),
    "batch-of-columns": Layout((6, 14, 10), 2, MID_ROW, factored=False),
}


@on_every_path
@pytest.mark.parametrize("options", [{}, {"bias_correction": True}], ids=["plain", "corrected"])
@pytest.mark.parametrize("case", CASES)
def test_slices_are_updated_as_vectors_are(case, options, dtype, kernels):
    beside = Layout((20, 30), 0, MID_ROW)
    worst = worst_distance(
        2, 4, [CASES[case], beside], BETAS[1], "spikes", dtype, kernels, seed=3, **options
    )
    assert worst <= TOLERANCE[dtype]


def pair(shape=(6, 5)):
    """A matrix, and a vector of the same elements."""
    start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.reshape(-1).clone())


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (8, 3, 2, 2), (1, 7)], ids=str)
def test_a_group_may_be_unfactored(shape):
    matrix, vector = pair(shape)
    other = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    ours = CAME([{"params": [matrix], "factored": False}, {"params": [other]}], lr=0.01)
    theirs = came_pytorch.CAME([vector], lr=0.01)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        matrix.grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        vector.grad, other.grad = matrix.grad.reshape(-1), torch.ones_like(other)
        ours.step()
        theirs.step()
    torch.testing.assert_close(matrix.detach().view(-1), vector.detach(), rtol=1e-12, atol=1e-14)
    assert set(ours.state[matrix]) == {"exp_avg", "exp_avg_sq"}
    assert ours.state[matrix]["exp_avg_sq"].shape == shape
    assert "exp_avg_sq_row" in ours.state[other]


def test_all_may_be_unfactored():
    matrix, _ = pair()
    matrix.grad = torch.ones_like(matrix)
    optimizer = CAME([matrix], factored=False)
    optimizer.step()
    assert set(optimizer.state[matrix]) == {"exp_avg", "exp_avg_sq"}


def test_state_of_the_other_kind_is_refused_and_nothing_changes():
    matrix, _ = pair()
    matrix.grad = torch.ones_like(matrix)
    optimizers = [CAME([matrix], factored=factored) for factored in (True, False)]
    for optimizer in optimizers:
        optimizer.step()
    for own, other in (optimizers, optimizers[::-1]):
        before = own.state_dict()
        with pytest.raises(ValueError, match="factored"):
            own.load_state_dict(other.state_dict())
        assert own.state_dict()["state"][0].keys() == before["state"][0].keys()


@pytest.mark.parametrize("factored", [True, False])
def test_a_dictionary_without_state_leaves_it_as_it_is(factored):
    matrix, _ = pair()
    saved = CAME([matrix], factored=not factored).state_dict()
    optimizer = CAME([matrix], factored=factored)
    optimizer.load_state_dict(saved)
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert ("exp_avg_sq_row" in optimizer.state[matrix]) == factored


def test_a_group_that_changes_its_mind_is_planned_anew():
    matrix, _ = pair()
    matrix.grad = torch.ones_like(matrix)
    optimizer = CAME([matrix])
    optimizer.step()
    optimizer.param_groups[0]["factored"] = False
    with pytest.raises(ValueError, match="factored=False"):
        optimizer.step()


@pytest.mark.parametrize("value", ["no", 0, None])
def test_what_is_no_truth_value_is_refused(value):
    matrix, _ = pair()
    with pytest.raises(ValueError, match="factored"):
        CAME([{"params": [matrix], "factored": value}])


def test_a_window_needs_rows_and_columns():
    with pytest.raises(ValueError, match="factored"):
        Shard((4, 6), 0, 4, window=(slice(0, 1), slice(0, 2), slice(0, 2)), factored=False)

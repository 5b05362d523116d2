"""From Megatron's parameters to shards, without Megatron's processes."""

import pytest
import torch

from megatron_came.host.sharding import ModelGroups, check_replicas, shard_of
from tests.simulated_ranks import SimulatedGroup, run_ranks

PAIR, EXPERT_PAIR, EMBEDDING = (SimulatedGroup([0, 1]) for _ in range(3))
GROUPS = ModelGroups(tp=PAIR, expert_tp=EXPERT_PAIR, embedding=EMBEDDING)


def parameter(shape, **attributes):
    param = torch.nn.Parameter(torch.zeros(shape))
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


def test_dense_expert_and_tied_parameters():
    dense = shard_of(parameter((4, 6), tensor_model_parallel=True, partition_dim=1), GROUPS)
    assert (dense.tp_dim, dense.tp_group, dense.copies_group) == (1, PAIR, None)
    expert = parameter((4, 6), tensor_model_parallel=True, partition_dim=0, allreduce=False)
    assert shard_of(expert, GROUPS).tp_group is EXPERT_PAIR
    assert shard_of(parameter((4, 6), shared_embedding=True), GROUPS).copies_group is EMBEDDING
    norm = shard_of(parameter((6,), tensor_model_parallel=False, partition_dim=-1), GROUPS)
    assert norm.tp_axis is None
    assert norm.full_numel == 6


@pytest.mark.parametrize("attributes", [{}, {"partition_dim": -1}, {"partition_dim": 2}], ids=str)
def test_a_dimension_that_is_not_stated_is_refused(attributes):
    param = parameter((4, 6), tensor_model_parallel=True, **attributes)
    with pytest.raises(ValueError, match=r"shape \(4, 6\) does not say along which dimension"):
        shard_of(param, GROUPS)


def _check_on_two_ranks(**attributes):
    groups = ModelGroups(
        tp=SimulatedGroup([0, 1]), expert_tp=SimulatedGroup([0, 1]), embedding=None
    )

    def program(rank):
        cut = parameter((3, 5), **attributes)
        cut.data.fill_(rank)
        check_replicas([parameter((7,)), cut, parameter((2,), allreduce=False)], groups)

    run_ranks(2, program, [groups.tp, groups.expert_tp])


def test_a_weight_that_is_cut_without_saying_so_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 5\) differs between tensor-parallel"):
        _check_on_two_ranks()
    with pytest.raises(ValueError, match=r"shape \(3, 5\) differs between tensor-parallel"):
        _check_on_two_ranks(allreduce=False)
    _check_on_two_ranks(tensor_model_parallel=True, partition_dim=0)

"""From Megatron's parameters to shards, without Megatron's processes."""

from argparse import Namespace

import pytest
import torch
from megatron.core.models.mimo.model.base import MimoModel

from megatron_came.megatron.builder import settings_of_model
from megatron_came.megatron.config import CameOptimizerConfig
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import Identity, identity_of
from megatron_came.megatron.rule_conditions import is_quantized_alone
from megatron_came.megatron.rules import refuse
from megatron_came.megatron.sharding import ModelGroups, check_replicas, shard_of
from megatron_came.rules import Settings
from megatron_came.voice import say_once
from scripts.cases.simulated_ranks import SimulatedGroup, run_ranks
from tests.support import quantized

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


def _mamba_identity(tp_rank, sizes):
    """As Mamba's sharded state has them: parts of unlike sizes, each a tensor of its own."""
    return Identity("decoder.layers.mixer.in_proj.weight.z", tuple((tp_rank * s, 0) for s in sizes))


class _Pair(SimulatedGroup):
    def rank(self):
        return 1


@pytest.mark.parametrize("sizes", [(8, 8, 4, 4, 2), (8, 4, 4), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("columns", [(6,), (1, 4), ()], ids=["matrix", "convolution", "vector"])
def test_parts_of_unlike_sizes_have_random_bits_of_the_ranks_own(sizes, columns, capsys):
    say_once.cache_clear()
    groups = ModelGroups(tp=_Pair([0, 1]), expert_tp=_Pair([0, 1]), embedding=None)
    param = parameter((sum(sizes), *columns), tensor_model_parallel=True, partition_dim=0)
    for _ in range(2):
        identity = identity_of(param, {param: _mamba_identity(1, sizes)}, groups.tp)
    assert identity.name == "decoder.layers.mixer.in_proj.weight.z of tensor-parallel rank 1"
    assert capsys.readouterr().out.count("every rank rounds momentum with random bits") == 1
    shard = shard_of(param, groups, identity=identity)
    assert (shard.tp_dim, shard.tp_rank, shard.tp_parts) == (0, 0, 1)


def test_equal_parts_have_random_bits():
    groups = ModelGroups(tp=_Pair([0, 1]), expert_tp=_Pair([0, 1]), embedding=None)
    param = parameter((8, 6), tensor_model_parallel=True, partition_dim=0)
    whole = Identity("mlp.linear_fc1.weight", ((4, 0), (12, 0)))
    assert identity_of(param, {param: whole}, groups.tp) is whole
    shard = shard_of(param, groups, identity=whole)
    assert (shard.tp_rank, shard.tp_parts) == (1, 2)


@pytest.mark.parametrize("wrappers", [0, 1, 2])
def test_mimo_models_are_refused_inside_their_wrappers(wrappers):
    model = MimoModel.__new__(MimoModel)
    for _ in range(wrappers):
        model = Namespace(module=model)
    with pytest.raises(UnsupportedError, match="does not support MiMo models"):
        refuse(settings_of_model(CameOptimizerConfig(lr=1e-3), [model]))


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


@pytest.mark.parametrize(
    ("changes", "fsdp", "sentence"),
    [
        ({"momentum_dtype": "fp8"}, False, "--came-momentum-dtype fp8 is not allowed: use fp32 or"),
        ({"main_params": "remainder"}, False, "the model's are fp32: add --bf16"),
        ({"main_params": "remainder", "bf16": True}, False, "needs the distributed optimizer"),
        ({"decoupled_weight_decay": False}, False, "has decoupled weight decay only"),
        ({"use_precision_aware_optimizer": True}, False, "does not go with --use-precision-aware"),
        (
            {"main_params": "remainder", "bf16": True},
            True,
            "--came-main-params remainder does not go with --use-megatron-fsdp",
        ),
    ],
    ids=str,
)
def test_a_configuration_made_without_a_command_line_meets_the_same_rules(changes, fsdp, sentence):
    config = CameOptimizerConfig(lr=1e-3)
    for name, value in changes.items():
        setattr(config, name, value)
    model = [Namespace(ddp_config=Namespace(use_megatron_fsdp=fsdp))]
    with pytest.raises(UnsupportedError) as error:
        refuse(settings_of_model(config, model))
    assert sentence in str(error.value)


def test_weights_in_fp8_that_nobody_quantises_are_refused():
    plain, model = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model.weight = quantized.parameter(torch.ones(4, 4), "tensorwise")
    with quantized.plugged_in():
        assert not is_quantized_alone(Settings(Namespace(model_chunks=[plain])))
        alone = Settings(Namespace(model_chunks=[plain, model]))
        gathered = Settings(Namespace(model_chunks=[plain, model], fp8_param_gather=True))
        assert is_quantized_alone(alone)
        assert not is_quantized_alone(gathered)
        model.weight.requires_grad = False
        assert not is_quantized_alone(alone)

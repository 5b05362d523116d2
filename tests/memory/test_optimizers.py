"""What optimizers keep: bytes from their dtypes, against the tensors of those that run on a CPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.layer_wise_optimizer import (
    LayerWiseDistributedOptimizer,
    is_managed_by_layer_wise_optimizer,
)
from torch import nn

from megatron_came import CAME, megatron, memory
from megatron_came.memory.optimizers import ADAFACTOR, ADAMW, by_matrix, compared, of_launch, sgd
from tests.support.memory_flags import BF16, DO, EXPERTS, MEDIUM, SMALL, launch

EP2 = "--expert-model-parallel-size 2 "
PRECISE = "--use-precision-aware-optimizer "
GUARD = "--came-spike-guard 3 "
MUON = by_matrix("Muon")


@pytest.fixture(scope="module", autouse=True)
def replaced():
    megatron.install()
    memory.install()


def per_parameter(flags):
    """Static bytes of a parameter, by optimizer, of GPT-2 Medium on one rank."""
    run = launch(MEDIUM + flags)
    (stage,) = run.stages
    columns = {each.name: each for each in (*compared(run.args), of_launch(run.args))}
    return {
        name: stage.components(each).static / stage.parameters for name, each in columns.items()
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (BF16 + DO, {"Adam bf16 + rem.": 12, "Adam fp8 + rem.": 10}),
        (BF16 + DO + "--grad-reduce-in-bf16 ", {"Adam bf16 + rem.": 10, "Adam fp8 + rem.": 8}),
        (BF16 + DO + PRECISE, {"Adam fp32 + rem.": 16}),
        (
            BF16 + DO + PRECISE + "--exp-avg-dtype bf16 --exp-avg-sq-dtype fp8 "
            "--main-params-dtype fp16 ",
            {"Adam bf16/fp8 + fp16 main": 11},
        ),
        ("--fp16 " + DO + PRECISE + "--exp-avg-dtype fp8 ", {"Adam fp8/fp32": 13}),
        # With another recipe than delayed scaling main weights are Megatron's.
        (BF16 + DO + PRECISE + "--fp8-format hybrid --fp8-recipe tensorwise ", {"Adam fp32": 18}),
    ],
)
def test_precision_aware_adam_is_counted_from_its_dtypes(flags, expected):
    found = per_parameter(flags)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.005)


def test_lion_and_muon_leave_words_and_vectors_to_adam():
    found = per_parameter(BF16 + DO)
    embeddings = 1024 * 50304  # of words; Megatron does not mark those of positions as such
    vectors = 24 * 13 * 1024 + 2 * 1024
    share = (embeddings + vectors) / 354_871_296
    assert found["Lion"] == found["Muon"] == pytest.approx(14 + 4 * share, abs=1e-3)
    lions = per_parameter(BF16 + DO + "--optimizer muon --muon-scalar-optimizer lion ")
    assert lions["Muon"] == pytest.approx(14, abs=1e-3)


def test_tensors_of_lion_and_muon_lie_where_megatron_puts_them():
    words = "--vocab-size 48 --make-vocab-size-divisible-by 48 "  # as many as a layer's matrix has
    run = launch(SMALL + BF16 + DO + EXPERTS + EP2 + words + "--optimizer muon ", 8)
    (stage,), ((chunk,),) = run.stages, run.chunks

    def is_expert(param):
        return not getattr(param, "allreduce", True)

    # Megatron makes the groups of the matrices' optimizer first.
    params = sorted(chunk.params, key=lambda p: not is_managed_by_layer_wise_optimizer(p))
    groups = [{"params": [p], "is_expert_parallel": is_expert(p)} for p in params]
    sharded = SimpleNamespace(dp_cp=None, expt_dp=None)
    optimizer = SimpleNamespace(param_groups=groups)
    LayerWiseDistributedOptimizer._shard_params_ping_pong(sharded, [optimizer], 8, 4)
    lists = sharded.dp_cp_params_list, sharded.expt_dp_params_list
    for of_experts, of_matrix in itertools.product((0, 1), (0, 1)):
        given = [
            sum(p.numel() for p in ps if is_managed_by_layer_wise_optimizer(p) == of_matrix)
            for ps in lists[of_experts]
        ]
        held = torch.zeros(len(given))
        for buffer in stage.whole_buffers:
            if (buffer.of_experts, buffer.by_matrix) == (of_experts, of_matrix):
                held += buffer.elements
        assert held.tolist() == given
    held = sum(int(buffer.elements.sum()) for buffer in stage.whole_buffers)
    assert (
        held
        == stage.parameters
        == sum(buffer.weights // buffer.weight for buffer in stage.whole_buffers)
    )


def test_lion_and_muon_gather_weights_in_a_copy_where_ranks_share_them():
    one, four = (launch(SMALL + BF16 + DO, ranks).stages[0] for ranks in (1, 4))
    assert one.step(MUON) == 0
    assert four.step(MUON) == 2 * four.parameters


# Adam's fp32 copies, see FusedAdam.step and .state_dict of Transformer Engine 2.20.


@pytest.mark.parametrize(
    ("moments", "in_step", "saving"),
    [("fp32 fp32", 0, 0), ("bf16 bf16", 0, 8), ("fp8 fp8", 8, 8), ("bf16 fp32", 4, 4)],
)
def test_adam_copies_moments_to_fp32(moments, in_step, saving):
    first, second = moments.split()
    flags = f"--exp-avg-dtype {first} --exp-avg-sq-dtype {second} --save folder "
    flags += "--save-interval 9 "
    run = launch(MEDIUM + BF16 + DO + PRECISE + flags)
    (stage,), adam = run.stages, of_launch(run.args)
    assert stage.step(adam) == in_step * stage.parameters
    assert stage.checkpoint(adam) == saving * stage.parameters
    kept = stage.components(adam).total
    assert stage.total(adam) == kept + max(stage.activations, stage.step(adam))
    assert stage.peak(adam) == kept + max(stage.activations, saving * stage.parameters)


def test_copies_of_dense_and_experts_parameters_take_turns():
    run = launch(SMALL + BF16 + DO + EXPERTS + PRECISE + EP2 + "--exp-avg-dtype fp8 ", 2)
    (stage,), adam = run.stages, of_launch(run.args)
    sizes = [0, 0]
    for buffer in stage.buffers:
        sizes[buffer.of_experts] += int(buffer.elements[0])
    assert min(sizes) > 0
    assert stage.step(adam) == 4 * max(sizes)


# Against real tensors.


@pytest.mark.parametrize("flags", ["", BF16 + DO, EXPERTS])
@pytest.mark.parametrize("momentum", ["fp32", "int8"])
def test_a_spike_guards_copies_are_counted(flags, momentum):
    came = f"--optimizer came --came-momentum-dtype {momentum} "
    guarded, free = (launch(SMALL + flags + came + more) for more in (GUARD, ""))
    (stage,), (own,) = guarded.stages, free.stages
    ((chunk,),) = guarded.chunks
    params = [nn.Parameter(torch.ones(param.shape)) for param in chunk.params]
    optimizer = CAME(params, spike_guard=3.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.begin_guarded(of_rank=True)
    for column in compared(guarded.args):
        assert stage.step(column) == (stage.factors if column.is_came else own.step(column))
    copies = optimizer._begun[0].moments[1]
    assert sum(copy.nbytes for copy in copies) == stage.step(of_launch(guarded.args))
    assert of_launch(guarded.args) in compared(guarded.args)
    assert own.step(of_launch(free.args)) == 0


def _muon(params):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch 2.9 has Muon")
    return torch.optim.Muon(params)


def _lion(params):
    from emerging_optimizers.scalar_optimizers import Lion

    return Lion(params, lr=1e-3)


MOMENTUM = type("Args", (), {"sgd_momentum": 0.9})
BARE = type("Args", (), {"sgd_momentum": 0.0})


@pytest.mark.parametrize(
    ("predicted", "build"),
    [
        (ADAMW, torch.optim.AdamW),
        (sgd(MOMENTUM), lambda params: torch.optim.SGD(params, lr=1, momentum=0.9)),
        (sgd(BARE), lambda params: torch.optim.SGD(params, lr=1)),
        (MUON, _muon),
        (by_matrix("Lion"), _lion),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_state_of_a_matrix_is_what_is_counted(predicted, build):
    weight = nn.Parameter(torch.randn(48, 80))
    optimizer = build([weight])
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        with torch.compiler.set_stance("force_eager"):  # Lion's is compiled: ten seconds
            optimizer.step()
    kept = sum(
        value.nbytes
        for key, value in optimizer.state[weight].items()
        if key != "step" and value is not None
    )
    assert kept == weight.numel() * predicted.state_per_element(4)


def test_adafactor_keeps_factors_of_a_matrix_alone():
    weight = nn.Parameter(torch.randn(48, 80))
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    assert sum(state[key].nbytes for key in ("row_var", "col_var")) == 4 * (48 + 80)
    assert ADAFACTOR.state_per_element(4) == 0
    assert "exp_avg" not in state

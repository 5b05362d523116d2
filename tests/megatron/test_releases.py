"""What older releases of Megatron are refused with; tests/releases runs them."""

from types import SimpleNamespace

import pytest
import torch

from megatron_came import rules
from megatron_came.megatron.builder import settings_of_model
from megatron_came.megatron.config import CameOptimizerConfig
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.rules import refuse
from megatron_came.versions import MegatronError

OLDER, NEWEST = (0, 17), (0, 19)


def choose(monkeypatch, release):
    monkeypatch.setattr(rules, "release", lambda: release)


def check_model(chunks):
    refuse(settings_of_model(CameOptimizerConfig(lr=1e-3), chunks))


class EnginesLinear(torch.nn.Linear):
    """Stands for a layer of Transformer Engine."""


EnginesLinear.__module__ = "transformer_engine.pytorch.module.grouped_linear"
GroupedMLP = type("GroupedMLP", (torch.nn.Linear,), {})


def model(expert_layer, **sizes):
    """A model with one layer of experts."""
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    class Layer(BaseMoELayer):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.experts = torch.nn.Sequential(expert_layer(2, 2))
            if expert_layer is GroupedMLP:
                self.experts = expert_layer(2, 2)

        def forward(self, hidden_states):
            return hidden_states

    chunk = torch.nn.Sequential(Layer())
    chunk.config = SimpleNamespace(
        **{
            "num_moe_experts": 4,
            "tensor_model_parallel_size": 1,
            "expert_tensor_parallel_size": 1,
            "expert_model_parallel_size": 2,
            **sizes,
        }
    )
    return [chunk]


CUT = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
REFUSED = {
    "packed": (GroupedMLP, {}, "--moe-grouped-gemm"),
    "unmarked": (
        EnginesLinear,
        CUT,
        "--expert-tensor-parallel-size 2 and --transformer-impl transformer_engine",
    ),
    "reduced-wrongly": (
        torch.nn.Linear,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 1},
        "--expert-tensor-parallel-size 1 at --tensor-model-parallel-size 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_an_older_release_is_not_exact_with_are_refused(monkeypatch, name):
    layer, sizes, flags = REFUSED[name]
    chunks = model(layer, **sizes)
    choose(monkeypatch, OLDER)
    with pytest.raises(UnsupportedError) as error:
        check_model(chunks)
    sentence = str(error.value)
    assert sentence.startswith(f"--optimizer came does not go with {flags}")
    assert "0.17" in sentence
    assert "or Megatron 0.19." in sentence
    assert "\n" not in sentence
    choose(monkeypatch, NEWEST)
    check_model(chunks)


@pytest.mark.parametrize("layer", [torch.nn.Linear, EnginesLinear])
def test_other_models_are_not_refused(monkeypatch, layer):
    choose(monkeypatch, OLDER)
    check_model(model(layer))
    check_model(model(torch.nn.Linear, **CUT))
    check_model(model(layer, num_moe_experts=None, **CUT))


def test_a_method_that_does_not_name_adams_state_is_refused():
    from megatron_came.megatron.compat.distributed_optimizer import _with_keys

    def gather(self, first=1):
        return [key.upper() for key in ("param", "exp_avg", "exp_avg_sq")][first:]

    assert _with_keys(gather)(None) == ["EXP_AVG"]
    assert gather(None) == ["EXP_AVG", "EXP_AVG_SQ"]
    with pytest.raises(MegatronError, match="does not name the state of Adam"):
        _with_keys(lambda self: ("param", "exp_avg"))

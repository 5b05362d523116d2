"""Models of hosts, which need not say how a checkpoint holds them when the optimizer is built."""

import argparse

import pytest
import torch

from megatron_came.megatron.checkpoints import stacks
from megatron_came.voice import EVERYONE


class _Unready(torch.nn.Linear):
    def sharded_state_dict(self) -> None:
        raise RuntimeError("no weights yet")


@pytest.mark.parametrize("layer", [torch.nn.Linear, _Unready])
def test_frozen_weights_of_a_model_without_a_sharded_state(layer: type[torch.nn.Linear]) -> None:
    model = layer(3, 4)
    model.bias.requires_grad_(False)
    stacks.mark([model], argparse.Namespace(), EVERYONE)
    assert not hasattr(model.weight, "came_is_alone")

"""Models of hosts, which need not say how a checkpoint holds them when the optimizer is built."""

import argparse
from functools import partial

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

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


class _Gated(torch.nn.Module):
    """Two layers with gated projections, whose halves have names of their own; one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 4, bias=False) for _ in range(2))
        self.layers[0].weight.requires_grad_(False)

    def sharded_state_dict(self) -> dict[str, ShardedTensorFactory]:
        return {
            str(number): ShardedTensorFactory("fc1", layer.weight, partial(_halves, number), dict)
            for number, layer in enumerate(self.layers)
        }


def _halves(number: int, key: str, weight: torch.Tensor, *_: object) -> list[ShardedTensor]:
    return [
        ShardedTensor.from_rank_offsets(f"{key}_{half}", part, (0, number, 2), prepend_axis_num=1)
        for half, part in zip("wv", weight.chunk(2), strict=True)
    ]


def test_halves_of_a_gated_projection_are_no_shared_weights() -> None:
    model = _Gated()
    settings = argparse.Namespace(
        save="there", ckpt_format="torch_dist", use_distributed_optimizer=True
    )
    stacks.mark([model], settings, EVERYONE)
    assert [layer.weight.came_is_alone for layer in model.layers] == [True, True]

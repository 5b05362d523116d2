"""Stand-ins under which Megatron builds modules without memory, GPU or other processes.

Every tensor is on torch's meta device, and objects that know their size take the place of the
process groups, so that a rank of any layout can be built anywhere, a training run included.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_came.cpu_megatron.devices import Stream
from megatron_came.memory.grid import Grid
from megatron_came.terminal.quiet import quiet

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class SizedGroup:
    """Stands for a process group: its number of ranks, and which of them this one is."""

    ranks: int
    own: int = 0

    def size(self) -> int:
        """Return the number of ranks."""
        return self.ranks

    def rank(self) -> int:
        """Return which of them this one is."""
        return self.own


def process_groups(grid: Grid, stage: int) -> Any:
    """Return a ``ProcessGroupCollection`` of stand-ins for a rank of a pipeline stage."""
    groups = ProcessGroupCollection()
    sizes = {
        "tp": grid.tensor,
        "tp_cp": grid.tensor,
        "ep": grid.expert,
        "expt_tp": grid.expert_tensor,
        "tp_ep": grid.expert_tensor * grid.expert,
    }
    for field in dataclasses.fields(ProcessGroupCollection):
        setattr(groups, field.name, SizedGroup(sizes.get(field.name, 1)))
    groups.pp = SizedGroup(grid.pipeline, stage)
    groups.embd = groups.pos_embd = None  # nothing is sent between the stages that embed
    return groups


@contextlib.contextmanager
def nowhere(grid: Grid, stage: int) -> Iterator[None]:
    """Let Megatron build modules without devices, processes or words, and put all back."""
    with contextlib.ExitStack() as stack:
        if not dist.is_initialized():  # without a process group Megatron takes every group for one
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(replaced(parallel_state, _sizes(grid, stage)))
        groups = staticmethod(lambda *args, **kwargs: process_groups(grid, stage))
        stack.enter_context(replaced(ProcessGroupCollection, {"use_mpu_process_groups": groups}))
        if not torch.cuda.is_available():
            # The few functions that Megatron's modules call as they are built.
            functions = {"current_device": lambda: 0, "Stream": Stream, **hopper()}
            stack.enter_context(replaced(torch.cuda, functions))
        stack.enter_context(_latent_attention())
        # What Megatron's models tell Transformer Engine through the environment stays out of it.
        others = {key: value for key, value in os.environ.items() if not key.startswith("NVTE_")}
        stack.enter_context(replaced(os, {"environ": others}))
        stack.enter_context(quiet())
        stack.enter_context(META)
        stack.enter_context(_OnMeta())
        yield


def _sizes(grid: Grid, stage: int) -> dict[str, int | SizedGroup | None]:
    """Megatron's own way to pretend a layout: sizes and ranks that win over the process groups."""
    found: dict[str, int | SizedGroup | None] = {
        # BERT and T5 do not hand on the groups that they are given.
        "_DATA_PARALLEL_GROUP": SizedGroup(1),
        "_TENSOR_MODEL_PARALLEL_GROUP": SizedGroup(grid.tensor),
        "_EXPERT_TENSOR_PARALLEL_GROUP": SizedGroup(grid.expert_tensor),
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": grid.virtual,
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK": None,
    }
    for kind, size, rank in (
        ("TENSOR_MODEL", grid.tensor, 0),
        ("PIPELINE_MODEL", grid.pipeline, stage),
        ("EXPERT_MODEL", grid.expert, 0),
        ("EXPERT_TENSOR", grid.expert_tensor, 0),
    ):
        found[f"_MPU_{kind}_PARALLEL_WORLD_SIZE"] = size
        found[f"_MPU_{kind}_PARALLEL_RANK"] = rank
    return found


def hopper() -> dict[str, Callable[..., Any]]:
    """Functions of ``torch.cuda`` that say what a GPU can do, where there may be none."""
    return {
        "get_device_capability": lambda device=None: (9, 0),  # an H100's: newer flags want it
        "get_device_properties": lambda device=None: argparse.Namespace(major=9, minor=0),
    }


@contextlib.contextmanager
def replaced(target: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes for a while."""
    before = {name: inspect.getattr_static(target, name) for name in values}  # not bound
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextlib.contextmanager
def _latent_attention() -> Iterator[None]:
    """Let latent attention be built of local layers, whose attention has no weights."""
    original = DotProductAttention.__init__

    @functools.wraps(original)
    def start(
        self: Any, *args: Any, k_channels: object = None, v_channels: object = None, **kwargs: Any
    ) -> None:
        original(self, *args, **kwargs)

    usual = MLASelfAttention._resolve_qk_norm_config

    def resolve(self: Any, submodules: Any) -> Any:
        if self.config.q_lora_rank is not None or not self.config.qk_layernorm:
            return usual(self, submodules)
        # Without a latent query its norm is in Transformer Engine's projection, or nowhere.
        names = ("linear_kv_up_proj", "kv_layernorm")
        own = {name: getattr(submodules, name) for name in names}
        return {**own, "linear_q_proj": _NormedProjection}

    with (
        replaced(DotProductAttention, {"__init__": start}),
        replaced(MLASelfAttention, {"_resolve_qk_norm_config": resolve}),
    ):
        yield


class _NormedProjection(ColumnParallelLinear):  # type: ignore[misc]
    """Has the weights of the norm of its input, as Transformer Engine's."""

    def __init__(self, size: int, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(size, *args, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(size))
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.empty(size))


class _OnMeta(TorchFunctionMode):
    """Every tensor that is asked for on a device comes without memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):  # which would want a GPU
            return args[0]
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": META}
        return func(*args, **kwargs)

"""Stand-ins under which Megatron builds modules without memory, GPU or other processes.

Every tensor is on torch's meta device, and objects that know their size take the place of the
process groups, so that a rank of any layout can be built anywhere, a training run included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.overrides import TorchFunctionMode

from megatron_came.memory.grid import Grid

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class SizedGroup:
    """Stands for a process group: this rank's place in it and its number of ranks."""

    ranks: int
    place: int = 0

    def size(self) -> int:
        """Return the number of ranks."""
        return self.ranks

    def rank(self) -> int:
        """Return the place of this rank."""
        return self.place


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
        if not dist.is_initialized():
            stack.enter_context(_one_process())
        stack.enter_context(replaced(parallel_state, _mpu_sizes(grid, stage)))
        if not torch.cuda.is_available():
            stack.enter_context(_without_cuda())
        stack.enter_context(_latent_attention())
        stack.enter_context(_environment_restored())
        stack.enter_context(_quiet())
        stack.enter_context(META)
        stack.enter_context(_OnMeta())
        yield


def _mpu_sizes(grid: Grid, stage: int) -> dict[str, int | None]:
    """Megatron's own way to pretend a layout: sizes and ranks that win over the process groups."""
    return {
        "_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE": grid.tensor,
        "_MPU_TENSOR_MODEL_PARALLEL_RANK": 0,
        "_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": grid.pipeline,
        "_MPU_PIPELINE_MODEL_PARALLEL_RANK": stage,
        "_MPU_EXPERT_MODEL_PARALLEL_WORLD_SIZE": grid.expert,
        "_MPU_EXPERT_MODEL_PARALLEL_RANK": 0,
        "_MPU_EXPERT_TENSOR_PARALLEL_WORLD_SIZE": grid.expert_tensor,
        "_MPU_EXPERT_TENSOR_PARALLEL_RANK": 0,
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": grid.virtual,
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK": None,
    }


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """A process group of this process alone: without one Megatron takes every group for one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _without_cuda() -> contextlib.AbstractContextManager[None]:
    """The few functions of ``torch.cuda`` that Megatron's modules call as they are built."""
    from megatron_came.cpu_megatron.devices import Stream

    functions = {"current_device": lambda: 0, "Stream": Stream}
    return replaced(torch.cuda, {**functions, **hopper()})


def hopper() -> dict[str, Callable[..., Any]]:
    """Functions of ``torch.cuda`` that say what a GPU can do, where there may be none."""
    capability = (9, 0)
    properties = argparse.Namespace(major=9, minor=0)
    return {
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
    }


@contextlib.contextmanager
def replaced(target: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes for a while."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def _latent_attention() -> contextlib.AbstractContextManager[None]:
    """Let the local attention, which has no weights, stand in for that of latent attention."""
    original = DotProductAttention.__init__

    @functools.wraps(original)
    def start(
        self: Any, *args: Any, k_channels: object = None, v_channels: object = None, **kwargs: Any
    ) -> None:
        original(self, *args, **kwargs)

    return replaced(DotProductAttention, {"__init__": start})


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    """Keep what Megatron's models tell Transformer Engine through the environment out of it."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("NVTE_")}
    try:
        yield
    finally:
        for name in list(os.environ):
            if name.startswith("NVTE_"):
                del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Megatron from warning again of what it builds."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _OnMeta(TorchFunctionMode):
    """Every tensor that is asked for on a device comes without memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": META}
        return func(*args, **kwargs)

"""Keeps the device's random numbers apart from the host's, as on a machine with a GPU.

Megatron relies on two streams.  Ranks of one tensor parallel group draw the same dropout masks
outside of tensor parallel regions because their GPUs' generators advance alike, while the host's
generator may advance on one of them only: the data loader draws from it, and tensor parallel rank
0 alone has one.  A model that runs on the CPU draws from torch's default generator.  So that one
plays the GPU's here; the host's is another, whose state the default one takes on for the data
loader.
"""

import collections
from typing import Any

import torch
import torch.utils.data
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from megatron_came.patching import Function, around

_device_generator = torch.default_generator
_host_generator = torch.Generator()


def _with_host_draws(method: Function, *args: Any, **kwargs: Any) -> Any:
    """Inside, torch's default generator continues the host's stream instead of the device's."""
    device_state = _device_generator.get_state()
    _device_generator.set_state(_host_generator.get_state())
    try:
        return method(*args, **kwargs)
    finally:
        _host_generator.set_state(_device_generator.get_state())
        _device_generator.set_state(device_state)


def _set_device_state(state: torch.Tensor, device: object = "cuda") -> None:
    """``torch.cuda.set_rng_state``, which refuses the state of a GPU's generator."""
    if state.numel() != _device_generator.get_state().numel():
        raise RuntimeError(
            "The checkpoint holds the state of a GPU's random number generator, which a CPU cannot "
            "continue: add --no-load-rng."
        )
    _device_generator.set_state(state)


def _seed_device(seed: int) -> None:
    _device_generator.manual_seed(int(seed))


def _seed_all(seed: int) -> torch.Generator:
    """``torch.manual_seed``, which seeds the host and all devices."""
    _host_generator.manual_seed(int(seed))
    return _device_generator.manual_seed(int(seed))


def install() -> None:
    """Put the stand-ins in place, for good."""
    module: Any
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device="cuda": _device_generator.get_state()
        module.set_rng_state = _set_device_state
        module.manual_seed = _seed_device
        module.manual_seed_all = lambda seed: _seed_device(seed)
    # Every index is the one device's generator.
    generators = collections.defaultdict(lambda: _device_generator, {0: _device_generator})
    torch.cuda.default_generators = generators  # type: ignore[assignment]
    for module in (torch, torch.random):
        module.get_rng_state = lambda: _host_generator.get_state()
        module.set_rng_state = lambda state: _host_generator.set_state(state)
        module.manual_seed = lambda seed: _seed_all(seed)
    loader: Any = DataLoader
    loader.__iter__ = around(_with_host_draws, loader.__iter__)
    iterator: Any = _BaseDataLoaderIter
    iterator.__next__ = around(_with_host_draws, iterator.__next__)

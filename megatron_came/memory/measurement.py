"""The memory of a running rank, from the tensors themselves and from CUDA's allocator."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.parameter_slice import gradient_of
from megatron_came.core.state import FACTORS, REMAINDER
from megatron_came.memory.optimizers import Components
from megatron_came.optimizer import CAME

# Of what torch's, apex's and Transformer Engine's optimizers call their momentum.
_MOMENTUM = ("exp_avg", "momentum")


@contextlib.contextmanager
def watch_step(model: Sequence[Any], optimizer: Any) -> Iterator[list[dict[str, int]]]:
    """Note the bytes that CUDA's allocator has given out around every ``step()``; none without.

    Resets the allocator's peak at the beginning of the step.
    """
    seen: list[dict[str, int]] = []
    step, cuda = optimizer.step, torch.cuda

    def watched(*args: Any, **kwargs: Any) -> Any:
        counts = {"peak_before": cuda.max_memory_allocated(), "before": cuda.memory_allocated()}
        cuda.reset_peak_memory_stats()
        result = step(*args, **kwargs)
        counts["peak_during"] = cuda.max_memory_allocated()
        counts["after"] = cuda.memory_allocated()
        seen.append(counts)
        return result

    if not any(param.is_cuda for chunk in model for param in chunk.parameters()):
        yield seen
        return
    optimizer.step = watched
    try:
        yield seen
    finally:
        del optimizer.step  # that of the class is there again


def measure(model: Sequence[Any], optimizer: Any) -> Components:
    """Count the bytes of a rank's tensors, each storage once.

    Args:
        model: the model chunks, in Megatron's ``DistributedDataParallel``.
        optimizer: Megatron's, after a step.
    """
    from megatron_came.megatron.sharding import chain_of  # imports Megatron, as only a run need

    chain = chain_of(optimizer)
    # Of an fp32 model Megatron's layer-wise optimizer holds torch's without a wrapper.
    found = (getattr(each, "optimizer", each) for each in chain)
    inner = [each for each in found if each is not None]
    weights = _storages(param for chunk in model for param in chunk.parameters())
    gradients = _storages(
        tensor
        for chunk in model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        for tensor in (buffer.grad_data, *getattr(buffer, "extra_main_grads", ()))
    )
    updated = [param for each in inner for group in each.param_groups for param in group["params"]]
    state: dict[str, list[Tensor]] = {"main_weights": [], "momentum": [], "second_moment": []}
    for each in inner:
        for values in each.state.values():
            for key, value in values.items():
                if isinstance(value, Tensor) and key != "step":
                    state[component_of(key)].append(value)
    away = (tensor for each in inner for tensor in getattr(each, "host_tensors", ()))
    host = _storages(away)  # of OffloadedCAME
    sizes = {key: _bytes(_storages(tensors), without=host) for key, tensors in state.items()}
    sizes["main_weights"] += _bytes(_storages(updated), without={**weights, **host})
    copies = _storages(grad for param in updated if (grad := gradient_of(param)) is not None)
    sums = _storages(buffer for each in inner if isinstance(each, CAME) for buffer in each.sums)
    return Components(
        weights=_bytes(weights),
        gradients=_bytes(gradients),
        buffers=_bytes(copies, without={**gradients, **host}) + _bytes(sums),
        host=_bytes(host),
        **sizes,
    )


def component_of(key: str) -> str:
    """The component that an optimizer's state of this key is counted under."""
    if key == REMAINDER:
        return "main_weights"
    # Adam's second moment is exp_avg_sq.
    is_momentum = key.startswith(_MOMENTUM) and key not in FACTORS and "_sq" not in key
    return "momentum" if is_momentum else "second_moment"


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Sizes of the memory that tensors lie in, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _bytes(storages: dict[int, int], without: Iterable[int] = ()) -> int:
    return sum(storages[address] for address in storages.keys() - set(without))

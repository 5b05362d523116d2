"""The memory of a running rank, from the tensors themselves and from CUDA's allocator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.parameter_slice import gradient_of
from megatron_came.core.state import FACTORS, REMAINDER
from megatron_came.core.sums import SumBuffer
from megatron_came.megatron.sharding import chain_of
from megatron_came.memory.components import Components

# Of what torch's, apex's and Transformer Engine's optimizers call their momentum.
_MOMENTUM = ("exp_avg", "momentum")


@dataclass(frozen=True, slots=True)
class Allocated:
    """Bytes that CUDA's allocator has given out around an optimizer step.

    Attributes:
        peak_before: most at once, from the start of the run to the optimizer step.
        before: as the step begins.
        peak_during: most at once in the step.
        after: as it ends.
    """

    peak_before: int
    before: int
    peak_during: int
    after: int

    def as_dict(self) -> dict[str, int]:
        """Bytes by the names of the attributes."""
        return asdict(self)


@contextlib.contextmanager
def watch_step(model: Sequence[Any], optimizer: Any) -> Iterator[list[Allocated]]:
    """Note the allocator's counts around every ``step()`` of an optimizer; none without CUDA.

    Resets the allocator's peak at the beginning of the step.

    Args:
        model: the model chunks that it updates.
        optimizer: Megatron's.
    """
    seen: list[Allocated] = []
    step = optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        cuda = torch.cuda
        peak, before = cuda.max_memory_allocated(), cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        result = step(*args, **kwargs)
        seen.append(Allocated(peak, before, cuda.max_memory_allocated(), cuda.memory_allocated()))
        return result

    if not any(param.is_cuda for chunk in model for param in chunk.parameters()):
        yield seen
        return
    optimizer.step = watched
    try:
        yield seen
    finally:
        del optimizer.step


def measure(model: Sequence[Any], optimizer: Any) -> Components:
    """Count the bytes of a rank's tensors, each storage once.

    Args:
        model: the model chunks, in Megatron's ``DistributedDataParallel``.
        optimizer: Megatron's, after a step.
    """
    chain = chain_of(optimizer)
    inner = [each.optimizer for each in chain if getattr(each, "optimizer", None) is not None]
    weights = _Storages(param for chunk in model for param in chunk.parameters())
    buffers = [
        buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    gradients = _Storages(
        tensor
        for buffer in buffers  # in which older releases make no copies
        for tensor in (buffer.grad_data, *getattr(buffer, "extra_main_grads", ()))
    )
    updated = [param for each in inner for group in each.param_groups for param in group["params"]]
    main_weights = _Storages(updated) - weights
    momentum: list[Tensor] = []
    second_moment: list[Tensor] = []
    remainders: list[Tensor] = []
    for each in inner:
        for param in updated:
            for key, value in each.state.get(param, {}).items():
                if key == REMAINDER:
                    remainders.append(value)
                elif isinstance(value, Tensor) and key != "step":
                    (momentum if _is_momentum(key) else second_moment).append(value)
    copies = _Storages(grad for param in updated if (grad := gradient_of(param)) is not None)
    sums = _Storages(buffer.flat for buffer in _buffers_of_sums(inner))
    return Components(
        weights=weights.bytes,
        gradients=gradients.bytes,
        main_weights=main_weights.bytes + _Storages(remainders).bytes,
        momentum=_Storages(momentum).bytes,
        second_moment=_Storages(second_moment).bytes,
        buffers=(copies - gradients).bytes + sums.bytes,
    )


def parameters(model: Sequence[Any]) -> int:
    """Number of elements of a rank's weights."""
    return sum(param.numel() for chunk in model for param in chunk.parameters())


def _is_momentum(key: str) -> bool:
    return key not in FACTORS and "_sq" not in key and key.startswith(_MOMENTUM)


class _Storages:
    """Pieces of memory that tensors lie in."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self._sizes[storage.data_ptr()] = storage.nbytes()

    def __sub__(self, other: _Storages) -> _Storages:
        rest = _Storages(())
        rest._sizes = {key: size for key, size in self._sizes.items() if key not in other._sizes}
        return rest

    @property
    def bytes(self) -> int:
        """Their sum."""
        return sum(self._sizes.values())


def _buffers_of_sums(root: Any) -> Iterator[SumBuffer]:
    """Find the buffers of sums over ranks among all that optimizers refer to."""
    seen: set[int] = set()
    found = [root]
    while found:
        each = found.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, SumBuffer):
            yield each
        elif isinstance(each, list | tuple | set):
            found.extend(each)
        elif isinstance(each, dict):
            found.extend(each.values())
        elif type(each).__module__.startswith("megatron_came."):
            found.extend(vars(each).values() if hasattr(each, "__dict__") else ())

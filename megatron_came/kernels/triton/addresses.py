"""Where the tensors of parameters lie: the first columns of their tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_came.core import int8
from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.state import MOMENTUM, REMAINDER, SCALE
from megatron_came.kernels.backend import Kernels
from megatron_came.kernels.triton.tables import IntTable

_GRADIENT_DTYPES = (torch.float32, torch.bfloat16)
_MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class Addresses:
    """Writes the first columns of a table: what the host may change between steps.

    Args:
        works: the parameters in the order of the table; all of them have begun a step.
        table: of ``MatrixField`` or ``VectorField``.
        factors: keys of the state, in the order of the table's columns.
        kernels: that read the table.
        is_int8: whether the momentum is.

    Attributes:
        copied: parameters of this step whose model weights kernels cannot write.
        rounds: whether any momentum is rounded with random bits, which differ from step to step.
    """

    def __init__(
        self,
        works: Sequence[ParameterSlice],
        table: IntTable,
        factors: Sequence[str],
        kernels: Kernels,
        is_int8: bool,
    ) -> None:
        self._works, self._table, self._factors = works, table, factors
        self._kernels, self._is_int8 = kernels, is_int8
        self._wanted = [_wanted_state(work, factors, is_int8) for work in works]
        self._get: list[Callable[[Any], tuple[Tensor, ...]]] = [
            itemgetter(*wanted) for wanted in self._wanted
        ]
        self._seen: list[tuple[Any, ...]] = [()] * len(works)
        self._placed: Any = None  # none, or not that of this table
        self._grads: list[Tensor] = []
        self.copied: list[ParameterSlice] = []
        self.rounds = False

    def refresh(self) -> Any:
        """Look where the tensors lie in this step.

        Returns:
            The table, where the kernels read it; another object if it has changed.

        Raises:
            ValueError: state that does not fit its parameter.
        """
        self.release()
        self.rounds = False
        for index, work in enumerate(self._works):
            grad, weight = self._gradient(work), self._model_weight(work)
            try:
                state = self._get[index](work.state)
            except KeyError:
                self._check(index)
                raise
            seen = (
                work.param.data_ptr(),
                grad.data_ptr(),
                grad.dtype,
                weight is not None and (weight.data_ptr(), weight.dtype),
                [
                    (tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.is_contiguous())
                    for tensor in state
                ],
            )
            self.rounds = self.rounds or work.state[MOMENTUM].dtype != torch.float32
            if seen != self._seen[index]:
                self._check(index)
                row = self._row(work, grad, weight)
                self._seen[index], self._placed = (), None  # until all is written
                self._table[index, : len(row)] = row
                self._seen[index] = seen
        if self._placed is None:
            self._placed = self._kernels.place(self._table)
        return self._placed

    def release(self) -> None:
        """Let go of what only this step needs."""
        self._grads, self.copied = [], []

    def _gradient(self, work: ParameterSlice) -> Tensor:
        grad = work.grad
        if grad.dtype not in _GRADIENT_DTYPES or not grad.is_contiguous():
            grad = grad.to(torch.float32).contiguous()
            self._grads.append(grad)
        return grad

    def _model_weight(self, work: ParameterSlice) -> Tensor | None:
        weight = work.model_weight
        if weight is not None and weight.dtype not in self._kernels.written_dtypes:
            self.copied.append(work)
            return None
        return weight

    def _row(self, work: ParameterSlice, grad: Tensor, weight: Tensor | None) -> list[int]:
        state = work.state
        momentum = state[MOMENTUM]
        return [
            work.param.data_ptr(),
            grad.data_ptr(),
            momentum.data_ptr(),
            state[SCALE].data_ptr() if self._is_int8 else 0,
            state[REMAINDER].data_ptr() if _has_remainder(work) else 0,
            0 if weight is None else weight.data_ptr(),
            *(state[key].data_ptr() for key in self._factors),
            grad.dtype == torch.bfloat16,
            weight is not None and weight.dtype == torch.bfloat16,
            momentum.dtype == torch.bfloat16,
        ]

    def _check(self, index: int) -> None:
        """Compare the state with what kernels rely on.

        Raises:
            ValueError: another size, dtype, device or layout, or none.
        """
        work = self._works[index]
        momentum = work.state.get(MOMENTUM)
        known = momentum is not None and momentum.dtype in _MOMENTUM_DTYPES
        if known and is_int8_momentum(work) != self._is_int8:
            raise ValueError("CAME: momentum is int8 in some parameters and not in others.")
        for key, wanted in self._wanted[index].items():
            if key not in work.state:
                raise ValueError(
                    f"CAME: a parameter of shape {work.shard.shape} has no state {key!r}: it "
                    "belongs to another model, or something has taken it away."
                )
            value = work.state[key]
            fits = value.numel() == wanted.numel and value.dtype in wanted.dtypes
            if not fits or not value.is_contiguous() or value.device != work.param.device:
                raise ValueError(
                    f"CAME: state {key!r} of a parameter of shape {work.shard.shape} has the shape "
                    f"{tuple(value.shape)}, {value.dtype}, on {value.device}: it belongs to "
                    "another model, or something has changed it."
                )


def is_int8_momentum(work: ParameterSlice) -> bool:
    """Whether a parameter's momentum is."""
    return MOMENTUM in work.state and work.state[MOMENTUM].dtype == torch.int8


class _Wanted(NamedTuple):
    """What a tensor of the state must be: kernels would write beyond the end of a smaller one."""

    numel: int
    dtypes: tuple[torch.dtype, ...]


def _has_remainder(work: ParameterSlice) -> bool:
    """Kernels bear a bf16 parameter only where it is the upper half of fp32 weights."""
    return work.param.dtype == torch.bfloat16


def _wanted_state(
    work: ParameterSlice, factors: Sequence[str], is_int8: bool
) -> dict[str, _Wanted]:
    """All that kernels touch of a parameter's state."""
    batch, rows, columns = work.shard.local_matrix
    numel = work.shard.numel
    wanted = {MOMENTUM: _Wanted(numel, _MOMENTUM_DTYPES)}
    if is_int8:
        wanted[SCALE] = _Wanted(int8.blocks(numel), (torch.float32,))
    if _has_remainder(work):
        wanted[REMAINDER] = _Wanted(numel, (torch.int16,))
    for key in factors:
        size = batch * (columns if key.endswith("_col") else rows)
        wanted[key] = _Wanted(size, (torch.float32,))
    return wanted

"""Where the tensors of parameters lie: the first columns of their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_came.core.momentum import MOMENTUM, MOMENTUM_DTYPES, SCALE, State
from megatron_came.core.parameter_slice import ParameterSlice, StepInputs
from megatron_came.core.state import REMAINDER
from megatron_came.kernels.backend import readable
from megatron_came.kernels.state_checks import check_state, is_int8_momentum, wanted_state
from megatron_came.kernels.triton.device import Device
from megatron_came.kernels.triton.tables import IntTable, Kind, blocks_are_rows


class Seen(NamedTuple):
    """What a step has found, to be kept until its end.

    Attributes:
        table: where the kernels read it; another object than before if it has changed.
        rounds: whether any momentum is rounded with random bits, which differ from step to step.
        copied: parameters whose model weights kernels cannot write.
        grads: copies of gradients that kernels cannot read as they are.
    """

    table: Any
    rounds: bool
    copied: Sequence[ParameterSlice]
    grads: Sequence[Tensor]


def kind_of(slice_: ParameterSlice, given: StepInputs, tile_columns: int) -> Kind:
    """Return what is compiled into the kernels that take a matrix parameter."""
    shard, state, weight = slice_.shard, given.state, given.model_weight
    momentum, columns = state.get(MOMENTUM), shard.local_matrix[2]
    dtype = None if momentum is None else momentum.dtype
    tensors = (slice_.param, given.grad, momentum, state.get(REMAINDER), weight)
    return Kind(
        ALIGNED=(shard.start | shard.stop | columns) % 4 == 0
        and all(t is None or t.data_ptr() % (4 * t.element_size()) == 0 for t in tensors),
        GRAD_IS_BF16=given.grad.dtype == torch.bfloat16,
        EXP_AVG_IS_BF16=dtype == torch.bfloat16,
        INT8=(dtype == torch.int8) * (2 - blocks_are_rows(shard, tile_columns)),
        HAS_REMAINDER=slice_.param.dtype == torch.bfloat16,  # kernels take no other bf16 ones
        MODEL=0 if weight is None else 1 if weight.dtype == torch.bfloat16 else 2,
    )


class Addresses:
    """Writes the first columns of a table: what others may change between steps.

    Args:
        slices: the parameters in the order of the table.
        table: of ``ParamField``.
        factors: keys of the state, in the order of the table's columns.
        device: on which they lie.
        is_int8: whether the momentum is.

    Attributes:
        kinds: of the parameters, as they were last seen.
    """

    def __init__(
        self,
        slices: Sequence[ParameterSlice],
        table: IntTable,
        factors: Sequence[str],
        device: Device,
        is_int8: bool,
    ) -> None:
        self._slices, self._table, self._factors = slices, table, factors
        self._device, self._is_int8 = device, is_int8
        self._wanted = [wanted_state(slice_, is_int8) for slice_ in slices]
        self._get: list[Callable[[Any], tuple[Tensor, ...]]] = [
            itemgetter(*wanted) for wanted in self._wanted
        ]
        self._rows: list[tuple[Any, ...]] = [()] * len(slices)
        self.kinds = [Kind()] * len(slices)
        self._uploaded: Any = None  # none, or not that of this table

    def refresh(self, inputs: Mapping[ParameterSlice, StepInputs]) -> Seen:
        """Look where the tensors lie in this step.

        Raises:
            ValueError: state that does not fit its parameter.
        """
        rounds, copied, grads = False, [], []
        for index, slice_ in enumerate(self._slices):
            state, grad, _, weight = inputs[slice_]
            if (copy := readable(grad)) is not grad:
                grads.append(grad := copy)
            if weight is not None and weight.dtype not in self._device.written_dtypes:
                copied.append(slice_)
                weight = None
            try:
                tensors = self._get[index](state)
            except KeyError:
                self._check(index, state)
                raise
            row = (
                slice_.param.data_ptr(),
                grad.data_ptr(),
                grad.dtype,
                weight is not None and (weight.data_ptr(), weight.dtype),
                [
                    (tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.is_contiguous())
                    for tensor in tensors
                ],
            )
            rounds = rounds or state[MOMENTUM].dtype != torch.float32
            if row != self._rows[index]:
                self._check(index, state)
                self._rows[index], self._uploaded = (), None  # until all is written
                given = inputs[slice_]._replace(grad=grad, model_weight=weight)
                columns = self._columns(index, given)
                self._table[index, : len(columns)] = columns
                self.kinds[index] = kind_of(slice_, given, self._device.tiling.columns)
                self._rows[index] = row
        if self._uploaded is None:
            self._uploaded = self._device.upload(self._table)
        return Seen(self._uploaded, rounds, copied, grads)

    def _columns(self, index: int, given: StepInputs) -> list[int]:
        state, weight = given.state, given.model_weight
        dtypes = given.grad.dtype, weight is not None and weight.dtype, state[MOMENTUM].dtype
        return [
            self._slices[index].param.data_ptr(),
            given.grad.data_ptr(),
            state[MOMENTUM].data_ptr(),
            state[SCALE].data_ptr() if self._is_int8 else 0,
            state[REMAINDER].data_ptr() if REMAINDER in self._wanted[index] else 0,
            0 if weight is None else weight.data_ptr(),
            *(dtype == torch.bfloat16 for dtype in dtypes),
            *(state[key].data_ptr() for key in self._factors),
        ]

    def _check(self, index: int, state: State) -> None:
        """Compare the state with what kernels rely on.

        Raises:
            ValueError: another size, dtype, device or layout, or none.
        """
        momentum = state.get(MOMENTUM)
        known = momentum is not None and momentum.dtype in MOMENTUM_DTYPES.values()
        if known and is_int8_momentum(state) != self._is_int8:
            raise ValueError("CAME: momentum is int8 in some parameters and not in others.")
        check_state(self._slices[index], state, self._wanted[index])

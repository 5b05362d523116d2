"""The passes on a CPU, in Numba's kernels, one parameter after another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_came.core.hyperparameters import GroupSettings
from megatron_came.core.momentum import MOMENTUM, SCALE
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums, StepInputs
from megatron_came.core.rounding import step_key
from megatron_came.core.state import MATRIX_FACTORS, REMAINDER, VECTOR_FACTORS
from megatron_came.kernels.backend import readable, unsupported_by_kernels
from megatron_came.kernels.cpu import threads
from megatron_came.kernels.cpu.factors import Axis, update_instabilities, update_second_moments
from megatron_came.kernels.cpu.shapes import Geometry, row_places, tiles_of
from megatron_came.kernels.cpu.sums import add_instability_sums, add_square_sums
from megatron_came.kernels.cpu.update import Arrays, Rates, Scales, update
from megatron_came.kernels.state_checks import check_state, is_int8_momentum, wanted_state

Array = npt.NDArray[Any]

# NumPy's names of dtypes; bf16 is one of two integers'.
_KINDS = {torch.float32: "f4", torch.int16: "i2", torch.int8: "i1", torch.float64: "f8"}
# Of fewer elements, one thread is done before others have begun.
_SMALL = 64 * 1024


class NumbaBackend:
    """:class:`megatron_came.kernels.backend.Backend` for the CPU, on PyTorch's threads.

    The other kernels are compiled, or loaded from Numba's cache, when they are called first.

    Raises:
        Exception: anything that Numba raises where it cannot compile.
    """

    name = "numba"

    def __init__(self) -> None:
        # What keeps Numba from compiling shows here, where eager PyTorch can still take over.
        one, sums = np.zeros(1, np.float32), np.zeros(1)
        add_square_sums(
            one, Geometry(0, 1, 1, 1, 1), np.array([[0, 0, 1]]), sums, sums.reshape(1, 1),
            np.zeros((1, 3, 1), np.float32), threads=1,
        )  # fmt: skip

    def unsupported(self, slice_: ParameterSlice) -> str | None:
        """Nothing beyond what hinders all kernels."""
        return unsupported_by_kernels(slice_)

    def passes(self, sums: Mapping[ParameterSlice, SliceSums], *, is_local: bool) -> _Passes:
        """Make the passes, one parameter after another."""
        return _Passes(sums)


class _Passes:
    def __init__(self, sums: Mapping[ParameterSlice, SliceSums]) -> None:
        self._matrices = {slice_: _Matrices(slice_, own) for slice_, own in sums.items()}
        largest = max(math.prod(each.partial_shape) for each in self._matrices.values())
        scratch = np.empty(largest, np.float32)  # all use the same, one after another
        for each in self._matrices.values():
            each.partial = scratch[: math.prod(each.partial_shape)].reshape(each.partial_shape)

    def begin(self, inputs: Mapping[ParameterSlice, StepInputs]) -> _Step:
        count = threads.usable()
        taken = [self._matrices[slice_] for slice_ in inputs]
        found = [self._matrices[slice_].find(given, count) for slice_, given in inputs.items()]
        return _Step(taken, count, [copy for copy in found if copy is not None])


class _Step:
    def __init__(self, taken: Sequence[_Matrices], count: int, copies: Sequence[Tensor]) -> None:
        self._taken, self._count, self._copies = taken, count, copies

    @property
    def lasts(self) -> bool:  # copies of gradients are of one step
        return not self._copies and self._count == threads.usable()

    def again(self, settings: Sequence[GroupSettings]) -> None:
        for each in self._taken:
            each.settings = settings[each.slice.group]

    def take(self, *passes: int) -> None:
        with threads.pool(self._count):
            for each in self._taken:  # one after another, which may stay in the cache
                for number in passes:
                    each.passes[number - 1](each)


def _array(tensor: Tensor, bf16_as: str = "u2") -> Array:
    """View a contiguous tensor as a flat array, valid as long as the tensor is where it is.

    ``Tensor.numpy()`` would hold the memory after the tensor has let go of it, and no host could
    resize it any more.
    """
    kind = bf16_as if tensor.dtype == torch.bfloat16 else _KINDS[tensor.dtype]
    if not tensor.numel():
        return np.empty(0, kind)
    # A type of ctypes for each length would take thirty times as long.
    where: dict[str, Any] = {"data": (tensor.data_ptr(), False), "shape": (tensor.numel(),)}
    return np.asarray(SimpleNamespace(__array_interface__={**where, "typestr": kind, "version": 3}))


def _is_written(weight: Tensor | None) -> bool:
    """Whether kernels write model weights; others are copied."""
    return weight is not None and weight.dtype == torch.bfloat16


class _Matrices:
    """One parameter, a batch of matrices (see ``Geometry``), and the passes over it."""

    partial: Array  # scratch for sums of columns
    arrays: Arrays  # of the slice
    second_moment: tuple[Axis, Axis]  # r and c; of a vector, the columns alone are v
    instability: tuple[Axis, Axis]  # R and C; of a vector, empty
    settings: GroupSettings  # of the parameter's group in this step
    grad: Array  # flat, valid as long as the gradient is where it is
    model_weight: Tensor | None  # 16-bit copy of the slice
    count: int  # of threads

    def __init__(self, slice_: ParameterSlice, sums: SliceSums) -> None:
        self.slice, self.total = slice_, sums.total.numpy()
        self.geometry = Geometry.of(slice_.shard)
        self.tiles, self.row_places = tiles_of(self.geometry), row_places(slice_.shard)
        self.partial_shape = len(self.tiles), 3, self.geometry.columns
        self.is_vector, self.full_numel = slice_.shard.is_vector, slice_.shard.full_numel
        _, _, batch, rows, columns = self.geometry
        sizes = batch * rows, (batch, columns), batch * rows, (batch, columns)
        self.scales = Scales(*(np.ones(size, np.float32) for size in sizes))
        self.inverse_guesses = np.empty(batch, np.float32)
        squares, instability = (
            [each.numpy() for each in views] for views in (sums.squares, sums.instability)
        )
        if slice_.shard.is_vector:
            squares = [np.empty((batch, 1)), squares[0].reshape(batch, columns)]
            instability = [np.zeros((3, batch, 1)), np.empty((3, batch, 0))]
        self._sums = *squares, *instability
        self.row_squares, self.column_squares = squares[0].reshape(-1), squares[1]
        self.row_sums = instability[0].reshape(3, batch * rows)
        self.column_sums = instability[1]
        self._seen: tuple[Any, ...] = ()

    def find(self, given: StepInputs, count: int) -> Tensor | None:
        """Look where this step's tensors lie, and view those anew that have moved.

        Return a copy of a gradient that kernels cannot read, to be kept as long as they read it.
        """
        state, grad, self.settings, weight = given
        self.count = count if self.geometry.size >= _SMALL else 1
        read = readable(grad)
        self.grad, self.model_weight = _array(read), weight
        own = (value for value in state.values() if isinstance(value, Tensor))  # and others' marks
        tensors = [self.slice.param, *own]
        if weight is not None and _is_written(weight):
            tensors.append(weight)
        seen = *state, *((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)
        if seen != self._seen:
            self._seen = ()  # until all is found
            check_state(self.slice, state, wanted_state(self.slice, is_int8_momentum(state)))
            self._view(state, weight if _is_written(weight) else None)
            self._seen = seen
        return None if read is grad else read

    def _view(self, state: Mapping[str, Tensor], weight: Tensor | None) -> None:
        remainder, block_scales = state.get(REMAINDER), state.get(SCALE)
        self.arrays = Arrays(
            weights=_array(self.slice.param, "i2"),
            remainders=np.empty(0, np.int16) if remainder is None else _array(remainder),
            model_weights=np.empty(0, np.uint16) if weight is None else _array(weight),
            momentum=_array(state[MOMENTUM]),
            block_scales=np.empty(0, np.float32) if block_scales is None else _array(block_scales),
        )
        shard, batch = self.slice.shard, self.geometry.batch
        counts = shard.full_columns, shard.full_rows
        are_whole = shard.tp_axis != "rows", shard.tp_axis != "columns"
        keys = VECTOR_FACTORS if shard.is_vector else MATRIX_FACTORS
        moments = [_array(state[key]).reshape(batch, -1) for key in keys]
        if shard.is_vector:
            none = np.empty((batch, 0), np.float32)
            moments, counts, are_whole = [none, *moments, none, none], (1, 1), (False, True)
        scales = [scale.reshape(batch, -1) for scale in self.scales]
        r, c, R, C = map(Axis, moments, self._sums, scales, counts * 2, are_whole * 2)
        self.second_moment, self.instability = (r, c), (R, C)

    def add_square_sums(self) -> None:
        """Pass 1."""
        add_square_sums(
            self.grad, self.geometry, self.tiles, self.row_squares, self.column_squares,
            self.partial, threads=self.count,
        )  # fmt: skip

    def add_instability_sums(self) -> None:
        """The second moments r and c (v of a vector), and pass 2."""
        hyper = self.settings.hyper
        update_second_moments(
            *self.second_moment, self.inverse_guesses, hyper.eps1, hyper.beta2, hyper.clip_threshold
        )
        add_instability_sums(
            self.grad, self.arrays.momentum, self.arrays.block_scales, self.geometry, self.tiles,
            self.scales.row, self.scales.column, self.inverse_guesses, self.row_sums,
            self.column_sums, self.partial, threads=self.count,
        )  # fmt: skip
        self.total[()] = self.row_sums[2].sum()

    def apply(self) -> None:
        """The clip divisor, R and C, and pass 3."""
        hyper = self.settings.hyper
        total = float(self.total)
        divisor = max(math.sqrt(total / self.full_numel) / hyper.clip_threshold, 1.0)
        inverse = 1.0 / divisor + 0.0 * total  # NaN for an infinite gradient
        if not self.is_vector:
            update_instabilities(
                *self.instability, self.inverse_guesses, inverse, hyper.eps2, hyper.beta3,
                hyper.beta1,
            )  # fmt: skip
        lr = float(self.settings.lr)
        is_rounded = self.arrays.momentum.dtype != np.float32
        key = step_key(self.slice.key, self.settings.step) if is_rounded else 0
        rates = Rates(lr, lr * self.settings.weight_decay, hyper.beta1, inverse, key)
        update(
            self.grad, self.arrays, self.geometry, self.row_places, self.scales, rates,
            threads=self.count,
        )  # fmt: skip
        if not _is_written(self.model_weight):
            self.slice.copy_to_model(self.model_weight)

    passes = add_square_sums, add_instability_sums, apply

"""The passes of a step in plain PyTorch: for any device and dtype, parameter by parameter.

The slice of a matrix is taken in boxes, so that temporaries stay within a few MiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from megatron_came.core import factors, passes, remainders
from megatron_came.core.hyperparameters import GroupSettings, Hyperparameters
from megatron_came.core.momentum import MOMENTUM, RoundedWriter, codec_of
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums, StepInputs
from megatron_came.core.rounding import random_bits, step_key
from megatron_came.core.shard import Box, Shard, boxes
from megatron_came.core.state import MATRIX_FACTORS, REMAINDER, VECTOR_FACTORS
from megatron_came.kernels.state_checks import check_eager_state

# Elements of a box: large enough to keep the device busy, small enough that temporaries stay within
# a few MiB on a CPU, and a few dozen on a GPU.
_BOX_ELEMENTS = {"cpu": 512 * 1024, "cuda": 4 * 1024 * 1024}
# Random bits and what is in fewer bits take that many times the temporaries.
_MORE_TEMPORARIES = 4


class EagerBackend:
    """:class:`megatron_came.kernels.backend.Backend` in plain PyTorch."""

    name = "plain"

    def unsupported(self, slice_: ParameterSlice) -> str | None:
        """Nothing is."""
        return None

    def passes(self, sums: Mapping[ParameterSlice, SliceSums], *, is_local: bool) -> _Passes:
        """Make the passes, one parameter after another."""
        return _Passes(sums)


class _Passes:
    def __init__(self, sums: Mapping[ParameterSlice, SliceSums]) -> None:
        self._sums = sums

    def begin(self, inputs: Mapping[ParameterSlice, StepInputs]) -> _Step:
        """Take up a step's gradients.

        Raises:
            ValueError: state that does not fit its parameter.
        """
        for slice_, given in inputs.items():
            check_eager_state(slice_, given.state)
        return _Step(
            [
                (_update_vector if slice_.shard.is_vector else _update_matrix)(
                    _Boxes(slice_, given), given, self._sums[slice_]
                )
                for slice_, given in inputs.items()
            ]
        )


class _Step:
    lasts = False  # it holds the gradients

    def __init__(self, updates: Sequence[Iterator[None]]) -> None:
        self._updates = updates

    def again(self, settings: Sequence[GroupSettings]) -> None:
        raise NotImplementedError  # since it does not last

    def take(self, *passes: int) -> None:
        for update in self._updates:
            for _ in passes:
                next(update, None)  # it goes on to the next pass


# An update goes on from yield to yield: there it waits for the sums that all ranks complete.


def _update_matrix(boxes: _Boxes, given: StepInputs, sums: SliceSums) -> Iterator[None]:
    """Update a matrix, or a batch of them: r, c, R, C, m and p of the paper's algorithm 2."""
    shard, hyper = boxes.shard, given.settings.hyper
    counts = (shard.full_columns, shard.full_rows)
    row_squares, column_squares = sums.squares
    for box in boxes:
        passes.add_squared_sums(
            boxes.gradient(box),
            row_squares[box.batch, box.rows],
            column_squares[box.batch, box.columns],
        )
    yield

    r, c, R, C = (boxes.factor(key) for key in MATRIX_FACTORS)
    for moment, squares, count in zip((r, c), sums.squares, counts, strict=True):
        factors.update_moment(moment, squares, count=count, eps=hyper.eps1, beta=hyper.beta2)
    row_scale, column_scale = factors.scales(r, c, _mean(shard, r, c))
    guess = _guessed_divisor(shard, hyper, (r, c), sums.squares)
    row_sums, column_sums = sums.instability
    for box in boxes:
        passes.add_instability_sums(
            boxes.gradient(box),
            boxes.momentum(box),
            row_scale[box.batch, box.rows],
            column_scale[box.batch, box.columns],
            guess,
            row_sums[:, box.batch, box.rows],
            column_sums[:, box.batch, box.columns],
        )
    sums.total.copy_(row_sums[2].sum())  # of u^2
    yield

    divisor = factors.clip_divisor(
        sums.total, numel=shard.full_numel, clip_threshold=hyper.clip_threshold
    )
    for moment, three, count in zip((R, C), sums.instability, counts, strict=True):
        instability = factors.true_instability(
            three, guess=guess, divisor=divisor, beta1=hyper.beta1
        )
        factors.update_moment(moment, instability, count=count, eps=hyper.eps2, beta=hyper.beta3)
    row_confidence, column_confidence = factors.scales(R, C, _mean(shard, R, C))
    for box in boxes:
        boxes.apply_update(
            box,
            divisor,
            row_scale[box.batch, box.rows],
            column_scale[box.batch, box.columns],
            row_confidence[box.batch, box.rows],
            column_confidence[box.batch, box.columns],
        )
    boxes.finish()


def _update_vector(boxes: _Boxes, given: StepInputs, sums: SliceSums) -> Iterator[None]:
    """Update a vector: v, clipped update, m and p; no confidence."""
    shard, hyper = boxes.shard, given.settings.hyper
    (squares,) = sums.squares
    for box in boxes:
        passes.add_squared_sums(boxes.gradient(box), squares[box.batch, box.rows], None)
    yield

    (v,) = (boxes.factor(key) for key in VECTOR_FACTORS)
    factors.update_moment(v, squares, count=1, eps=hyper.eps1, beta=hyper.beta2)
    scale = v.rsqrt()
    for box in boxes:
        passes.add_squared_update(boxes.gradient(box), scale[box.batch, box.rows], sums.total)
    yield

    divisor = factors.clip_divisor(
        sums.total, numel=shard.full_numel, clip_threshold=hyper.clip_threshold
    )
    for box in boxes:
        boxes.apply_update(box, divisor, scale[box.batch, box.rows])
    boxes.finish()


def _mean(shard: Shard, row: Tensor, column: Tensor) -> Tensor:
    """Return mean(r) = mean(c) from the factor that this rank holds whole."""
    return factors.mean_of(column if shard.tp_axis == "rows" else row)


def _guessed_divisor(
    shard: Shard, hyper: Hyperparameters, moments: Sequence[Tensor], squares: Sequence[Tensor]
) -> Tensor:
    """Return d0 from the factors that this rank holds whole: the larger, where both are."""
    # Ranks of a tensor-parallel group hold the same one whole, and so guess alike.
    guesses = [
        factors.guessed_divisor(
            moment, sums, count=count, eps=hyper.eps1, clip_threshold=hyper.clip_threshold
        )
        for axis, moment, sums, count in (
            ("rows", moments[0], squares[0], shard.full_columns),
            ("columns", moments[1], squares[1], shard.full_rows),
        )
        if shard.tp_axis != axis
    ]
    return torch.stack(guesses).amax()


class _Boxes:
    """The boxes of one slice in one step, and what they hold, in the dtype of the arithmetic."""

    def __init__(self, slice_: ParameterSlice, given: StepInputs) -> None:
        self._slice, self._given, self._state = slice_, given, given.state
        self.shard = slice_.shard
        self._codec = codec_of(self._state[MOMENTUM].dtype)
        self._rounded = RoundedWriter(self._state)
        self._grad = given.grad.reshape(-1)
        limit = _BOX_ELEMENTS.get(slice_.param.device.type, _BOX_ELEMENTS["cuda"])
        if self._codec.is_rounded or REMAINDER in self._state:
            limit = max(limit // _MORE_TEMPORARIES, 1)
        self._boxes = list(boxes(slice_.shard, limit))

    @cached_property
    def _weights(self) -> Tensor:
        """The flat weights, or a copy of those that do not lie so in memory."""
        return self._slice.param.detach().contiguous().resolve_neg().view(-1)

    def __iter__(self) -> Iterator[Box]:
        return iter(self._boxes)

    def factor(self, key: str) -> Tensor:
        """View a factor as (batch, n)."""
        return self._state[key].view(self.shard.local_matrix[0], -1)

    def gradient(self, box: Box) -> Tensor:
        """Return a box of the gradient."""
        return self._grad[box.flat].to(self._slice.dtype).view(box.shape)

    def momentum(self, box: Box) -> Tensor:
        """Return a box of the momentum, or a copy of it where it is kept in another dtype."""
        return self._codec.read(self._state, box.start, box.stop).view(box.shape)

    def apply_update(
        self,
        box: Box,
        divisor: Tensor,
        row_scale: Tensor,
        column_scale: Tensor | None = None,
        row_confidence: Tensor | None = None,
        column_confidence: Tensor | None = None,
    ) -> None:
        """Pass 3 over a box; see :func:`megatron_came.core.passes.apply_update`."""
        settings = self._given.settings
        momentum, weights = self.momentum(box), self._weights[box.flat]
        has_remainder = REMAINDER in self._state
        if has_remainder:
            remainder = self._state[REMAINDER].view(-1)[box.flat]
            weights = remainders.join(weights, remainder)
        passes.apply_update(
            weights.view(box.shape),
            self.gradient(box),
            momentum,
            row_scale,
            column_scale,
            row_confidence,
            column_confidence,
            divisor=divisor.to(self._slice.dtype),  # sums are float64
            beta1=settings.hyper.beta1,
            lr=float(settings.lr),
            weight_decay=settings.weight_decay,
            cautious=settings.hyper.cautious,
        )
        if self._codec.is_rounded:
            key = step_key(self._slice.key, settings.step)
            bits = random_bits(self.shard.full_offsets(box, momentum.device), key)
            self._rounded.write(momentum.view(-1), bits.view(-1))
        if has_remainder:
            self._weights[box.flat], remainder[:] = remainders.split(weights)

    def finish(self) -> None:
        """Write what is not written yet."""
        param = self._slice.param.detach()
        if not param.is_contiguous() or param.is_neg():  # of which the flat weights are a copy
            param.copy_(self._weights.view(param.shape))
        self._slice.copy_to_model(self._given.model_weight)

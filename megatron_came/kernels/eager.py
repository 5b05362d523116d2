"""The passes of a step in plain PyTorch: for any device and dtype, parameter by parameter.

The slice of a matrix is cut into boxes, so that temporaries stay within a few MiB; vectors, which
are small, are taken whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_came.core import factors, int8, passes, remainders
from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.rounding import random_bits, to_bf16
from megatron_came.core.shard import Block, blocks
from megatron_came.core.state import MATRIX_FACTORS, MOMENTUM, REMAINDER, SCALE, VECTOR_FACTORS

# Elements of a box: large enough to keep the device busy, small enough that temporaries stay within
# a few MiB on a CPU, and a few dozen on a GPU.
_BLOCK_ELEMENTS = {"cpu": 512 * 1024, "cuda": 4 * 1024 * 1024}
# Random bits and what is in fewer bits take that many times the temporaries.
_MORE_TEMPORARIES = 4


class PlainPasses:
    """The passes over some parameters.

    Args:
        works: the parameters that may take part in a step.
    """

    def __init__(self, works: Iterable[ParameterSlice]) -> None:
        self._parts = {work: _Part(work) for work in works}
        self._active: list[_Part] = []

    def begin(self, active: Sequence[ParameterSlice]) -> None:
        """Start a step of these parameters, all of which have begun."""
        self._active = [self._parts[work] for work in active]
        for part in self._active:
            part.begin()

    def add_square_sums(self) -> None:
        """Pass 1."""
        for part in self._active:
            part.add_square_sums()

    def add_instability_sums(self) -> None:
        """With the sums of pass 1 complete: second moments and pass 2."""
        for part in self._active:
            part.update_second_moment()
            part.add_instability_sums()

    def apply(self) -> None:
        """With the sums of pass 2 complete: instabilities and pass 3, but of copies."""
        self._apply(part for part in self._active if part.work.copies_group is None)

    def apply_copies(self) -> None:
        """The same of copies, with second moments anew from the sums that all copies share."""
        copies = [part for part in self._active if part.work.copies_group is not None]
        for part in copies:
            part.update_second_moment()
        self._apply(copies)

    def step(self) -> None:
        """All passes, where no sum goes over ranks and nothing is a copy."""
        self.add_square_sums()
        self.add_instability_sums()
        self.apply()

    def end(self) -> None:
        """Rewrite the model's weights, and let go of the gradients."""
        for part in self._active:
            part.work.copy_to_model()
            part.end()
        self._active = []

    def _apply(self, parts: Iterable[_Part]) -> None:
        for part in parts:
            part.update_instability()
            part.apply()


class _Part:
    """The passes over one parameter."""

    def __init__(self, work: ParameterSlice) -> None:
        self.work, self._shard = work, work.shard
        self._limit = 0
        self._blocks: list[Block]
        self._grad: Tensor
        # Momentum, and its random bits, of a begun block of int8.
        self._rest: tuple[Tensor, Tensor]

    def begin(self) -> None:
        """Take up this step's gradient."""
        self._grad = self.work.grad.reshape(-1)
        limit = _BLOCK_ELEMENTS.get(self._grad.device.type, _BLOCK_ELEMENTS["cuda"])
        is_small = self.work.state[MOMENTUM].dtype in (torch.bfloat16, torch.int8)
        if is_small or REMAINDER in self.work.state:
            limit = max(limit // _MORE_TEMPORARIES, 1)
        if limit != self._limit:
            self._limit, self._blocks = limit, list(blocks(self._shard, limit))

    def end(self) -> None:
        """Let go of it."""
        del self._grad

    def _factors(self, *keys: str) -> list[Tensor]:
        """View factors as (batch, n)."""
        batch = self._shard.local_matrix[0]
        return [self.work.state[key].view(batch, -1) for key in keys]

    def _grad_box(self, block: Block) -> Tensor:
        box = self._grad[block.start : block.stop]
        return box.to(self.work.dtype).view(block.shape)

    def _momentum_box(self, block: Block) -> Tensor:
        """The momentum, or a copy of it in the dtype of the arithmetic."""
        state = self.work.state
        box = state[MOMENTUM].view(-1)[block.start : block.stop].view(block.shape)
        if box.dtype == torch.int8:
            return int8.dequantize(box, state[SCALE], block.start)
        return box.to(self.work.dtype)

    def _keep_momentum(self, momentum: Tensor, block: Block) -> None:
        """Round a copy back to the dtype in which momentum is kept."""
        kept = self.work.state[MOMENTUM].view(-1)
        if kept.dtype not in (torch.bfloat16, torch.int8):
            return
        bits = random_bits(self._places(block), self.work.step_key)
        if kept.dtype == torch.bfloat16:
            kept[block.start : block.stop] = to_bf16(momentum, bits).view(-1)
        else:
            self._keep_int8(momentum.view(-1), bits.view(-1), block)

    def _keep_int8(self, momentum: Tensor, bits: Tensor, block: Block) -> None:
        """Round whole blocks of 256; what is left begins the next box."""
        values, bits = (torch.cat(pair) for pair in zip(self._rest, (momentum, bits), strict=True))
        whole = values.numel()
        if block.stop < self._shard.numel:
            whole -= whole % int8.BLOCK
        first = block.stop - values.numel()
        self._rest = values[whole:], bits[whole:]
        quantized, scale = int8.quantize(values[:whole], bits[:whole])
        self.work.state[MOMENTUM].view(-1)[first : first + whole] = quantized
        at = first // int8.BLOCK
        self.work.state[SCALE][at : at + scale.numel()] = scale

    def _weights_box(self, flat: Tensor, block: Block) -> Tensor:
        """The weights, or a copy of them in fp32 where remainders complete them."""
        box = flat[block.start : block.stop]
        if REMAINDER in self.work.state:
            box = remainders.join(
                box, self.work.state[REMAINDER].view(-1)[block.start : block.stop]
            )
        return box.view(block.shape)

    def _keep_weights(self, weights: Tensor, flat: Tensor, block: Block) -> None:
        """Split a copy into bf16 weights and remainders."""
        if REMAINDER in self.work.state:
            span = slice(block.start, block.stop)
            flat[span], self.work.state[REMAINDER].view(-1)[span] = remainders.split(
                weights.view(-1)
            )

    def _places(self, block: Block) -> Tensor:
        """The flat places of a box's elements in the full tensor."""
        device = self.work.param.device
        batch, rows, columns = (
            torch.arange(axis.start, axis.stop, device=device) + offset
            for axis, offset in zip(
                (block.batch, block.rows, block.columns), self._shard.offsets, strict=True
            )
        )
        size, jump = self._shard.row_parts
        rows = rows + torch.arange(block.rows.start, block.rows.stop, device=device) // size * jump
        row = batch.view(-1, 1, 1) * self._shard.full_rows + rows.view(-1, 1)
        return row * self._shard.full_columns + columns

    def add_square_sums(self) -> None:
        """Pass 1 over this rank's boxes."""
        rows, *columns = self.work.square_sums
        for block in self._blocks:
            passes.add_squared_sums(
                self._grad_box(block),
                rows[block.batch, block.rows],
                columns[0][block.batch, block.columns] if columns else None,
            )

    def update_second_moment(self) -> None:
        """The second moments r and c (v of a vector), and the scales of u."""
        work, shard = self.work, self._shard
        keys = VECTOR_FACTORS if shard.is_vector else MATRIX_FACTORS[:2]
        moments = self._factors(*keys)
        counts = (shard.full_columns, shard.full_rows)
        eps, beta = work.hyper.eps1, work.hyper.beta2
        for moment, sums, count in zip(moments, work.square_sums, counts, strict=False):
            factors.update_moment(moment, sums, count=count, eps=eps, beta=beta)
        if shard.is_vector:
            self._scales: tuple[Tensor, Tensor | None] = moments[0].rsqrt(), None
            return
        self._scales = factors.scales(moments[0], moments[1], self._mean(moments))
        guesses = [
            factors.guessed_divisor(
                moment, sums, count=count, eps=eps, clip_threshold=work.hyper.clip_threshold
            )
            for axis, moment, sums, count in zip(
                ("rows", "columns"), moments, work.square_sums, counts, strict=True
            )
            if shard.tp_axis != axis
        ]
        self._guess = torch.stack(guesses).amax()

    def _mean(self, pair: list[Tensor]) -> Tensor:
        """Return mean(r) = mean(c) from the factor that this rank holds whole."""
        return factors.mean_of(pair[1 if self._shard.tp_axis == "rows" else 0])

    def _scale_boxes(
        self, pair: tuple[Tensor, Tensor | None], block: Block
    ) -> tuple[Tensor, Tensor | None]:
        row, column = pair
        return row[block.batch, block.rows], (
            None if column is None else column[block.batch, block.columns]
        )

    def add_instability_sums(self) -> None:
        """Pass 2 over this rank's boxes."""
        work = self.work
        for block in self._blocks:
            row_scale, column_scale = self._scale_boxes(self._scales, block)
            if column_scale is None:
                passes.add_squared_update(self._grad_box(block), row_scale, work.total)
                continue
            rows, columns = work.residual_sums
            passes.add_instability_sums(
                self._grad_box(block),
                self._momentum_box(block),
                row_scale,
                column_scale,
                self._guess,
                rows[:, block.batch, block.rows],
                columns[:, block.batch, block.columns],
            )
        if not self._shard.is_vector:
            work.total.copy_(work.residual_sums[0][2].sum())

    def update_instability(self) -> None:
        """The clip divisor, then R and C."""
        work, shard, hyper = self.work, self._shard, self.work.hyper
        divisor = factors.clip_divisor(
            work.total, numel=shard.full_numel, clip_threshold=hyper.clip_threshold
        )
        self._divisor = divisor.to(work.dtype)
        self._confidence: tuple[Tensor, Tensor] | None = None
        if shard.is_vector:
            return
        pair = self._factors(*MATRIX_FACTORS[2:])
        for moment, sums, count in zip(
            pair, work.residual_sums, (shard.full_columns, shard.full_rows), strict=True
        ):
            residual = factors.true_residuals(
                sums, guess=self._guess, divisor=divisor, beta1=hyper.beta1
            )
            factors.update_moment(moment, residual, count=count, eps=hyper.eps2, beta=hyper.beta3)
        self._confidence = factors.scales(pair[0], pair[1], self._mean(pair))

    def apply(self) -> None:
        """Pass 3 over this rank's boxes."""
        work = self.work
        param = work.param.detach()
        flat = param.contiguous().view(-1)
        self._rest = flat.new_empty(0, dtype=work.dtype), flat.new_empty(0, dtype=torch.int64)
        for block in self._blocks:
            confidence = (
                (None, None)
                if self._confidence is None
                else self._scale_boxes(self._confidence, block)
            )
            momentum, weights = self._momentum_box(block), self._weights_box(flat, block)
            passes.apply_update(
                weights,
                self._grad_box(block),
                momentum,
                *self._scale_boxes(self._scales, block),
                *confidence,
                divisor=self._divisor,
                beta1=work.hyper.beta1,
                lr=float(work.group["lr"]),
                weight_decay=float(work.group["weight_decay"]),
            )
            self._keep_momentum(momentum, block)
            self._keep_weights(weights, flat, block)
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))

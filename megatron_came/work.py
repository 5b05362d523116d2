"""One parameter's part in a step: its slice cut into boxes, its sums, its factors.

The step of :class:`megatron_came.CAME` calls the methods here in order, for all parameters, with
one reduction over the ranks after each of the two ``add_*_sums``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_came.comm import Request
from megatron_came.layout import Block, ProcessGroup, Shard, blocks
from megatron_came.maths import factors, passes
from megatron_came.maths.hyperparameters import Hyperparameters
from megatron_came.state import MATRIX_FACTORS, VECTOR_FACTORS, state_dtype

# Elements of a box: large enough to keep the device busy, small enough that an operation's
# temporaries stay within a few MiB.
_BLOCK_ELEMENTS = {"cpu": 512 * 1024, "cuda": 4 * 1024 * 1024}


class ParameterWork:
    """The slice of one parameter on this rank.

    Args:
        param: the slice, of any shape with ``shard.numel`` elements.
        group: its parameter group; learning rate and the like are read at every step.
        shard: where the slice lies in the full tensor.
    """

    def __init__(self, param: Tensor, group: dict[str, Any], shard: Shard) -> None:
        self.param, self.group, self.shard = param, group, shard
        limit = _BLOCK_ELEMENTS.get(param.device.type, _BLOCK_ELEMENTS["cuda"])
        self._blocks: list[Block] = list(blocks(shard, limit))
        self._dtype = state_dtype(param)

    # What this parameter sums over ranks.

    def _request(self, *shape: int, summed_over_tp: bool) -> Request:
        tp_group: ProcessGroup | None = self.shard.tp_group if summed_over_tp else None
        return Request(shape, self.shard.dp_group, tp_group, self.shard.copies_group)

    def square_requests(self) -> list[Request]:
        """Row and column sums of g^2; of a vector, rows alone."""
        batch, rows, columns = self.shard.local_matrix
        axis = self.shard.tp_axis
        requests = [self._request(batch, rows, summed_over_tp=axis == "columns")]
        if not self.shard.is_vector:
            requests.append(self._request(batch, columns, summed_over_tp=axis == "rows"))
        return requests

    def instability_requests(self) -> list[Request]:
        """Total of u^2, row and column sums of e^2, u e and u^2; of a vector, the total alone."""
        batch, rows, columns = self.shard.local_matrix
        axis = self.shard.tp_axis
        requests = [self._request(summed_over_tp=axis is not None)]
        if not self.shard.is_vector:
            requests += [
                self._request(3, batch, rows, summed_over_tp=axis == "columns"),
                self._request(3, batch, columns, summed_over_tp=axis == "rows"),
            ]
        return requests

    def bind(self, squares: list[Tensor], instability: list[Tensor]) -> None:
        """Take the views of the sum buffers that answer the two lists of requests."""
        self._square_sums = squares
        self._total, self._instability_sums = instability[0], instability[1:]

    # A step.

    def takes_part(self) -> bool:
        """Whether this step updates the parameter: not without a gradient, but as an empty slice.

        Raises:
            RuntimeError: a sparse gradient.
            ValueError: no gradient, while other ranks hold other parts of the same tensor.
        """
        grad, dp_group = self.param.grad, self.shard.dp_group
        if grad is None and self.shard.numel and dp_group is not None and dp_group.size() > 1:
            raise ValueError(
                f"CAME: a slice of shape {self.shard.shape} has no gradient on this rank, "
                "but other ranks hold the rest of the tensor and would wait for it; give it a "
                "gradient of zeros."
            )
        if grad is not None and grad.is_sparse:
            raise RuntimeError("CAME does not support sparse gradients; use dense ones.")
        return self.shard.full_numel > 0 and (grad is not None or self.shard.numel == 0)

    def begin(self, state: dict[str, Tensor], hyper: Hyperparameters) -> None:
        """Take up the state, the group's hyperparameters and this step's gradient."""
        self._state, self._hyper = state, hyper
        # An empty slice may have no gradient; the slice itself is as empty.
        grad = self.param if self.param.grad is None else self.param.grad
        self._grad = grad.detach().reshape(-1)
        keys = VECTOR_FACTORS if self.shard.is_vector else MATRIX_FACTORS[:2]
        self._moments = self._factors(*keys)

    def _factors(self, *keys: str) -> list[Tensor]:
        """View factors as (batch, n)."""
        batch = self.shard.local_matrix[0]
        return [self._state[key].view(batch, -1) for key in keys]

    def _grad_box(self, block: Block) -> Tensor:
        return self._grad[block.start : block.stop].to(self._dtype).view(block.shape)

    def add_square_sums(self) -> None:
        """Pass 1 over this rank's boxes."""
        rows, *columns = self._square_sums
        for block in self._blocks:
            passes.add_squared_sums(
                self._grad_box(block),
                rows[block.batch, block.rows],
                columns[0][block.batch, block.columns] if columns else None,
            )

    def update_second_moment(self) -> None:
        """With the sums complete: r and c (v of a vector), and the scales of u."""
        counts = (self.shard.full_columns, self.shard.full_rows)
        eps, beta = self._hyper.eps1, self._hyper.beta2
        for moment, sums, count in zip(self._moments, self._square_sums, counts, strict=False):
            factors.update_moment(moment, sums, count=count, eps=eps, beta=beta)
        if self.shard.is_vector:
            self._scales: tuple[Tensor, Tensor | None] = self._moments[0].rsqrt(), None
            return
        self._scales = factors.scales(self._moments[0], self._moments[1], self._mean(self._moments))
        guesses = [
            factors.guessed_divisor(
                moment, sums, count=count, eps=eps, clip_threshold=self._hyper.clip_threshold
            )
            for axis, moment, sums, count in zip(
                ("rows", "columns"), self._moments, self._square_sums, counts, strict=True
            )
            if self.shard.tp_axis != axis
        ]
        self._guess = torch.stack(guesses).amax()

    def _mean(self, pair: list[Tensor]) -> Tensor:
        """Return mean(r) = mean(c) from the factor that this rank holds whole."""
        return pair[1 if self.shard.tp_axis == "rows" else 0].mean(-1, keepdim=True)

    def _scale_boxes(
        self, pair: tuple[Tensor, Tensor | None], block: Block
    ) -> tuple[Tensor, Tensor | None]:
        row, column = pair
        return row[block.batch, block.rows], (
            None if column is None else column[block.batch, block.columns]
        )

    def add_instability_sums(self) -> None:
        """Pass 2 over this rank's boxes."""
        exp_avg = self._state["exp_avg"].view(-1)
        for block in self._blocks:
            row_scale, column_scale = self._scale_boxes(self._scales, block)
            if column_scale is None:
                passes.add_squared_update(self._grad_box(block), row_scale, self._total)
                continue
            rows, columns = self._instability_sums
            passes.add_instability_sums(
                self._grad_box(block),
                exp_avg[block.start : block.stop].view(block.shape),
                row_scale,
                column_scale,
                self._guess,
                rows[:, block.batch, block.rows],
                columns[:, block.batch, block.columns],
            )
        if not self.shard.is_vector:
            self._total.copy_(self._instability_sums[0][2].sum())

    def update_instability(self) -> None:
        """With the sums complete: the clip divisor, then R and C."""
        hyper, shard = self._hyper, self.shard
        divisor = factors.clip_divisor(
            self._total, numel=shard.full_numel, clip_threshold=hyper.clip_threshold
        )
        self._divisor = divisor.to(self._dtype)
        self._confidence: tuple[Tensor, Tensor] | None = None
        if shard.is_vector:
            return
        pair = self._factors(*MATRIX_FACTORS[2:])
        for moment, sums, count in zip(
            pair, self._instability_sums, (shard.full_columns, shard.full_rows), strict=True
        ):
            residual = factors.true_residuals(
                sums, guess=self._guess, divisor=divisor, beta1=hyper.beta1
            )
            factors.update_moment(moment, residual, count=count, eps=hyper.eps2, beta=hyper.beta3)
        self._confidence = factors.scales(pair[0], pair[1], self._mean(pair))

    def apply(self) -> None:
        """Pass 3 over this rank's boxes, and the end of the step."""
        param = self.param.detach()
        flat = param.contiguous().view(-1)
        exp_avg = self._state["exp_avg"].view(-1)
        for block in self._blocks:
            place = slice(block.start, block.stop)
            confidence = (
                (None, None)
                if self._confidence is None
                else self._scale_boxes(self._confidence, block)
            )
            passes.apply_update(
                flat[place].view(block.shape),
                self._grad_box(block),
                exp_avg[place].view(block.shape),
                *self._scale_boxes(self._scales, block),
                *confidence,
                divisor=self._divisor,
                beta1=self._hyper.beta1,
                lr=float(self.group["lr"]),
                weight_decay=float(self.group["weight_decay"]),
            )
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))
        del self._grad  # the host's to free

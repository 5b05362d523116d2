"""One parameter's part in a step: its slice, what it sums over ranks, and this step's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.hyperparameters import Hyperparameters
from megatron_came.core.rounding import step_key
from megatron_came.core.shard import ProcessGroup, Shard
from megatron_came.core.state import MATRIX_FACTORS, VECTOR_FACTORS, has_remainder, state_dtype
from megatron_came.core.sums import Request


def gradient_of(param: Tensor) -> Tensor | None:
    """Return a parameter's gradient.

    PyTorch wants ``grad`` to have the parameter's dtype; ``decoupled_grad`` (Megatron's name) may
    have another, and is used where it is set.
    """
    grad: Tensor | None = getattr(param, "decoupled_grad", None)
    return param.grad if grad is None else grad


class ParameterSlice:
    """The slice of one parameter on this rank.

    Args:
        param: the slice, of any shape with ``shard.numel`` elements.
        group: its parameter group; learning rate and the like are read at every step.
        shard: where the slice lies in the full tensor.
        key: of the random bits that round its momentum.
        remainders: whether a bf16 slice is the upper halves of fp32 weights.

    Attributes:
        has_fp32_weights: whether the weights are fp32, in one piece or two.
        dtype: of its state, and of the arithmetic.
        square_sums: row and column sums of g^2, (batch, rows) and (batch, columns); of a vector,
            g^2 itself. Float64 views of a buffer that all ranks' sums complete.
        total: sum of u^2, likewise.
        residual_sums: row and column sums of e^2, u e and u^2, (3, batch, rows) and (3, batch,
            columns), likewise; of a vector, none.
        state: of this parameter, from :meth:`begin` on.
        hyper: likewise.
        model_weight: 16-bit copy of the slice that the step rewrites, or None; likewise.
        grad: the gradient of the slice, of any shape, from :meth:`begin` to :meth:`end`.
    """

    def __init__(
        self,
        param: Tensor,
        group: dict[str, Any],
        shard: Shard,
        key: int = 0,
        remainders: bool = False,
    ) -> None:
        self.param, self.group, self.shard, self.key = param, group, shard, key
        self.dtype = state_dtype(param)
        self.has_fp32_weights = param.dtype == torch.float32 or has_remainder(param, remainders)
        self._second_moment_keys = VECTOR_FACTORS if shard.is_vector else MATRIX_FACTORS[:2]
        self._has_elements, self._tensor_has_elements = shard.numel > 0, shard.full_numel > 0
        self.state: dict[str, Tensor]
        self.hyper: Hyperparameters
        self.model_weight: Tensor | None
        self.grad: Tensor

    @property
    def step_key(self) -> int:
        """The key of this step's random bits."""
        return step_key(self.key, self.group.get("step", 0))

    # What this parameter sums over ranks.

    @property
    def copies_group(self) -> ProcessGroup | None:
        """The ranks that hold copies, if any other does."""
        group = self.shard.copies_group
        return None if group is None or group.size() == 1 else group

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold other parts, or copies, of the tensor."""
        shard = self.shard
        tp_group = shard.tp_group if shard.tp_axis is not None else None
        groups = (shard.dp_group, tp_group, shard.copies_group)
        return any(group is not None and group.size() > 1 for group in groups)

    def _request(self, *shape: int, summed_over_tp: bool) -> Request:
        shard = self.shard
        if not summed_over_tp:
            return Request(shape, shard.dp_group)
        if shard.tp_dp_group is not None:
            return Request(shape, shard.tp_dp_group)
        return Request(shape, shard.dp_group, shard.tp_group)

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

    def bind(self, squares: Sequence[Tensor], instability: Sequence[Tensor]) -> None:
        """Take the views of the sum buffers that answer the two lists of requests."""
        self.square_sums = list(squares)
        self.total, self.residual_sums = instability[0], list(instability[1:])

    @property
    def sums(self) -> list[Tensor]:
        """All pieces of the sum buffers that are this parameter's."""
        return [*self.square_sums, self.total, *self.residual_sums]

    # A step.

    def takes_part(self, grad: Tensor | None) -> bool:
        """Whether this step updates the parameter: not without a gradient, but as an empty slice.

        Raises:
            RuntimeError: a sparse gradient.
            ValueError: one of another size or on another device; or none, while other ranks hold
                other parts or copies of the same tensor and would sum up without this one. Of a
                tensor that they hold whole without summing, one cannot know.
        """
        if grad is not None:
            if grad.is_sparse:
                raise RuntimeError("CAME does not support sparse gradients; use dense ones.")
            # PyTorch looks after ``grad``; nobody after ``decoupled_grad``.
            if grad.numel() != self.shard.numel or grad.device != self.param.device:
                raise ValueError(
                    f"CAME: a parameter of {self.shard.numel} elements on {self.param.device} has "
                    f"a gradient of {grad.numel()} on {grad.device}: set decoupled_grad to one "
                    "that fits."
                )
            return self._tensor_has_elements
        if self._has_elements and self.is_shared:
            held = "a copy" if self.copies_group is not None else "the rest"
            raise ValueError(
                f"CAME: a slice of shape {self.shard.shape} has no gradient on this rank, "
                f"but other ranks hold {held} of the tensor and would wait for it, or go on "
                "without it; give it a gradient of zeros."
            )
        return self._tensor_has_elements and not self._has_elements

    def begin(
        self,
        state: dict[str, Tensor],
        hyper: Hyperparameters,
        model_weight: Tensor | None,
        grad: Tensor | None,
    ) -> None:
        """Take up the state, the group's hyperparameters and this step's gradient."""
        self.state, self.hyper, self.model_weight = state, hyper, model_weight
        # An empty slice may have no gradient; the slice itself is as empty.
        self.grad = self.param if grad is None else grad

    def keep_second_moment(self) -> None:
        """Remember the second moment as it is before the step."""
        self._kept = {key: self.state[key].clone() for key in self._second_moment_keys}

    def restore_second_moment(self) -> None:
        """Put it back, to be updated anew."""
        for key, value in self._kept.items():
            self.state[key].copy_(value)
        self._kept.clear()

    def copy_to_model(self) -> None:
        """Rewrite the 16-bit copy, where kernels have not."""
        if self.model_weight is not None:
            self.model_weight.copy_(self.param.detach().view_as(self.model_weight))

    def end(self) -> None:
        """Let go of the gradient, which is the host's to free."""
        del self.grad

"""One parameter on this rank: its slice, what it sums over ranks, and what a step brings to it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_came.core.hyperparameters import GroupSettings
from megatron_came.core.shard import Shard
from megatron_came.core.state import state_dtype
from megatron_came.core.sums import Request

# Bytes of sums from which on a bundle is worth a reduction of its own, and the most bundles.
_BUNDLE_BYTES = 32 * 1024 * 1024
_MAX_BUNDLES = 4


def gradients_of(params: Iterable[Tensor]) -> list[Tensor | None]:
    """Return the gradients of parameters.

    PyTorch wants ``grad`` to have the parameter's dtype; ``decoupled_grad`` (Megatron's name) may
    have another, and is used where it is set.
    """
    return [
        param.grad if (grad := getattr(param, "decoupled_grad", None)) is None else grad
        for param in params
    ]


def gradient_of(param: Tensor) -> Tensor | None:
    """Return the gradient of one."""
    return gradients_of([param])[0]


class StepInputs(NamedTuple):
    """What one step brings to one parameter; nobody keeps it longer than the step."""

    state: dict[str, Tensor]  # see :func:`megatron_came.core.state.new_state`
    grad: Tensor  # of the slice, of any shape and floating dtype
    settings: GroupSettings
    model_weight: Tensor | None = None  # 16-bit copy of the slice that the step rewrites


class SliceSums(NamedTuple):
    """A parameter's sums over elements: float64 views of buffers that all ranks' sums complete."""

    # Row and column sums of g^2, (batch, rows) and (batch, columns); of a vector g^2, (1, rows).
    squares: tuple[Tensor, ...]
    total: Tensor  # sum of u^2, a scalar
    # Likewise of e^2, u e and u^2, (3, batch, rows) and (3, batch, columns); of a vector, none.
    instability: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class ParameterSlice:
    """The slice of one parameter on this rank."""

    param: Tensor  # the slice, of any shape with ``shard.numel`` elements
    shard: Shard  # where the slice lies in the full tensor
    group: int = 0  # number of its parameter group
    key: int = 0  # of the random bits that round its momentum
    remainders: bool = False  # whether a bf16 slice is the upper halves of fp32 weights
    cautious: bool = False  # whether its group's updates are, which kernels do not know
    may_be_skipped: bool = False  # a step without its gradient is right, if it lacks on all ranks
    # Device of the model that a slice on the CPU belongs to, whose sums are reduced there.
    home: torch.device | None = None

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the state, and of the arithmetic."""
        return state_dtype(self.param)

    # What this parameter sums over ranks.

    @cached_property
    def is_shared(self) -> bool:
        """Whether other ranks hold the rest, or copies, of the tensor."""
        shard = self.shard
        tp_group = shard.tp_group if shard.tp_axis is not None else None
        groups = (shard.dp_group, *shard.more_groups, tp_group, shard.copies_group)
        return any(group is not None and group.size() > 1 for group in groups)

    @cached_property
    def sums_device(self) -> torch.device:
        """Where its sums are reduced."""
        return self.home or self.param.device

    def _request(self, *shape: int, summed_over_tp: bool) -> Request:
        shard = self.shard
        dp_group, tp_group = shard.dp_group, shard.tp_group
        if not summed_over_tp:
            tp_group = None
        elif shard.tp_dp_group is not None:
            dp_group, tp_group = shard.tp_dp_group, None
        return Request(shape, dp_group, tp_group, shard.copies_group, shard.more_groups)

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

    # A step.

    @cached_property
    def _tensor_has_elements(self) -> bool:
        return self.shard.full_numel > 0

    def takes_part(self, grad: Tensor | None) -> bool:
        """Whether this step updates the parameter: not without a gradient, but as an empty slice.

        Raises:
            RuntimeError: a sparse gradient.
            ValueError: one of another size or on another device; or none, while other ranks hold
                the rest, or copies, of the same tensor and would sum up without this one. Of a
                tensor that they hold whole without summing, one cannot know.
        """
        if grad is not None:
            self._check(grad)
            return self._tensor_has_elements
        if self.may_be_skipped:
            return False
        if self.shard.numel and self.is_shared:
            held = "a copy" if self.shard.has_copies else "the rest"
            raise ValueError(
                f"CAME: a slice of shape {self.shard.shape} has no gradient on this rank, "
                f"but other ranks hold {held} of the tensor and would wait for it, or go on "
                "without it; give it a gradient of zeros."
            )
        return self._tensor_has_elements and not self.shard.numel

    def _check(self, grad: Tensor) -> None:
        """PyTorch looks after ``grad``; nobody after ``decoupled_grad``."""
        param = self.param
        if not isinstance(grad, Tensor):
            raise ValueError(f"CAME: decoupled_grad is {type(grad).__name__}, not a tensor.")
        if grad.layout != torch.strided:
            raise RuntimeError("CAME does not support sparse gradients; use dense ones.")
        is_turned = (
            min(param.dim(), grad.dim()) > 1 and grad.squeeze().shape != param.squeeze().shape
        )
        has_size = grad.numel() == self.shard.numel and not is_turned
        if not has_size or grad.device != param.device or not grad.is_floating_point():
            raise ValueError(
                f"CAME: a parameter of shape {tuple(param.shape)}, {self.shard.numel} elements, on "
                f"{param.device} has a gradient of shape {tuple(grad.shape)}, {grad.dtype}, on "
                f"{grad.device}: set decoupled_grad to one that fits."
            )

    def copy_to_model(self, weight: Tensor | None) -> None:
        """Rewrite the 16-bit copy, if there is one, rounded to nearest."""
        if weight is not None:
            weight.copy_(self.param.detach().view_as(weight))


def spread(slices: Sequence[ParameterSlice]) -> Iterable[list[ParameterSlice]]:
    """Cut a list of parameters into a few bundles of about the same size.

    Those of which other ranks hold copies are in the first: these ranks complete the same sums in
    the same order, into however many bundles each cuts what it holds.
    """
    sizes = [sum(r.numel for r in slice_.instability_requests()) for slice_ in slices]
    count = min(max(8 * sum(sizes) // _BUNDLE_BYTES, 1), _MAX_BUNDLES)
    bundles: list[list[ParameterSlice]] = [[] for _ in range(count)]
    before = 0
    for slice_, size in zip(slices, sizes, strict=True):
        number = min(int((before + size / 2) * count / sum(sizes)), count - 1)
        bundles[0 if slice_.shard.has_copies else number].append(slice_)
        before += size
    return filter(None, bundles)

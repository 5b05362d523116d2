"""What a backend fulfils: eager PyTorch for all that there is, Triton on GPUs, Numba on CPUs.

A :class:`Backend` computes on one device. :meth:`Backend.passes` makes, once for a set of
parameters, what outlives a step (tables, scratch); :meth:`Passes.begin` makes of that and of what a
step brings a :class:`Step`, which is taken again as long as no tensor has moved. It takes the three
passes; between them ``step.py`` completes the sums over ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_came.core.hyperparameters import GroupSettings
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums, StepInputs
from megatron_came.core.state import has_remainder

# A batch of more matrices, each of fewer elements, is left to eager PyTorch: tiles of it would be
# mostly empty.
_MANY_MATRICES, _SMALL_MATRIX = 64, 1024


class UnusableError(Exception):
    """Kernels that are installed and do not run: the reason and what to do, each in a clause."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class Step(Protocol):
    """The passes of one step over the parameters that take part in it.

    Sums are added to the tensors that :meth:`Backend.passes` was given; they are zero before:

    1. add the row and column sums of g^2; of a vector, write g^2;
    2. with these complete, update r and c (v), and add the row and column sums of e^2, u e and u^2
       with e = u/d0 - m, and the total of u^2; of a vector, the total alone;
    3. with these complete, update R and C, then momentum and weights; rewrite the model's 16-bit
       weights, where there are some.
    """

    @property
    def lasts(self) -> bool:
        """Whether it may be taken again: it knows where tensors lie, and holds none of a step's."""

    def again(self, settings: Sequence[GroupSettings]) -> None:
        """Take up what a later step brings to the same tensors, none of which has moved.

        The settings are those of all parameter groups.
        """

    def take(self, *passes: int) -> None:
        """Take one of the passes or, where no sum goes over ranks, all three of them.

        The latter matrix by matrix, if that saves traffic.
        """


class Passes(Protocol):
    """The passes over some parameters, of step after step."""

    def begin(self, inputs: Mapping[ParameterSlice, StepInputs]) -> Step:
        """Take up what a step brings, before anything is changed.

        A step that has failed, here or later, leaves nothing behind that the next one relies on.

        Args:
            inputs: of those of the parameters that take part, in the order in which
                :meth:`Backend.passes` was given them; perhaps of none.

        Raises:
            ValueError: state that does not fit its parameter.
        """


class Backend(Protocol):
    """Who computes the passes on one device."""

    name: str  # one of dispatch.CHOICES; but for "plain", the package that compiles the kernels

    def unsupported(self, slice_: ParameterSlice) -> str | None:
        """Return why it does not update a parameter, as "with float64 weights"; None if it does.

        What one backend does not update, eager PyTorch does.
        """

    def passes(self, sums: Mapping[ParameterSlice, SliceSums], *, is_local: bool) -> Passes:
        """Return the passes over some parameters, all of which it supports, on one device.

        Args:
            sums: where each parameter's sums go; the order is the same on all ranks.
            is_local: whether no sum goes over ranks, so that matrices may go through all passes
                one after another, see :meth:`Step.take`.
        """


def unsupported_by_kernels(slice_: ParameterSlice) -> str | None:
    """Return what hinders all kernels: they work on addresses, and on fp32 weights."""
    param = slice_.param
    if slice_.cautious:
        return "with cautious updates"
    if param.dtype != torch.float32 and not has_remainder(param, slice_.remainders):
        return f"with {str(param.dtype).removeprefix('torch.')} weights"
    if type(param) not in (Tensor, torch.nn.Parameter):  # whose data may be elsewhere
        return f"in tensors of type {type(param).__name__}"
    if not param.is_contiguous():
        return "in tensors that are not contiguous"
    if param.is_neg():
        return "in views of negated tensors"
    if slice_.shard.window is not None:
        return "that are cut along several dimensions, or into unequal columns"
    batch, rows, columns = slice_.shard.local_matrix
    if batch > _MANY_MATRICES and rows * columns < _SMALL_MATRIX:
        return "with batches of many small matrices, as convolutions are (see flat_convolutions)"
    return None


def readable(grad: Tensor) -> Tensor:
    """Return a gradient that kernels can read: this one or, where they cannot, an fp32 copy."""
    is_known = grad.dtype in (torch.float32, torch.bfloat16) and grad.is_contiguous()
    return grad if is_known else grad.to(torch.float32).contiguous()

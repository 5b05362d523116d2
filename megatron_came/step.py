"""A step's order of work: bundles of parameters, each with its buffers of sums and its passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from megatron_came import dtensors
from megatron_came.core.agreement import Agreement
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums, StepInputs
from megatron_came.core.sums import SumBuffer
from megatron_came.kernels.backend import Backend, Step
from megatron_came.kernels.eager import EagerBackend

# Bytes of sums from which on a bundle is worth a reduction of its own, and the most bundles.
_BUNDLE_BYTES = 32 * 1024 * 1024
_MAX_BUNDLES = 4


class Bundle:
    """Parameters on one device that go through a step together.

    Their sums are reduced after each of the first two passes, unless all are local.

    Args:
        slices: the parameters.
        backend: for those that it supports; eager PyTorch takes the others.

    Attributes:
        left: of each parameter that the backend leaves to eager PyTorch, why.
    """

    def __init__(self, slices: Sequence[ParameterSlice], backend: Backend) -> None:
        device = slices[0].param.device
        requests = [slice_.square_requests() for slice_ in slices]
        more_requests = [slice_.instability_requests() for slice_ in slices]
        self._agreement = Agreement(slices)
        self.squares = SumBuffer(
            [*chain.from_iterable(requests), *self._agreement.requests], device
        )
        self.instability = SumBuffer(list(chain.from_iterable(more_requests)), device)
        views, more_views = iter(self.squares.views), iter(self.instability.views)
        sums: dict[ParameterSlice, SliceSums] = {}
        for slice_, squares, rest in zip(slices, requests, more_requests, strict=True):
            total, *instability = (next(more_views) for _ in rest)
            sums[slice_] = SliceSums(tuple(next(views) for _ in squares), total, tuple(instability))
        self._marks = list(views)
        is_local = not (self.squares.is_reduced or self.instability.is_reduced)
        reasons = {slice_: backend.unsupported(slice_) for slice_ in slices}
        self.left = [why for why in reasons.values() if why is not None]
        left = {slice_: sums[slice_] for slice_ in slices if reasons[slice_] is not None}
        taken = {slice_: sums[slice_] for slice_ in slices if reasons[slice_] is None}
        self._passes = [
            (members, by.passes(members, is_local=is_local))
            for by, members in ((EagerBackend(), left), (backend, taken))
            if members
        ]

    @property
    def buffers(self) -> list[Tensor]:
        """The memory that its sums lie in."""
        return [self.squares.flat, self.instability.flat]

    def begin(self, inputs: Mapping[ParameterSlice, StepInputs]) -> _BundleStep:
        """Take up what a step brings to those of the parameters that take part in it."""
        self.squares.zero_()
        self.instability.zero_()
        self._agreement.mark(inputs, self._marks)
        steps = [
            passes.begin({each: inputs[each] for each in members if each in inputs})
            for members, passes in self._passes
        ]
        return _BundleStep(self, steps, inputs)

    def finish_squares(self, inputs: Mapping[ParameterSlice, StepInputs]) -> None:
        """Wait for the sums of the first pass.

        Raises:
            ValueError: ranks do not agree on what they update, or how.
        """
        self.squares.finish()
        self._agreement.check(inputs, self._marks)


class _BundleStep:
    """The passes of one step, with the reductions between them."""

    def __init__(
        self,
        bundle: Bundle,
        steps: Sequence[Step],
        inputs: Mapping[ParameterSlice, StepInputs],
    ) -> None:
        self._bundle, self._steps, self._inputs = bundle, steps, inputs

    def add_square_sums(self) -> None:
        for step in self._steps:
            step.add_square_sums()
        self._bundle.squares.start()

    def add_instability_sums(self) -> None:
        self._bundle.finish_squares(self._inputs)
        for step in self._steps:
            step.add_instability_sums()
        self._bundle.instability.start()

    def apply(self) -> None:
        self._bundle.instability.finish()
        for step in self._steps:
            step.apply()

    def run(self) -> None:
        for step in self._steps:
            step.run()


class Plan:
    """The bundles of an optimizer's parameters.

    Args:
        slices: all parameters, in an order that is the same on all ranks.
        backends: by device.
        param_groups: as they are now; :meth:`fits` compares with them.

    Attributes:
        left: why backends leave parameters to eager PyTorch, of each.
    """

    def __init__(
        self,
        slices: list[ParameterSlice],
        backends: Mapping[torch.device, Backend],
        param_groups: Sequence[dict[str, Any]],
    ) -> None:
        self.slices = slices
        self._groups = list(param_groups)
        self._params = [list(group["params"]) for group in param_groups]
        self._locals = _locals(self._params)
        self._layouts = _layouts(self._locals)
        self.local: list[Bundle] = []
        self.shared: list[Bundle] = []
        for device in dict.fromkeys(slice_.param.device for slice_ in slices):
            here = [slice_ for slice_ in slices if slice_.param.device == device]
            local = [slice_ for slice_ in here if not slice_.is_shared]
            if local:
                self.local.append(Bundle(local, backends[device]))
            for members in _spread([slice_ for slice_ in here if slice_.is_shared]):
                self.shared.append(Bundle(members, backends[device]))
        self.left = [why for bundle in (*self.local, *self.shared) for why in bundle.left]

    @property
    def buffers(self) -> list[Tensor]:
        """The memory that all sums lie in."""
        return [each for bundle in (*self.local, *self.shared) for each in bundle.buffers]

    def fits(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups are the plan's, and hold its parameters, as they were."""
        params = [group["params"] for group in param_groups]
        locals_ = _locals(params)
        return (
            _are_same(param_groups, self._groups)
            and all(map(_are_same, params, self._params))
            and _are_same(locals_, self._locals)  # FSDP2 puts others in their place
            and _layouts(locals_) == self._layouts
        )

    def step(self, inputs: Mapping[ParameterSlice, StepInputs]) -> None:
        """Take one step with those of the parameters that take part in it."""
        shared: list[Step] = []
        for bundle in self.shared:
            shared.append(bundle.begin(inputs))
            shared[-1].add_square_sums()
        # While the sums of the shared bundles travel, the local ones are computed.
        for bundle in self.local:
            bundle.begin(inputs).run()
        for step in shared:
            step.add_instability_sums()
        for step in shared:
            step.apply()


def _are_same(objects: Sequence[object], others: Sequence[object]) -> bool:
    return len(objects) == len(others) and all(map(is_, objects, others))


def _locals(params: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return list(map(dtensors.local_of, chain.from_iterable(params)))


def _layouts(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Device, dtype, shape and contiguity, which decide who updates a tensor."""
    kinds = map(attrgetter("device", "dtype", "shape"), tensors)
    return list(zip(kinds, map(Tensor.is_contiguous, tensors), strict=True))


def _spread(slices: Sequence[ParameterSlice]) -> Iterable[list[ParameterSlice]]:
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

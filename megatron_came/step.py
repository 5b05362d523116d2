"""A step's order of work: bundles of parameters, each with its buffers of sums and its passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from megatron_came import dtensors
from megatron_came.core.agreement import Agreement
from megatron_came.core.hyperparameters import GroupSettings
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums, StepInputs, gradients_of
from megatron_came.core.state import trust_all
from megatron_came.core.sums import SumBuffer
from megatron_came.kernels.backend import Backend, Step
from megatron_came.kernels.eager import EagerBackend
from megatron_came.snapshots import Seen, Snapshot

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

    def zero_sums(self) -> None:
        """Forget the sums of the last step."""
        self.squares.zero_()
        self.instability.zero_()

    def begin(self, inputs: Mapping[ParameterSlice, StepInputs]) -> _BundleStep:
        """Take up what a step brings to those of the parameters that take part in it."""
        self.zero_sums()
        self._agreement.mark(inputs, self._marks)
        steps = [
            passes.begin({each: inputs[each] for each in members if each in inputs})
            for members, passes in self._passes
        ]
        return _BundleStep(self, steps, frozenset(inputs))

    def finish_squares(self, taken: Collection[ParameterSlice]) -> None:
        """Wait for the sums of the first pass.

        Raises:
            ValueError: ranks do not agree on what they update, or how.
        """
        self.squares.finish()
        self._agreement.check(taken, self._marks)


class _BundleStep:
    """The passes of one step, with the reductions between them."""

    def __init__(
        self,
        bundle: Bundle,
        steps: Sequence[Step],
        taken: Collection[ParameterSlice],
    ) -> None:
        self._bundle, self._steps, self._taken = bundle, steps, taken

    @property
    def lasts(self) -> bool:
        return all(step.lasts for step in self._steps)

    def again(self, settings: Sequence[GroupSettings]) -> None:
        self._bundle.zero_sums()
        for step in self._steps:
            step.again(settings)

    def add_square_sums(self) -> None:
        for step in self._steps:
            step.add_square_sums()
        self._bundle.squares.start()

    def add_instability_sums(self) -> None:
        self._bundle.finish_squares(self._taken)
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
        params: the parameters themselves, which may be DTensors.
        backends: by device.
        param_groups: as they are now; :meth:`fits` compares with them.

    Attributes:
        left: why backends leave parameters to eager PyTorch, of each.
    """

    def __init__(
        self,
        slices: list[ParameterSlice],
        params: list[Tensor],
        backends: Mapping[torch.device, Backend],
        param_groups: Sequence[dict[str, Any]],
    ) -> None:
        self.slices, self.params = slices, params
        self._has_dtensors = any(map(dtensors.is_dtensor, params))
        self._groups = list(param_groups)
        self._params = [list(group["params"]) for group in param_groups]
        self._cautious, self._locals = _cautious(param_groups), _locals(self._params)
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
        # The last step, while it can be taken again, and what its tensors were.
        self._steps: dict[Bundle, _BundleStep] = {}
        self._seen: Seen | None = None
        self.updated: list[Tensor] = []

    @property
    def buffers(self) -> list[Tensor]:
        """The memory that all sums lie in."""
        return [each for bundle in (*self.local, *self.shared) for each in bundle.buffers]

    def holds(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups are the plan's, and hold its parameters."""
        params = [group["params"] for group in param_groups]
        return (
            are_same(param_groups, self._groups)
            and all(map(are_same, params, self._params))
            and _cautious(param_groups) == self._cautious
        )

    def fits(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether, moreover, the parameters are what they were."""
        locals_ = _locals(self._params)
        return (
            self.holds(param_groups)
            and are_same(locals_, self._locals)  # FSDP2 puts others in their place
            and _layouts(locals_) == self._layouts
        )

    def snapshot(
        self, states: Mapping[Any, dict[str, Any]], weights: Iterable[Tensor]
    ) -> Snapshot | None:
        """Look at all tensors of a step; None where the next step must take them up anew."""
        if self._has_dtensors or any(group.get("maximize") for group in self._groups):
            return None
        return Snapshot.of(self.params, gradients_of(self.params), states, weights)

    def goes_on(self, settings: Sequence[GroupSettings], now: Snapshot | None) -> bool:
        """Whether :meth:`step` may take the last step's tensors: nothing of them has changed."""
        if any(each.hyper.no_confidence for each in settings):
            return False  # the state is looked at in every step
        same = now is not None and self._seen is not None and self._seen.equals(now)
        return same and bool(self._steps) and all(step.lasts for step in self._steps.values())

    def inputs(
        self,
        settings: Sequence[GroupSettings],
        state_of: Callable[[Tensor], dict[str, Tensor]],
        weights: Mapping[Tensor, Tensor],
    ) -> dict[ParameterSlice, StepInputs]:
        """Return what a step brings, of the parameters that take part in it.

        Args:
            settings: of the parameter groups.
            state_of: returns a parameter's state.
            weights: 16-bit copies, by parameter.
        """
        inputs = {}
        found = zip(self.slices, self.params, gradients_of(self.params), strict=True)
        for slice_, param, whole_grad in found:
            grad = dtensors.local_gradient(param, whole_grad)
            if not slice_.takes_part(grad):
                continue
            if grad is None:
                grad = slice_.param  # both without elements
            elif self._groups[slice_.group].get("maximize"):
                grad = grad.neg()
            state, weight = dtensors.state_here(state_of(param)), weights.get(param)
            inputs[slice_] = StepInputs(state, grad, settings[slice_.group], weight)
        return inputs

    def step(
        self,
        settings: Sequence[GroupSettings],
        inputs: Mapping[ParameterSlice, StepInputs] | None,
        now: Snapshot | None,
    ) -> None:
        """Take one step.

        Args:
            settings: of the parameter groups.
            inputs: of those of the parameters that take part in it; None for the last step's.
            now: all tensors of it.
        """
        before, self._steps = self._steps, {}  # until it is taken
        steps: dict[Bundle, _BundleStep] = {}

        def begun(bundle: Bundle) -> _BundleStep:
            if inputs is None:
                steps[bundle] = before[bundle]
                steps[bundle].again(settings)
            else:
                steps[bundle] = bundle.begin(inputs)
            return steps[bundle]

        for given in (inputs or {}).values():
            if given.settings.hyper.no_confidence:
                trust_all(given.state)
        for bundle in self.shared:
            begun(bundle).add_square_sums()
        # While the sums of the shared bundles travel, the local ones are computed.
        for bundle in self.local:
            begun(bundle).run()
        for bundle in self.shared:
            steps[bundle].add_instability_sums()
        for bundle in self.shared:
            steps[bundle].apply()
        if inputs is not None:
            pairs = zip(self.slices, self.params, strict=True)
            self.updated = [t for s, param in pairs if s in inputs for t in {s.param, param}]
            self._seen = None
        if now is not None and all(step.lasts for step in steps.values()):
            self._steps, self._seen = steps, self._seen or Seen(now)


def are_same(objects: Sequence[object], others: Sequence[object]) -> bool:
    """Whether two lists hold the same objects, in the same order."""
    return len(objects) == len(others) and all(map(is_, objects, others))


def _locals(params: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return list(map(dtensors.local_of, chain.from_iterable(params)))


def _layouts(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Device, dtype, shape and contiguity, which decide who updates a tensor."""
    kinds = map(attrgetter("device", "dtype", "shape"), tensors)
    return list(zip(kinds, map(Tensor.is_contiguous, tensors), strict=True))


def _cautious(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [group.get("cautious") for group in groups]


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

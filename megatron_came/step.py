"""A step's order of work: bundles of parameters, each with its buffers of sums and its passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from megatron_came import dtensors
from megatron_came.core.agreement import Agreement
from megatron_came.core.diagnostics import Sums, kind_of, measure, measure_whole, on_cpu
from megatron_came.core.hyperparameters import GroupSettings
from megatron_came.core.parameter_slice import (
    ParameterSlice,
    SliceSums,
    StepInputs,
    gradients_of,
    spread,
)
from megatron_came.core.state import SECOND_MOMENTS, STEP, own_count, trust_all
from megatron_came.core.sums import SumBuffer
from megatron_came.group_table import GroupTable, layout_settings
from megatron_came.kernels.backend import Backend, Step
from megatron_came.kernels.eager import EagerBackend
from megatron_came.snapshots import Snapshot

_StateOf = Callable[[Tensor], dict[str, Tensor]]


class Bundle:
    """Parameters whose sums are reduced on one device, which go through a step together.

    Their sums are reduced after each of the first two passes, unless all are local. Backends take
    what they support, eager PyTorch the others.

    Attributes:
        agreement: of ranks, seen in the sums of the first pass, where its ``marks`` are.
        left: of each parameter that the backend leaves to eager PyTorch, why.
        totals: sums of u^2 by parameter, complete from the second reduction to the next step.
    """

    def __init__(
        self,
        slices: Sequence[ParameterSlice],
        backends: Mapping[torch.device, Backend],
        *,
        in_passes: bool,
    ) -> None:
        device = slices[0].sums_device
        requests = [slice_.square_requests() for slice_ in slices]
        more_requests = [slice_.instability_requests() for slice_ in slices]
        self.agreement = Agreement(slices)
        marks = self.agreement.requests
        self.squares, self.instability = (
            SumBuffer(
                [*chain.from_iterable(own), *rest],
                device,
                [s.home is not None for s, each in zip(slices, own, strict=True) for _ in each]
                + [False] * len(rest),
            )
            for own, rest in ((requests, marks), (more_requests, []))
        )
        views, more_views = iter(self.squares.views), iter(self.instability.views)
        sums: dict[ParameterSlice, SliceSums] = {}
        for slice_, squares, rest in zip(slices, requests, more_requests, strict=True):
            total, *instability = (next(more_views) for _ in rest)  # in the order of the requests
            sums[slice_] = SliceSums(tuple(next(views) for _ in squares), total, tuple(instability))
        self.marks = list(views)  # what is left
        self.totals = {slice_: own.total for slice_, own in sums.items()}
        # Then matrices may go through all passes one after another.
        is_local = not (in_passes or self.squares.is_reduced or self.instability.is_reduced)
        reasons = {each: backends[each.param.device].unsupported(each) for each in slices}
        self.left = {each: why for each, why in reasons.items() if why is not None}
        # Those on the CPU last: meanwhile a device computes what it was told.
        members: dict[tuple[bool, bool, torch.device], dict[ParameterSlice, SliceSums]] = {}
        for each in slices:
            key = each.home is not None, reasons[each] is None, each.param.device
            members.setdefault(key, {})[each] = sums[each]
        self._passes = [
            (own, (backends[key[2]] if key[1] else EagerBackend()).passes(own, is_local=is_local))
            for key, own in sorted(members.items(), key=lambda item: item[0][:2])
        ]

    def zero_sums(self) -> None:
        """Forget the sums of the last step."""
        self.squares.zero_()
        self.instability.zero_()

    def begin(self, inputs: Mapping[ParameterSlice, StepInputs]) -> _BundleStep:
        """Take up what a step brings to those of the parameters that take part in it."""
        self.zero_sums()
        self.agreement.mark(inputs, self.marks)
        steps = [
            passes.begin({each: inputs[each] for each in members if each in inputs})
            for members, passes in self._passes
        ]
        return _BundleStep(self, steps, [each for each in inputs if each in self.totals])


class _BundleStep:
    """The passes of one step, with the reductions between them."""

    def __init__(
        self, bundle: Bundle, steps: Sequence[Step], taken: Collection[ParameterSlice]
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
            step.take(1)
        self._bundle.squares.start()

    def add_instability_sums(self) -> None:
        self._bundle.squares.finish()
        self._bundle.agreement.check(self._taken, self._bundle.marks)
        for step in self._steps:
            step.take(2)
        self._bundle.instability.start()

    def totals(self) -> dict[ParameterSlice, Tensor]:
        self._bundle.instability.finish()
        return {slice_: self._bundle.totals[slice_] for slice_ in self._taken}

    def apply(self) -> None:
        self._bundle.instability.finish()
        for step in self._steps:
            step.take(3)

    def run(self) -> None:
        for step in self._steps:
            step.take(1, 2, 3)


class Begun(NamedTuple):
    """A step of which the last pass is to come, with the arguments of :meth:`Plan.begin`."""

    plan: Plan
    steps: dict[Bundle, _BundleStep]
    settings: Sequence[GroupSettings]
    inputs: Mapping[ParameterSlice, StepInputs] | None
    now: Snapshot | None
    # r, c and v of all parameters, if it may be undone, and what they were before.
    moments: tuple[list[Tensor], list[Tensor]]

    def squared_update(self, of_rank: bool) -> Tensor:
        """Return the sum of u^2, and of how many elements: this rank's share, or of all."""
        totals = {s: t for step in self.steps.values() for s, t in step.totals().items()}
        shares = [(s.shard.share if of_rank else 1.0, float(s.shard.full_numel)) for s in totals]
        share, numel = torch.tensor(shares, dtype=torch.float64, device="cpu").view(-1, 2).unbind(1)
        return torch.stack([on_cpu([*totals.values()]), numel]) @ share

    def undo(self) -> None:
        """Leave all as it was before the step."""
        if self.moments[0]:
            torch._foreach_copy_(*self.moments)


class Plan:
    """The bundles of an optimizer's parameters.

    Args:
        slices: all parameters, in an order that is the same on all ranks.
        params: the parameters themselves, which may be DTensors.
        backends: by device.
        table: of the parameter groups as they are now; :meth:`fits` compares with them.
        in_passes: whether a step goes over all parameters pass by pass.

    Attributes:
        trained: those that are not frozen now.
        left: why backends leave these to eager PyTorch, of each that they do.
        settings: of the table in the last step; None if it was not taken to its end.
        updated: the tensors that the last step has written.
        counts: of own steps, of parameters that took part in it.
    """

    def __init__(
        self,
        slices: list[ParameterSlice],
        params: list[Tensor],
        backends: Mapping[torch.device, Backend],
        table: GroupTable,
        *,
        in_passes: bool = False,
    ) -> None:
        self.slices, self.params, self.table, self.in_passes = slices, params, table, in_passes
        self._has_dtensors = any(map(dtensors.is_dtensor, params))
        self._params = [list(group["params"]) for group in table.groups]
        known = {*map(id, params)}
        self._left_out = [p for p in chain.from_iterable(self._params) if id(p) not in known]
        self._made = [p for p in chain.from_iterable(self._params) if not is_lazy(p)]
        self._planned = layout_settings(table.groups)
        self._locals = list(map(dtensors.local_of, self._made))
        self._layouts = _layouts(self._locals)
        self.local: list[Bundle] = []
        self.shared: list[Bundle] = []
        for device in dict.fromkeys(slice_.sums_device for slice_ in slices):
            here = [slice_ for slice_ in slices if slice_.sums_device == device]
            local = [slice_ for slice_ in here if not slice_.is_shared]
            if local:
                # A guard's decision comes before the last pass of all.
                bundles = self.shared if in_passes else self.local
                bundles.append(Bundle(local, backends, in_passes=in_passes))
            for members in spread([slice_ for slice_ in here if slice_.is_shared]):
                self.shared.append(Bundle(members, backends, in_passes=in_passes))
        pairs = zip(slices, params, gradients_of(params), strict=True)
        self.trained = [s for s, p, grad in pairs if p.requires_grad or grad is not None]
        left = {each: why for bundle in self._bundles for each, why in bundle.left.items()}
        self.left = [left[each] for each in self.trained if each in left]
        self.settings: Sequence[GroupSettings] | None = None
        # The last step, while it can be taken again, and what its tensors were.
        self._steps: dict[Bundle, _BundleStep] = {}
        self._seen: Snapshot | None = None
        self.updated: list[Tensor] = []
        self.counts: list[Tensor] = []

    @property
    def buffers(self) -> list[SumBuffer]:
        """Where all sums lie."""
        return [sums for each in self._bundles for sums in (each.squares, each.instability)]

    @property
    def _bundles(self) -> list[Bundle]:
        return [*self.local, *self.shared]

    def holds(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups are the plan's, and hold its parameters."""
        params = [group["params"] for group in param_groups]
        return (
            are_same(param_groups, self.table.groups)
            and all(map(are_same, params, self._params))
            and layout_settings(param_groups) == self._planned
            and all(map(is_, map(attrgetter("grad"), self._left_out), repeat(None)))
        )

    def fits(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether, moreover, the parameters are what they were."""
        locals_ = list(map(dtensors.local_of, self._made))
        return (
            self.holds(param_groups)
            and are_same(locals_, self._locals)  # FSDP2 puts others in their place
            and _layouts(locals_) == self._layouts
        )

    def snapshot(
        self, states: Mapping[Any, dict[str, Any]], weights: Iterable[Tensor]
    ) -> Snapshot | None:
        """Look at all tensors of a step; None where the next step must take them up anew."""
        if self._has_dtensors or any(group.get("maximize") for group in self.table.groups):
            return None
        return Snapshot.of(self.params, gradients_of(self.params), states, weights)

    def goes_on(self, settings: Sequence[GroupSettings], now: Snapshot | None) -> bool:
        """Whether :meth:`step` may take the last step's tensors: nothing of them has changed."""
        if any(each.hyper.no_confidence for each in settings):
            return False  # the state is looked at in every step
        same = now is not None and self._seen is not None and self._seen.has_become(now)
        return same and bool(self._steps) and all(step.lasts for step in self._steps.values())

    def inputs(
        self,
        settings: Sequence[GroupSettings],
        state_of: _StateOf,
        weights: Mapping[Tensor, Tensor],
    ) -> dict[ParameterSlice, StepInputs]:
        """Return what a step brings, of the parameters that take part in it."""
        inputs = {}
        found = zip(self.slices, self.params, gradients_of(self.params), strict=True)
        for slice_, param, whole_grad in found:
            grad = dtensors.local_gradient(param, whole_grad)
            if not slice_.takes_part(grad):
                continue
            if grad is None:
                grad = slice_.param  # both without elements
            elif self.table.group_of(slice_.group).get("maximize"):
                grad = grad.neg()
            grad = grad.resolve_neg()  # of an imaginary part, its sign may not be in memory yet
            state, weight = dtensors.state_here(state_of(param)), weights.get(param)
            inputs[slice_] = StepInputs(state, grad, settings[slice_.group], weight)
        return inputs

    def begin(
        self,
        settings: Sequence[GroupSettings],
        inputs: Mapping[ParameterSlice, StepInputs] | None,
        now: Snapshot | None,
        states: Mapping[Any, dict[str, Any]],
    ) -> Begun:
        """Take the first two passes of a step; where all sums are local, all three.

        Args:
            settings: of the table.
            inputs: of the parameters that take part; None for the last step's.
            now: all tensors of it.
            states: of all parameters, where the step may be undone.
        """
        own = (state for param, state in states.items() if isinstance(param, Tensor))
        kept = (state.get(key) for state in own for key in SECOND_MOMENTS)
        moments = [dtensors.local_of(moment) for moment in kept if moment is not None]
        old = list(torch._foreach_mul(moments, 1.0)) if moments else []  # copies, in a few launches
        before, self._steps, self.settings = self._steps, {}, None  # until it is taken
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
        return Begun(self, steps, settings, inputs, now, (moments, old))

    def end(self, begun: Begun) -> None:
        """Take the last pass of a step."""
        _, steps, settings, inputs, now, _ = begun
        for bundle in self.shared:
            steps[bundle].apply()
        if inputs is not None:
            pairs = zip(self.slices, self.params, strict=True)
            self.updated = [t for s, param in pairs if s in inputs for t in {s.param, param}]
            states = [each.state for each in inputs.values() if STEP in each.state]
            self.counts = [each[STEP] for each in states if own_count(each) is not None]
            self._seen = None
        if now is not None and all(step.lasts for step in steps.values()):
            self._steps, self._seen = steps, self._seen or now.let_go()
        self.settings = settings

    def measure(self, state_of: _StateOf, kinds: Mapping[Tensor, str] | None, whole: bool) -> Sums:
        """Measure the last step, whose gradients and state must still be there.

        Without kinds of layers these are found by the groups' ``param_names``. Of whole parameters,
        not of what this rank holds, it is a collective.
        """
        if kinds is None:
            groups = self.table.groups
            named = (zip(g["params"], g.get("param_names", ()), strict=False) for g in groups)
            kinds = {param: kind_of(name) for param, name in chain.from_iterable(named)}
        inputs = {} if self.settings is None else self.inputs(self.settings, state_of, {})
        if not inputs and self.params:
            raise ValueError(
                "CAME: diagnostics() looks at the last step's gradients, and there are none: call "
                "it after a step() that was taken, before zero_grad()."
            )
        totals = {s: t for bundle in self._bundles for s, t in bundle.totals.items()}
        of = {s: kinds[p] for s, p in zip(self.slices, self.params, strict=True) if p in kinds}
        return (measure_whole if whole else measure)(inputs, totals, of)


def are_same(objects: Sequence[object], others: Sequence[object]) -> bool:
    """Whether two lists hold the same objects, in the same order."""
    return len(objects) == len(others) and all(map(is_, objects, others))


def _is_contiguous(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous()  # sparse rows cannot say


def _layouts(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Device, dtype, shape, contiguity and lazy sign, which decide who updates a tensor."""
    tensors = [tensor for tensor in tensors if not tensor.is_nested]  # which have no shape
    kinds = map(attrgetter("device", "dtype", "shape"), tensors)
    lies = map(_is_contiguous, tensors), map(Tensor.is_neg, tensors)
    return list(zip(kinds, *lies, strict=True))

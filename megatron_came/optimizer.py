"""The CAME optimizer: a ``torch.optim.Optimizer`` over whole tensors or slices of them."""

import copy
import logging
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_came import dtensors, parameter_checks
from megatron_came.core.diagnostics import Sums
from megatron_came.core.hyperparameters import check_group, with_plain_numbers
from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.rounding import parameter_key
from megatron_came.core.shard import Shard
from megatron_came.core.spike_guard import SpikeGuard
from megatron_came.core.state import new_state
from megatron_came.group_table import GroupTable, Own, count_steps, whole_shard
from megatron_came.kernels.dispatch import Choice, choose, left_to_plain
from megatron_came.state_dicts import COPIED, KNOWN, WithStateDicts, check_not_cast
from megatron_came.step import Begun, Plan
from megatron_came.torch_compile import keep_out_of_compiler
from megatron_came.voice import warn_once

_logger = logging.getLogger(__name__)


class CAME(WithStateDicts):
    """Confidence-guided Adaptive Memory Efficient Optimization (Luo et al., ACL 2023, algorithm 2).

    Without ``shards`` a drop-in for the authors' ``came_pytorch.CAME``. With them, every rank
    updates its slice of each tensor as the unsharded algorithm would: row and column statistics are
    sums over elements, which two reductions a step complete, wherever slices begin and end. Of
    DTensors (``fully_shard``, ``parallelize_module``) that is found out; their state is DTensors
    too, see :mod:`megatron_came.dtensors`.

    Tensors of two or more dimensions have factored statistics; of fewer, a full second moment and
    no confidence. Those without a gradient are skipped. 16-bit gradients are squared in fp32.

    State of a parameter is listed in :func:`megatron_came.core.state.new_state`.
    A parameter group counts its steps under ``step``; with bias correction each parameter counts
    its own, too. A gradient in another dtype than the parameter's is taken from the parameter's
    attribute ``decoupled_grad``, if that is set.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a scalar tensor; the authors advise 0.5 to 0.9 times AdamW's,
            and their class has no default: this one is for code that gives parameters alone.
        eps: added to squared gradient and instability, both above 0.
        clip_threshold: largest RMS of an update before momentum, above 0.
        betas: decay of momentum, squared-gradient and instability statistics, each in [0, 1).
        weight_decay: decoupled weight decay, at least 0.
        bias_correction: divide averages by 1 - beta^t; without it first updates are large.
        cautious: leave out of an update the elements that would move against their gradient.
        no_confidence: take the momentum for the update, as Adafactor does: R and C are 1.
        factored: whether matrices have factors; if not they are updated as vectors are, with a
            whole second moment.
        shards: where each parameter lies in its full tensor; those not named are whole.
        kernels: who computes parameters with fp32 weights, remainders included: "auto" is Triton
            on GPUs and Numba on CPUs where they are installed; "plain" PyTorch; "numba"; "triton".
            Cautious updates, other dtypes, tensors that are not contiguous and batches of many
            small matrices are computed in plain PyTorch.
        cuda_graph: replay the launches of Triton's kernels as CUDA graphs, once they have stayed
            the same for a few steps; see :mod:`megatron_came.kernels.triton.graphs`.
        momentum_dtype: ``torch.float32``; ``torch.bfloat16``, half the memory; or ``torch.int8``
            with a scale for every 256 elements, a quarter; both rounded stochastically.
        remainders: take bf16 parameters for the upper halves of fp32 weights and keep the lower
            halves as state, see :mod:`megatron_came.core.remainders`: they are trained as fp32
            parameters are.
        seed: of that rounding. Its bits are a function of the seed, the step, the parameter's
            name and the element's place in the full tensor.
        names: of parameters, the same in every layout, for that rounding; by default their places.
        flat_convolutions: run the algorithm on weights of more than two dimensions as if they were
            matrices, of the first dimension and all others: many of 3 x 3 have larger factors.
        spike_guard: skip a step whose raw update's RMS is so many times its running median; see
            :class:`megatron_came.core.spike_guard.SpikeGuard`.
        maximize: go up the gradient, which is negated: a copy of each during a step.
        foreach, fused: mean nothing here: kernels take all parameters at once.
        differentiable: not supported; nor is ``capturable``.

    Raises:
        ValueError: a setting out of range; a parameter that is float8 or complex, or overlaps
            itself; a DTensor whose placements are not of a known kind; matrices that a wrapper has
            made flat; a shard that does not fit its parameter; kernels that are not installed;
            ``cuda_graph`` without a GPU, or with other kernels.
    """

    # Fairseq asks: fp16 parameters are updated as they are, with state in fp32; and not flat ones,
    # since a flat vector has no rows and columns.
    supports_memory_efficient_fp16, supports_flat_params = True, False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-4,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = False,
        cautious: bool = False,
        no_confidence: bool = False,
        factored: bool = True,
        shards: Mapping[Tensor, Shard] | None = None,
        kernels: str = "auto",
        cuda_graph: bool = False,
        momentum_dtype: torch.dtype = torch.float32,
        remainders: bool = False,
        seed: int = 0,
        names: Mapping[Tensor, str] | None = None,
        flat_convolutions: bool = False,
        spike_guard: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        parameter_checks.check_settings(
            momentum_dtype,
            seed,
            remainders=remainders,
            flat_convolutions=flat_convolutions,
            cuda_graph=cuda_graph,
        )
        self._momentum_dtype, self._seed, self._remainders = momentum_dtype, seed, remainders
        self._flat_convolutions = flat_convolutions
        self.spike_guard = None if spike_guard is None else SpikeGuard(spike_guard, warn_once)
        self._guard = parameter_checks.Guard()
        self._begun: list[Begun] = []  # of which the guard has yet to decide
        self._shards: dict[Tensor, Shard] = {}
        self._wanted_kernels, self._cuda_graph = kernels, cuda_graph
        self._choices: dict[torch.device, Choice] = {}
        self._model_weights: dict[Tensor, Tensor] = {}
        self._homes: dict[Tensor, torch.device] = {}  # of those that a subclass keeps on the CPU
        self._plan: Plan | None = None
        own = {"betas": betas, "eps": eps, "clip_threshold": clip_threshold, "cautious": cautious}
        own |= {"bias_correction": bias_correction, "no_confidence": no_confidence}
        defaults = {"lr": lr, **own, "weight_decay": weight_decay, "step": 0}
        switches = {"maximize": maximize, "foreach": foreach, "fused": fused, "factored": factored}
        switches |= {"differentiable": differentiable, "capturable": capturable}
        check_group({**defaults, **switches})
        defaults |= {"maximize": True} if maximize else {}
        defaults |= {} if factored else {"factored": False}
        with_plain_numbers(defaults)
        super().__init__(params, defaults)
        self.set_shards(shards or {}, names)
        self._guard.check(self.param_groups, self._shards, flat_convolutions)
        self._choose_kernels()
        keep_out_of_compiler(CAME)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it is refused as the class refuses its parameters."""
        if isinstance(param_group, dict):  # what else it may be, PyTorch says
            check_group({**self.defaults, **param_group})
            parameter_checks.say_if_betas(param_group.get("eps", self.defaults["eps"]))
            with_plain_numbers(param_group)
        super().add_param_group(param_group)
        try:
            parameter_checks.check_trainable(self.param_groups[-1]["params"])
        except ValueError:
            del self.param_groups[-1]
            raise
        self._guard.note(self.param_groups[-1]["params"])

    def set_shards(
        self,
        shards: Mapping[Tensor, Shard],
        names: Mapping[Tensor, str] | None = None,
        own: Mapping[Tensor, Own] | None = None,
    ) -> None:
        """Say where each parameter lies in its full tensor; those not named are whole.

        All ranks of a group must name the same tensors in the same order, those they hold no
        element of included (as parameters of zero elements).

        Args:
            shards: by parameter.
            names: as for the class.
            own: hyperparameters of single parameters, which go before those of their groups.

        Raises:
            ValueError: see :func:`megatron_came.parameter_checks.check_placement`.
        """
        known = {param for group in self.param_groups for param in group["params"]}
        parameter_checks.check_placement(
            shards, names, known, self._momentum_dtype, self._flat_convolutions
        )
        self._plan = None
        self._shards, self._names, self._own = dict(shards), dict(names or {}), dict(own or {})

    def set_model_weights(self, weights: Mapping[Tensor, Tensor]) -> None:
        """Name 16-bit copies of parameters, which every step rewrites, rounded to nearest.

        They are contiguous, with as many elements as their parameter; those not named have none.

        Raises:
            ValueError: one does not fit its parameter.
        """
        parameter_checks.check_model_weights(weights)
        self._plan = None
        self._model_weights = dict(weights)

    def shard_of(self, param: Tensor) -> Shard:
        """Return where a parameter lies in its full tensor."""
        shard = self._shards.get(param)
        if shard is not None:
            return shard
        if dtensors.is_dtensor(param):
            return dtensors.shard_of(param)
        return whole_shard(param, self.param_groups, self._flat_convolutions)

    def init_state(self) -> None:
        """Create what is missing of the parameters' state; no collectives, no update."""
        for param in self._params():
            for key, value in self._new_state(param).items():
                self.state[param].setdefault(key, value)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step; return the loss of a closure that reevaluates the model, if one is given."""
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.spike_guard is None:
            self._end(self._begin())
        elif self.spike_guard.allows(self):
            self._end(self._begun.pop())
        else:
            self._begun.pop().undo()
        return loss

    def _begin(self) -> Begun:
        """Take the first passes of a step."""
        plan = self._plan
        if plan is None or not plan.holds(self.param_groups):  # looks at less than _current_plan
            plan = self._current_plan()
        now = plan.snapshot(self.state, self._model_weights.values())
        settings, inputs = plan.table.at_step(self.state), None
        if not plan.goes_on(settings, now):
            # Of shards, as of Megatron's, all that a group has take part in its steps.
            if not self._shards and count_steps(self.param_groups, self.state, self._state_of):
                self._plan = None
            plan = self._current_plan()
            settings = plan.table.at_step(self.state)
            inputs = plan.inputs(settings, self._state_of, self._model_weights)
            if now is not None and len(now.state) != sum(map(len, self.state.values())):
                now = plan.snapshot(self.state, self._model_weights.values())  # with what was made
        return plan.begin(settings, inputs, now, self.state if self.spike_guard else {})

    def begin_guarded(self, of_rank: bool) -> Tensor:
        """See :class:`megatron_came.core.spike_guard.SpikeGuard`."""
        if self._plan is not None and not self._plan.in_passes:
            self._plan = None  # the guard was set after it was made
        self._begun = [self._begin()]
        # Ranks of a mesh must decide alike, to the last bit.
        sums = self._begun[0].squared_update(of_rank)
        return sums if of_rank else dtensors.agreed(sums, self._params())

    def _end(self, begun: Begun) -> None:
        """Take the last pass."""
        begun.plan.end(begun)
        if begun.plan.updated:  # kernels write behind autograd's back
            torch.autograd.graph.increment_version(begun.plan.updated)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        if begun.plan.counts:
            torch._foreach_add_(begun.plan.counts, 1)

    def __getstate__(self) -> dict[str, Any]:
        if self._shards:
            raise TypeError(
                "CAME with shards holds process groups and cannot be copied or pickled: "
                "use state_dict()."
            )
        own = {key: self.__dict__[key] for key in COPIED}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what was copied or pickled, also by an older version; or a state dictionary."""
        if state.keys() == {"state", "param_groups"}:  # torch.optim loads a dictionary so
            check_not_cast(state["state"], self._new_state)
        super().__setstate__(state)
        for key, default in COPIED.items():
            self.__dict__.setdefault(key, copy.copy(default))
        self.__dict__.setdefault("_shards", {})
        self.__dict__.setdefault("_choices", {})
        self._guard = parameter_checks.Guard(self.param_groups)
        self._plan = None
        keep_out_of_compiler(CAME)

    def diagnostics(self, kinds: Mapping[Tensor, str] | None = None) -> dict[str, dict[str, float]]:
        """Return figures of the last step, of "all" and each kind of layer: docs/stability.md.

        Of whole parameters, the same on all ranks that hold some of them, which all must ask.

        Args:
            kinds: of parameters, from :data:`megatron_came.core.diagnostics.KINDS`; by default
                found by the names that the optimizer was given with its parameters, if it was.

        Raises:
            ValueError: there are no gradients of a last step.
        """
        found = self.measure(kinds, whole=True).figures()
        if self.spike_guard is not None:
            found["all"]["skipped_steps"] = self.spike_guard.skipped
        return found

    @torch.no_grad()
    def measure(self, kinds: Mapping[Tensor, str] | None = None, *, whole: bool = False) -> Sums:
        """Return what :meth:`diagnostics` is made of; of what this rank holds, if not whole."""
        return self._current_plan().measure(self._state_of, kinds, whole)

    def _params(self) -> list[Tensor]:
        """All parameters that may be trained; a plan looks whether others have a gradient."""
        return parameter_checks.trainable(
            chain.from_iterable(group["params"] for group in self.param_groups)
        )

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if state.keys().isdisjoint(KNOWN):  # a wrapper may have put something there
            state.update(self._new_state(param))
        return state

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        here, shard = dtensors.local_of(param), self.shard_of(param)
        state = new_state(here, shard, self._momentum_dtype, self._remainders)
        return dtensors.state_like(param, state)

    def _current_plan(self) -> Plan:
        """Return the plan, made anew where others have replaced or moved something."""
        if self._plan is None or not self._plan.fits(self.param_groups):
            self._guard.check(self.param_groups, self._shards, self._flat_convolutions, self.state)
            table = GroupTable(self.param_groups, self._own, self.state)
            # Named shards first, in the order of naming, which is the same on all ranks.
            params = dict.fromkeys(chain(self._shards, self._params()))
            # Random bits go by name or, without names, by the place in the groups.
            place = {param: str(index) for index, param in enumerate(table.number)}
            slices = [
                ParameterSlice(
                    dtensors.local_of(param),
                    self.shard_of(param),
                    number := table.number[param],
                    parameter_key(self._seed, self._names.get(param, place[param])),
                    self._remainders,
                    table.group_of(number).get("cautious", False),
                    may_be_skipped=dtensors.is_dtensor(param),
                    home=self._homes.get(param),
                )
                for param in params
            ]
            owned = dict(zip(params, slices, strict=True))
            self._guard.compare_ranks(owned, self.param_groups, self._momentum_dtype)
            self._choose_kernels()
            backends = {device: choice.backend for device, choice in self._choices.items()}
            in_passes = bool(self.spike_guard)
            self._plan = Plan(slices, list(params), backends, table, in_passes=in_passes)
            if self._plan.left:
                warn_once(left_to_plain(self._plan.left, len(self._plan.trained)))
        return self._plan

    @property
    def sums(self) -> list[Tensor]:
        """The buffers of its sums over ranks, which a step has made."""
        return [] if self._plan is None else [sums.flat for sums in self._plan.buffers]

    @property
    def kernel_choices(self) -> list[str]:
        """Who computes the step and why, a sentence for each device that no warning was about."""
        return [choice.reason for choice in self._choices.values() if not choice.should_warn]

    def _choose_kernels(self) -> None:
        devices = {param.device for group in self.param_groups for param in group["params"]}
        for device in devices - self._choices.keys():
            choice = choose(self._wanted_kernels, device, cuda_graph=self._cuda_graph)
            self._choices[device] = choice
            # What is no warning, Megatron's builder says on one rank.
            (warn_once if choice.should_warn else _logger.debug)(choice.reason)

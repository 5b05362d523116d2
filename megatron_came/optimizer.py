"""The CAME optimizer: a ``torch.optim.Optimizer`` over whole tensors or slices of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_came import state as state_of
from megatron_came.kernels.choice import Choice, choose
from megatron_came.layout import Shard
from megatron_came.maths.hyperparameters import Hyperparameters, check_number
from megatron_came.maths.rounding import parameter_key
from megatron_came.plan import Plan
from megatron_came.work import ParameterWork, gradient_of

_logger = logging.getLogger(__name__)


class CAME(torch.optim.Optimizer):
    """Confidence-guided Adaptive Memory Efficient Optimization (Luo et al., ACL 2023, algorithm 2).

    Without ``shards`` a drop-in for the authors' ``came_pytorch.CAME``. With them, every rank
    updates its slice of each tensor as the unsharded algorithm would: row and column statistics
    are sums over elements, which two reductions a step complete, wherever the slices begin and
    end.

    Tensors of two or more dimensions have factored statistics; of fewer, a full second moment
    and no confidence. Parameters without a gradient are skipped. Gradients in bf16 or fp16 are
    upcast before they are squared.

    State of a parameter whose whole local tensor has the shape (..., n, m); fp32, or float64 for
    float64 parameters:

    ====================  =========================  ==========================================
    ``exp_avg``           like the parameter         momentum m of this rank's slice, in
                                                     ``momentum_dtype``
    ``exp_avg_scale``     (ceil(elements / 256),)    int8 alone: ``exp_avg`` is to be multiplied
                                                     by these, in blocks along the flat slice
    ``remainder``         like the parameter         int16: the lower halves of fp32 weights
    ``exp_avg_sq_row``    (..., n)                   r, whole on every data-parallel rank
    ``exp_avg_sq_col``    (..., m)                   c, likewise
    ``exp_avg_res_row``   (..., n)                   R, likewise
    ``exp_avg_res_col``   (..., m)                   C, likewise
    ``exp_avg_sq``        (n,), vectors alone        v, instead of the four factors; whole
    ====================  =========================  ==========================================

    A parameter group counts its steps under ``step``. A gradient in another dtype than the
    parameter's is taken from the parameter's attribute ``decoupled_grad``, if that is set.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a scalar tensor; the authors advise 0.5 to 0.9 times AdamW's.
        betas: decay of momentum, squared-gradient and instability statistics, each in [0, 1). No
            bias correction: with the default beta3 the first updates are up to 11 lr in RMS, so
            warm up.
        eps: added to squared gradient and squared residual, both above 0.
        clip_threshold: largest RMS of an update before momentum, above 0.
        weight_decay: decoupled weight decay, at least 0.
        shards: where each parameter lies in its full tensor; those not named are whole.
        kernels: who computes parameters with fp32 weights, remainders included: "auto" is Triton
            on GPUs and Numba on CPUs where they are installed; "plain" PyTorch; "numba"; "triton".
            Other dtypes, tensors that are not contiguous and batches of many small matrices are
            computed in plain PyTorch.
        momentum_dtype: ``torch.float32``; ``torch.bfloat16``, half the memory; or ``torch.int8``
            with a scale for every 256 elements, a quarter. Both are rounded stochastically.
        remainders: take bf16 parameters for the upper halves of fp32 weights and keep the lower
            halves as state, see :mod:`megatron_came.maths.remainders`: they are trained as fp32
            parameters are.
        seed: of that rounding. Its bits are a function of the seed, the step, the parameter's
            name and the element's place in the full tensor.
        names: of parameters, the same in every layout, for that rounding; the others are named by
            their place in the parameter groups.

    Raises:
        ValueError: a hyperparameter out of range, a complex or integer parameter, a shard that
            does not fit its parameter, kernels that are not installed, or a dtype that momentum
            cannot have.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        shards: Mapping[Tensor, Shard] | None = None,
        kernels: str = "auto",
        momentum_dtype: torch.dtype = torch.float32,
        remainders: bool = False,
        seed: int = 0,
        names: Mapping[Tensor, str] | None = None,
    ) -> None:
        dtypes = state_of.MOMENTUM_DTYPES.values()
        if momentum_dtype not in dtypes:
            raise ValueError(
                f"CAME: momentum_dtype {momentum_dtype} is not one of "
                f"{', '.join(map(str, dtypes))}."
            )
        self._momentum_dtype, self._seed = momentum_dtype, seed
        self._remainders = remainders
        self._shards: dict[Tensor, Shard] = {}
        self._wanted_kernels = kernels
        self._choices: dict[torch.device, Choice] = {}
        self._model_weights: dict[Tensor, Tensor] = {}
        self._plan: Plan | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            "step": 0,
        }
        _check_group(defaults)
        super().__init__(params, defaults)
        self.set_shards(shards or {}, names)
        self._choose_kernels()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Raises:
            ValueError: as for the class.
        """
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                raise ValueError(f"CAME updates real floating-point parameters, not {param.dtype}.")

    def set_shards(
        self, shards: Mapping[Tensor, Shard], names: Mapping[Tensor, str] | None = None
    ) -> None:
        """Say where each parameter lies in its full tensor; those not named are whole.

        All ranks of a group must name the same tensors in the same order, those they hold no
        element of included (as parameters of zero elements).

        Args:
            shards: by parameter.
            names: as for the class.

        Raises:
            ValueError: a shard with another number of elements than its parameter, or of no
                parameter of this optimizer; no names, which the momentum's dtype needs.
        """
        if shards and self._momentum_dtype != torch.float32 and names is None:
            raise ValueError(
                f"CAME: with shards and momentum in {self._momentum_dtype}, names must name the "
                "parameters: their places in the parameter groups may differ between ranks."
            )
        known = {param for group in self.param_groups for param in group["params"]}
        for param, shard in shards.items():
            if param not in known:
                raise ValueError(
                    f"CAME: a shard of shape {shard.shape} names a tensor in no parameter group."
                )
            if param.numel() != shard.numel:
                raise ValueError(
                    f"CAME: a parameter has {param.numel()} elements, its shard {shard.numel} "
                    f"([{shard.start}, {shard.stop}) of shape {shard.shape})."
                )
        self._plan = None
        self._shards, self._names = dict(shards), dict(names or {})

    def set_model_weights(self, weights: Mapping[Tensor, Tensor]) -> None:
        """Name 16-bit copies of parameters, which every step rewrites, rounded to nearest.

        Args:
            weights: by parameter, contiguous, with as many elements; those not named have none.

        Raises:
            ValueError: one does not fit its parameter.
        """
        for param, weight in weights.items():
            if weight.numel() != param.numel() or not weight.is_contiguous():
                raise ValueError(
                    f"CAME: the model weight of a parameter of {param.numel()} elements must be "
                    f"contiguous with as many, not {tuple(weight.shape)}."
                )
        self._model_weights = dict(weights)

    def shard_of(self, param: Tensor) -> Shard:
        """Return where a parameter lies in its full tensor."""
        return self._shards.get(param) or Shard.whole(tuple(param.shape))

    def init_state(self) -> None:
        """Create what is missing of the parameters' state; no collectives, no update."""
        for group in self.param_groups:
            for param in group["params"]:
                for key, value in self._new_state(param).items():
                    self.state[param].setdefault(key, value)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one optimizer step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, if one was given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._current_plan()
        active = {
            work: grad for work in plan.works if work.takes_part(grad := gradient_of(work.param))
        }
        hypers = {id(group): Hyperparameters.from_group(group) for group in self.param_groups}
        for work, grad in active.items():
            weight = self._model_weights.get(work.param)
            work.begin(self._state_of(work), hypers[id(work.group)], weight, grad)

        # While the sums of the shared chunks travel, the local ones are computed.
        for chunk in plan.shared:
            chunk.add_square_sums(active)
        for chunk in plan.local:
            chunk.step(active)
        for chunk in plan.shared:
            chunk.add_instability_sums()
        for chunk in plan.shared:
            chunk.apply()
        for chunk in plan.shared:
            chunk.apply_copies()

        for work in active:
            work.end()
        if active:  # kernels write behind autograd's back
            torch.autograd.graph.increment_version([work.param for work in active])
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary, also one of ``came_pytorch.CAME``.

        State keeps the dtype that CAME gives it; ``torch.optim`` would cast it to the parameter's.
        Momentum of another dtype is rounded to nearest.
        """
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        mine = chain.from_iterable(group["params"] for group in self.param_groups)
        states = {
            param: self._as_state(state_dict["state"][key], param)
            for key, param in zip(saved, mine, strict=False)  # what does not fit is said below
            if key in state_dict["state"]
        }
        super().load_state_dict(state_dict)
        self.state.update(states)

    def __getstate__(self) -> dict[str, Any]:
        if self._shards:
            raise TypeError(
                "CAME with shards holds process groups and cannot be copied or pickled: "
                "use state_dict()."
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_shards", {})
        self.__dict__.setdefault("_wanted_kernels", "auto")
        self.__dict__.setdefault("_choices", {})
        self.__dict__.setdefault("_model_weights", {})
        self.__dict__.setdefault("_momentum_dtype", torch.float32)
        self.__dict__.setdefault("_remainders", False)
        self.__dict__.setdefault("_seed", 0)
        self.__dict__.setdefault("_names", {})
        self._plan = None

    def _state_of(self, work: ParameterWork) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[work.param]
        if not state:
            state.update(self._new_state(work.param))
        return state

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        return state_of.new_state(
            param, self.shard_of(param), self._momentum_dtype, self._remainders
        )

    def _as_state(self, saved: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
        """Give loaded state our dtypes; drop ``step`` and ``RMS`` of the authors' class."""
        state = self._new_state(param)
        if state_of.REMAINDER in saved and state_of.REMAINDER not in state:
            raise ValueError(
                "CAME: the state dictionary holds the lower halves of fp32 weights, which would "
                "be lost: give remainders=True, with bf16 parameters."
            )
        for key, value in saved.items():
            if key == state_of.MOMENTUM:
                if value.dtype == state[key].dtype:
                    state[key] = value.to(param.device).contiguous()
                else:
                    state_of.set_momentum(state, state_of.momentum_of(saved))
            elif key == state_of.SCALE and key not in state:
                pass  # the momentum of another dtype has taken it up
            elif key not in ("step", "RMS"):
                dtype = state[key].dtype if key in state else state_of.state_dtype(param)
                state[key] = value.to(device=param.device, dtype=dtype).contiguous()
        return state

    def _current_plan(self) -> Plan:
        """Return the plan, made anew where the host has replaced or moved something."""
        if self._plan is None or not self._plan.fits(self.param_groups):
            group_of = {param: group for group in self.param_groups for param in group["params"]}
            if any(param not in group_of for param in self._shards):
                raise ValueError(
                    "CAME: a parameter with a shard is in no parameter group any more: "
                    "call set_shards with those that are."
                )
            # Named shards first, in the order in which they were named: it is the same on all
            # ranks.
            params = dict.fromkeys(chain(self._shards, group_of))
            place = {param: str(index) for index, param in enumerate(group_of)}
            works = [
                ParameterWork(
                    param,
                    group_of[param],
                    self.shard_of(param),
                    parameter_key(self._seed, self._names.get(param, place[param])),
                    self._remainders,
                )
                for param in params
            ]
            self._choose_kernels()
            kernels = {device: choice.kernels for device, choice in self._choices.items()}
            self._plan = Plan(works, kernels, self.param_groups)
            if left := self._plan.left:
                _logger.warning(
                    "CAME's step runs in plain PyTorch, which is slower, for %d of %d parameters, "
                    "the first of shape %s in %s: kernels compute contiguous ones with fp32 "
                    "weights, but no batches of many small matrices, no rows of more than 16 "
                    "million elements and no vectors of which other ranks hold copies.",
                    *(len(left), len(works), left[0].shard.shape, left[0].param.dtype),
                )
        return self._plan

    @property
    def kernel_choices(self) -> list[str]:
        """Who computes the step and why, a sentence for each device."""
        return [choice.reason for choice in self._choices.values()]

    def _choose_kernels(self) -> None:
        for group in self.param_groups:
            for device in {param.device for param in group["params"]} - self._choices.keys():
                self._choices[device] = choice = choose(self._wanted_kernels, device)
                if choice.is_lesser:
                    _warn_once(choice.reason)
                else:
                    _logger.info(choice.reason)


@functools.cache
def _warn_once(message: str) -> None:
    """Megatron makes several optimizers."""
    _logger.warning(message)


def _check_group(group: Mapping[str, Any]) -> None:
    check_number("lr", group["lr"], 0.0)
    check_number("weight_decay", group["weight_decay"], 0.0)
    Hyperparameters.from_group(group)

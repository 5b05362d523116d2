"""State dictionaries are checked before anything of them is taken over."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron_came import dtensors
from megatron_came.core.hyperparameters import check_group, check_step, with_plain_numbers
from megatron_came.core.momentum import MOMENTUM, SCALE, is_complete
from megatron_came.core.saved import momentum_ranges, set_momentum
from megatron_came.core.shard import Shard
from megatron_came.core.state import FACTORS, REMAINDER, STEP, own_count

_SETTINGS = ("lr", "betas", "eps", "clip_threshold", "weight_decay")
# Of the authors' class, beside what it shares with ours; numbers.
_AUTHORS_OWN = (STEP, "RMS")
KNOWN = (MOMENTUM, SCALE, REMAINDER, *FACTORS)
# Attributes of CAME that copies and pickles take along, and what those of older versions lack.
COPIED: dict[str, Any] = {
    "_wanted_kernels": "auto",
    "_cuda_graph": False,
    "_momentum_dtype": torch.float32,
    "_remainders": False,
    "_flat_convolutions": False,
    "_seed": 0,
    "_names": {},
    "_own": {},
    "_model_weights": {},
    "_homes": {},
    "spike_guard": None,
}


class WithStateDicts(torch.optim.Optimizer):
    """State dictionaries of :class:`megatron_came.CAME`."""

    _shards: dict[Tensor, Shard]
    _new_state: Callable[[Tensor], dict[str, Tensor]]

    def state_dict(self) -> dict[str, Any]:
        """Return a state dictionary; int8 momentum is bf16 in it, which holds the same values.

        Codes of int8 mean nothing without the scales of blocks along a slice, and who loads the
        dictionary may have other slices, or floats. Of named shards, Megatron's wrappers see to it.
        """

        def make_portable(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            params = list(chain.from_iterable(group["params"] for group in self.param_groups))
            for key, state in state_dict["state"].items():
                if isinstance(key, int):  # or a wrapper's, of no parameter
                    state_dict["state"][key] = dtensors.portable(params[key], state)
            for group in state_dict["param_groups"]:  # schedules may have put in NumPy's
                with_plain_numbers(group)

        if self._shards:
            return super().state_dict()
        # The first: others may give it other keys.
        hook = self.register_state_dict_post_hook(make_portable, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary, also one of ``came_pytorch.CAME``.

        State keeps the dtype that CAME gives it; ``torch.optim`` would cast it to the parameter's.
        Momentum of another dtype is rounded to nearest.

        Raises:
            ValueError: it is another optimizer's, or another model's. Nothing is changed then.
        """
        states: dict[Tensor, dict[str, Tensor]] = {}

        def take(_: torch.optim.Optimizer, final: Any) -> dict[str, Any]:
            # Of sharded parameters, Megatron's wrappers load the factors themselves.
            is_partial = bool(self._shards)
            # All is checked before anything is taken.
            states.update(_states_in(final, self.param_groups, self._new_state, is_partial))
            groups = _complete_groups(final, self.defaults, self.param_groups)
            # PyTorch would cast the parameters' state, all at once.
            return {"state": _without_parameter(final), "param_groups": groups}

        def fill(_: torch.optim.Optimizer) -> None:
            for param, saved in states.items():  # one at a time: the old state is gone by now
                own = {key: saved.pop(key) for key in [*saved] if key in KNOWN}
                state = _as_state(own, self._new_state(param), param) if own else {}
                for key, value in saved.items():  # what others keep beside it, counts of steps
                    device = torch.device("cpu") if key == STEP else param.device
                    is_tensor = isinstance(value, Tensor)
                    state[key] = value.to(device, copy=True) if is_tensor else value
                self.state[param] = state

        if not isinstance(state_dict, Mapping):
            take(self, state_dict)  # says so
        # The last and the first: others may change what is loaded, before and after.
        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def check_not_cast(
    states: Mapping[Any, Any], new_state: Callable[[Tensor], dict[str, Tensor]]
) -> None:
    """Refuse state that ``torch.optim.Optimizer.load_state_dict`` has cast to that of parameters.

    Raises:
        ValueError: it was called past the method here, or something that does as it does.
    """
    for param, state in states.items():
        if not isinstance(param, Tensor) or not isinstance(state, Mapping):
            continue  # what a wrapper keeps
        own = new_state(param)
        for key, made in own.items():
            if isinstance(state.get(key), Tensor) and state[key].dtype != made.dtype:
                raise ValueError(
                    f"CAME: {key!r} of a parameter of shape {tuple(param.shape)} is "
                    f"{state[key].dtype} where CAME keeps {made.dtype}: "
                    "torch.optim.Optimizer.load_state_dict, or a copy of it, has cast it; call the "
                    "optimizer's own load_state_dict()."
                )


def _states_in(
    state_dict: Any,
    groups: Sequence[Mapping[str, Any]],
    new_state: Callable[[Tensor], dict[str, Tensor]],
    is_partial: bool,
) -> dict[Tensor, dict[str, Tensor]]:
    """Return by parameter the state that a state dictionary holds, checked and as it was saved.

    What a wrapper keeps beside CAME's own is among it. ``new_state`` returns a parameter's state
    before the first step; if it ``is_partial``, Megatron's wrappers load the rest.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "CAME: a state dictionary has the keys 'state' and 'param_groups'; this "
            f"{_kind(state_dict)} does not: give what an optimizer's state_dict() returned."
        )
    _check_groups(state_dict["param_groups"], groups, is_partial)
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError(
            "CAME: 'state' of the state dictionary must be a dictionary by parameter, not this "
            f"{_kind(state_dict['state'])}."
        )
    saved_params = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    mine = chain.from_iterable(group["params"] for group in groups)
    pairs = dict(zip(saved_params, mine, strict=True))
    states = {}
    others = _without_parameter(state_dict)
    for key, state in state_dict["state"].items():
        if key in others:
            continue
        if key not in pairs:
            raise ValueError(
                f"CAME: the state dictionary holds state of a parameter {key!r} that its "
                "parameter groups do not list: it is damaged, or was put together by hand."
            )
        states[pairs[key]] = _checked(state, key, pairs[key], new_state, is_partial)
    return states


def _without_parameter(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a wrapper keeps of no parameter: under a name, and without a key of CAME's."""
    listed = {*chain.from_iterable(group["params"] for group in state_dict["param_groups"])}
    return {
        key: value
        for key, value in state_dict["state"].items()
        if isinstance(key, str)
        and key not in listed
        and (not isinstance(value, Mapping) or value.keys().isdisjoint(KNOWN))
    }


def _checked(
    state: Any,
    key: Any,
    param: Tensor,
    new_state: Callable[[Tensor], dict[str, Tensor]],
    is_partial: bool,
) -> dict[str, Tensor]:
    """Return what a state dictionary holds of one parameter; a new state is here for comparison."""
    own = new_state(param)
    _check_keys(state, key, () if is_partial else own)
    there = {k: v for k, v in state.items() if not _is_nothing(v)}
    saved = {k: v for k, v in there.items() if k in KNOWN}
    others = {k: v for k, v in there.items() if k not in (*KNOWN, *_AUTHORS_OWN)}
    if not is_partial and not param.numel():
        saved = {}  # the authors' means of no elements are NaN
    _check_state(saved, own, param, is_partial)
    if not is_partial and (count := own_count(state)) is not None:
        check_step(count, f"the state of parameter {key!r} of the state dictionary")
        others[STEP] = count
    return saved | others


def _complete_groups(
    state_dict: Mapping[str, Any], defaults: Mapping[str, Any], own: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return its parameter groups, and in them what an older version's or the authors' lack.

    The authors' class counts steps with each parameter, and bias correction needs them. What the
    state was made for stays this optimizer's, and so does what PyTorch's named state dictionaries
    lack of a group without parameters.
    """
    states = [state for state in state_dict["state"].values() if isinstance(state, Mapping)]
    steps = [state.get("step") for state in states if MOMENTUM in state]
    # The authors' counts are numbers; ours are tensors, and stay in the state.
    taken = max((step for step in steps if isinstance(step, int)), default=0)
    complete = {**defaults, "step": taken}
    groups = []
    for group, mine in zip(state_dict["param_groups"], own, strict=True):
        made = {key: value for key, value in group.items() if key != "factored"}
        kept = {"factored": mine["factored"]} if "factored" in mine else {}
        groups.append({**complete, **({} if group["params"] else mine), **made, **kept})
    return groups


def _check_state(
    saved: Mapping[str, Tensor], own: Mapping[str, Tensor], param: Tensor, is_partial: bool
) -> None:
    """Compare a parameter's saved state with what its state is in this optimizer."""
    shape = tuple(param.shape)
    if REMAINDER in saved and REMAINDER not in own:
        raise ValueError(
            "CAME: the state dictionary holds the lower halves of fp32 weights, which would "
            "be lost: give remainders=True, with bf16 parameters."
        )
    wanted = [key for key in own if key not in (SCALE, REMAINDER)]
    is_lacking = saved and not is_partial and not saved.keys() >= set(wanted)
    if is_lacking or any(key not in own and key != SCALE for key in saved):
        raise ValueError(
            f"CAME: the state dictionary's state of a parameter of shape {shape} has the keys "
            f"{', '.join(map(repr, saved))} where CAME has {', '.join(map(repr, wanted))}: it "
            "belongs to another optimizer or another model, or was saved with factored set "
            "otherwise."
        )
    for key, value in saved.items():
        if key not in own or key == SCALE:
            continue
        is_flat = is_partial and value.numel() == own[key].numel()
        if value.shape != own[key].shape and not is_flat:
            raise ValueError(
                f"CAME: {key!r} of a parameter of shape {shape} has the shape "
                f"{tuple(value.shape)} in the state dictionary, not {tuple(own[key].shape)}: it "
                "belongs to another model, or was saved with another flat_convolutions."
            )
    for key in saved:
        if flaw := _flaw(key, saved, looks=not is_partial):
            raise ValueError(
                f"CAME: {key!r} of a parameter of shape {shape} {flaw} in the state dictionary, "
                "which CAME does not write: it is damaged, or of a run whose gradients were not "
                "finite."
            )


def _as_state(
    saved: Mapping[str, Tensor], own: dict[str, Tensor], param: Tensor
) -> dict[str, Tensor]:
    """Fill a parameter's own state, of before the first step, with loaded state of any layout."""
    # The authors' momentum lies as the first gradient did; it is read in the order of elements.
    saved = {key: value.contiguous().resolve_neg() for key, value in saved.items()}
    saved = dtensors.laid_out(param, saved)
    for key, value in saved.items():
        if key == MOMENTUM:
            if value.dtype == own[key].dtype:
                own[key] = value.to(param.device).contiguous()
            else:
                here = dtensors.state_here(own)
                for start, some in momentum_ranges(dtensors.state_here(saved)):
                    set_momentum(here, some, start)
        elif key in own and (key != SCALE or saved.get(MOMENTUM, value).dtype == torch.int8):
            # Not the scale of a momentum of another dtype, which has taken it up.
            own[key] = value.to(device=param.device, dtype=own[key].dtype).contiguous()
    return own


def _check_groups(saved: Any, groups: Sequence[Mapping[str, Any]], is_partial: bool) -> None:
    if not isinstance(saved, list | tuple):
        raise ValueError(
            "CAME: 'param_groups' of the state dictionary must be a list of dictionaries, not "
            f"this {_kind(saved)}."
        )
    for index, group in enumerate(saved):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(
                f"CAME: parameter group {index} of the state dictionary must be a dictionary with "
                f"a list 'params', not this {_kind(group)}."
            )
        lacking = [key for key in _SETTINGS if key not in group]
        # So PyTorch's named state dictionaries have a group without parameters.
        if lacking and not is_partial and group != {"params": []}:
            has = ", ".join(repr(key) for key in group if key != "params")
            raise ValueError(
                f"CAME: parameter group {index} of the state dictionary has no "
                f"{' or '.join(map(repr, lacking))} but {has}: it belongs to another optimizer; "
                "start CAME without it."
            )
        where = f"parameter group {index} of the state dictionary"
        if not lacking:
            check_group(group, where)
        check_step(group.get("step", 0), where)
    _check_order(saved, groups)
    lengths = [len(group["params"]) for group in saved]
    mine = [len(group["params"]) for group in groups]
    if lengths != mine:
        raise ValueError(
            f"CAME: the parameter groups of the state dictionary have {lengths} parameters, those "
            f"of this optimizer {mine}: it belongs to another model, or its groups were made in "
            "another way."
        )


def _check_order(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the same names in another order: state goes by place, whatever stands there."""
    found = [[group.get("param_names", []) for group in each] for each in (saved, groups)]
    theirs, ours = ([name for names in each for name in list(names or ())] for each in found)
    if theirs == ours or sorted(map(str, theirs)) != sorted(map(str, ours)):
        return  # other names: of a wrapper around the same model, perhaps
    place = next(place for place, name in enumerate(theirs) if name != ours[place])
    raise ValueError(
        f"CAME: the state dictionary has {theirs[place]!r} where this optimizer has "
        f"{ours[place]!r}: state goes by the place of a parameter, so give the parameters in the "
        "order in which they were when it was saved, or sort it in a load_state_dict_pre_hook."
    )


def _check_keys(state: Any, key: Any, own: Collection[str]) -> None:
    """Look at the keys of a parameter's state; beside all of its own there may be a wrapper's."""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"CAME: the state dictionary's state of parameter {key!r} must be a dictionary, not "
            f"this {_kind(state)}."
        )
    for name, value in state.items():
        if name in _AUTHORS_OWN or _is_nothing(value):
            continue
        if name not in KNOWN:
            if own and state.keys() >= {*own} - {SCALE, REMAINDER}:
                continue
            raise ValueError(
                f"CAME: the state dictionary's state of parameter {key!r} has a {name!r}, which "
                "CAME has not: it belongs to another optimizer; start CAME without it."
            )
        if not isinstance(value, Tensor):
            raise ValueError(
                f"CAME: {name!r} of parameter {key!r} in the state dictionary must be a tensor, "
                f"not this {_kind(value)}."
            )


def _flaw(key: str, saved: Mapping[str, Tensor], *, looks: bool) -> str | None:
    """Say what of a saved tensor no step leaves behind: its dtype; its numbers, if it looks."""
    value, here = saved[key], dtensors.local_of(saved[key])
    fits = is_complete(saved) if key == MOMENTUM else value.is_floating_point()
    if not (value.dtype == torch.int16 if key == REMAINDER else fits):
        return f"is {value.dtype}"
    if not looks:
        return None
    if here.layout != torch.strided or here.is_meta:
        return "is a meta tensor, without values," if here.is_meta else f"is {here.layout}"
    if not here.numel() or not here.is_floating_point():
        return None
    low, high = (float(end) for end in torch.aminmax(here))  # both NaN if there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        return "holds a NaN or an infinity"
    return "holds a negative number" if key in FACTORS and low < 0.0 else None


def _is_nothing(value: Any) -> bool:
    """Whether PyTorch put it in the place of what a flattened state dictionary does not have."""
    return isinstance(value, Mapping) and not value


def _kind(value: Any) -> str:
    return type(value).__name__

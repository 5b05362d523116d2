"""Parameters that CAME would train wrongly are refused, in a sentence that says what to do."""

from collections.abc import Container, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy

from megatron_came import dtensors
from megatron_came.core.hyperparameters import HyperparameterError
from megatron_came.core.momentum import MOMENTUM_DTYPES
from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.shard import Shard
from megatron_came.core.state import MATRIX_FACTORS, VECTOR_FACTORS
from megatron_came.voice import warn_once

# A vector of more elements is seldom one: embeddings' biases have up to a few 100,000.
LONG_VECTOR = 1_000_000
_NO_STATE: dict[Tensor, dict[str, Any]] = {}
TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Guard:
    """Looks at an optimizer's parameters when it is made, and where others have changed them."""

    def __init__(self, groups: Iterable[Mapping[str, Any]] = ()) -> None:
        self._has_compared = False
        self._had_matrices: list[bool] = []
        self._vectors: set[Tensor] = set()
        for group in groups:
            self.note(group["params"])

    def note(self, params: Sequence[Tensor]) -> None:
        """Take up the parameters of a group that is added."""
        made = [param for param in params if not is_lazy(param)]
        vectors = [param for param in made if param.dim() < 2]
        self._had_matrices.append(len(vectors) < len(made))
        self._vectors.update(vectors)

    def check(
        self,
        groups: Sequence[Mapping[str, Any]],
        shards: Mapping[Tensor, Shard],
        flat_convolutions: bool = False,
        states: Mapping[Tensor, Mapping[str, Any]] = _NO_STATE,
    ) -> None:
        """Refuse what would be trained wrongly, and say once what may be.

        Arguments are those of :class:`megatron_came.CAME`, and states of parameters that have taken
        a step.

        Raises:
            ValueError: a DTensor that is not cut in a known way or is to be unfactored, matrices
                that have been made flat, state of the other kind, or a shard of a parameter in no
                group.
        """
        every = [p for group in groups for p in group["params"] if not is_lazy(p)]
        check_trainable(every)
        if shards.keys() - set(every):
            raise ValueError(
                "CAME: a parameter with a shard is in no parameter group any more: "
                "call set_shards with those that are."
            )
        loose = [p for p in every if p not in shards]
        _check_unfactored(groups, set(loose), states)
        dtensors.check(loose, shards, flat_convolutions)
        _check_flat(loose)
        had = self._had_matrices
        for index, (group, had_matrices) in enumerate(zip(groups, had, strict=False)):
            params = [param for param in group["params"] if not is_lazy(param)]
            new = [p.numel() for p in params if p not in self._vectors and p not in shards]
            if had_matrices and new and all(param.dim() < 2 for param in params):
                raise ValueError(
                    f"CAME: parameter group {index} was built with matrices and now holds other "
                    f"parameters, vectors alone (here one of {max(new)} elements), as DeepSpeed's "
                    "ZeRO makes them, so that CAME would have no rows and columns: use "
                    "DistributedDataParallel or Megatron's distributed optimizer "
                    "(--use-distributed-optimizer)."
                )
        longest = max((p.numel() for p in loose if p.dim() < 2 and p.requires_grad), default=0)
        if longest > LONG_VECTOR:
            warn_once(
                f"CAME: a parameter is a vector of {longest} elements: vectors have a whole second "
                "moment, as Adam's, and no confidence; if it is a matrix that was made flat, give "
                "CAME the matrix."
            )

    def compare_ranks(
        self,
        slices: Mapping[Tensor, ParameterSlice],
        groups: Sequence[Mapping[str, Any]],
        momentum: torch.dtype,
    ) -> None:
        """Compare what ranks with DTensors were given, before the first step; then a collective.

        It says, too, how many parameters are on the meta device and left behind.

        Raises:
            ValueError: ranks differ.
        """
        if not self._has_compared:
            meta = [param for param in slices if param.is_meta and param.requires_grad]
            without = [param for param in meta if param.grad is None]
            if without:
                warn_once(
                    f"CAME: {len(without)} of {len(slices)} parameters are on the meta device, "
                    "without values, and a step changes nothing of them: to_empty() and "
                    "load_state_dict(assign=True) put others in their place in the model, so make "
                    "the optimizer after them."
                )
            group_of = {
                param: index for index, each in enumerate(groups) for param in each["params"]
            }
            given = {
                param: {
                    "shape": tuple(param.shape),
                    "dtype": param.dtype,
                    "group": group_of[param],
                    "key of random bits": each.key,
                    "remainders": each.remainders,
                    "momentum": momentum,
                }
                for param, each in slices.items()
            }
            dtensors.check_ranks(given, groups)
            self._has_compared = True


def _check_unfactored(
    groups: Sequence[Mapping[str, Any]],
    params: Container[Tensor],
    states: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    for group in groups:
        factored = group.get("factored", True)
        other = VECTOR_FACTORS[0] if factored else MATRIX_FACTORS[0]
        for param in group["params"]:
            if param not in params or param.dim() < 2:
                continue
            if not factored and dtensors.is_dtensor(param):
                raise ValueError(
                    "CAME: a parameter group with factored=False holds a DTensor of shape "
                    f"{tuple(param.shape)}, of which ranks have parts: leave factored out for it."
                )
            if other in states.get(param, {}):
                raise ValueError(
                    f"CAME: a parameter group has factored={factored}, but the state {other} of "
                    "its last step, with which it was otherwise: set it back, or make a new "
                    "optimizer."
                )


def _check_flat(params: Sequence[Tensor]) -> None:
    # FSDP's mark, which parameters keep that it leaves in their shape (NO_SHARD).
    flat = [param for param in params if getattr(param, "_fsdp_flattened", False)]
    if flat and all(param.dim() < 2 for param in flat):
        raise ValueError(
            "CAME: FullyShardedDataParallel has made flat vectors of the matrices (here "
            f"{max(param.numel() for param in flat)} elements), so that CAME would have no rows "
            "and columns: give it use_orig_params=True with ShardingStrategy.NO_SHARD, or use "
            "DistributedDataParallel or Megatron's distributed optimizer."
        )


def trainable(params: Iterable[Tensor]) -> list[Tensor]:
    """Leave out frozen parameters of other kinds, as quantized layers have, and lazy ones.

    When one of them has a gradient, :func:`check_trainable` refuses it.
    """
    made = [param for param in params if _has_arithmetic(param) and not is_lazy(param)]
    return [param for param in made if not _overlaps(param) and _is_plain(param)]


def _has_arithmetic(param: Tensor) -> bool:
    return param.dtype in TRAINABLE and _is_dense(param)


def _is_dense(param: Tensor) -> bool:
    # Of nested tensors the default layout calls itself strided.
    return param.layout == torch.strided and not param.is_nested


def _overlaps(param: Tensor) -> bool:
    """Whether elements lie on each other, as an expanded tensor's do."""
    if is_lazy(param):
        return False
    here, reach = dtensors.local_of(param), 0
    if here.is_contiguous() or not here.numel():
        return False
    # From the innermost dimension on: each must step over all that lies within.
    for stride, size in sorted(zip(here.stride(), here.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _is_plain(param: Tensor) -> bool:
    """Whether values lie in one plain tensor: the parameter, or what a wrapper has of its kind.

    A step changes that in place. Of a wrapper that quantizes, or keeps two tensors, it would change
    copies, or add up the sums of both.
    """
    here = dtensors.local_of(param)
    if type(here).__torch_dispatch__ is Tensor.__torch_dispatch__ or not here.numel():
        return True
    with torch._C.DisableTorchFunctionSubclass():
        if here.is_meta or isinstance(here, FakeTensor) or Tensor.data_ptr(here):
            return True  # without values, or with memory of its own
    # Wrappers of one plain tensor name what they are made of, and it is like themselves.
    names = here.__tensor_flatten__()[0] if hasattr(here, "__tensor_flatten__") else ()
    inner = [each for name in names if isinstance(each := getattr(here, name), Tensor)]
    alike = [each for each in inner if each.shape == here.shape and each.dtype == here.dtype]
    return len(alike) == 1 and _is_plain(alike[0])


def check_trainable(params: Iterable[Tensor]) -> None:
    """Refuse parameters of dtypes and layouts that there is no arithmetic for, unless frozen.

    And those whose elements overlap, or that wrap their values in a way that is not known; of the
    latter with a gradient alone: Megatron's fp8 weights are there until its wrappers replace them.

    Raises:
        ValueError: there is one, or one is given twice.
    """
    seen: set[int] = set()
    for param in params:
        if id(param) in seen:
            raise ValueError(
                f"CAME: a parameter of shape {tuple(param.shape)} is given twice, as tied weights "
                "may be, and would be updated once: give each once, as in "
                "list(dict.fromkeys(params))."
            )
        seen.add(id(param))
        if not param.requires_grad and param.grad is None:
            continue  # frozen
        if not _has_arithmetic(param):
            is_dense = _is_dense(param)
            layout = "nested tensors" if param.is_nested else param.layout
            raise ValueError(
                f"CAME updates {'' if is_dense else 'dense '}parameters of "
                f"{', '.join(map(str, TRAINABLE))}, not of "
                f"{param.dtype if is_dense else layout}: freeze it (requires_grad=False), or "
                "leave it out."
            )
        if _overlaps(param):
            raise ValueError(
                f"CAME: elements of a parameter of shape {tuple(param.shape)} and strides "
                f"{tuple(param.stride())} overlap in memory, so that one update would go over "
                "another: give a clone() of it."
            )
        if param.grad is not None and not is_lazy(param) and not _is_plain(param):
            raise ValueError(
                f"CAME: a parameter of shape {tuple(param.shape)} is a "
                f"{type(dtensors.local_of(param)).__name__}, which does not keep its values in one "
                f"plain tensor of {param.dtype}, so that a step would not change them, or wrongly: "
                "train plain tensors, or freeze it (requires_grad=False)."
            )


def check_settings(momentum_dtype: torch.dtype, seed: int, **switches: bool) -> None:
    """Check what CAME is made with beside hyperparameters.

    Raises:
        ValueError: another kind of thing.
    """
    if momentum_dtype not in (dtypes := MOMENTUM_DTYPES.values()):
        raise ValueError(
            f"CAME: momentum_dtype {momentum_dtype} is not one of {', '.join(map(str, dtypes))}."
        )
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise HyperparameterError(name, value, "True or False")
    if not isinstance(seed, Integral) or isinstance(seed, bool):  # which is an Integral
        raise HyperparameterError("seed", seed, "a whole number")


def say_if_betas(eps: Sequence[Any]) -> None:
    """Say what stands in the place of eps, if it has the size of decays."""
    if min(map(float, eps)) >= 0.5:
        warn_once(
            f"CAME: eps = {tuple(eps)} look like betas, which are the fifth argument: with eps of "
            "that size hardly anything is updated; give betas=(beta1, beta2, beta3)."
        )


def check_placement(
    shards: Mapping[Tensor, Shard],
    names: Mapping[Tensor, str] | None,
    known: Container[Tensor],
    momentum_dtype: torch.dtype,
    flat_convolutions: bool,
) -> None:
    """Check what CAME is told of its known parameters, and what does not go with shards.

    Raises:
        ValueError: no dictionary by parameter; a shard of none of these, or with another number of
            elements; with shards, ``flat_convolutions``, or no names, which the momentum's dtype
            needs.
    """
    _check_by_parameter("shards", shards, Shard)
    _check_by_parameter("names", names or {}, str)
    if not shards:
        return
    if momentum_dtype != torch.float32 and names is None:
        raise ValueError(
            f"CAME: with shards and momentum in {momentum_dtype}, names must name the "
            "parameters: their places in the parameter groups may differ between ranks."
        )
    if flat_convolutions:
        raise ValueError(
            "CAME: flat_convolutions does not go with shards, which have shapes of their own: "
            "give a shard of the shape that its parameter is to be seen in."
        )
    for param, shard in shards.items():
        if dtensors.is_dtensor(param):
            continue
        if param not in known:
            raise ValueError(
                f"CAME: a shard of shape {shard.shape} names a tensor in no parameter group."
            )
        if param.numel() != shard.numel:
            raise ValueError(
                f"CAME: a parameter has {param.numel()} elements, its shard {shard.numel} "
                f"([{shard.start}, {shard.stop}) of shape {shard.shape})."
            )


def check_model_weights(weights: Mapping[Tensor, Tensor]) -> None:
    """Compare 16-bit copies with their parameters.

    Raises:
        ValueError: one does not fit.
    """
    _check_by_parameter("weights", weights, Tensor)
    for param, weight in weights.items():
        if weight.numel() != param.numel() or not weight.is_contiguous():
            raise ValueError(
                f"CAME: the model weight of a parameter of {param.numel()} elements must be "
                f"contiguous with as many, not {tuple(weight.shape)}."
            )


def _check_by_parameter(what: str, given: object, kind: type) -> None:
    """Refuse what is no dictionary by parameter, such as ``dict(model.named_parameters())``."""
    is_right = isinstance(given, Mapping) and all(
        isinstance(key, Tensor) and isinstance(value, kind) for key, value in given.items()
    )
    if not is_right:
        raise ValueError(
            f"CAME: {what} must be a dictionary with parameters for keys and {kind.__name__} for "
            f"values, not this {type(given).__name__}: {str(given)[:80]}."
        )

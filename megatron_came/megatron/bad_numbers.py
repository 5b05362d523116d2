"""A NaN or an infinity in a loss or a gradient stops training before the step, and is named.

Megatron's rerun machine does not look at the first iteration of a run, nor at gradients of FSDP's;
it computes a later iteration again, and then saves what it has, to ``--save`` or, without it, to
None. Here all ranks end before the optimizer's step with one sentence, and nothing is saved. Who
keeps the file that tracks what the rerun machine rejects, and has a folder to save to, gets the
sentence and then what the machine decides: a checkpoint to compute from on another device, and its
exit status. Where the check is off, so is this. What turns bad later is found by the next save, or
by the next loss.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_came.dtensors import is_dtensor, local_of
from megatron_came.megatron.parameter_names import named_parameters
from megatron_came.megatron.run import run_args
from megatron_came.patching import Function
from megatron_came.voice import of_any_rank, rank, say_once, stop

_LOSS = "the loss is"
_BUCKET = re.compile(r"bucket #(\d+)")


@dataclass
class _Watch:
    """What was found in the iteration under way."""

    model: list[Any]  # chunks of this rank
    where: str  # iteration and rank
    buckets: Any = None  # whose gradients are being looked at
    loss: str | None = None  # what is wrong with it, in a clause
    gradient: str | None = None  # what is wrong with the first one that is
    turns: int = 0  # how often the iteration has been computed
    last: int = 0  # of them, in which something was wrong

    def note(self, message: str, result: Tensor) -> None:
        """Remember what is wrong, the first time that something is."""
        self.last = self.turns
        bucket = _BUCKET.search(message)
        if bucket and self.buckets is not None:
            params = self.buckets.buckets[int(bucket[1])].params
            self.gradient = self.gradient or _gradient_clause(params, self.names)
        elif bucket:
            self.gradient = self.gradient or message
        else:
            what = "NaN" if result.isnan().any() else "infinite"
            self.loss = self.loss or f"{_LOSS} {what}, {_weights_clause(self.names)}"

    def look(self) -> None:
        """Look at the gradients that this rank holds once all are reduced."""
        grads = [_gradient_of(param) for param in self.names]
        norms = torch._foreach_norm([grad for grad in grads if grad is not None])
        if norms and not torch.stack(norms).isfinite().all():
            self.last = self.turns
            self.gradient = _gradient_clause(self.names, self.names)

    @property
    def names(self) -> dict[Tensor, str]:
        """Names of the parameters of this rank."""
        return {param: name for name, param in named_parameters(self.model)}

    @property
    def finding(self) -> str | None:
        """All of it, or None."""
        found = ", and ".join(filter(None, (self.loss, self.gradient)))
        if not found:
            return None
        if self.turns > self.last:
            found += " (but not when computed again, which speaks for a fault of the device)"
        return f"{self.where}: {found}"


# The innermost one is last. Not a ContextVar: on GPUs, hooks of the backward pass, where gradients
# are looked at, run in threads that PyTorch starts without a context.
_watches: list[_Watch | None] = [None]


def watched(
    original: Function, forward_step_func: Any, data: Any, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """Look for bad numbers in an iteration of CAME's."""
    run = run_args()
    where = f"iteration {getattr(run, 'curr_iteration', 0) + 1}, rank {rank()}"
    is_asked = run.optimizer == "came" and run.check_for_nan_in_loss_and_grad
    _watches.append(_Watch(model, where) if is_asked else None)
    try:
        return original(forward_step_func, data, model, *args, **kwargs)
    finally:
        _watches.pop()


def counted(original: Function, self: Any, *args: Any, **kwargs: Any) -> bool:
    """Count how often the iteration is computed."""
    will_run = bool(original(self, *args, **kwargs))
    if watch := _watches[-1]:
        watch.turns += will_run  # a rerun is a turn more
    return will_run


def with_buckets(original: Function, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Remember whose gradients are being looked at."""
    if watch := _watches[-1]:
        watch.buckets = self
    return original(self, *args, **kwargs)


def left_alone(original: Function, grad: Tensor) -> None:
    """Do not let Megatron-FSDP end one rank alone, with all of a gradient: see :func:`ended`."""
    if _watches[-1] is None:
        original(grad)


def noted(
    original: Function,
    self: Any,
    result: Any,
    rejection_func: Any,
    message: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Remember what is wrong instead of ending one rank alone."""
    watch = _watches[-1]
    if watch is None or rejection_func not in (torch.isnan, torch.isinf):
        original(self, result, rejection_func, message, *args, **kwargs)
        return
    is_bad = bool(rejection_func(result))
    if is_bad:
        watch.note(message, result)
        if self.mode == type(self.mode).DISABLED:
            # Megatron writes it to its own log of such, and raises.
            with contextlib.suppress(RuntimeError):  # it would end this rank alone
                original(self, result, lambda _: True, message, *args, **kwargs)
            return
    original(self, result, lambda _: is_bad, message, *args, **kwargs)  # not looked at once more


def ended(original: Function, self: Any) -> Any:
    """End all ranks with one sentence before Megatron would save."""
    watch = _watches[-1]
    judges = self.mode == type(self.mode).VALIDATE_RESULTS and self.first_iteration_complete
    result = original(self)
    if watch is None:
        return result
    # Megatron looks at no gradient of FSDP's, which has no buckets of its own.
    if not all(hasattr(chunk, "bucket_groups") for chunk in watch.model):
        watch.look()
    # Had Megatron rejected anything on any rank, all would have computed it again.
    elif judges and watch.turns == 1:
        return result
    finding = of_any_rank(watch.finding, _first)
    if finding is None:
        return result
    _, will_exit, _ = result
    args = run_args()
    # Someone follows what the rerun machine rejects, and it can save.
    if will_exit and args.save and getattr(args, "result_rejected_tracker_filename", None):
        say_once(f"{finding}; what follows is up to Megatron's rerun machine.")
        return result
    stop(
        f"{finding}; nothing of this iteration was taken or saved: resume from the last "
        "checkpoint with other data, a lower learning rate or stronger clipping, or give "
        "--no-check-for-nan-in-loss-and-grad to go on as Megatron then does."
    )


def _first(problems: list[str]) -> str:
    """The first rank's; a loss comes before the gradients that it spoils on other stages."""
    return next((each for each in problems if _LOSS in each), problems[0])


def _gradient_of(param: Any) -> Tensor | None:
    """What this rank holds of a gradient once it is reduced; its own before."""
    if is_dtensor(param):
        return None if param.grad is None else local_of(param.grad)
    grad: Tensor | None = getattr(param, "main_grad", None)
    return grad


def _gradient_clause(params: Iterable[Any], names: Mapping[Tensor, str]) -> str:
    found = {names.get(param, "a parameter"): _gradient_of(param) for param in params}
    grads = {name: grad for name, grad in found.items() if grad is not None and grad.numel()}
    bad = _bad(grads)
    if bad:
        return f"the gradient of {bad}"
    largest = {name: float(grad.abs().max()) for name, grad in grads.items()}
    name = max(largest, key=lambda name: largest[name])
    return (
        f"the norm of the gradients is Inf, since that of {name} has elements of {largest[name]:g}"
    )


def _weights_clause(names: Mapping[Tensor, str]) -> str:
    # What this rank holds of them: other ranks do not take part.
    bad = _bad({name: local_of(param).detach() for param, name in names.items()})
    return f"and the weight {bad}" if bad else "though all weights of this rank are finite"


def _bad(tensors: Mapping[str, Tensor]) -> str | None:
    """Say what is not finite in the first tensor that has such, and how many others do."""
    found = []
    for name, tensor in tensors.items():
        counts = {"NaN": int(tensor.isnan().sum()), "Inf": int(tensor.isinf().sum())}
        if any(counts.values()):
            said = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
            found.append(f"{name} holds {said} among {tensor.numel()} elements")
    if not found:
        return None
    return found[0] + (f" (as do {len(found) - 1} more)" if len(found) > 1 else "")

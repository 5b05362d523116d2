"""A NaN or an infinity in a loss or a gradient stops training before the step, and is named.

Megatron's rerun machine does not look at the first iteration of a run, computes a later one again,
and then saves what it has, to ``--save`` or, without it, to None. Here all ranks end before the
optimizer's step with one sentence, and nothing is saved. Where the check is off, so is this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_came.patching import Function
from megatron_came.voice import end_if, rank

_LOSS = "the loss is"
_BUCKET = re.compile(r"bucket #(\d+)")


@dataclass
class _Watch:
    """What was found in the iteration under way.

    Attributes:
        model: chunks of this rank.
        where: iteration and rank.
        buckets: whose gradients are being looked at.
        loss: what is wrong with the loss, in a clause.
        gradient: what is wrong with the first gradient that is.
    """

    model: list[Any]
    where: str
    buckets: Any = None
    loss: str | None = None
    gradient: str | None = None

    def note(self, message: str, result: Tensor) -> None:
        """Remember what is wrong, the first time that something is."""
        bucket = _BUCKET.search(message)
        if bucket and self.buckets is not None:
            params = self.buckets.buckets[int(bucket[1])].params
            self.gradient = self.gradient or _gradient_clause(params, _names(self.model))
        elif bucket:
            self.gradient = self.gradient or message
        else:
            what = "NaN" if result.isnan().any() else "infinite"
            self.loss = self.loss or f"{_LOSS} {what}, {_weights_clause(self.model)}"

    @property
    def sentence(self) -> str | None:
        """All of it, or None."""
        found = ", and ".join(filter(None, (self.loss, self.gradient)))
        if not found:
            return None
        return (
            f"{self.where}: {found}; nothing of this iteration was taken or saved: resume from the "
            "last checkpoint with other data, a lower learning rate or stronger clipping, or give "
            "--no-check-for-nan-in-loss-and-grad to go on as Megatron then does."
        )


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


def watched(original: Function) -> Function:
    """Look for bad numbers in an iteration of CAME's."""

    def train_step(
        forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args

        run = get_args()
        watch = None
        if run.optimizer == "came" and run.check_for_nan_in_loss_and_grad:
            iteration = getattr(run, "curr_iteration", 0) + 1
            watch = _Watch(model, f"iteration {iteration}, rank {rank()}")
        token = _watch.set(watch)
        try:
            return original(forward_step_func, data_iterator, model, *args, **kwargs)
        finally:
            _watch.reset(token)

    return train_step


def with_buckets(original: Function) -> Function:
    """Remember whose gradients are being looked at."""

    def check_grads(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = _watch.get()
        if watch is not None:
            watch.buckets = self
        return original(self, *args, **kwargs)

    return check_grads


def noted(original: Function) -> Function:
    """Remember what is wrong instead of ending one rank alone."""

    def validate_result(
        self: Any, result: Any, rejection_func: Any, message: str, *args: Any, **kwargs: Any
    ) -> None:
        watch = _watch.get()
        if watch is None or rejection_func not in (torch.isnan, torch.isinf):
            original(self, result, rejection_func, message, *args, **kwargs)
            return
        is_bad = bool(rejection_func(result))
        if is_bad:
            watch.note(message, result)
            if self.mode == type(self.mode).DISABLED:
                return  # Megatron would end this rank alone
        original(self, result, lambda _: is_bad, message, *args, **kwargs)

    return validate_result


def ended(original: Function) -> Function:
    """End all ranks with one sentence before Megatron would save."""

    def should_checkpoint_and_exit(self: Any) -> Any:
        result = original(self)
        watch = _watch.get()
        if watch is not None:
            end_if(watch.sentence, _first)
        return result

    return should_checkpoint_and_exit


def _first(problems: list[str]) -> str:
    """The first rank's; a loss comes before the gradients that it spoils on other stages."""
    return next((each for each in problems if _LOSS in each), problems[0])


def _names(model: Iterable[Any]) -> dict[Tensor, str]:
    """Names of the parameters, without those of Megatron's wrappers."""
    return {
        param: re.sub(r"^(module\.)+", "", name)
        for chunk in model
        for name, param in chunk.named_parameters()
    }


def _gradient_clause(params: Iterable[Any], names: dict[Tensor, str]) -> str:
    grads = [(names.get(param, "a parameter"), param.main_grad) for param in params]
    bad = list(_bad(grads))
    if bad:
        name, what = bad[0]
        more = f" (as do those of {len(bad) - 1} more parameters)" if len(bad) > 1 else ""
        return f"the gradient of {name} holds {what}{more}"
    name, grad = max(grads, key=lambda pair: float(pair[1].abs().max()))
    return (
        f"the norm of the gradients is Inf, since that of {name} has elements of "
        f"{float(grad.abs().max()):g}"
    )


def _weights_clause(model: Iterable[Any]) -> str:
    bad = list(_bad((name, param.detach()) for param, name in _names(model).items()))
    if not bad:
        return "though all weights of this rank are finite"
    name, what = bad[0]
    more = f" (as do {len(bad) - 1} more weights)" if len(bad) > 1 else ""
    return f"and the weight {name} holds {what}{more}"


def _bad(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Count what is not finite in each tensor that has such."""
    for name, tensor in tensors:
        counts = (int(tensor.isnan().sum()), int(tensor.isinf().sum()))
        if any(counts):
            kinds = zip(counts, ("NaN", "Inf"), strict=True)
            yield (
                name,
                " and ".join(f"{count} {kind}" for count, kind in kinds if count)
                + f" among {tensor.numel()} elements",
            )

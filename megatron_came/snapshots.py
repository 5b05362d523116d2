"""What a step's tensors are: whether any has changed since, without looking at each in Python.

A snapshot holds no tensor longer than a step, so that others can let go of gradients and state.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, call, is_
from typing import Any, NamedTuple, Self
from weakref import ref

from torch import Tensor

_address, _dtype = Tensor.data_ptr, attrgetter("dtype")


class Snapshot(NamedTuple):
    """The tensors of a step."""

    facts: tuple[list[Any], ...]  # what kernels go by: addresses, and what may change at one
    state: list[Any]  # of all parameters, whose tensors are known by identity

    @classmethod
    def of(
        cls,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        states: Mapping[Any, dict[str, Any]],
        weights: Iterable[Tensor],
    ) -> Self | None:
        """Look at all parameters, their gradients and states, and 16-bit copies.

        It is None where something is no tensor in memory of its own, as it lies there.
        """
        present = [grad for grad in grads if grad is not None]
        # Mostly all have one, and then the numbers say so.
        lacking = [] if len(present) == len(grads) else [grad is None for grad in grads]
        rest = [*present, *weights]
        others = [*params, *rest]
        try:
            # Of other classes data may be elsewhere; what is at the address may have another sign.
            if {*map(type, present)} - {Tensor} or any(map(Tensor.is_neg, others)):
                return None
            state = list(chain.from_iterable(map(dict.values, states.values())))
            facts = (
                list(map(_address, others)),
                list(map(_dtype, others)),
                list(map(Tensor.stride, params)),  # and with as many elements, the same shape
                list(map(Tensor.is_contiguous, rest)),
                list(map(Tensor.numel, present)),
                lacking,
                list(map(_address, state)),
                list(chain.from_iterable(states.values())),
            )
        except (TypeError, RuntimeError):  # no tensor, or one without an address
            return None
        return cls(facts, state)

    def let_go(self) -> Self:
        """Return what is left of it after the step: the state by references that do not hold it.

        Another tensor may have taken an address by the next step, but not these.
        """
        return self._replace(state=list(map(ref, self.state)))

    def has_become(self, now: Self) -> bool:
        """Whether nothing has changed since a snapshot that has let go."""
        return (
            now.facts == self.facts
            and len(now.state) == len(self.state)
            and all(map(is_, now.state, map(call, self.state)))
        )

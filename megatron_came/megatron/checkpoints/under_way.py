"""The load of a checkpoint under way."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Load:
    """What is filled from a checkpoint, and what is known of that.

    Attributes:
        own_rates: whether rates are this run's: ``--override-opt_param-scheduler``.
        asked: which tensors a distributed checkpoint is asked for, if one is read for them.
        folder: where Megatron found the checkpoint.
        saved: Megatron's arguments of the run that saved it.
        differing: flags that it was saved with otherwise.
        other_buckets: that it was cut into other buckets, in a sentence, if so.
        is_finished: whether this is the end that ``--exit-on-missing-checkpoint`` asks for.
    """

    model_chunks: list[Any]
    optimizer: Any
    scheduler: Any
    own_rates: bool = False
    asked: Any = None
    folder: Any = None
    saved: Any = None
    differing: str = ""
    other_buckets: str | None = None
    is_finished: bool = False


# The one that is to fill an optimizer: a checkpoint's weights alone suit anyone.
current: ContextVar[Load | None] = ContextVar("load", default=None)

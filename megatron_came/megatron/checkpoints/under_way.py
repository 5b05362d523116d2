"""The load of a checkpoint under way."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Load:
    """What is filled from a checkpoint, and what is known of that."""

    model_chunks: list[Any]
    optimizer: Any
    scheduler: Any
    own_rates: bool = False  # whether rates are this run's: ``--override-opt_param-scheduler``
    # Which tensors a distributed checkpoint is asked for, if one is read for them.
    asked: Any = None
    folder: Any = None  # where Megatron found the checkpoint
    saved: Any = None  # Megatron's arguments of the run that saved it
    differing: str = ""  # flags that it was saved with otherwise
    other_buckets: str | None = None  # that it was cut into other buckets, in a sentence, if so
    # Whether this is the end that ``--exit-on-missing-checkpoint`` asks for.
    is_finished: bool = False


# The one that is to fill an optimizer: a checkpoint's weights alone suit anyone.
current: ContextVar[Load | None] = ContextVar("load", default=None)

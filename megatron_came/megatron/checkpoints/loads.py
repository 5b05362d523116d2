"""The load of a checkpoint under way, and how it ends on all ranks."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.distributed as dist


@dataclass
class Load:
    """What a checkpoint is being loaded into."""

    model_chunks: list[Any]
    optimizer: Any
    scheduler: Any
    folder: Any = None  # where Megatron found it
    differing: str = ""  # flags that it was saved with otherwise
    finished: bool = False  # the end that --exit-on-missing-checkpoint asks for


# The load under way, if it is to fill an optimizer: a checkpoint's weights alone suit anyone.
current: ContextVar[Load | None] = ContextVar("load", default=None)


def end_if(problem: str | None) -> None:
    """End all ranks with the sentence of the first that has one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem)
        problem = next(filter(None, found), None)
    if problem:
        stop(problem)


def stop(problem: str, cause: BaseException | None = None) -> NoReturn:
    """End this rank with a sentence.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(f"megatron_came: {problem}") from cause

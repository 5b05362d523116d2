"""What users are told: on one rank, once; and how all ranks end with one sentence."""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

PREFIX = "megatron_came: "
# What gloo says of a rank that has ended; the latter if something was under way to it.
_LOST = ("Connection closed by peer", "Connection reset by peer")

# Groups that together, one after the other, connect ranks; None stands for all of them.
Groups = Sequence[dist.ProcessGroup | None]
EVERYONE: Groups = (None,)

_logger = logging.getLogger("megatron_came")


def rank() -> int:
    """Return the rank of this process among all, 0 without others."""
    # Before there are groups, torchrun's number: what is said then is said once, too.
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks of the training, 1 without others."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(sentence: str) -> None:
    """Print a sentence, on rank 0."""
    if rank() == 0:
        print(PREFIX + sentence, flush=True)


@functools.cache
def say_once(sentence: str) -> None:
    """Print a sentence, on rank 0, if this process has not said it yet."""
    say(sentence)


@functools.cache
def warn_once(sentence: str) -> None:
    """Log a sentence as a warning, on rank 0, if this process has not logged it yet."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        _logger.warning(sentence)


def stop(problem: str, cause: BaseException | None = None) -> NoReturn:
    """End this process with a sentence.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(PREFIX + problem) from cause


def is_of_lost_rank(error: BaseException) -> bool:
    """Return whether an error is that another rank has ended, and not a server of files."""
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _LOST)


def some(items: Sequence[str], count: int = 1) -> str:
    """Name the first of several things, and say how many there are beside."""
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")


def collectives_device() -> str:
    """Return where the collectives over all ranks of a training take their tensors from."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def of_all_ranks(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return a value of every rank of a group, by default of all; a collective."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def by_rank(value: Any, groups: Groups = EVERYONE) -> dict[int, Any]:
    """Return a value of every rank that groups connect, by rank; a collective."""
    found = {rank(): value}
    for group in groups:
        found = {one: its for each in of_all_ranks(found, group) for one, its in each.items()}
    return dict(sorted(found.items()))


def of_any_rank(
    problem: str | None,
    choose: Callable[[list[str]], str] = lambda problems: problems[0],
    groups: Groups = EVERYONE,
) -> str | None:
    """Return on all ranks the problem that one of them has, None if none has; a collective.

    Of several ranks' problems it is the one that ``choose`` returns, by default the first.
    """
    if world_size() > 1:
        has = torch.tensor(problem is not None, dtype=torch.int32, device=collectives_device())
        for group in groups:
            dist.all_reduce(has, op=dist.ReduceOp.MAX, group=group)
        if not has.item():  # most often: gathering objects takes several collectives
            return None
    problems = [each for each in by_rank(problem, groups).values() if each is not None]
    return choose(problems) if problems else None


def end_if(problem: str | None) -> None:
    """End all ranks with one sentence, if one of them has a problem; a collective.

    Raises:
        SystemExit: on all ranks.
    """
    found = of_any_rank(problem)
    if found is not None:
        stop(found)

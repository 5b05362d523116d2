"""Ranks that were not given the same: refused on all of them before training, in one sentence.

What is compared is hashed, and one small collective tells whether all hashes are equal; only where
they are not do ranks tell each other what they have. Every rank takes part, whatever it holds.
"""

import contextlib
import copy
import hashlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_came.kernels.dispatch import choose, choose_on_host
from megatron_came.megatron import rank_settings
from megatron_came.megatron.config import CameOptimizerConfig
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import named_parameters
from megatron_came.rules import Settings
from megatron_came.voice import collectives_device, of_all_ranks

_NO_OPINION = -(2**62)

# How the reason of plain PyTorch begins where there could be kernels.
_SLOWER = "CAME's step runs in plain PyTorch, which is slower: "

Groups = Sequence[dist.ProcessGroup | None]  # None: all ranks


class Kernels(NamedTuple):
    """Who would compute the step on a rank."""

    name: str | None  # with the version; None if those that were asked for are missing
    reason: str  # a sentence


def agree(
    config: CameOptimizerConfig, model_chunks: list[Any], collection: Any | None, everyone: Groups
) -> CameOptimizerConfig:
    """Return this rank's settings, with the kernels that all ranks have.

    Raises:
        UnsupportedError: on all ranks, if they have other settings or parameters.
    """
    refuse_other_settings(rank_settings.settings_of(config), everyone)
    config = _with_common_kernels(config, model_chunks, everyone)
    _refuse_other_parameters(model_chunks, collection, everyone)
    return config


def connecting(collection: Any | None) -> Groups:
    """Return groups that together, one after the other, connect all ranks of a model."""
    if collection is None:
        return [None]
    groups = (getattr(collection, "mp", None), _data_parallel(collection))
    return [group for group in groups if group is not None]


def _data_parallel(collection: Any) -> dist.ProcessGroup | None:
    return getattr(collection, "dp_cp", None) or getattr(collection, "dp", None)


def refuse_other_settings(settings: rank_settings.Settings, everyone: Groups) -> None:
    """Make sure that all ranks have these settings.

    Raises:
        UnsupportedError: on all ranks, if one has others.
    """
    if clause := _compare(settings, everyone):
        raise UnsupportedError(f"{clause}: all ranks of a run need the same, so start them alike.")


def _with_common_kernels(
    config: CameOptimizerConfig, model_chunks: list[Any], everyone: Groups
) -> CameOptimizerConfig:
    """Let all ranks compute with the kernels that all of them have: others round otherwise."""
    here = _kernels_here(config, model_chunks)
    found = {dist.get_rank(): here}
    if _differ(here and (here.name or "missing"), everyone):
        found = _gather(here, everyone)
    with_weights = {rank: kernels for rank, kernels in found.items() if kernels is not None}
    missing = [rank for rank, kernels in with_weights.items() if kernels.name is None]
    flag = "--came-cuda-graph" if config.cuda_graph else f"--came-kernels {config.kernels}"
    if missing:
        raise UnsupportedError(
            f"{flag} cannot be used on {rank_settings.names_of(missing)}: "
            f"{with_weights[missing[0]].reason}"
        )
    clause = rank_settings.difference(
        {rank: {"kernels": str(kernels.name)} for rank, kernels in with_weights.items()}
    )
    if not clause:
        return config
    if config.kernels != "auto" or config.cuda_graph:
        raise UnsupportedError(
            f"{flag}: {clause}, which round otherwise: install one version everywhere, or leave "
            f"{flag.split()[0]} out."
        )
    plain = (kernels.reason for kernels in with_weights.values() if kernels.name == "plain")
    why = next(plain, "install one version").removeprefix(_SLOWER)
    config = copy.copy(config)
    config.kernels = "plain"
    config.why_plain = (
        "CAME's step runs in plain PyTorch on all ranks, which is slower, since other kernels "
        f"round otherwise and {clause}: {why}"
    )
    return config


def _kernels_here(config: CameOptimizerConfig, model_chunks: list[Any]) -> Kernels | None:
    """Who would compute this rank's step; None if it trains nothing."""
    params = (param for _, param in named_parameters(model_chunks) if param.requires_grad)
    devices = dict.fromkeys(param.device for param in params)
    try:
        choices = [
            choose(config.kernels, device, cuda_graph=config.cuda_graph)
            for device in sorted(devices, key=str)
        ]
        if choices and config.optimizer_cpu_offload:
            choices.append(choose_on_host(config.kernels))
    except ValueError as error:
        return Kernels(None, str(error).removeprefix("CAME: "))
    if not choices:
        return None
    names = dict.fromkeys(_name(choice.backend.name) for choice in choices)
    return Kernels(" and ".join(names), " ".join(choice.reason for choice in choices))


def _name(backend: str) -> str:
    """Return a backend with the version of what compiles it, on which the last bits depend."""
    if backend == "plain":
        return backend
    return f"{backend} {importlib.import_module(backend).__version__}"


def _refuse_other_parameters(
    model_chunks: list[Any], collection: Any | None, everyone: Groups
) -> None:
    """Compare parameters with the ranks that hold replicas or other shards of them."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    if collection is None:
        collection = ProcessGroupCollection.use_mpu_process_groups()
    named = dict(named_parameters(model_chunks))
    dense = {name: p for name, p in named.items() if getattr(p, "allreduce", True)}
    experts = {name: p for name, p in named.items() if name not in dense}
    copies = [p for p in named.values() if getattr(p, "shared_embedding", False)]
    tied = {"tied embeddings": copies[-1]} if copies else {}  # another name on the last stage
    groups = Settings(collection)
    compared = [
        (dense, groups.tp),
        (dense, _data_parallel(collection)),
        (experts, groups.expt_tp),
        (experts, groups.expt_dp),
        (tied, groups.embd if tied else None),
    ]
    clauses = [
        _compare(rank_settings.parameters_of(params), [group])
        for params, group in compared
        if group is not None and group.size() > 1
    ]
    # Other groups have found nothing, or something else.
    if clause := _of_any(next(filter(None, clauses), None), everyone):
        raise UnsupportedError(
            f"--optimizer came: {clause}: ranks that train one model need the same parameters, "
            "so start them alike."
        )


@contextlib.contextmanager
def refused_on_all(everyone: Groups) -> Iterator[None]:
    """Let all ranks meet the refusal that one of them meets inside; a collective at its end.

    Inside, no rank may wait for others, unless these wait as well when it refuses.

    Raises:
        UnsupportedError: on all ranks, if CAME refuses something on one of them.
    """
    refused = None
    try:
        yield
    except ValueError as error:
        if not isinstance(error, UnsupportedError) and not str(error).startswith("CAME: "):
            raise
        refused = error
    if problem := _of_any(str(refused) if refused else None, everyone):
        raise UnsupportedError(problem) from refused


def _of_any(problem: str | None, everyone: Groups) -> str | None:
    """Return the first rank's problem, None if none has one."""
    if _differ(problem or "", everyone):
        problem = next(filter(None, _gather(problem, everyone).values()))
    return problem


def _compare(mine: rank_settings.Settings, groups: Groups) -> str | None:
    """Say in a clause where ranks differ, or return None."""
    if not _differ(repr(list(mine.items())), groups):
        return None
    return (
        rank_settings.difference(_gather(mine, groups))
        or "ranks hold their parameters in another order"
    )


def _differ(text: str | None, groups: Groups) -> bool:
    """Whether the ranks have unlike texts; those with None have none."""
    extremes = [_NO_OPINION, _NO_OPINION]
    if text is not None:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little") >> 2
        extremes = [number, -number]
    most = torch.tensor(extremes, dtype=torch.int64, device=collectives_device())
    for group in groups:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    greatest, least = most.tolist()
    return bool(greatest != _NO_OPINION and greatest != -least)


def _gather(mine: Any, groups: Groups) -> dict[int, Any]:
    """Return what every rank has, by rank."""
    found = {dist.get_rank(): mine}
    for group in groups:
        found = {rank: value for each in of_all_ranks(found, group) for rank, value in each.items()}
    return dict(sorted(found.items()))

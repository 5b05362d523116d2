"""Ranks that were not given the same: refused on all of them before training, in one sentence.

Ranks are started by one command, but not always: a launch script reads a variable that one node
lacks, or a node has other packages. Replicas then drift apart, and nothing says so.

What is compared is hashed, and one small collective tells whether all hashes are equal; only where
they are not do ranks tell each other what they have. Every rank takes part, whatever it holds.
"""

import contextlib
import copy
import enum
import hashlib
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_came import __version__
from megatron_came.kernels.dispatch import choose, choose_on_host
from megatron_came.megatron.config import OWN, CameOptimizerConfig
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import named_parameters
from megatron_came.megatron.run import arguments
from megatron_came.rules import Settings, flag_of
from megatron_came.voice import Groups, by_rank, collectives_device, of_any_rank, rank, some

# What a rank was given: by the flag, or what else it has for a name, its value as text.
Given = dict[str, str]

# Arguments that may differ: where a rank's own files are, what it reports, and who it is.
_OWN_FILES = re.compile(
    r"(^|_)(path|paths|dir|file|files|prefix|name|id|host|load|save|url|model)(_|$)"
)
_OWN_BUSINESS = re.compile(
    r"(^|_)(rank|ranks|logger|logging|tensorboard|wandb|profile|profiler|nsys|workers|port"
    r"|timeout|gc|verbose|debug|snapshot)(_|$)"
)
# Of these, whether there is one: a rank that loads or saves alone waits for the others, or goes on
# from other weights than theirs.
_ON_ALL_OR_NONE = ("load", "save", "pretrained_checkpoint")
# Variables of the environment that decide how the same numbers are computed.
_ENVIRONMENT = (
    *("TRITON_INTERPRET", "NUMBA_DISABLE_JIT", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"),
    *("NUMBA_ENABLE_AVX", "NUMBA_OPT", "NUMBA_LOOP_VECTORIZE", "NUMBA_SLP_VECTORIZE"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
)
_NO_OPINION = -(2**62)  # below all numbers that stand for something

# How the reason of plain PyTorch begins where there could be kernels.
_SLOWER = "CAME's step runs in plain PyTorch, which is slower: "


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
    refuse_other_settings(settings_of(config), everyone)
    config = _with_common_kernels(config, model_chunks, everyone)
    _refuse_other_parameters(model_chunks, collection, everyone)
    return config


def connecting(collection: Any | None) -> Groups:
    """Return groups that together, one after the other, connect all ranks of a model."""
    if collection is None:
        return [None]
    # Ranks of one replica of the model, and those of one place in it.
    groups = (getattr(collection, "mp", None), _data_parallel(collection))
    return [group for group in groups if group is not None]


def _data_parallel(collection: Any) -> dist.ProcessGroup | None:
    return getattr(collection, "dp_cp", None) or getattr(collection, "dp", None)


def refuse_other_settings(settings: Given, everyone: Groups) -> None:
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
    found = {rank(): here}
    if _differ(here and (here.name or "missing"), everyone):
        found = by_rank(here, everyone)
    with_weights = {one: kernels for one, kernels in found.items() if kernels is not None}
    missing = [rank for rank, kernels in with_weights.items() if kernels.name is None]
    flag = "--came-cuda-graph" if config.cuda_graph else f"--came-kernels {config.kernels}"
    if missing:
        raise UnsupportedError(
            f"{flag} cannot be used on {names_of(missing)}: {with_weights[missing[0]].reason}"
        )
    clause = difference(
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
        _compare(parameters_of(params), [group])
        for params, group in compared
        if group is not None and group.size() > 1
    ]
    # Other groups have found nothing, or something else.
    if clause := of_any_rank(next(filter(None, clauses), None), groups=everyone):
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
    if problem := of_any_rank(str(refused) if refused else None, groups=everyone):
        raise UnsupportedError(problem) from refused


def _compare(mine: Given, groups: Groups) -> str | None:
    """Say in a clause where ranks differ, or return None."""
    if not _differ(repr(list(mine.items())), groups):
        return None
    return difference(by_rank(mine, groups)) or "ranks hold their parameters in another order"


def _differ(text: str | None, groups: Groups) -> bool:
    """Whether the ranks have unlike texts; those with None have none."""
    extremes = [_NO_OPINION, _NO_OPINION]
    if text is not None:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        # 62 bits: it and its negative are above what stands for none.
        number = int.from_bytes(digest, "little") >> 2
        extremes = [number, -number]
    most = torch.tensor(extremes, dtype=torch.int64, device=collectives_device())
    for group in groups:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    # The least of numbers is the greatest of their negatives, so that one collective finds both.
    greatest, least = most.tolist()
    return bool(greatest != _NO_OPINION and greatest != -least)


def settings_of(config: Any) -> Given:
    """Return what decides a run's numbers on this rank: as flags, their values as text.

    To a ``CameOptimizerConfig`` come Megatron's arguments, where its training loop has read some.
    """
    from megatron.core import __version__ as megatron

    found = {"PyTorch": torch.__version__, "megatron_came": __version__, "Megatron": str(megatron)}
    found |= {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    own = {**asdict(values.pop("came")), **{name: values.pop(name) for name in OWN}}
    values |= {f"came_{name}": value for name, value in own.items()}
    args = arguments()
    # Those of the command line first: others are made of them.
    for name, value in {**args, **values, **args}.items():
        if _is_common(name, value) and name not in _ON_ALL_OR_NONE:
            found[flag_of(name)] = _text(value)
    found |= {flag_of(name): "FOLDER" for name in _ON_ALL_OR_NONE if args.get(name)}
    return found


def _is_common(name: str, value: object) -> bool:
    if _OWN_BUSINESS.search(name):
        return False
    if isinstance(value, list | tuple):
        return all(_is_common(name, item) for item in value)
    if value is None or isinstance(value, str):
        # What has a slash is a path, whatever its name.
        return not _OWN_FILES.search(name) and os.sep not in (value or "")
    return isinstance(value, bool | int | float | torch.dtype | enum.Enum)


def _text(value: object) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    return str(value).removeprefix("torch.")


def parameters_of(named: Mapping[str, Tensor]) -> Given:
    """Return parameters by name: their shape, dtype, and how tensor parallelism cuts them."""
    described = {}
    for name, param in named.items():
        shape = "x".join(map(str, param.shape)) or "scalar"
        words = [*([] if param.requires_grad else ["frozen"]), shape, _text(param.dtype)]
        if getattr(param, "tensor_model_parallel", False):
            words.append(f"cut along dimension {getattr(param, 'partition_dim', -1)}")
        described[name] = " ".join(words)
    return described


def difference(found: Mapping[int, Given]) -> str | None:
    """Say in one clause where the settings of ranks differ, or return None."""
    names = dict.fromkeys(name for settings in found.values() for name in settings)
    clauses = []
    for name in names:
        ranks: dict[str | None, list[int]] = {}
        for one, settings in found.items():
            ranks.setdefault(settings.get(name), []).append(one)
        if len(ranks) > 1:
            clauses.append(_clause(name, ranks))
    if not clauses:
        return None
    more = f" ({len(clauses) - 1} more differ)" if len(clauses) > 1 else ""
    return clauses[0] + more


def _clause(name: str, ranks: Mapping[str | None, list[int]]) -> str:
    """As ``rank 1 has --lr 0.1, rank 0 0.2``: first what the fewest have."""
    order = sorted(ranks.items(), key=lambda item: (len(item[1]), -item[1][0]))
    said: list[str] = []
    for value, those in order[:4]:  # a sentence of more nobody reads
        have = "has " if len(those) == 1 else "have "
        what = f"no {name}" if value is None else f"{name} {value}"
        if said and None not in ranks:
            have, what = "", str(value)
        said.append(f"{names_of(those)} {have}{what}")
    return ", ".join(said)


def names_of(ranks: list[int]) -> str:
    """As ``rank 3`` or ``ranks 0, 1 and 2``; of many, the first few and how many more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    numbers = [*map(str, ranks)]
    shown = some(numbers, 4) if len(ranks) > 8 else f"{', '.join(numbers[:-1])} and {numbers[-1]}"
    return f"ranks {shown}"

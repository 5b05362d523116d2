"""What every rank must have been given alike: settings by the flag that sets them, and parameters.

Ranks are started by one command, but not always: a launch script reads a variable that one node
lacks, or a node has other packages. Replicas then drift apart, and nothing says so.
"""

import enum
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from megatron_came import __version__
from megatron_came.megatron.config import OWN
from megatron_came.rules import flag_of
from megatron_came.voice import some

Settings = dict[str, str]

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


def settings_of(config: Any) -> Settings:
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


def arguments() -> Mapping[str, Any]:
    """Return Megatron's arguments by name; none outside its training loop."""
    try:
        from megatron.training.global_vars import get_args

        return dict(vars(get_args()))
    except (ImportError, AssertionError):  # core alone, or a loop of someone's own
        return {}


def _is_common(name: str, value: object) -> bool:
    if _OWN_BUSINESS.search(name):
        return False
    if isinstance(value, list | tuple):
        return all(_is_common(name, item) for item in value)
    if value is None or isinstance(value, str):
        return not _OWN_FILES.search(name) and os.sep not in (value or "")
    return isinstance(value, bool | int | float | torch.dtype | enum.Enum)


def _text(value: object) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    return str(value).removeprefix("torch.")


def parameters_of(named: Mapping[str, Tensor]) -> Settings:
    """Return parameters by name: their shape, dtype, and how tensor parallelism cuts them."""
    described = {}
    for name, param in named.items():
        shape = "x".join(map(str, param.shape)) or "scalar"
        words = [*([] if param.requires_grad else ["frozen"]), shape, _text(param.dtype)]
        if getattr(param, "tensor_model_parallel", False):
            words.append(f"cut along dimension {getattr(param, 'partition_dim', -1)}")
        described[name] = " ".join(words)
    return described


def difference(found: Mapping[int, Settings]) -> str | None:
    """Say in one clause where the settings of ranks differ, or return None."""
    names = dict.fromkeys(name for settings in found.values() for name in settings)
    clauses = []
    for name in names:
        ranks: dict[str | None, list[int]] = {}
        for rank, settings in found.items():
            ranks.setdefault(settings.get(name), []).append(rank)
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
    for value, those in order[:4]:
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

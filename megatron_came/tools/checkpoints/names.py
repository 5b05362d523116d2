"""What the names of tensors in a checkpoint of format torch_dist say."""

from __future__ import annotations

import re

from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS
from megatron_came.core.state import FACTORS

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([a-z0-9_]+)\.(.+)", re.DOTALL)
_BUCKET = re.compile(r"(.*\.bucket_idx_\d+)\.(param|exp_avg)", re.DOTALL)
_KINDS = {"param": MAIN_WEIGHTS, "fp32_param": MAIN_WEIGHTS, "exp_avg": MOMENTUM}


def named(name: str) -> tuple[str, str] | None:
    """The kind of a tensor, as digests have it, and its parameter's key; None for other state."""
    found = _STATE.fullmatch(name)
    if found is None:
        other = name.startswith(("optimizer.", "chained_")) or _BUCKET.fullmatch(name)
        return None if other else (WEIGHTS, name)
    kind = found[1] if found[1] in FACTORS else _KINDS.get(found[1])
    return (kind, found[2]) if kind else None


def bucket(name: str) -> tuple[str, str] | None:
    """The kind of a bucket of the distributed optimizer, and its key; None for all else."""
    found = _BUCKET.fullmatch(name)
    return (_KINDS[found[2]], found[1]) if found else None

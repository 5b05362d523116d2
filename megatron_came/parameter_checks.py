"""Parameters that CAME would train wrongly are refused, in a sentence that says what to do."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_came.voice import warn_once

# A vector of more elements is seldom one: embeddings' biases have up to a few 100,000.
LONG_VECTOR = 1_000_000

_SHARDED = (
    "CAME: a parameter of shape {shape} is a DTensor, as fully_shard and torch's tensor "
    "parallelism make them, which CAME does not support yet: use DistributedDataParallel, or "
    "Megatron's distributed optimizer (--use-distributed-optimizer)."
)
_FSDP = (
    "CAME: FullyShardedDataParallel has made flat vectors of the matrices (here {numel} elements), "
    "so that CAME would have no rows and columns: give it use_orig_params=True with "
    "ShardingStrategy.NO_SHARD, or use DistributedDataParallel or Megatron's distributed optimizer."
)
_FLAT = (
    "CAME: parameter group {index} was built with matrices and now holds other parameters, "
    "vectors alone (here one of {numel} elements), as DeepSpeed's ZeRO makes them, so that CAME "
    "would have no rows and columns: use DistributedDataParallel or Megatron's distributed "
    "optimizer (--use-distributed-optimizer)."
)
_LONG = (
    "CAME: a parameter is a vector of {numel} elements: vectors have a whole second moment, as "
    "Adam's, and no confidence; if it is a matrix that was made flat, give CAME the matrix."
)


class Guard:
    """Looks at an optimizer's parameters when it is made, and again where others have changed them.

    Args:
        groups: parameter groups that there are already.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]] = ()) -> None:
        self._had_matrices: list[bool] = []
        self._vectors: set[Tensor] = set()
        for group in groups:
            self.note(group["params"])

    def note(self, params: Sequence[Tensor]) -> None:
        """Take up the parameters of a group that is added."""
        vectors = [param for param in params if param.dim() < 2]
        self._had_matrices.append(len(vectors) < len(params))
        self._vectors.update(vectors)

    def check(self, groups: Sequence[Mapping[str, Any]], shards: Container[Tensor]) -> None:
        """Refuse what would be trained wrongly, and say once what may be.

        Args:
            groups: all parameter groups.
            shards: parameters of which is known where they lie in their full tensor.

        Raises:
            ValueError: a DTensor, or matrices that have been made flat.
        """
        loose = [p for group in groups for p in group["params"] if p not in shards]
        _check_kinds(loose)
        known = self._vectors
        for index, (group, had_matrices) in enumerate(
            zip(groups, self._had_matrices, strict=False)
        ):
            params = group["params"]
            new = [p.numel() for p in params if p not in known and p not in shards]
            if had_matrices and new and all(param.dim() < 2 for param in params):
                raise ValueError(_FLAT.format(index=index, numel=max(new)))
        vectors = [p.numel() for p in loose if p.dim() < 2 and p.requires_grad]
        if max(vectors, default=0) > LONG_VECTOR:
            warn_once(_LONG.format(numel=max(vectors)))


def _check_kinds(params: Sequence[Tensor]) -> None:
    for param in params:
        if _is_dtensor(param):
            raise ValueError(_SHARDED.format(shape=tuple(param.shape)))
    # FSDP's mark, which parameters keep that it leaves in their shape (NO_SHARD).
    flat = [param for param in params if getattr(param, "_fsdp_flattened", False)]
    if flat and all(param.dim() < 2 for param in flat):
        raise ValueError(_FSDP.format(numel=max(param.numel() for param in flat)))


def _is_dtensor(param: Tensor) -> bool:
    # Whoever has made one has loaded this module, which takes long to load.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, getattr(module, "DTensor", ()))

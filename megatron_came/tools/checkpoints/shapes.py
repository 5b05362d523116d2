"""Shapes and dtypes that follow from those of the model's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.stored import Stored
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS
from megatron_came.tools.checkpoints import names
from megatron_came.tools.checkpoints.kinds import has_padding

_LACKS = {
    "exp_avg_sq_row": -1,
    "exp_avg_res_row": -1,
    "exp_avg_sq_col": -2,
    "exp_avg_res_col": -2,
}


class Expected:
    """What CAME's state should look like.

    Args:
        checkpoint: of which the model's weights say so.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._weights = {tensor.name: tensor for tensor in checkpoint.tensors}
        self._is_came = checkpoint.args.get("optimizer") == "came"
        self._is_named = checkpoint.folder.is_distributed

    def flaws(self, tensor: Stored) -> Iterator[str]:
        """Say what a tensor's shape and dtype should be, if they are others."""
        numel = math.prod(tensor.shape)
        if tensor.stored_numel != numel and not has_padding(tensor.name):
            yield f"has {tensor.stored_numel} elements in files, and should have {numel}"
        known = names.named(tensor.name) if self._is_named else None
        if known is None or known[0] == WEIGHTS or not self._is_came:
            yield from self._legacy_flaws(tensor)
            return
        weight = self._weights.get(known[1])
        if weight is None:
            return
        shape = weight.shape
        if known[0] in _LACKS:
            place = len(shape) + _LACKS[known[0]]
            shape = shape[:place] + shape[place + 1 :]
        if tensor.shape != shape:
            yield f"has shape {tensor.shape}, and should have {shape}"
        yield from self._dtype_flaws(known[0], tensor.dtype, weight.dtype)

    def _legacy_flaws(self, tensor: Stored) -> Iterator[str]:
        found = set(tensor.name.split(".")) & {*_LACKS, "exp_avg_sq"}
        if not self._is_named and self._is_came and found:
            yield from self._dtype_flaws(min(found), tensor.dtype, None)

    @staticmethod
    def _dtype_flaws(kind: str, dtype: torch.dtype, weight: torch.dtype | None) -> Iterator[str]:
        allowed = {torch.float64 if weight == torch.float64 else torch.float32}
        if kind == MOMENTUM:
            allowed.add(torch.bfloat16)
        elif kind == MAIN_WEIGHTS and weight is not None and weight.itemsize == 4:
            allowed.add(weight)
        if weight is None:
            allowed.add(torch.float64)
        if dtype not in allowed:
            wanted = str(min(allowed, key=str)).removeprefix("torch.")
            yield f"is {str(dtype).removeprefix('torch.')}, and should be {wanted}"

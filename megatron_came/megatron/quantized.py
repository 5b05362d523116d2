"""Weights in Transformer Engine's fp8 tensors, which ``--fp8-param-gather`` keeps.

Such a tensor says that it is in bf16 and has no memory of its own: its bytes and scales lie in
others. What is asked about its layout, or about its values, is asked of a plain copy.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor
from torch.nn import Module

from megatron_came.megatron.errors import UnsupportedError


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is one of Transformer Engine's, of any recipe."""
    return bool(is_float8tensor(tensor))


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor, or the values of a quantised one in the dtype that it says it has."""
    if not is_quantized(tensor):
        return tensor
    values: Tensor = dequantize_fp8_tensor(tensor.detach())
    return values


def check_gather(model_chunks: Iterable[Module], *, gathers_fp8: bool) -> None:
    """Make sure that somebody quantises the weights that are to be updated.

    Raises:
        UnsupportedError: a weight is in fp8, but not gathered in it.
    """
    trained = (p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad)
    found = next(filter(is_quantized, trained), None)
    if found is not None and not gathers_fp8:
        raise UnsupportedError(
            f"--optimizer came: a weight of shape {tuple(found.shape)} is in fp8, which is "
            "supported with --fp8-param-gather alone: add that, or keep weights in bf16."
        )

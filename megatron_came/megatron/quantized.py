"""Weights in Transformer Engine's fp8 tensors, which ``--fp8-param-gather`` keeps.

Such a tensor says that it is in bf16 and has no memory of its own: its bytes and scales lie in
others. What is asked about its layout, or about its values, is asked of a plain copy.
"""

from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is one of Transformer Engine's, of any recipe."""
    return bool(is_float8tensor(tensor))


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor, or the values of a quantised one in the dtype that it says it has."""
    if not is_quantized(tensor):
        return tensor
    values: Tensor = dequantize_fp8_tensor(tensor.detach())
    return values

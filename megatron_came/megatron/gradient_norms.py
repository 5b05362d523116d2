"""Norms of gradients that are kept in 16 bits."""

from __future__ import annotations

from typing import Any

import torch

from megatron_came.patching import Function, around


@around
def in_fp32(
    original: Function,
    chunk_size: Any,
    noop_flag: Any,
    tensor_lists: Any,
    per_tensor: bool,
    *args: Any,
) -> Any:
    """Let Megatron's fallback for apex's and Transformer Engine's norm compute in fp32.

    Those do so by themselves; the fallback would round the norm of bf16 gradients to bf16, and two
    layouts would clip unlike each other.
    """
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    if not any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors):
        return original(chunk_size, noop_flag, tensor_lists, per_tensor, *args)
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None

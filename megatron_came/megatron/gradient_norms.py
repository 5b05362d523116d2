"""Norms that Megatron takes wrongly: of 16-bit gradients, and of FSDP2's weights."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_came.megatron.run import run_args
from megatron_came.patching import Function
from megatron_came.voice import collectives_device


def in_fp32(
    original: Function, chunk_size: Any, noop_flag: Any, tensor_lists: Any, *args: Any
) -> Any:
    """Let Megatron's fallback for apex's and Transformer Engine's norm compute in fp32.

    Those do so by themselves; the fallback would round the norm of bf16 gradients to bf16, and two
    layouts would clip unlike each other.
    """
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    if not any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors):
        return original(chunk_size, noop_flag, tensor_lists, *args)
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None  # as the fallback does


def of_all_rows(original: Function, *args: Any, **kwargs: Any) -> float:
    """Let ``--log-params-norm`` add up what FSDP2's ranks hold: Megatron's takes one rank's."""
    from megatron.core import mpu

    norm: float = original(*args, **kwargs)
    if not getattr(run_args(), "use_torch_fsdp2", False):
        return norm
    square = torch.tensor(norm**2, dtype=torch.float64, device=collectives_device())
    dist.all_reduce(square, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return float(square.sqrt())

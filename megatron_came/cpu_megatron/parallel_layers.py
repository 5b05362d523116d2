"""Stand-ins for parts of Megatron's local layers, so that more layouts run on a CPU.

Sequence parallelism, context parallelism and ``--apply-layernorm-1p`` need a norm and an attention
that only Transformer Engine and apex have, and experts a gather that gloo lacks.  These are written
for debugging and tests: right, not fast.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_came.patching import Function


def norms_of_all_kinds(
    original: Function, cls: type, config: Any, *args: Any, **kwargs: Any
) -> torch.nn.Module:
    """Let torch's norms run on a part of the sequence, and with weights around zero.

    A norm treats every token alone. All that sequence parallelism asks of it is a mark on its
    weights: their gradients are partial sums, which Megatron adds up over tensor-parallel ranks.
    """
    whole = copy.copy(config)
    whole.sequence_parallel = whole.layernorm_zero_centered_gamma = False
    norm: torch.nn.Module = original(cls, whole, *args, **kwargs)
    if config.layernorm_zero_centered_gamma:
        _center_at_zero(norm)
    for param in norm.parameters():
        param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def _center_at_zero(norm: torch.nn.Module) -> None:
    """Let a norm multiply by its weights + 1 (``--apply-layernorm-1p``)."""
    if isinstance(norm, torch.nn.LayerNorm):
        norm.__class__ = _ZeroCenteredLayerNorm
    elif isinstance(norm, torch.nn.RMSNorm):
        norm.__class__ = _ZeroCenteredRMSNorm
    else:  # it has no weights
        return
    torch.nn.init.zeros_(norm.weight)


class _ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(
            tokens, self.normalized_shape, self.weight + 1, self.bias, self.eps
        )


class _ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(
            tokens, self.normalized_shape, self.weight + 1, self.eps
        )


def starting_alone(original: Function, self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """Let the unfused attention be built with context parallelism, which it refuses."""
    alone = copy.copy(config)
    alone.context_parallel_size = 1
    original(self, alone, *args, **kwargs)


def attending_to_all(
    original: Function,
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let the unfused attention see the keys and values of all context-parallel ranks."""
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        # The mask has this rank's queries and all keys.
        if attention_mask is None:  # as of a stage in the middle, which loads no data
            keys = torch.arange(len(query) * group.size())
            chunks = keys.chunk(2 * group.size())
            queries = torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]])
            attention_mask = (keys > queries[:, None])[None, None]
        whole: Any = _WholeSequence.apply
        key, value = whole(key, group), whole(value, group)
    return original(self, query, key, value, attention_mask, *args, **kwargs)


def gathering_unlike(
    original: Function, part: Tensor, group: Any, sizes: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Gather parts of unlike sizes."""
    if sizes is None or group.size() == 1:
        return original(part, group, sizes, *args, **kwargs)
    padded = part.new_zeros((max(sizes), *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])


def scattering_unlike(
    original: Function, whole: Tensor, group: Any, sizes: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Add up, and scatter parts of unlike sizes."""
    if sizes is None or group.size() == 1:
        return original(whole, group, sizes, *args, **kwargs)
    total = whole.clone()
    dist.all_reduce(total, group=group)
    return torch.split(total, sizes)[group.rank()].clone()


class _WholeSequence(torch.autograd.Function):
    """Gather a sequence of which each rank has two chunks, the r-th and the r-th from the end."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        early, late = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*early, *reversed(late)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        chunks = whole.chunk(2 * ctx.group.size())
        rank = ctx.group.rank()
        return torch.cat([chunks[rank], chunks[-1 - rank]]), None

"""Stand-ins for parts of Megatron's local layers, so that more layouts run on a CPU.

Sequence parallelism, context parallelism and ``--apply-layernorm-1p`` need a norm and an attention
that only Transformer Engine and apex have, and experts a gather that gloo lacks.  These are written
for debugging and tests: right, not fast.
"""

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Put the stand-ins in place, for good."""
    _norms_of_all_kinds()
    _attention_for_context_parallelism()
    _uneven_splits_for_experts()


def _norms_of_all_kinds() -> None:
    """Let torch's norms run on a part of the sequence, and with weights around zero.

    A norm treats every token alone.  All that sequence parallelism asks of it is a mark on its
    weights: their gradients are partial sums, which Megatron adds up over tensor-parallel ranks.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    @functools.wraps(build)
    def build_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        whole = copy.copy(config)
        whole.sequence_parallel = whole.layernorm_zero_centered_gamma = False
        norm: torch.nn.Module = build(cls, whole, *args, **kwargs)
        if config.layernorm_zero_centered_gamma:
            _center_at_zero(norm)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = staticmethod(build_marked)


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
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(
            tokens, self.normalized_shape, self.weight + 1, self.bias, self.eps
        )


class _ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(
            tokens, self.normalized_shape, self.weight + 1, self.eps
        )


def _attention_for_context_parallelism() -> None:
    """Let the unfused attention see the keys and values of all context-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    start, attend = DotProductAttention.__init__, DotProductAttention.forward

    @functools.wraps(start)
    def start_alone(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        start(self, alone, *args, **kwargs)

    @functools.wraps(attend)
    def attend_to_all(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        if group.size() > 1:
            if attention_mask is None:
                raise ValueError(
                    "--context-parallel-size above 1 needs the data loader's attention mask on the "
                    "CPU: leave out --no-create-attention-mask-in-dataloader."
                )
            # The mask has this rank's queries and all keys.
            key, value = _whole_sequence(key, group), _whole_sequence(value, group)
        attended: torch.Tensor = attend(self, query, key, value, attention_mask, *args, **kwargs)
        return attended

    DotProductAttention.__init__ = start_alone
    DotProductAttention.forward = attend_to_all


def _uneven_splits_for_experts() -> None:
    """Gather and scatter parts of unlike sizes, which gloo does not.

    Tensor-parallel ranks of an expert hold unlike numbers of tokens.
    """
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    @functools.wraps(gather)
    def gather_unlike(
        part: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            even: torch.Tensor = gather(part, group, sizes, *args, **kwargs)
            return even
        padded = part.new_zeros((max(sizes), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])

    @functools.wraps(reduce_scatter)
    def reduce_scatter_unlike(
        whole: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            even: torch.Tensor = reduce_scatter(whole, group, sizes, *args, **kwargs)
            return even
        total = whole.clone()
        dist.all_reduce(total, group=group)
        own: torch.Tensor = torch.split(total, sizes)[group.rank()].clone()
        return own

    mappings._gather_along_first_dim = gather_unlike
    mappings._reduce_scatter_along_first_dim = reduce_scatter_unlike


def _whole_sequence(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole: torch.Tensor = _WholeSequence.apply(part, group)  # type: ignore[no-untyped-call, unused-ignore]
    return whole


class _WholeSequence(torch.autograd.Function):
    """Gather a sequence of which each rank has two chunks, the r-th and the r-th from the end."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        early, late = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*early, *reversed(late)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        chunks = whole.chunk(2 * ctx.group.size())
        rank = ctx.group.rank()
        return torch.cat([chunks[rank], chunks[-1 - rank]]), None

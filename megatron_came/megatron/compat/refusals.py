"""Models that a release before 0.19 is not exact with: refused before training starts."""

from __future__ import annotations

from typing import Any

from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.versions import release

_NEWER = "or Megatron 0.19"


def check_model(model_chunks: list[Any]) -> None:
    """Refuse experts whose layout a release before 0.19 does not say.

    Raises:
        UnsupportedError: what the model has, the flag, and what to use instead.
    """
    if release() >= (0, 19):
        return
    config = model_chunks[0].config
    if not getattr(config, "num_moe_experts", None):
        return
    expert_tp, tp = config.expert_tensor_parallel_size, config.tensor_model_parallel_size
    if config.expert_model_parallel_size == 1 and expert_tp != tp:
        raise UnsupportedError(
            f"--optimizer came does not go with --expert-tensor-parallel-size {expert_tp} at "
            f"--tensor-model-parallel-size {tp} and --expert-model-parallel-size 1 on Megatron "
            f"{_series()}, which reduces the gradients of such experts over the wrong ranks: use "
            f"--expert-tensor-parallel-size {tp}, {_NEWER}."
        )
    for experts in _experts(model_chunks):
        if type(experts).__name__ == "GroupedMLP":
            raise UnsupportedError(
                "--optimizer came does not go with --moe-grouped-gemm where Megatron "
                f"{_series()} packs all experts of a rank into one weight (its legacy GroupedMLP): "
                "use --transformer-impl transformer_engine without --moe-use-legacy-grouped-gemm, "
                f"leave --moe-grouped-gemm out, {_NEWER}."
            )
        if expert_tp > 1 and any(map(_is_transformer_engines, experts.modules())):
            raise UnsupportedError(
                f"--optimizer came does not go with --expert-tensor-parallel-size {expert_tp} and "
                f"--transformer-impl transformer_engine on Megatron {_series()}, whose expert "
                "layers do not say how they are cut: use --expert-tensor-parallel-size 1 with "
                f"--expert-model-parallel-size above 1, --transformer-impl local, {_NEWER}."
            )


def _series() -> str:
    return ".".join(map(str, release()))


def _experts(model_chunks: list[Any]) -> list[Any]:
    """All modules that hold the experts of a layer."""
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    return [
        module.experts
        for chunk in model_chunks
        for module in chunk.modules()
        if isinstance(module, BaseMoELayer)
    ]


def _is_transformer_engines(module: object) -> bool:
    return any(
        base.__module__.split(".")[0] == "transformer_engine" for base in type(module).__mro__
    )

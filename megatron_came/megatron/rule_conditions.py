"""Conditions of rules: on several settings, and on the model, where it has been built."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_came.dtensors import is_dtensor
from megatron_came.rules import Settings


def has_checkpoints(s: Settings) -> bool:
    """Whether a run saves or loads."""
    return bool(s.save or s.load)


EMPTY = "--init-model-with-meta-device or --no-initialization"


def has_empty_weights(s: Settings) -> bool:
    """Whether Megatron's loop trains what lies where weights are, unless it loads them."""
    # What is not among the settings is not known; "load" is the training loop's alone.
    is_left_out = "perform_initialization" in s and not s.perform_initialization
    return "load" in s and bool(s.init_model_with_meta_device or is_left_out)


def starts_empty(s: Settings) -> bool:
    """Whether it loads none; a model that has been built, or is left out, a host may fill."""
    loads = s.load or s.pretrained_checkpoint or s.model_chunks
    return bool("load" in s and s.init_model_with_meta_device and not loads)


def saves_torch(s: Settings) -> bool:
    """Whether Megatron saves in its old format, and finds out at the first save what that lacks."""
    return bool(s.ckpt_format == "torch" and s.save and s.non_persistent_ckpt_type != "local")


def saves_nowhere(s: Settings) -> bool:
    """Whether it is to save between saves, but not how."""
    between = s.non_persistent_save_interval and not s.non_persistent_ckpt_type
    return bool(between and s.save)


def overwrites_gradients(s: Settings) -> bool:
    """Whether the step writes weights where gradients are."""
    return bool(s.reuse_grad_buf_for_mxfp8_param_ag and not s.overlap_param_gather)


def has_other_main_weights(s: Settings) -> bool:
    """Whether Megatron-FSDP is to keep main weights in another dtype; None is the model's."""
    name = "megatron_fsdp_main_params_dtype"
    is_fp32 = getattr(s, name) in ("fp32", torch.float32)
    return bool(s.use_megatron_fsdp and name in s and not is_fp32)


def has_tied_mtp_behind_others(s: Settings) -> bool:
    """Whether the last of several stages predicts further tokens with a copy of the embeddings.

    Its own output layer has weights beside them, which Megatron asserts that it has not.
    """
    return bool(
        (s.pipeline_model_parallel_size or 1) > 1
        and not s.pipeline_model_parallel_layout  # which may have a stage for it alone
        and "untie_embeddings_and_output_weights" in s
        and not s.untie_embeddings_and_output_weights
        and has_checkpoints(s)
    )


def warms_up_to_the_end(unit: str) -> Callable[[Settings], bool]:
    """Return whether a warm-up, also as a fraction, leaves nothing of the schedule."""

    def leaves_nothing(s: Settings) -> bool:
        if s.skip_train:  # there is none
            return False
        is_share = unit == "fraction"
        whole = 1.0 if is_share else getattr(s, f"lr_decay_{unit}") or getattr(s, f"train_{unit}")
        return bool(whole) and getattr(s, f"lr_warmup_{unit}") >= whole

    return leaves_nothing


def is_mimo(s: Settings) -> bool:
    """Whether the model is one of several modalities."""
    model = next(iter(s.model_chunks or ()), None)
    if model is None:
        return False  # on the command line
    from megatron.core.models.mimo.model.base import MimoModel

    while not isinstance(model, MimoModel) and hasattr(model, "module"):
        model = model.module  # out of its wrappers
    return isinstance(model, MimoModel)


def is_quantized_alone(s: Settings) -> bool:
    """Whether a weight that is trained is in fp8, and nobody quantises it after a step."""
    if s.fp8_param_gather or not s.model_chunks:
        return False
    from megatron_came.megatron.quantized import is_quantized

    params = (p for chunk in s.model_chunks for p in chunk.parameters() if p.requires_grad)
    return any(map(is_quantized, params))


def fsdp2_saves_unlike_rows(s: Settings) -> bool:
    """Whether FSDP2 cuts weights so that Megatron cannot save them.

    That is into unlike numbers of rows, or with rows of both of SwiGLU's projections on a rank.
    """
    needs_names = s.came_momentum_dtype != "fp32"
    if not (s.use_torch_fsdp2 and (has_checkpoints(s) or needs_names)):
        return False
    params = (p for chunk in s.model_chunks or () for p in chunk.parameters())
    cuts = {(len(p), p.device_mesh.size()) for p in params if is_dtensor(p) and p.dim()}
    halves = 2 if s.gated_linear_unit else 1
    # An odd number of ranks leaves one with rows of both projections.
    return any(rows % size or (size > 1 and size % halves) for rows, size in cuts)


# Experts whose layout a release before 0.19 does not say.


def _experts(s: Settings) -> list[Any]:
    """All modules that hold the experts of a layer."""
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    chunks = s.model_chunks if s.num_moe_experts else None
    modules = (module for chunk in chunks or () for module in chunk.modules())
    return [module.experts for module in modules if isinstance(module, BaseMoELayer)]


def packs_experts(s: Settings) -> bool:
    """Whether a rank's experts are one weight."""
    # By name: newer releases do not have the class.
    return any(type(experts).__name__ == "GroupedMLP" for experts in _experts(s))


def cuts_experts_in_silence(s: Settings) -> bool:
    """Whether experts are Transformer Engine's."""
    return any(
        base.__module__.split(".")[0] == "transformer_engine"
        for experts in _experts(s)
        for module in experts.modules()
        for base in type(module).__mro__
    )

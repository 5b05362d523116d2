"""What the CPU host has to do otherwise for a release before the newest."""

from __future__ import annotations

import sys
import types

from megatron_came.megatron.versions import release


def lacks(destination: str) -> bool:
    """Whether this release has no argument of this name, and needs no default for it."""
    return destination == "async_strategy" and release() < (0, 17)


def forks_checkpoint_worker() -> bool:
    """Whether the process that writes checkpoints in the background can be made to fork."""
    return release() >= (0, 17)


def refused_flags() -> dict[str, str]:
    """Flags that work on the CPU with newer releases, and what this one needs for them."""
    if forks_checkpoint_worker():
        return {}
    return {"--use-persistent-ckpt-worker": "a process that uses CUDA afresh"}


def install() -> None:
    """Put the stand-ins in place that 0.16 alone needs, for good.

    Its training loop compiles CUDA kernels at the start that only its legacy models use, and its
    router asks for a function of Transformer Engine that it has not been able to import.
    """
    if release() >= (0, 17):
        return
    name = "megatron.legacy.fused_kernels"
    kernels = types.ModuleType(name)
    kernels.load = lambda args: None  # type: ignore[attr-defined]
    sys.modules[name] = kernels
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None

"""What a tensor is, from its name in a checkpoint."""

from __future__ import annotations

from megatron_came.core.state import FACTORS

KINDS = ("weights", "main weights", "momentum", "factors", "other")


def kind_of(name: str) -> str:
    """One of :data:`KINDS`."""
    words = name.split(".")
    if any(word in FACTORS for word in words):
        return "factors"
    if "exp_avg" in words:
        return "momentum"
    if "optimizer" in words or "optimizer_state" in words:
        return "main weights" if "param" in words or "fp32_param" in words else "other"
    return "weights"


def has_padding(name: str) -> bool:
    """Whether it is a bucket of the distributed optimizer, whose padding is arbitrary."""
    return ".bucket_idx_" in name

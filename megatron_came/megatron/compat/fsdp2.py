"""FSDP2 before Megatron 0.19, whose training loop gives it an argument that it does not take."""

from typing import Any

from megatron_came.patching import Function


def with_all_reduce(original: Function, self: Any, force_all_reduce: bool = False) -> None:
    """Let ``finish_grad_sync`` take what 0.19's takes, and does not use either."""
    original(self)

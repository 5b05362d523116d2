"""Megatron's arguments of the run, where its training loop has read some."""

from collections.abc import Mapping
from typing import Any


def run_args() -> Any:
    """Return them; for what only a training loop calls."""
    from megatron.training import get_args

    return get_args()


def arguments() -> Mapping[str, Any]:
    """Return them by name; none outside the training loop."""
    try:
        from megatron.training.global_vars import get_args

        return dict(vars(get_args()))
    except (ImportError, AssertionError):  # core alone, or a loop of someone's own
        return {}

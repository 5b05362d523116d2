"""Warnings that a process gives once, though it may make several optimizers."""

from __future__ import annotations

import functools
import logging

import torch.distributed as dist

_logger = logging.getLogger("megatron_came")


@functools.cache
def warn_once(sentence: str) -> None:
    """Log a sentence as a warning, if it has not been logged before; on one rank of several."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        _logger.warning(sentence)

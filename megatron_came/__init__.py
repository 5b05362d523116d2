"""CAME for Megatron-LM: exact under tensor, pipeline, data, context and expert parallelism."""

from megatron_came._version import __version__
from megatron_came.layout import Shard
from megatron_came.optimizer import CAME

__all__ = ["CAME", "Shard", "__version__"]

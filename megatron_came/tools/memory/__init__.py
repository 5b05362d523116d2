"""``megatron-came memory``: the memory of a launch before it is started."""

from megatron_came.tools.memory.command import main

__all__ = ["main"]

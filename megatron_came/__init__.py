"""CAME for Megatron-LM: exact under tensor, pipeline, data, context and expert parallelism."""

import importlib

from megatron_came import waiting
from megatron_came._version import __version__

TYPE_CHECKING = False  # as type checkers know it, without the import of typing
if TYPE_CHECKING:
    from megatron_came.core.shard import Shard
    from megatron_came.megatron.arguments import use_came
    from megatron_came.optimizer import CAME

__all__ = ["CAME", "Shard", "__version__", "use_came"]
_MODULES = {"CAME": "optimizer", "Shard": "core.shard", "use_came": "megatron.arguments"}


def __getattr__(name: str) -> object:
    """Import PyTorch only once an optimizer is wanted: the commands' help needs none."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


waiting.start()

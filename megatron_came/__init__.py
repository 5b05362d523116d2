"""CAME for Megatron-LM: exact under tensor, pipeline, data, context and expert parallelism."""

from megatron_came import waiting
from megatron_came._version import __version__

TYPE_CHECKING = False  # as type checkers know it, without the import of typing
if TYPE_CHECKING:
    from megatron_came.core.shard import Shard
    from megatron_came.megatron.arguments import use_came
    from megatron_came.optimizer import CAME

__all__ = ["CAME", "Shard", "__version__", "use_came"]


def __getattr__(name: str) -> object:
    """Import PyTorch only once an optimizer is wanted: the commands' help needs none."""
    if name == "CAME":
        from megatron_came.optimizer import CAME

        return CAME
    if name == "Shard":
        from megatron_came.core.shard import Shard

        return Shard
    if name == "use_came":
        from megatron_came.megatron.arguments import use_came

        return use_came
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


waiting.start()

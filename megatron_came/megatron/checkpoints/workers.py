"""The processes of ``--async-save --use-persistent-ckpt-worker``, which end with their trainer.

Megatron ends them when a run ends in order. After SIGKILL, ``os._exit`` and the like they wait for
ever, and hold the job's memory, files and ports.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

from megatron_came.megatron.errors import HostError
from megatron_came.megatron.patching import Function, wrap
from megatron_came.terminal.children import end_with_parent

# A process that is no fork has no replacements: there this is Megatron's own.
_loop: Function = async_utils.PersistentAsyncCaller.async_loop


def install() -> None:
    """Have the worker and the process of its queue end with the process that starts them.

    Raises:
        HostError: Megatron lacks what is to be replaced.
    """
    caller = async_utils.PersistentAsyncCaller
    if caller.async_loop is not loop:
        caller.async_loop = staticmethod(loop)
    names = ("get_write_results_queue", "_get_write_results_queue")  # the latter before 0.18
    name = next((name for name in names if hasattr(filesystem_async, name)), None)
    if name is None or not hasattr(filesystem_async, "_results_queue"):
        raise HostError(
            "--optimizer came does not fit this Megatron: its checkpoint workers cannot be found."
        )
    wrap(filesystem_async.__name__, name, _with_queue)


def loop(*args: Any, **kwargs: Any) -> None:
    """Megatron's ``PersistentAsyncCaller.async_loop`` for as long as its trainer lives."""
    trainer = multiprocessing.parent_process()
    if trainer is not None and trainer.pid is not None:
        end_with_parent(trainer.pid)
    _loop(*args, **kwargs)


def _with_queue(original: Function) -> Function:
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(end_with_parent, (os.getpid(),))
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    return get_write_results_queue

"""The processes of ``--async-save --use-persistent-ckpt-worker``, which end with their trainer.

Megatron ends them when a run ends in order. After SIGKILL, ``os._exit`` and the like they wait for
ever, and hold the job's memory, files and ports.
"""

import multiprocessing
import os
import pickle
import sys
from multiprocessing.managers import SyncManager
from types import ModuleType
from typing import Any

from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

from megatron_came.patching import Function, maker
from megatron_came.terminal.children import end_with_parent

# A process that is no fork has no replacements: there this is Megatron's own.
_loop: Function = async_utils.PersistentAsyncCaller.async_loop


# The loop goes to the process by its name: a function made for the occasion would not be found.
@maker
def with_trainer(original: Function) -> Function:
    """Have the process that writes checkpoints end with the one that starts it."""
    return loop


def loop(*args: Any, **kwargs: Any) -> None:
    """Megatron's ``PersistentAsyncCaller.async_loop`` for as long as its trainer lives."""
    trainer = multiprocessing.parent_process()
    if trainer is not None and trainer.pid is not None:
        end_with_parent(trainer.pid)
    _loop(*args, **kwargs)


class _Results:
    """The queue of what was written, which its process has as bytes.

    To hold Megatron's own it would import PyTorch, for seconds and in 450 MB of memory.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, results: Any) -> None:
        self._queue.put(pickle.dumps(results))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def with_queue(original: Function, mp_mode: str = "spawn") -> Any:
    """Have the process of the queue of results end with the one that starts it.

    It runs nothing of the script, which would import Megatron once more, for seconds, and without
    what is replaced of it.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # a fresh process would import it
        try:
            manager.start(end_with_parent, (os.getpid(),))
        finally:
            sys.modules["__main__"] = script
        filesystem_async._results_queue = _Results(manager.Queue())
    return filesystem_async._results_queue

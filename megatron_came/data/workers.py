"""A map over several processes that keeps the order and notices when one of them dies.

The standard library's pools of processes wait for ever for one that is killed while it sends. Here
threads of a pool each ask a process through a pipe of its own, which ends when the process does.
"""

import multiprocessing
import os
import pickle
import queue
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_came.terminal.children import end_with_parent, signals_held_back
from megatron_came.terminal.sentences import CommandError

_REMEDY = "give fewer --workers, or cut the text into smaller documents"


def ordered_map[Item, Result](
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    remedy: str = _REMEDY,
    afresh: bool = False,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each item, in order.

    Args:
        function: What to do; only its CommandErrors come through.
        items: Taken in this process, and no further ahead than the workers can use.
        workers: How many processes; 0 is this one, which no signal can interrupt while the
            function is busy in a library.
        remedy: What to do if memory runs out.
        afresh: Whether the workers start with nothing loaded: OpenMP waits for ever in a fork of
            a process that has used it.

    Raises:
        CommandError: If the function does, or a process dies.
    """
    if workers == 0:
        yield from map(function, items)
        return
    processes: list[BaseProcess] = []
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    pending: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        # All are there before the first thread is, whose locks a fork would take over.
        for connection in _start(function, workers, afresh, processes):
            idle.put(connection)
        for item in items:
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
            pending.append(threads.submit(_ask, idle, item, remedy))
        while pending:
            yield pending.popleft().result()
    finally:
        with signals_held_back():
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            threads.shutdown(cancel_futures=True)


def _start(
    function: Callable[[Any], Any], workers: int, afresh: bool, processes: list[BaseProcess]
) -> list[Connection]:
    """Start processes, add them to a list of those to be killed, and return pipes to them."""
    # A fork has what is loaded here already; nothing runs beside it that could hold a lock.
    method = "spawn" if afresh else "fork" if sys.platform == "linux" else None
    context: Any = multiprocessing.get_context(method)
    if method != "fork":  # its first start lets Ctrl-C through again, which is held back below
        resource_tracker.ensure_running()
    ours: list[Connection] = []
    for _ in range(workers):
        here, there = context.Pipe()
        ours.append(here)
        process = context.Process(
            target=_work, args=(function, there, ours, os.getpid()), daemon=True
        )
        # The command decides what a signal ends, and kills them: a worker that a signal ended on
        # its own would be taken for one that ran out of memory.
        with signals_held_back():
            process.start()
            processes.append(process)
        there.close()  # so that the pipe ends when the process does
    return ours


def _ask[Item](idle: "queue.SimpleQueue[Connection]", item: Item, remedy: str) -> Any:
    connection = idle.get()
    try:
        _send(connection, item)
        result = connection.recv()
    except (EOFError, OSError) as error:
        raise CommandError(
            f"A worker was killed, most likely because memory ran out: {remedy}."
        ) from error
    finally:
        idle.put(connection)
    if isinstance(result, CommandError):
        raise result
    return result


def _send(connection: Connection, thing: object) -> None:
    # Connection.send pickles into a buffer with a view on it, which crashes the interpreter
    # (CPython 3.12) if the other end is gone and the garbage collector finds both.
    connection.send_bytes(pickle.dumps(thing))


def _work(
    function: Callable[[Any], Any], connection: Connection, others: list[Connection], parent: int
) -> None:
    end_with_parent(parent)
    for other in others:  # the command's ends, which a fork has too: the pipe would never end
        other.close()
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):  # the command is gone, perhaps in the middle of an item
            return
        try:
            result = function(item)
        except CommandError as error:
            result = error
        with suppress(ConnectionError):
            _send(connection, result)

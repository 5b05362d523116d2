"""A map over several processes that keeps the order and notices when one of them dies.

``multiprocessing.Pool`` waits for ever for a process that was killed, and ``concurrent.futures``
for one that was killed while it was sending; here each process has a pipe to itself.
"""

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from megatron_came.data.errors import DataError
from megatron_came.terminal.children import end_with_parent, signals_held_back

_REMEDY = "give fewer --workers, or cut the text into smaller documents"


def ordered_map[Item, Result](
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    remedy: str = _REMEDY,
    afresh: bool = False,
) -> Iterator[Result]:
    """Yields ``function(item)`` for each item, in order.

    Args:
        function: What to do; only its DataErrors come through.
        items: Taken in this process, and no further ahead than the workers can use.
        workers: How many processes work; 0 is this one, which no signal can interrupt while the
            function is busy in a library.
        remedy: What to do if memory runs out.
        afresh: Whether the workers start with nothing loaded: OpenMP waits for ever in a fork of
            a process that has used it.

    Raises:
        DataError: If the function does, or a process dies.
    """
    if workers == 0:
        yield from map(function, items)
        return
    # A fork has what is loaded here already; nothing runs beside it that could hold a lock.
    method = "spawn" if afresh else "fork" if sys.platform == "linux" else None
    context: Any = multiprocessing.get_context(method)
    processes: list[BaseProcess] = []
    idle: list[Connection] = []
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process: BaseProcess = context.Process(
                target=_work, args=(function, there, [*idle, here], os.getpid()), daemon=True
            )
            # The command decides what a signal ends, and kills them: a worker that a signal ended
            # on its own would be taken for one that ran out of memory.
            with signals_held_back():
                process.start()
            there.close()  # so that the pipe ends when the process does
            processes.append(process)
            idle.append(here)
        yield from _distribute(items, idle, remedy)
    finally:
        with signals_held_back():
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _distribute[Item, Result](
    items: Iterable[Item], idle: list[Connection], remedy: str
) -> Iterator[Result]:
    window = 2 * len(idle)  # how many may be worked on or wait for their turn
    numbered = enumerate(items)
    busy: dict[Connection, int] = {}
    done: dict[int, Result | DataError] = {}
    turn = 0
    while True:
        while idle and len(busy) + len(done) < window and (numbered_item := next(numbered, None)):
            connection = idle.pop()
            busy[connection], item = numbered_item
            with _death_noticed(remedy):
                _send(connection, item)
        if not busy:
            return
        for connection in cast(list[Connection], wait(list(busy))):
            with _death_noticed(remedy):
                done[busy.pop(connection)] = connection.recv()
            idle.append(connection)
        while turn in done:
            result = done.pop(turn)
            if isinstance(result, DataError):
                raise result
            yield result
            turn += 1


def _send(connection: Connection, thing: object) -> None:
    # Connection.send pickles into a buffer with a view on it, which crashes the interpreter
    # (CPython 3.12) if the other end is gone and the garbage collector finds both.
    connection.send_bytes(pickle.dumps(thing))


@contextmanager
def _death_noticed(remedy: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise DataError(
            f"A worker was killed, most likely because memory ran out: {remedy}."
        ) from error


def _work[Item, Result](
    function: Callable[[Item], Result],
    connection: Connection,
    others: list[Connection],
    parent: int,
) -> None:
    end_with_parent(parent)
    for other in others:  # the command's ends, which a fork has too: the pipe would never end
        other.close()
    while True:
        try:
            item: Item = connection.recv()
        except (EOFError, OSError):  # the command is gone, perhaps in the middle of an item
            return
        try:
            result: Result | DataError = function(item)
        except DataError as error:
            result = error
        with suppress(ConnectionError):
            _send(connection, result)

"""Forks the ranks of test runs from one process that has imported Megatron, which takes seconds.

    python -m tests.training.nursery MODULE FOLDER SESSION

It imports the module, and then each connection to the socket in the folder asks for one run, in a
line of JSON: the number of ranks, the module that they run by its ``main`` and the arguments of
that, a file for the log, and a time limit in seconds. The answer is 0 if every rank ended well;
when one does not, the others are killed. When the process SESSION has ended, the nursery removes
the folder and ends.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import socketserver
import sys
import threading
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_came.terminal.children import end_with_parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Run(socketserver.StreamRequestHandler):
    """One run, in a process of its own."""

    def handle(self) -> None:
        end_with_parent(self.server.pid)
        request = json.loads(self.rfile.readline())
        with Path(request["log"]).open("w") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        launcher = {
            "WORLD_SIZE": str(request["ranks"]),
            "LOCAL_WORLD_SIZE": str(request["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        os.environ |= launcher
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=_be_rank, args=(rank, request["worker"], request["arguments"]))
            for rank in range(request["ranks"])
        ]
        try:
            for rank in ranks:
                rank.start()
            failed = _failed(ranks, request["seconds"])
        finally:
            for rank in ranks:
                _end(rank)
        self.wfile.write(b"1" if failed else b"0")


def _failed(ranks: list[BaseProcess], seconds: float) -> bool:
    """Wait for the end of all ranks, or of one that failed."""
    deadline = time.monotonic() + seconds
    running = list(ranks)
    while running and not any(rank.exitcode for rank in ranks):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"The ranks ran for more than {seconds} s.", file=sys.stderr)
            return True
        connection.wait([rank.sentinel for rank in running], left)
        running = [rank for rank in running if rank.exitcode is None]
    return any(rank.exitcode for rank in ranks)


def _end(rank: BaseProcess) -> None:
    """Kill a rank, if it lives, and the processes that it leaves behind when it is killed."""
    if rank.pid is None:  # it never started
        return
    rank.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.join()


def _be_rank(rank: int, worker: str, arguments: list[str]) -> None:
    end_with_parent(multiprocessing.parent_process().pid)
    os.setpgid(0, 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [worker, *arguments]
    importlib.import_module(worker).main()


class Nursery(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Answers until the session that it is for is gone."""

    max_children = 8

    def __init__(self, folder: str, session: int) -> None:
        super().__init__(f"{folder}/socket", Run)
        self.pid, self._folder = os.getpid(), folder
        self._session = os.pidfd_open(session)

    def service_actions(self) -> None:
        super().service_actions()
        if select.select([self._session], [], [], 0)[0]:  # it has ended
            shutil.rmtree(self._folder)
            sys.exit()


def main() -> None:
    module, folder, session = sys.argv[1:]
    sys.argv = [module]
    gc.disable()  # what is imported lives to the end
    importlib.import_module(module)
    if threading.active_count() > 1:
        raise RuntimeError("processes with threads cannot be forked safely")
    gc.collect()
    gc.freeze()  # the ranks then collect in a moment, and do not copy what they share
    gc.enable()
    Nursery(folder, int(session)).serve_forever()


if __name__ == "__main__":
    main()

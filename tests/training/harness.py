"""Starts the workers and reads what they saw."""

import fcntl
import functools
import hashlib
import itertools
import json
import operator
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.training.nursery import free_port as free_port

ROOT = Path(__file__).parents[2]
WORKER = "tests.training.worker"  # imports all that other workers do

MODEL = """
    --num-layers 2 --hidden-size 48 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --tokenizer-type NullTokenizer --vocab-size 255
    --make-vocab-size-divisible-by 32 --mock-data --micro-batch-size 2 --global-batch-size 8
    --train-iters 20 --eval-iters 0 --eval-interval 1000 --lr 3e-4 --min-lr 3e-5
    --lr-decay-style cosine --lr-warmup-iters 4 --weight-decay 0.1 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0 --log-interval 10 --seed 5
"""
# For runs of a few iterations.
SMALL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16
    --max-position-embeddings 16 --tokenizer-type NullTokenizer --vocab-size 127 --mock-data
    --global-batch-size 8 --train-iters 6 --eval-iters 0 --eval-interval 1000 --lr 1e-3
    --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1
    --attention-dropout 0 --hidden-dropout 0 --log-interval 1 --seed 5 --optimizer came
"""


@dataclass
class Case:
    """One training: flags beyond the model's, and what runs in CAME's place (see variants).

    The last rank alone has the flags in ``last`` as well.
    """

    name: str
    flags: str
    variant: str = "came"
    fails: bool = False
    model: str = MODEL
    last: str = ""

    def as_json(self, ranks: int) -> dict:
        # Two micro-batches an iteration: enough to accumulate gradients and to fill a pipeline.
        size = max(8 // data_parallel_size(self.flags, ranks) // 2, 2)
        flags = f"{self.model} --micro-batch-size {size} {self.flags}".split()
        return {**asdict(self), "flags": flags, "last": self.last.split()}


def parallel_size(flags: str, kind: str) -> int:
    """The size that flags give to ``--KIND-parallel-size``; the last one counts."""
    found = re.findall(rf"--{kind}-parallel-size (\d+)", flags)
    return int(found[-1]) if found else 1


def data_parallel_size(flags: str, ranks: int) -> int:
    """How many ranks train on batches of their own."""
    for kind in ("tensor-model", "pipeline-model", "context"):
        ranks //= parallel_size(flags, kind)
    return ranks


class _Nursery:
    """A process that has imported a module and forks the ranks of runs.

    The workers of one session of pytest share it: the first that needs it starts it. It ends with
    the session.
    """

    def __init__(self, module: str, search_path: Sequence[Path]):
        session = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        which = repr((ROOT, module, search_path)).encode()
        name = f"nursery-{session}-{hashlib.sha256(which).hexdigest()[:8]}"
        self._folder = Path(tempfile.gettempdir()) / name
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._is_alive():
                self._start(module, search_path, session)

    def _is_alive(self) -> bool:
        try:
            os.kill(int((self._folder / "pid").read_text()), 0)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return True

    def _start(self, module: str, search_path: Sequence[Path], session: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MEGATRON_CAME_CPU": "1",
            "PYTHONPATH": os.pathsep.join(map(str, [*search_path, ROOT])),
        }
        command = [sys.executable, "-m", "tests.training.nursery", module]
        command += [str(self._folder), str(session)]
        (self._folder / "socket").unlink(missing_ok=True)
        with (self._folder / "log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        threading.Thread(target=process.wait, daemon=True).start()  # so that its end is seen
        (self._folder / "pid").write_text(str(process.pid))

    def run(self, **request: object) -> bool:
        """Ask for a run; returns whether a rank failed or took longer."""
        with socket.socket(socket.AF_UNIX) as connection:
            self._connect(connection)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = connection.recv(1)
        return answer != b"0"

    def _connect(self, connection: socket.socket) -> None:
        while True:  # it imports for some seconds
            try:
                return connection.connect(str(self._folder / "socket"))
            except OSError as error:
                if not self._is_alive():
                    log = (self._folder / "log").read_text()[-6000:]
                    raise AssertionError(f"the nursery has ended:\n{log}") from error
                time.sleep(0.05)


@functools.cache
def _nursery(module: str, *search_path: Path) -> _Nursery:
    return _Nursery(module, search_path)


def fork(
    worker: str,
    ranks: int,
    arguments: Sequence[str],
    log: Path,
    *,
    imported: str = WORKER,
    search_path: Sequence[Path] = (),
    seconds: int = 900,
) -> bool:
    """Run ``main`` of a module on some ranks, in processes that need not import Megatron.

    Args:
        worker: the module.
        ranks: how many.
        arguments: of each rank's.
        log: file for what they print.
        imported: module that they find imported, with all that it imports.
        search_path: folders with the ``megatron`` package to use; none for the one installed.
        seconds: after which they are killed.

    Returns:
        Whether a rank failed or took longer.
    """
    return _nursery(imported, *search_path).run(
        worker=worker, ranks=ranks, arguments=list(arguments), log=str(log), seconds=seconds
    )


def run(
    world_size: int,
    cases: list[Case],
    folder: Path,
    *,
    dies: bool = False,
    search_path: Sequence[Path] = (),
    worker: str = WORKER,
) -> dict[str, list[dict]]:
    """Run the cases one after the other on ``world_size`` ranks.

    Args:
        world_size: number of ranks.
        cases: in this order.
        folder: for the log and what the ranks saw.
        dies: the last case ends its processes; nothing is returned of it.
        search_path: folders with the ``megatron`` package to use; none for the one installed.
        worker: module that runs the cases.

    Returns:
        By name of the case, what each rank saw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases_file = folder / "cases.json"
    cases_file.write_text(json.dumps([case.as_json(world_size) for case in cases]))
    log = folder / "log"
    seconds = max(900, 30 * len(cases))  # a case takes two, and ten on a busy machine
    failed = fork(
        worker,
        world_size,
        [str(cases_file), str(folder)],
        log,
        imported=worker if search_path else WORKER,  # another release may have no training loop
        search_path=search_path,
        seconds=seconds,
    )
    if dies != failed:
        raise AssertionError(f"workers failed; the end of {log}:\n" + log.read_text()[-6000:])
    return {
        case.name: [
            json.loads((folder / f"{case.name}.{rank}.json").read_text())
            for rank in range(world_size)
        ]
        for case in cases[: len(cases) - dies]
    }


def run_chains(chains: Sequence[list[Case]], folder: Path) -> dict[str, list[dict]]:
    """Run cases on one rank, two at a time: those of a chain one after the other.

    Returns:
        By name of the case, what its rank saw.
    """
    _nursery(WORKER)  # of which both would start one
    halves = [list(itertools.chain.from_iterable(chains[first::2])) for first in range(2)]
    with ThreadPoolExecutor() as pool:
        results = pool.map(run, (1, 1), halves, (folder / "first", folder / "second"))
        return functools.reduce(operator.or_, results)


def losses(ranks: list[dict]) -> list[float]:
    """The losses that the last pipeline stage saw; all ranks that saw some saw the same."""
    (seen,) = {tuple(rank["losses"]) for rank in ranks if rank["losses"]}
    return list(seen)


def worst_difference(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two loss curves."""
    if len(ours) != len(theirs):
        raise AssertionError(f"{len(ours)} and {len(theirs)} iterations")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

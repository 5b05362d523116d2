"""Starts the workers and reads what they saw."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

MODEL = """
    --num-layers 4 --hidden-size 48 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --tokenizer-type NullTokenizer --vocab-size 255
    --make-vocab-size-divisible-by 32 --mock-data --micro-batch-size 2 --global-batch-size 8
    --train-iters 20 --eval-iters 0 --eval-interval 1000 --lr 3e-4 --min-lr 3e-5
    --lr-decay-style cosine --lr-warmup-iters 4 --weight-decay 0.1 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0 --log-interval 10 --seed 5
"""


@dataclass
class Case:
    """One training: flags beyond ``MODEL``, and what runs in CAME's place (see variants)."""

    name: str
    flags: str
    variant: str = "came"
    fails: bool = False

    def as_json(self) -> dict:
        return {**asdict(self), "flags": [*MODEL.split(), *self.flags.split()]}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(
    world_size: int,
    cases: list[Case],
    folder: Path,
    *,
    dies: bool = False,
    search_path: Sequence[Path] = (),
    worker: str = "tests.training.worker",
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
    cases_file.write_text(json.dumps([case.as_json() for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
    command += [
        "--master-port",
        str(free_port()),
        "-m",
        worker,
        str(cases_file),
        str(folder),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MEGATRON_CAME_CPU": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [*search_path, ROOT])),
    }
    with (folder / "log").open("w") as log:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=900
        ).returncode
    if dies != bool(code):
        raise AssertionError(
            f"workers failed; the end of {folder / 'log'}:\n" + (folder / "log").read_text()[-6000:]
        )
    return {
        case.name: [
            json.loads((folder / f"{case.name}.{rank}.json").read_text())
            for rank in range(world_size)
        ]
        for case in cases[: len(cases) - dies]
    }


def losses(ranks: list[dict]) -> list[float]:
    """The losses that the last pipeline stage saw; all ranks that saw some saw the same."""
    (seen,) = {tuple(rank["losses"]) for rank in ranks if rank["losses"]}
    return list(seen)


def worst_difference(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two loss curves."""
    if len(ours) != len(theirs):
        raise AssertionError(f"{len(ours)} and {len(theirs)} iterations")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

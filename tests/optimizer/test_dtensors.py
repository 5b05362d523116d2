"""CAME on DTensors: fully_shard, tensor parallelism, both; two and four gloo ranks, once each."""

import json
import re
from pathlib import Path

import pytest

from tests.support.running import run_python

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2" / "train.py"

CASES = [
    "refusals",
    "every_placement",
    "gradients_partial_or_replicated",
    "momentum_in_fewer_bits",
    "gpt",
    "clipped_gradients",
    "two_reductions_a_step",
    "checkpoints_between_wrappers",
    "whole_state",
]


def run_ranks(size, folder, cases):
    """Run cases on some ranks; returns what failed, by case."""
    done = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)),
        *("-m", "tests.optimizer.dtensors_worker", str(folder), *cases),
    )
    files = sorted(folder.glob(f"failed-{size}-*.json"))
    assert len(files) == size, done.stdout[-3000:] + done.stderr[-3000:]
    failed = {}
    for file in files:
        failed |= json.loads(file.read_text())
        file.unlink()
    return failed


@pytest.fixture(scope="module", params=[2, 4])
def failed(request, tmp_path_factory):
    """What failed on some number of ranks, by case."""
    return run_ranks(request.param, tmp_path_factory.mktemp("ranks"), CASES)


@pytest.mark.parametrize("case", CASES)
def test_dtensors(failed, case):
    assert case not in failed, failed[case]


def test_checkpoints_hop_between_numbers_of_ranks(tmp_path):
    for index, size in enumerate((4, 2, 1, 4)):
        failed = run_ranks(size, tmp_path, [f"hop{index}"])
        assert not failed, failed[f"hop{index}"]


def test_the_example_trains(tmp_path):
    """And goes on from its checkpoint, on another number of ranks."""
    before = 3.3
    for ranks, first in ((2, 0), (1, 20)):
        done = run_python(
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *(str(EXAMPLE), "--steps", str(first + 20), "--checkpoint", str(tmp_path / "saved")),
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        losses = dict(re.findall(r"step +(\d+) +loss ([\d.]+)", done.stdout))
        assert min(map(int, losses)) == first
        last = float(losses[str(first + 19)])
        assert last < before
        before = last

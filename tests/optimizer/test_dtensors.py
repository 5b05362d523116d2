"""CAME on DTensors: fully_shard, tensor parallelism, both, on gloo ranks."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.training.harness import fork

WORKER = "tests.optimizer.dtensors_worker"  # which knows nothing of Megatron
EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2" / "train.py"

# The numbers of ranks are started once for all of their cases.
CASES = [
    *["some_placements", "gradients_partial_or_replicated", "momentum_in_fewer_bits"],
    *["remainders", "refusals", "a_gradient_on_some_ranks_alone", "different_settings"],
    *["copies_go_on", "a_spike_that_some_ranks_see"],
]
WITH_MODELS = [
    *[
        "two_reductions_a_step",
        "gpt",
        "clipped_gradients",
        "policies",
        "swapped_tensors",
        "schedules_and_accumulation",
    ],
    *["scaled_gradients", "optimizers_in_the_backward_pass"],
    *["figures_are_those_of_one_rank", "a_spike_is_skipped_on_all_ranks"],
    *["checkpoints_between_wrappers", "the_same_wrapper_resumes_bit_for_bit"],
    *["remainders_in_checkpoints", "whole_state", "own_counts_of_steps_are_loaded"],
]
if torch.__version__.startswith("2.6."):
    reason = "fully_shard of PyTorch 2.6 does not run on a CPU"
    WITH_MODELS = [pytest.param(case, marks=pytest.mark.skip(reason)) for case in WITH_MODELS]
# They take minutes.
SWEEPS = ["every_placement", "gpt_in_float64", "checkpoints_between_all_wrappers"]
ON_TWO = ["every_placement", "gpt", "gpt_in_float64", "whole_state", "different_settings"]
# On four ranks these are among those above, with the wrappers that need four.
FIGURES = ["figures_are_those_of_one_rank", "a_spike_is_skipped_on_all_ranks"]


def run_ranks(size, folder, cases):
    """Run cases on some ranks; returns what failed, by case."""
    log = folder / "log"
    fork(WORKER, size, [str(folder), *cases], log, imported=WORKER, seconds=1200)
    files = sorted(folder.glob(f"failed-{size}-*.json"))
    assert len(files) == size, log.read_text()[-6000:]
    failed = {}
    for file in files:
        failed |= json.loads(file.read_text())
        file.unlink()
    return failed


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """What failed on four ranks, by case."""
    cases = [*CASES, *(case for case in WITH_MODELS if isinstance(case, str))]
    return run_ranks(4, tmp_path_factory.mktemp("ranks"), cases)


@pytest.mark.parametrize("case", [*CASES, *WITH_MODELS])
def test_dtensors(failed, case):
    assert case not in failed, failed[case]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="no fully_shard on a CPU")
def test_figures_and_spikes_on_two_ranks(tmp_path):
    failed = run_ranks(2, tmp_path, [*FIGURES, "a_spike_that_some_ranks_see"])
    assert not failed, "\n".join(failed.values())


@pytest.mark.matrix
@pytest.mark.parametrize(("size", "cases"), [(4, SWEEPS), (2, ON_TWO)])
def test_all_of_it(tmp_path, size, cases):
    failed = run_ranks(size, tmp_path, cases)
    assert not failed, "\n".join(failed.values())


@pytest.mark.matrix
def test_checkpoints_hop_between_numbers_of_ranks(tmp_path):
    for index, size in enumerate((4, 2, 1, 4)):
        failed = run_ranks(size, tmp_path, [f"hop{index}"])
        assert not failed, failed[f"hop{index}"]


def run_example(ranks, folder, steps):
    arguments = [str(EXAMPLE), "--steps", str(steps), "--checkpoint", str(folder / "saved")]
    log = folder / f"log{steps}"
    failed = fork("tests.support.script_worker", ranks, arguments, log, imported=WORKER)
    assert not failed, log.read_text()[-5000:]
    found = re.findall(r"step +(\d+) +loss ([\d.]+)", log.read_text())
    return {int(step): float(loss) for step, loss in found}


def test_the_example_trains(tmp_path):
    losses = run_example(2, tmp_path, 20)
    assert losses[19] < 3.3 < losses[0]


@pytest.mark.matrix
def test_the_example_goes_on_from_its_checkpoint(tmp_path):
    before = run_example(2, tmp_path, 20)
    after = run_example(1, tmp_path, 40)
    assert min(after) == 20
    assert after[39] < before[19]

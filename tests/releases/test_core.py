"""Release 0.16.1 as pip offers it: ``megatron.core`` without a training loop."""

import os
import subprocess
import sys

import pytest

from tests.releases.places import wheel
from tests.training.harness import ROOT, Case, losses, run, worst_difference

TOLERANCE = 2e-6  # of the loss; see tests/training/test_training.py

DO = "--use-distributed-optimizer "
TP, PP = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
MODELS = {"gpt2": "", "moe": "--num-experts 4 "}
LAYOUTS = {
    "gpt2-tp2": TP,
    "gpt2-tp2-do": TP + DO,
    "gpt2-dp2-do": DO,
    "gpt2-pp2": PP,
    "moe-ep2-do": MODELS["moe"] + "--expert-model-parallel-size 2 " + DO,
}
SAVED = {
    "full": DO + "--sharding fully_reshardable ",
    "dp": DO + "--sharding dp_reshardable ",
    "fp32": "",
}
LEGACY_EXPERTS = MODELS["moe"] + "--moe-grouped-gemm "


@pytest.fixture(scope="module")
def search_path():
    return wheel("0.16.1")


@pytest.fixture(scope="module")
def seen(search_path, tmp_path_factory):
    """What the ranks saw, by name of the case."""
    folder = tmp_path_factory.mktemp("core")
    start = {model: f"--load {folder / model} --weights-only " for model in MODELS}
    one = [
        Case(f"weights-{model}", f"--save {folder / model} --weights-only --train-iters 0 {flags}")
        for model, flags in MODELS.items()
    ]
    one += [
        Case(f"oracle-{model}", start[model] + flags, "oracle") for model, flags in MODELS.items()
    ]
    one.append(Case("legacy-experts", LEGACY_EXPERTS))
    two = [Case(name, start[name.split("-")[0]] + flags) for name, flags in LAYOUTS.items()]
    two.append(Case("fault", start["gpt2"] + DO, "no_dp_sum"))
    for name, flags in SAVED.items():
        two += [
            Case(f"{name}-straight", flags),
            Case(f"{name}-first", f"{flags} --train-iters 10 --save {folder / name}"),
            Case(f"{name}-second", f"{flags} --load {folder / name}"),
        ]
    two.append(Case("full-at-tp2", f"{SAVED['full']} {TP} --load {folder / 'full'}"))
    worker = {"search_path": search_path, "worker": "tests.releases.core_worker"}
    return run(1, one, folder / "ranks1", **worker) | run(2, two, folder / "ranks2", **worker)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_equal_the_authors_optimizer(seen, name):
    ours, theirs = losses(seen[name]), losses(seen["oracle-" + name.split("-")[0]])
    assert len(ours) == 20
    assert theirs[-1] < theirs[0] - 0.5
    assert worst_difference(ours, theirs) <= TOLERANCE


def test_a_missing_reduction_is_seen(seen):
    assert worst_difference(losses(seen["fault"]), losses(seen["oracle-gpt2"])) > 50 * TOLERANCE


@pytest.mark.parametrize("name", SAVED)
def test_resuming_is_bit_identical(seen, name):
    straight, first, second = (seen[f"{name}-{part}"] for part in ("straight", "first", "second"))
    assert losses(first) + losses(second) == losses(straight)
    for one, other in zip(straight, second, strict=True):
        assert one["state"] == other["state"]
        assert one["weights"] == other["weights"]


def test_resuming_at_another_layout_differs_by_rounding(seen):
    straight = losses(seen["full-straight"])[10:]
    assert worst_difference(losses(seen["full-at-tp2"]), straight) <= TOLERANCE


def test_experts_packed_into_one_weight_are_refused(seen):
    error = seen["legacy-experts"][0]["error"]
    assert error.startswith(
        "UnsupportedError: --optimizer came does not go with --moe-grouped-gemm"
    )
    assert "leave --moe-grouped-gemm out" in error
    assert not seen["legacy-experts"][0]["losses"]


def test_the_bundled_script_says_that_there_is_no_training_loop(search_path):
    path = os.pathsep.join(map(str, [*search_path, ROOT]))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_came.pretrain_gpt", "--optimizer", "came"],
        env={**os.environ, "PYTHONPATH": path, "MEGATRON_CAME_CPU": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "megatron-core 0.16.1 of pip has no training loop: install 0.17 or newer" in done.stderr
    assert "Traceback" not in done.stderr

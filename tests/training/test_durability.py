"""Checkpoints of a run that was killed, damaged ones, and those of an older version."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.training.harness import Case, losses, run, worst_difference

FULL = "--optimizer came --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
SHORT = "--train-iters 12 --lr-warmup-iters 2 "

# Written by version 0.1.0; tests/support/checkpoint-v1.md says how.
KEPT = Path(__file__).parents[1] / "support" / "checkpoint-v1"
KEPT_MODEL = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 2 --seq-length 8 "
    "--max-position-embeddings 8 --vocab-size 15 --make-vocab-size-divisible-by 8 "
)


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("durability")
    saving = f"{SHORT}{FULL}--save {folder / 'killed'} --save-interval 4 "
    results = run(
        2,
        [Case("straight", SHORT + FULL), Case("killed", saving, "came+killed")],
        folder / "first",
        dies=True,
    )
    # Twice the same, one of them damaged.
    shutil.copytree(folder / "killed", folder / "truncated")
    for file in (folder / "truncated" / "iter_0000004").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    kept = f"{SHORT}{FULL}{KEPT_MODEL}--load {KEPT} "
    cases = [
        Case("resumed", f"{SHORT}{FULL}--load {folder / 'killed'} "),
        Case("kept", kept, "came+all-documents"),
        Case("kept-at-tp2", kept + "--tensor-model-parallel-size 2 ", "came+all-documents"),
        Case("exploding", f"{SHORT}{FULL}--rerun-mode disabled", "came+exploding", fails=True),
        Case("truncated", f"{SHORT}{FULL}--load {folder / 'truncated'} ", fails=True),
    ]
    results |= run(2, cases[:-2], folder / "second")
    results |= run(1, cases[-2:], folder / "third")
    return results | {"left": sorted(path.name for path in (folder / "killed").iterdir())}


def test_a_run_killed_while_saving_resumes_from_the_last_complete_checkpoint(seen):
    assert "iter_0000008" in seen["left"]  # the one it died in
    assert losses(seen["resumed"]) == losses(seen["straight"])[4:]


def test_a_truncated_checkpoint_is_refused_in_a_sentence(seen):
    (rank,) = seen["truncated"]
    said = r"SystemExit: megatron_came: \S+/__\d_0\.distcp has \d+ bytes where at least \d+ were w"
    assert re.match(said, rank["error"])
    assert "--ckpt-step" in rank["error"]
    assert "\n" not in rank["error"]
    assert not rank["losses"]


def test_gradients_whose_squares_overflow_leave_the_state_untouched(seen):
    """Megatron's own check of gradients, which is on by default, stops the step."""
    (rank,) = seen["exploding"]
    assert len(rank["losses"]) == 2
    assert "Inf" in rank["error"]
    assert rank["changed_though_failed"] is False


@pytest.mark.parametrize("name", ["kept", "kept-at-tp2"])
def test_a_checkpoint_of_the_first_version_resumes(seen, name):
    expected = json.loads(KEPT.with_suffix(".json").read_text())["losses"]
    assert worst_difference(losses(seen[name]), expected) <= 2e-6

"""Checkpoints of runs whose layers share weights, which stand there under several names."""

import contextlib
import io

import pytest

from megatron_came.tools import inspect
from tests.training.harness import SMALL, Case, losses, run
from tests.training.layouts import UNTIED

FOUR = SMALL + "--micro-batch-size 2 --num-layers 4 "
DO = "--use-distributed-optimizer "
FULL = DO + "--dist-ckpt-optim-fully-reshardable "
# What is shared, and flags; all on two ranks, in formats that Megatron can save.
SAVED = {
    "legacy": ("shared-layers", DO + "--ckpt-format torch "),
    "words": ("shared-words", DO + UNTIED),
    "full-words": ("shared-words", FULL + UNTIED),
    "whole-words": ("shared-words", UNTIED),
}
# In others.
REFUSED = {"data": DO, "full": FULL, "whole": ""}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    cases = []
    for name, (shared, flags) in SAVED.items():
        variant, place = f"came+{shared}", folder / name
        save = f"--save {place} --save-interval 3 --exit-interval 3 "
        cases += [
            Case(f"{name}-straight", flags, variant, model=FOUR),
            Case(f"{name}-first", flags + save, variant, model=FOUR),
            Case(f"{name}-second", f"{flags}--load {place} ", variant, model=FOUR),
        ]
    for name, flags in REFUSED.items():
        save = f"{flags}--save {folder / name} --save-interval 3 "
        cases.append(Case(name, save, "came+shared-layers", fails=True, model=FOUR))
        cases.append(Case(f"{name}-unsaved", flags, "came+shared-layers", model=FOUR))
    return run(2, cases, folder) | {"folder": folder}


@pytest.mark.parametrize("name", SAVED)
def test_a_run_with_shared_weights_resumes_bit_for_bit(seen, name):
    straight = losses(seen[f"{name}-straight"])
    assert losses(seen[f"{name}-first"]) == straight[:3]
    assert losses(seen[f"{name}-second"]) == straight[3:]
    for one, other in zip(seen[f"{name}-second"], seen[f"{name}-straight"], strict=True):
        assert one["state"] == other["state"]


@pytest.mark.parametrize("name", SAVED)
def test_its_checkpoint_is_proved(seen, name):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert inspect.main(["--verify", str(seen["folder"] / name)]) == 0
    assert printed.getvalue().splitlines()[-1] == "It is sound."


@pytest.mark.parametrize("name", REFUSED)
def test_shared_layers_in_torch_dist_are_refused_before_training(seen, name):
    for rank in seen[name]:
        assert not rank["losses"]
        assert "with --ckpt-format torch_dist: use torch." in rank["error"]
        assert "and 11 more some layers or experts are the same weights" in rank["error"]
    assert len(losses(seen[f"{name}-unsaved"])) == 6

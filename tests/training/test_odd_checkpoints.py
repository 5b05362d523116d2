"""Checkpoints of runs of which some layers, or stages, are frozen or share their weights."""

import contextlib
import io

import pytest

from megatron_came.tools import inspect
from tests.training.harness import SMALL, Case, losses, run
from tests.training.layouts import EP, MODELS, UNTIED, pp, tp

FOUR = SMALL + "--micro-batch-size 2 --num-layers 4 "
DO = "--use-distributed-optimizer "
FULL = DO + "--dist-ckpt-optim-fully-reshardable "
# What is frozen, and flags; all on two ranks, in formats that Megatron can save.
SAVED = {
    "data": ("frozen-layer", DO),
    "tensor": ("frozen-layer", DO + tp(2) + MODELS["llama"].replace("--num-layers 2 ", "")),
    "pipeline": ("frozen-layer", DO + pp(2)),
    "experts": ("frozen-layer", DO + EP + MODELS["moe"].replace("--num-layers 2 ", "")),
    "stage": ("frozen-stage", DO + pp(2) + UNTIED),
    "legacy": ("frozen-layer", DO + "--ckpt-format torch "),
    "shared-legacy": ("shared-layers", DO + "--ckpt-format torch "),
    "words": ("shared-words", DO + UNTIED),
    "full-words": ("shared-words", FULL + UNTIED),
    "whole-words": ("shared-words", UNTIED),
}
FROZEN = [name for name, (variant, _) in SAVED.items() if variant.startswith("frozen")]
# In others, and what to do.
_OF_SHARED = "with --ckpt-format torch_dist: use torch."
REFUSED = {
    "full": ("frozen-layer", FULL, "with --dist-ckpt-optim-fully-reshardable: leave it out"),
    "whole": ("frozen-layer", "", "without --use-distributed-optimizer: add it"),
    "shared-data": ("shared-layers", DO, _OF_SHARED),
    "shared-full": ("shared-layers", FULL, _OF_SHARED),
    "shared-whole": ("shared-layers", "", _OF_SHARED),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    cases = []
    for name, (odd, flags) in SAVED.items():
        variant, place = f"came+{odd}", folder / name
        save = f"--save {place} --save-interval 3 --exit-interval 3 "
        cases += [
            Case(f"{name}-straight", flags, variant, model=FOUR),
            Case(f"{name}-first", flags + save, variant, model=FOUR),
            Case(f"{name}-second", f"{flags}--load {place} ", variant, model=FOUR),
        ]
        if name in FROZEN:
            cases.append(Case(f"{name}-thawed", f"{flags}--load {place} ", fails=True, model=FOUR))
    for name, (odd, flags, _) in REFUSED.items():
        save = f"{flags}--save {folder / name} --save-interval 3 "
        cases.append(Case(name, save, f"came+{odd}", fails=True, model=FOUR))
        cases.append(Case(f"{name}-unsaved", flags, f"came+{odd}", model=FOUR))
    return run(2, cases, folder) | {"folder": folder}


@pytest.mark.parametrize("name", SAVED)
def test_a_run_resumes_bit_for_bit(seen, name):
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


@pytest.mark.parametrize("name", FROZEN)
def test_state_of_layers_that_were_frozen_is_not_made_up(seen, name):
    for rank in seen[f"{name}-thawed"]:
        assert rank["error"].startswith("SystemExit: megatron_came: ")
        assert not rank["losses"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_before_training(seen, name):
    for rank in seen[name]:
        assert not rank["losses"]
        assert REFUSED[name][2] in rank["error"]
        assert "and 11 more some layers or experts are " in rank["error"]
    assert len(losses(seen[f"{name}-unsaved"])) == 6

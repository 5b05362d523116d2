"""Checkpoints of runs that train some layers, or stages, and not others."""

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
}
# In others, and what to do.
REFUSED = {
    "full": (FULL, "with --dist-ckpt-optim-fully-reshardable: leave it out"),
    "whole": ("", "without --use-distributed-optimizer: add it"),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    cases = []
    for name, (frozen, flags) in SAVED.items():
        variant, place = f"came+{frozen}", folder / name
        save = f"--save {place} --save-interval 3 --exit-interval 3 "
        cases += [
            Case(f"{name}-straight", flags, variant, model=FOUR),
            Case(f"{name}-first", flags + save, variant, model=FOUR),
            Case(f"{name}-second", f"{flags}--load {place} ", variant, model=FOUR),
            Case(f"{name}-thawed", f"{flags}--load {place} ", fails=True, model=FOUR),
        ]
    for name, (flags, _) in REFUSED.items():
        save = f"{flags}--save {folder / name} --save-interval 3 "
        cases.append(Case(name, save, "came+frozen-layer", fails=True, model=FOUR))
        cases.append(Case(f"{name}-unsaved", flags, "came+frozen-layer", model=FOUR))
    return run(2, cases, folder) | {"folder": folder}


@pytest.mark.parametrize("name", SAVED)
def test_a_run_with_frozen_layers_resumes_bit_for_bit(seen, name):
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


@pytest.mark.parametrize("name", SAVED)
def test_state_of_layers_that_were_frozen_is_not_made_up(seen, name):
    for rank in seen[f"{name}-thawed"]:
        assert rank["error"].startswith("SystemExit: megatron_came: ")
        assert not rank["losses"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_cannot_save_is_refused_before_training(seen, name):
    for rank in seen[name]:
        assert not rank["losses"]
        assert REFUSED[name][1] in rank["error"]
        assert "of decoder.layers.mlp.linear_fc1.bias and 11 more some layers" in rank["error"]
    assert len(losses(seen[f"{name}-unsaved"])) == 6

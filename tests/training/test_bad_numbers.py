"""NaNs and infinities in training: named with parameter, rank and iteration, and nothing saved."""

import pytest

from tests.training.harness import SMALL, Case, run

DO = "--use-distributed-optimizer "
WEIGHT = "decoder.layers.0.mlp.linear_fc1.weight"
BY_RANK = {
    "overlap": DO + "--overlap-grad-reduce --ddp-bucket-size 5003 ",
    "whole": "",
    "disabled": DO + "--rerun-mode disabled ",
    "bf16": DO + "--bf16 ",
    "tp": DO + "--tensor-model-parallel-size 2 ",
    "pp": DO + "--pipeline-model-parallel-size 2 ",
}
# Name of the case: variant, flags, what is said.
STOPPED = {
    "saving": ("nan-gradient", DO, f"iteration 3, rank 1: the gradient of {WEIGHT} holds 3 NaN"),
    "first": ("nan-gradient-at-first", DO, f"iteration 1, rank 1: the gradient of {WEIGHT}"),
    "infinite": ("inf-gradient", DO, f"iteration 3, rank 1: the gradient of {WEIGHT} holds 3 Inf"),
    "loss": ("nan-loss", DO, "iteration 3, rank 1: the loss is NaN, though all weights"),
    "overflow": ("exploding", "--micro-batch-size 2 ", "the norm of the gradients is Inf"),
    **{f"gradient-{name}": ("nan-gradient", flags, WEIGHT) for name, flags in BY_RANK.items()},
    **{f"loss-{name}": ("nan-loss", flags, "the loss is NaN") for name, flags in BY_RANK.items()},
}
GOES_ON = {
    "unchecked": ("nan-gradient", DO + "--no-check-for-nan-in-loss-and-grad "),
    "spiky": ("spiky", DO + "--check-for-spiky-loss --check-for-large-grads "),
    "fp16": ("nan-gradient", DO + "--fp16 --initial-loss-scale 1024 "),
}
QUICK = ("saving", "first", "loss", "unchecked")


def _mark(names):
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in names
    ]


@pytest.fixture(scope="session")
def seen(request, tmp_path_factory):
    """What the ranks saw, by name of the case, and the folder that they save to."""
    folder = tmp_path_factory.mktemp("numbers")
    items = [item for item in request.session.items if item.path.name == "test_bad_numbers.py"]
    asked = {item.callspec.id for item in items}
    cases = [
        Case(name, f"{flags} --save {folder / name} --save-interval 2", f"came+{variant}", True)
        for name, (variant, flags, _) in STOPPED.items()
    ]
    cases += [
        Case(f"on-{name}", flags, f"came+{variant}") for name, (variant, flags) in GOES_ON.items()
    ]
    for case in cases:
        case.model = SMALL
    cases = [case for case in cases if case.name.removeprefix("on-") in asked]
    return run(2, cases, folder / "run") | {"folder": folder, "log": (folder / "run" / "log")}


@pytest.mark.parametrize("name", _mark(STOPPED))
def test_a_bad_number_is_named_and_nothing_is_saved(seen, name):
    for rank in seen[name]:
        assert rank["error"].startswith("SystemExit: megatron_came: iteration ")
        assert STOPPED[name][2] in rank["error"]
        assert "\n" not in rank["error"]
        assert rank["changed_though_failed"] is False
    assert seen[name][0]["error"] == seen[name][1]["error"]
    tracker = seen["folder"] / name / "latest_checkpointed_iteration.txt"
    done = len(seen[name][0]["skipped"])
    assert (tracker.read_text() if tracker.exists() else "0") == str(done // 2 * 2)


@pytest.mark.parametrize("name", _mark(GOES_ON))
def test_training_goes_on_where_megatron_lets_it(seen, name):
    for rank in seen[f"on-{name}"]:
        assert rank["error"] is None
        assert len(rank["skipped"]) == 6

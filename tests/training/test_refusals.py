"""Command lines that Megatron itself reads: one sentence, before training starts."""

import pytest

from tests.training.harness import Case, run

DO = "--use-distributed-optimizer "
REFUSED = {
    "beta": (
        "--optimizer came --came-beta2 1.5",
        "--came-beta2 1.5 is not allowed",
    ),
    "stray": ("--optimizer adam --came-beta2 0.9", "--came-beta2 is a setting of CAME"),
    "precision": (DO + "--optimizer came --use-precision-aware-optimizer", "leave it out"),
    "muon": (
        "--optimizer came --muon-momentum 0.9",
        "--muon-momentum is a setting",
    ),
    "adam-checkpoint": (
        "--optimizer came --load {adam}",
        "--optimizer adam, this run has",
    ),
    "came-checkpoint": (
        "--optimizer adam --load {came}",
        "--optimizer came, this run has",
    ),
    "wrapper": (DO + "--optimizer came --load {came}", "saved without --use-distributed-optimizer"),
}


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    places = {name: folder / f"checkpoint-{name}" for name in ("adam", "came")}
    short = "--train-iters 2 --lr-warmup-iters 0 "
    cases = [
        Case(f"save-{name}", f"{short} --optimizer {name} --save {place} --save-interval 2")
        for name, place in places.items()
    ]
    cases += [
        Case(name, short + flags.format(**places), fails=True)
        for name, (flags, _) in REFUSED.items()
    ]
    afresh = "--train-iters 4 --lr-warmup-iters 0 --load {} --no-load-optim --optimizer {}"
    cases += [
        Case("came-from-adam", afresh.format(places["adam"], "came")),
        Case("adam-from-came", afresh.format(places["came"], "adam")),
        Case("ignored", short + "--optimizer came --adam-beta1 0.5 --sgd-momentum 0.1"),
        Case("plain", short + "--optimizer came"),
        Case("notice", f"{short} {DO} --optimizer came --save {folder / 'x'} --save-interval 99"),
    ]
    return run(1, cases, folder) | {"log": (folder / "log").read_text()}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(seen, name):
    error = seen[name][0]["error"]
    assert error.startswith("SystemExit: megatron_came: ")
    assert REFUSED[name][1] in error
    assert not seen[name][0]["losses"]


@pytest.mark.parametrize("name", ["came-from-adam", "adam-from-came"])
def test_weights_of_another_optimizers_checkpoint_train_on(seen, name):
    assert seen[name][0]["error"] is None
    assert len(seen[name][0]["losses"]) == 2


def test_settings_of_adam_and_sgd_are_ignored_with_a_line(seen):
    assert seen["ignored"][0]["losses"] == seen["plain"][0]["losses"]
    assert seen["log"].count("came ignores --adam-beta1, --sgd-momentum.") == 1


def test_what_checkpoints_can_do_is_said_at_the_start(seen):
    assert seen["log"].count("--dist-ckpt-optim-fully-reshardable allows") == 1

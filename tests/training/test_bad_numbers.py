"""NaNs and infinities in training: named with parameter, rank and iteration, and nothing saved."""

import inspect
import re
import threading
from functools import partial

import pytest
import torch
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

from megatron_came.megatron import bad_numbers
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
FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy "
FSDP2 = "--use-torch-fsdp2 --ckpt-format torch_dist --untie-embeddings-and-output-weights "
# Where Megatron looks at no gradients, or ends one rank alone.
BY_FSDP = {
    "no_shard": FSDP + "no_shard ",
    "optim": FSDP + "optim --clip-grad 0 ",
    "optim_grads": FSDP + "optim_grads ",
    "optim_grads_params": FSDP + "optim_grads_params --bf16 --clip-grad 0 ",
    "fsdp2": FSDP2,
    "fsdp2-unclipped": FSDP2 + "--bf16 --clip-grad 0 ",
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
    **{
        name: ("nan-gradient", flags, f"the gradient of {WEIGHT} holds 3 NaN among")
        for name, flags in BY_FSDP.items()
    },
    "loss-fsdp": ("nan-loss", BY_FSDP["optim_grads"], "iteration 3, rank 1: the loss is NaN"),
    "first-fsdp2": ("nan-gradient-at-first", FSDP2, f"the gradient of {WEIGHT} holds 3 NaN among"),
}
# After the step, with a save before anybody would see it: flags, and whose main weight it is.
AFTER = {
    "after": (DO + "--bf16 ", "rank 1: main weights of "),
    "after-fp32": (DO, "rank 1: main weights of "),
    "after-fsdp2": (FSDP2 + "--bf16 ", "rank 1: main weights of "),
    "after-fsdp": (FSDP + "optim_grads_params ", "rank 1: weights of "),
    "after-legacy": (DO + "--ckpt-format torch ", "rank 1: main weights of "),
}
GOES_ON = {
    "unchecked": ("nan-gradient", DO + "--no-check-for-nan-in-loss-and-grad "),
    "spiky": ("spiky", DO + "--check-for-spiky-loss --check-for-large-grads "),
    "fp16": ("nan-gradient", DO + "--fp16 --initial-loss-scale 1024 "),
    "after-unchecked": ("nan-main-weight", DO + "--bf16 --no-check-for-nan-in-loss-and-grad "),
}
QUICK = (
    "saving",
    "first",
    "loss",
    "unchecked",
    "optim",
    "fsdp2-unclipped",
    "after",
    "after-unchecked",
)


def _mark(names):
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in names
    ]


# Where the rerun machine's events are tracked: variant and Megatron's exit status.
TRACKED = {"reproduced": ("nan-gradient", 16), "passing": ("nan-gradient-once", 17)}


@pytest.fixture(scope="session")
def seen(request, tmp_path_factory):
    """What the ranks saw, by name of the case, and the folder that they save to."""
    folder = tmp_path_factory.mktemp("numbers")
    items = [item for item in request.session.items if item.path.name == "test_bad_numbers.py"]
    asked = {item.callspec.id for item in items if hasattr(item, "callspec")}
    cases = [
        Case(name, f"{flags} --save {folder / name} --save-interval 2", f"came+{variant}", True)
        for name, (variant, flags, _) in STOPPED.items()
    ]
    cases += [
        Case(
            name, f"{flags} --save {folder / name} --save-interval 2", "came+nan-main-weight", True
        )
        for name, (flags, _) in AFTER.items()
    ]
    cases += [
        Case(f"on-{name}", f"{flags} --save {folder / name} --save-interval 4", f"came+{variant}")
        for name, (variant, flags) in GOES_ON.items()
    ]
    cases += [
        Case(
            name,
            f"{DO} --save {folder / name} --save-interval 9 "
            f"--result-rejected-tracker-filename {folder / name}.events",
            f"came+{variant}",
            True,
        )
        for name, (variant, _) in TRACKED.items()
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


@pytest.mark.parametrize("name", _mark(AFTER))
def test_what_turns_bad_in_a_step_is_not_saved(seen, name):
    (error,) = {rank["error"] for rank in seen[name]}
    assert f"megatron_came: iteration 4, {AFTER[name][1]}" in error
    assert " holds a number that is not finite; nothing of this iteration is saved: " in error
    tracker = seen["folder"] / name / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"


@pytest.mark.parametrize("name", ["after-unchecked"])
def test_unchecked_it_is_saved_with_a_line(seen, name):
    said = [line for line in seen["log"].read_text().splitlines() if "it is saved so" in line]
    assert any(
        line.startswith("megatron_came: iteration 4, rank 1: main weights of ") for line in said
    )


def test_bad_numbers_are_seen_from_threads_of_the_backward_pass(monkeypatch):
    """On a GPU, buckets are looked at in these, and contexts do not reach them."""
    watch = bad_numbers._Watch([torch.nn.Identity()], "", turns=1)
    monkeypatch.setattr(bad_numbers, "_watches", [watch])
    look = partial(bad_numbers.noted, inspect.unwrap(RerunStateMachine.validate_result))
    machine = RerunStateMachine(mode=RerunMode.DISABLED)
    arguments = (machine, torch.tensor(float("nan")), torch.isnan, "loss")
    thread = threading.Thread(target=look, args=arguments)
    thread.start()
    thread.join()
    assert "the loss is NaN" in watch.finding


@pytest.mark.parametrize("name", _mark(GOES_ON))
def test_training_goes_on_where_megatron_lets_it(seen, name):
    for rank in seen[f"on-{name}"]:
        assert rank["error"] is None
        assert len(rank["skipped"]) == 6


@pytest.mark.parametrize("name", TRACKED)
def test_megatrons_rerun_machine_decides_where_its_events_are_tracked(seen, name):
    status = TRACKED[name][1]
    assert [rank["error"] for rank in seen[name]] == [f"SystemExit: {status}"] * 2
    events = (seen["folder"] / f"{name}.events").read_text()
    assert "FIRST_RERUN" in events
    assert ("NOT_REPRODUCIBLE" in events) == (status == 17)
    tracker = seen["folder"] / name / "latest_checkpointed_iteration.txt"
    assert tracker.exists() == (status == 16)  # to compute from on another device
    said = re.findall(rf"megatron_came: iteration 3, rank 1: .*{WEIGHT}.*", seen["log"].read_text())
    again = "but not when computed again" if status == 17 else "up to Megatron's rerun machine"
    assert any(again in line for line in said)


def test_a_step_that_megatron_has_judged_needs_no_collective_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(bad_numbers, "of_any_rank", lambda problem, _: asked.append(problem))
    machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    # Other tests may have put it in place in this process already.
    end = partial(bad_numbers.ended, inspect.unwrap(RerunStateMachine.should_checkpoint_and_exit))
    for turns, expected in ((1, 1), (1, 1), (2, 2)):  # the first is judged by nobody
        monkeypatch.setattr(bad_numbers, "_watches", [bad_numbers._Watch([], "", turns=turns)])
        end(machine)
        assert len(asked) == expected

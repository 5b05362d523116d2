"""Command lines that Megatron itself reads: one sentence, before training starts."""

import re
from types import SimpleNamespace

import pytest

from megatron_came.megatron.checkpoints import refusals
from megatron_came.tools import inspect
from tests.training.harness import Case, run_chains

DO = "--use-distributed-optimizer "
REFUSED = {
    "beta": (
        "--optimizer came --came-beta2 1.5",
        "--came-beta2 1.5 is not allowed",
    ),
    "stray": ("--optimizer adam --came-beta2 0.9", "--came-beta2 is a setting of CAME"),
    "precision": (DO + "--optimizer came --use-precision-aware-optimizer", "leave it out"),
    "remainder": (
        "--optimizer came --came-main-params remainder " + DO,
        "completes bf16 weights, and the model's are fp32: add --bf16",
    ),
    "remainder-whole": (
        "--optimizer came --bf16 --came-main-params remainder",
        "needs the distributed optimizer: add --use-distributed-optimizer",
    ),
    "adam-checkpoint": (
        "--optimizer came --load {adam}",
        "--optimizer adam, this run has",
    ),
    "came-checkpoint": (
        "--optimizer adam --load {came}",
        "--optimizer came, this run has",
    ),
    "pretrained": (
        "--optimizer came --finetune --load {came}-none --pretrained-checkpoint {came}-not",
        "came-not cannot be read (FileNotFoundError: No checkpoint found in",
    ),
    "schedules": (
        "--optimizer came --override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
        "of the flags and of the checkpoint: leave one of them out",
    ),
    "strictness": (
        "--optimizer came --dist-ckpt-strictness return_all",
        "--dist-ckpt-strictness return_all asks Megatron to hand back",
    ),
    "step-0": ("--optimizer came --load {came} --ckpt-step 0", "--ckpt-step 0 is no checkpoint"),
    "empty": (
        "--optimizer came --no-initialization --load {came}-none",
        "-none holds no checkpoint, which alone would fill weights with --init-model-with-meta",
    ),
    "wrapper": (DO + "--optimizer came --load {came}", "saved without --use-distributed-optimizer"),
}
SIZES = (
    "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 "
    "--max-position-embeddings 8 --tokenizer-type NullTokenizer --vocab-size 127 --mock-data"
)
# Of the first things that newcomers type, without the model of the others.
UNFINISHED = {
    "no-layers": ("", "either num-layers or encoder-num-layers should be specified"),
    "no-heads": (
        "--num-layers 2 --hidden-size 8",
        "Megatron needs --num-attention-heads: add it to the flags.",
    ),
    "no-rate": (f"{SIZES} --train-iters 2", "Megatron needs --lr: add it to the flags."),
    "no-length": (f"{SIZES} --lr 1e-3", "Megatron needs --train-iters: add it to the flags."),
    "no-interval": (f"{SIZES} --lr 1e-3 --train-iters 2", "Megatron needs --eval-interval: add"),
    "warm-up": (
        f"{SIZES} --lr 1e-3 --train-iters 2 --lr-warmup-iters 2",
        "--lr-warmup-iters 2 is not shorter than the schedule of the learning rate",
    ),
    "schedule": (
        f"{SIZES} --lr 1e-3 --train-iters 2 --eval-interval 9 --lr-decay-style WSD",
        "Megatron stops at 'assert self.wsd_decay_steps is not None'",
    ),
    "adam": ("--optimizer adam --num-layers 2", "Megatron needs --hidden-size: add it"),
}
IGNORED = ["--adam-beta1", "--sgd-momentum", "--muon-momentum", "--lion-beta1", "--adam-eps"]


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    places = {name: folder / f"checkpoint-{name}" for name in ("adam", "came")}
    short = "--train-iters 2 --lr-warmup-iters 0 "
    saving = [
        Case(f"save-{name}", f"{short} --optimizer {name} --save {place} --save-interval 2")
        for name, place in places.items()
    ]
    cases = [
        Case(name, short + flags.format(**places), fails=True)
        for name, (flags, _) in REFUSED.items()
    ]
    cases += [
        Case(name, f"--optimizer came {flags}", fails=True, model="")
        for name, (flags, _) in UNFINISHED.items()
    ]
    again = "--train-iters 4 --lr-warmup-iters 0 --override-opt-param-scheduler"
    afresh = "--train-iters 4 --lr-warmup-iters 0 --load {} --no-load-optim --optimizer {}"
    cases += [
        Case("came-from-adam", afresh.format(places["adam"], "came") + " --norm-epsilon 1e-4"),
        Case("nowhere", f"{short} --optimizer came --load {folder / 'y'}"),
        Case("adam-from-came", afresh.format(places["came"], "adam")),
        Case("ignored", f"{short} --optimizer came {' '.join(f'{flag} 0.5' for flag in IGNORED)}"),
        Case("plain", short + "--optimizer came"),
        Case("changed-beta", f"{again} --optimizer came --load {places['came']} --came-beta2 0.9"),
        Case("notice", f"{short} {DO} --optimizer came --save {folder / 'x'} --save-interval 99"),
    ]
    results = run_chains([[case] for case in saving], folder / "saving")
    results |= run_chains([[case] for case in cases], folder / "others")
    log = "".join(path.read_text() for path in folder.glob("others/*/log"))
    return results | {"log": log, "folder": folder}


@pytest.mark.parametrize("name", [*REFUSED, *UNFINISHED])
def test_refused(seen, name):
    error = seen[name][0]["error"]
    assert error.startswith("SystemExit: megatron_came: ")
    assert (REFUSED | UNFINISHED)[name][1] in error
    assert not seen[name][0]["losses"]


@pytest.mark.parametrize("name", ["came-from-adam", "adam-from-came"])
def test_weights_of_another_optimizers_checkpoint_train_on(seen, name):
    assert seen[name][0]["error"] is None
    assert len(seen[name][0]["losses"]) == 2


def test_what_begins_anew_is_said(seen):
    (printed,) = re.findall(
        r"=== case came-from-adam\n(.*?)(?:=== case|\Z)", seen["log"], re.DOTALL
    )
    assert "after iteration 2 with an optimizer without momentum and statistics" in printed
    assert "the schedule of the learning rate begins anew" in printed
    assert "--norm-epsilon 0.0001 (the checkpoint's run had 1e-05)" in printed


def test_a_load_of_nothing_is_said(seen):
    assert len(seen["nowhere"][0]["losses"]) == 2
    assert seen["log"].count("/y holds no checkpoint, so training starts from scratch") == 1


@pytest.mark.parametrize(("step", "refused"), [(None, False), (20, False), (10, True)])
def test_an_earlier_legacy_checkpoint_is_refused(tmp_path, step, refused):
    """Megatron would load its weights, and the optimizer's state of the latest one."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    saved = SimpleNamespace(optimizer="came", use_distributed_optimizer=True)
    args = SimpleNamespace(
        **vars(saved), finetune=False, no_load_optim=False, load=str(tmp_path), ckpt_step=step
    )
    problem = refusals.refusal(saved, args, "legacy")
    assert refused == (problem is not None and "leave --ckpt-step out" in problem)


def test_settings_of_other_optimizers_are_ignored_with_a_line(seen):
    assert seen["ignored"][0]["losses"] == seen["plain"][0]["losses"]
    assert seen["log"].count(f"came ignores {', '.join(IGNORED)}.") == 1


def test_what_checkpoints_can_do_is_said_at_the_start(seen):
    assert seen["log"].count("--dist-ckpt-optim-fully-reshardable allows") == 1


def test_hyperparameters_of_a_resumed_run_are_those_of_its_flags(seen):
    (line,) = (line for line in seen["log"].splitlines() if "--came-beta2 0.9 (" in line)
    assert line.startswith("megatron_came: training goes on with ")
    assert line.endswith(" --came-beta2 0.9 (the checkpoint's run had 0.999).")
    assert len(seen["changed-beta"][0]["losses"]) == 2


@pytest.mark.parametrize("options", [[], ["--summary"]], ids=str)
def test_inspect_lists_what_is_inside(seen, options, capsys):
    folder = seen["folder"] / "checkpoint-came"
    assert inspect.main([str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "iteration   2\n" in printed
    assert "optimizer   came\n" in printed
    name = "optimizer.state.exp_avg_res_row.decoder.layers.mlp.linear_fc1.weight  2x192 float32"
    assert (name in printed) == (not options)


def test_inspect_of_something_else(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == 2
    assert inspect.main([str(tmp_path / "nothing")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "holds no checkpoint of Megatron" in first
    assert "is not a folder" in second

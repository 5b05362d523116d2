"""A reduced matrix of layouts, and checkpoints, in the training loop of every release.

The wheel of 0.16.1 has no training loop, and 0.20 is not out, so that checkouts of these are used;
see test_core.py for what the wheel has.
"""

import pytest

from tests.releases.places import copy_of, wheel
from tests.training.harness import Case, losses, run, worst_difference
from tests.training.layouts import MODELS

TOLERANCE = 2e-6  # of the loss; see tests/training/test_training.py

RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.0", "0.20.0")
DO = "--use-distributed-optimizer "
FULL = DO + "--dist-ckpt-optim-fully-reshardable "
TP, PP = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
EP = "--expert-model-parallel-size 2 "
RATES = "--decoupled-lr 1e-3 --decoupled-min-lr 1e-4 "
CAME = "--optimizer came --ckpt-format torch_dist "

LAYOUTS = {
    "gpt2": {"tp2-do": TP + DO, "dp2-do": DO, "pp2": PP},
    "moe": {"ep2-do": EP + DO},
}
NAMES = [f"{model}-{name}" for model, layouts in LAYOUTS.items() for name in layouts]
# Saved after ten iterations and resumed at the same layout, by name of the model.
SAVED = {
    "full": ("gpt2", FULL),
    "dp-bf16": ("gpt2", DO + "--bf16 "),
    "smallest": (
        "gpt2",
        DO + "--bf16 --grad-reduce-in-bf16 --came-momentum-dtype int8 "
        "--came-main-params remainder ",
    ),
    "fp32-small": ("moe", EP + FULL + "--came-momentum-dtype bf16 "),
    "fp32": ("gpt2", ""),
    "legacy": ("gpt2", DO + "--ckpt-format torch "),
    "legacy-moe": ("moe", EP + DO + "--ckpt-format torch "),
    "dp-moe": ("moe", EP + DO),
    # Before 0.19 Megatron gives groups of parameters each other's rates.
    "rates": ("gpt2", FULL + RATES),
    "rates-whole": ("gpt2", RATES),
    "rates-legacy": ("gpt2", DO + "--ckpt-format torch " + RATES),
}
# What releases before 0.19 are not exact with.
REFUSED = {
    "experts": (
        MODELS["moe"] + TP + "--sequence-parallel --expert-tensor-parallel-size 1 " + CAME,
        "--expert-tensor-parallel-size 1 at --tensor-model-parallel-size 2 and "
        "--expert-model-parallel-size 1",
    ),
}


def _cases(folder, older):
    """The cases, by number of ranks."""
    once = "--train-iters 1 --lr 1e-12 --min-lr 0 --lr-warmup-iters 0 --optimizer sgd "
    saving = "--save-interval 1 --no-save-optim --no-save-rng "
    start = {
        model: f"--load {folder / model} --finetune --no-load-optim --no-load-rng {MODELS[model]}"
        for model in LAYOUTS
    }
    one, two = [], []
    for model, layouts in LAYOUTS.items():
        one += [
            Case(f"weights-{model}", f"{once}{saving}--save {folder / model} {MODELS[model]}"),
            Case(f"oracle-{model}", start[model] + CAME, "oracle"),
        ]
        two += [
            Case(f"{model}-{name}", start[model] + CAME + flags) for name, flags in layouts.items()
        ]
    two.append(Case("fault", start["gpt2"] + CAME + DO, "no_dp_sum"))
    for name, (model, flags) in SAVED.items():
        begin = "--ckpt-format torch " if "legacy" in name else ""
        begin += MODELS[model] if "legacy" in name else start[model]  # weights of another format
        place = f"--save {folder / name} --save-interval 10 --exit-interval 10 "
        again = f"--load {folder / name} " + MODELS[model]
        two += [
            Case(f"{name}-straight", begin + CAME + flags),
            Case(f"{name}-first", begin + CAME + flags + place),
            Case(f"{name}-second", CAME + flags + again),
        ]
    for name, flags in (("full", FULL), ("fp32", "")):
        faster = f"--lr 1e-3 --override-opt_param-scheduler --load {folder / name} {CAME}{flags}"
        faster += MODELS["gpt2"]
        two.append(Case(f"{name}-faster", faster))
    at_tp2 = f"{CAME}{FULL}{TP}--load {folder / 'full'} " + MODELS["gpt2"]
    two.append(Case("full-at-tp2", at_tp2))
    if older:
        two += [
            Case(name, flags.format(folder=folder), fails=True)
            for name, (flags, _) in REFUSED.items()
        ]
    return {1: one, 2: two}


@pytest.fixture(scope="module", params=RELEASES)
def seen(request, tmp_path_factory):
    """What the ranks saw, by name of the case, with one release."""
    release = request.param
    folder = tmp_path_factory.mktemp(release)
    if release in ("0.16.1", "0.20.0"):
        search_path = copy_of(f"core_v{release}", folder / "checkout")
    else:
        search_path = wheel(release)
    results = {"release": release}
    for ranks, cases in _cases(folder, older=release < "0.19").items():
        results.update(run(ranks, cases, folder / f"ranks{ranks}", search_path=search_path))
    return results


@pytest.mark.parametrize("name", NAMES)
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
    assert len(losses(first)) == len(losses(second)) == 10
    assert losses(first) + losses(second) == losses(straight)
    for one, other in zip(straight, second, strict=True):
        assert one["state"] == other["state"]
        assert one["weights"] == other["weights"]


def test_resuming_at_another_layout_differs_by_rounding(seen):
    straight = losses(seen["full-straight"])[10:]
    assert worst_difference(losses(seen["full-at-tp2"]), straight) <= TOLERANCE


@pytest.mark.parametrize("name", ["full", "fp32"])
def test_resuming_at_another_learning_rate(seen, name):
    straight, faster = losses(seen[f"{name}-straight"])[10:], losses(seen[f"{name}-faster"])
    assert faster[0] == straight[0]
    assert worst_difference(faster[1:], straight[1:]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_older_release_is_not_exact_with_is_refused(seen, name):
    if seen["release"] >= "0.19":
        pytest.skip("this release is exact with it")
    for rank in seen[name]:
        assert rank["error"].startswith("SystemExit: megatron_came: --optimizer came does not go ")
        assert REFUSED[name][1] in rank["error"]
        assert not rank["losses"]

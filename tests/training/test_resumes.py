"""A resume with changed flags: it does what they say and says what differs, or is refused."""

import re
from pathlib import Path

import pytest

from tests.training.damaged_settings import DAMAGE
from tests.training.harness import SMALL as MODEL
from tests.training.harness import Case, losses, run_chains

DO = "--use-distributed-optimizer "
FORMATS = {
    "dp": DO,
    "full": DO + "--dist-ckpt-optim-fully-reshardable ",
    "whole": "",
    "legacy": DO + "--ckpt-format torch ",
    "legacy-whole": "--ckpt-format torch ",
}
OVERRIDE, KEEP = "--override-opt_param-scheduler ", "--use-checkpoint-opt_param-scheduler "
DECOUPLED = "--untie-embeddings-and-output-weights --decoupled-lr 2e-3 --decoupled-min-lr 1e-4 "

# Flags that change with a run's, and what the line says of them; the losses differ from the
# unchanged run's, for all but the last.
SAID = {
    "lr": (OVERRIDE + "--lr 3e-3 --min-lr 3e-3", ["--lr 0.003 (", "had 0.001)", "--min-lr 0.003"]),
    "decay": (OVERRIDE + "--weight-decay 0.4", ["--weight-decay 0.4 (", "had 0.1)"]),
    "decays": (
        OVERRIDE + "--start-weight-decay 0.2 --end-weight-decay 0.9 "
        "--weight-decay-incr-style linear",
        ["--start-weight-decay 0.2", "--end-weight-decay 0.9", "--weight-decay-incr-style linear"],
    ),
    "warmup": (OVERRIDE + "--lr-warmup-iters 5", ["--lr-warmup-iters 5 (", "had 2)"]),
    "style": (OVERRIDE + "--lr-decay-style linear", ["--lr-decay-style linear (", "had cosine)"]),
    "decay-iters": (OVERRIDE + "--lr-decay-iters 40", ["--lr-decay-iters 40 (", "had 6)"]),
    "longer": (OVERRIDE + "--train-iters 9", ["--train-iters 9 (", "had 6)"]),
    "batch": (OVERRIDE + "--global-batch-size 16", ["--global-batch-size 16 (", "had 8)"]),
    "clip": ("--clip-grad 0.05", ["--clip-grad 0.05 (", "had 1.0)"]),
    "seed": ("--seed 6", ["--seed 6 (", "had 5)"]),
    "betas": (
        "--came-beta1 0.5 --came-beta2 0.9 --came-beta3 0.99",
        ["--came-beta1 0.5", "--came-beta2 0.9", "--came-beta3 0.99 (", "had 0.9999)"],
    ),
    "eps": ("--came-eps1 1e-4 --came-eps2 1e-4", ["--came-eps1 0.0001 (", "--came-eps2 0.0001 ("]),
    "threshold": ("--came-clip-threshold 0.1", ["--came-clip-threshold 0.1 (", "had 1.0)"]),
    "options": (
        "--came-bias-correction --came-cautious --came-no-confidence",
        ["--came-bias-correction on (", "--came-cautious on (", "--came-no-confidence on ("],
    ),
    "dropout": ("--hidden-dropout 0.5", ["--hidden-dropout 0.5 (", "had 0.0)"]),
    "norm": ("--norm-epsilon 0.5", ["--norm-epsilon 0.5 (", "had 1e-05)"]),
    "activation": ("--squared-relu", ["--squared-relu on (", "had it off)"]),
    "longer-kept": (KEEP + "--train-iters 9", ["--train-iters 9 (", "--lr-decay-iters 6 (this"]),
    "lr-kept": (KEEP + "--lr 3e-3 --min-lr 3e-3", ["--lr 0.001 (this run's flags have 0.003)"]),
}
# Refused, and what of.
REFUSED = {
    "lr": ("--lr 3e-3", "with --lr 0.003 (the checkpoint's run had 0.001): add --override"),
    "min-lr": ("--min-lr 3e-5", "with --min-lr 3e-05 ("),
    "longer": ("--train-iters 9", "with --train-iters 9 (the checkpoint's run had 6): add"),
    "batch": ("--global-batch-size 16", "--global-batch-size 16 ("),
    "warmup": ("--lr-warmup-iters 1", "--lr-warmup-iters 1 ("),
    "fewer-layers": ("--num-layers 1", "--num-layers 1 (the checkpoint's run had 2)"),
    "more-layers": ("--num-layers 3", "--num-layers 3 (the checkpoint's run had 2)"),
    "heads": ("--num-attention-heads 2", "--num-attention-heads 2 ("),
    "untied": ("--untie-embeddings-and-output-weights", "the model has output_layer.weight"),
    "queries": ("--qk-layernorm", "q_layernorm.weight"),
    "biases": ("--disable-bias-linear", "--disable-bias-linear on ("),
    "norms": ("--normalization RMSNorm", "--normalization RMSNorm ("),
    "positions": ("--position-embedding-type rope", "--position-embedding-type rope ("),
    "tokens": ("--vocab-size 60 --make-vocab-size-divisible-by 64", "--vocab-size"),
}
QUICK = {
    *(
        "said-full-lr",
        "said-full-lr-kept",
        "said-full-options",
        "said-full-batch",
        "said-dp-lr",
        "said-legacy-whole-lr",
    ),
    *(
        "refused-full-lr",
        "refused-full-biases",
        "refused-full-tokens",
        "refused-legacy-whole-norms",
    ),
    *(
        "saves-less-full",
        "saves-less-whole",
        "padding-full",
        "release-full",
        "no-save-optim-full",
        "decoupled-full",
        "done-full",
        "rewound-full",
        "rewound-legacy",
    ),
    *("damaged-full-betas-text", "damaged-dp-step-text", "damaged-legacy-parameters-none"),
}


def _names(kind, names, formats=FORMATS):
    cases = [
        (form, name, "-".join(filter(None, (kind, form, name))))
        for form in formats
        for name in names
    ]
    return [
        pytest.param(form, name, id=case, marks=() if case in QUICK else pytest.mark.matrix)
        for form, name, case in cases
    ]


def _cases(folder):
    """All cases that resume, by name."""
    cases = {}

    def add(name, form, flags, variant="came", place=None):
        load = f"--load {folder / (place or form)} "
        cases[name] = Case(name, FORMATS[form] + load + flags, variant, fails=True, model=MODEL)

    for form in FORMATS:
        add(f"same-{form}", form, "")
        for name, (flags, _) in SAID.items():
            add(f"said-{form}-{name}", form, flags)
        for name, (flags, _) in REFUSED.items():
            add(f"refused-{form}-{name}", form, flags)
        for name in DAMAGE:
            add(f"damaged-{form}-{name}", form, "", f"came+damaged-{name}")
        add(f"padding-{form}", form, "--make-vocab-size-divisible-by 256")
        add(f"frozen-{form}", form, "", "came+frozen-but-one")
        add(f"rewound-{form}", form, "--override-ckpt-iteration 1")
        add(f"done-{form}", form, KEEP + "--train-iters 3")
        add(f"release-{form}", form, "", place=f"{form}-release")
        add(f"saves-less-{form}", form, "--no-save-optim --no-save-rng ")
        add(f"no-save-optim-{form}", form, "", place=f"{form}-without")
        faster = DECOUPLED.replace("2e-3", "8e-3")
        add(f"decoupled-{form}", form, OVERRIDE + faster, place=f"{form}-decoupled")
        add(f"decoupled-{form}-same", form, DECOUPLED, place=f"{form}-decoupled")
        add(f"decoupled-{form}-refused", form, faster, place=f"{form}-decoupled")
        add(f"decoupled-{form}-kept", form, KEEP + faster, place=f"{form}-decoupled")
    return cases


def _needed(name):
    """The case of a test, and what it is compared with."""
    form = next(form for form in sorted(FORMATS, key=len, reverse=True) if f"-{form}" in name)
    also = [f"{name}-{end}" for end in ("same", "refused", "kept") if name.startswith("decoupled")]
    return [name, f"same-{form}", *also]


@pytest.fixture(scope="session")
def seen(request, tmp_path_factory):
    """What the ranks saw, by name of the case; of those cases alone that are asked for."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    folder = tmp_path_factory.mktemp("resumes")
    every = _cases(folder)
    needed = dict.fromkeys(name for item in items for name in _needed(item.callspec.id))
    chains = []
    for form, flags in FORMATS.items():
        resumed = [
            every[name]
            for name in needed
            if name in every and _needed(name)[1].endswith(f"same-{form}")
        ]
        if not resumed:
            continue
        saving = []
        for place, more in (
            (form, ""),
            (f"{form}-release", ""),
            (f"{form}-without", "--no-save-optim "),
            (f"{form}-decoupled", DECOUPLED),
        ):
            if any(f"/{place} " in case.flags for case in resumed):
                save = f"--save {folder / place} --save-interval 3 --exit-interval 3 "
                variant = "came+released" if "release" in place else "came"
                saving.append(Case(f"save-{place}", flags + more + save, variant, model=MODEL))
        chains.append([*saving, *resumed])
    results = run_chains(chains, folder)
    results["log"] = "".join(path.read_text() for path in folder.glob("*/log"))
    return results


def _said(seen, name):
    """The lines that a case has printed under our name."""
    (printed,) = re.findall(rf"=== case {name}\n(.*?)(?==== case|\Z)", seen["log"], re.DOTALL)
    assert "Traceback" not in printed
    return "\n".join(line for line in printed.splitlines() if line.startswith("megatron_came: "))


def _refusal(seen, name):
    (rank,) = seen[name]
    assert rank["error"].startswith("SystemExit: megatron_came: "), rank["error"]
    assert "\n" not in rank["error"]
    assert not rank["losses"]
    _said(seen, name)
    return rank["error"]


@pytest.mark.parametrize(("form", "name"), _names("said", SAID))
def test_what_differs_is_said_and_done(seen, form, name):
    (rank,), same = seen[f"said-{form}-{name}"], losses(seen[f"same-{form}"])
    assert rank["error"] is None
    said = _said(seen, f"said-{form}-{name}")
    for words in SAID[name][1]:
        assert words in said
    # The last iterations of those that go on as the unchanged run.
    assert (rank["losses"][: len(same)] == same) == name.endswith("-kept")
    assert len(rank["losses"]) == (6 if "longer" in name else 3)


@pytest.mark.parametrize(("form", "name"), _names("refused", REFUSED))
def test_what_does_not_fit_is_refused(seen, form, name):
    assert REFUSED[name][1] in _refusal(seen, f"refused-{form}-{name}")


@pytest.mark.parametrize(("form", "name"), _names("damaged", DAMAGE))
def test_damage_is_refused(seen, form, name):
    if form == "legacy-whole" and name.startswith(("format", "factors", "parameters")):
        pytest.skip("factors stand among the optimizer's state")
    assert DAMAGE[name][1] in _refusal(seen, f"damaged-{form}-{name}")


@pytest.mark.parametrize(("form", "name"), _names("padding", [""]))
def test_another_padding_of_the_vocabulary_is_said_or_refused(seen, form, name):
    case = f"padding-{form}"
    if form in ("full", "whole"):
        assert "the vocabulary is padded to 256 rows in this run and to 128" in _said(seen, case)
        assert len(losses(seen[case])) == 3
    else:
        assert "--make-vocab-size-divisible-by 256 (" in _refusal(seen, case)


@pytest.mark.parametrize(("form", "name"), _names("frozen", [""], ["full", "whole"]))
def test_parameters_that_are_not_trained_any_more_are_said(seen, form, name):
    case = f"frozen-{form}"
    if form == "full":
        assert "this run does not train all parameters" in _said(seen, case)
        assert losses(seen[case])[0] == losses(seen[f"same-{form}"])[0]
    else:
        assert seen[case][0]["error"].startswith("SystemExit: megatron_came: ")


@pytest.mark.parametrize(("form", "name"), _names("done", [""]))
def test_that_nothing_is_left_to_train_is_said(seen, form, name):
    assert "--train-iters 3 leaves nothing to train" in _said(seen, f"done-{form}")
    assert seen[f"done-{form}"][0]["error"] is None


@pytest.mark.parametrize(("form", "name"), _names("rewound", [""]))
def test_another_iteration_is_that_of_the_data_and_of_the_run(seen, form, name):
    if form == "legacy":
        said = "--override-ckpt-iteration 1 goes for the data alone with --ckpt-format torch"
        assert said in _refusal(seen, f"rewound-{form}")
    else:
        assert len(losses(seen[f"rewound-{form}"])) == 5


@pytest.mark.parametrize(("form", "name"), _names("release", [""]))
def test_weights_of_a_release_are_taken(seen, form, name):
    (rank,) = seen[f"release-{form}"]
    assert rank["error"] is None
    assert len(rank["losses"]) == 6
    first = losses(seen[f"same-{form}"])[0]
    assert abs(rank["losses"][0] - first) < 0.2  # of a trained model


@pytest.mark.parametrize(("form", "name"), _names("saves-less", [""]))
def test_what_a_run_is_not_going_to_save_is_loaded(seen, form, name):
    (rank,) = seen[f"saves-less-{form}"]
    assert rank["error"] is None
    assert losses([rank]) == losses(seen[f"same-{form}"])


@pytest.mark.parametrize(("form", "name"), _names("no-save-optim", [""]))
def test_a_checkpoint_without_optimizer_is_refused(seen, form, name):
    error = _refusal(seen, f"no-save-optim-{form}")
    assert "saved with --no-save-optim" in error
    assert "--no-load-optim" in error


@pytest.mark.parametrize(("form", "name"), _names("decoupled", [""]))
def test_other_rates_of_some_parameters(seen, form, name):
    case = f"decoupled-{form}"
    faster, same = losses(seen[case]), losses(seen[f"{case}-same"])
    assert faster[0] == same[0]
    assert faster[1:] != same[1:]
    assert losses(seen[f"{case}-kept"]) == same
    assert "--decoupled-lr 0.008 (the checkpoint's run had 0.002)" in _said(seen, case)
    assert "--decoupled-lr 0.008 (" in _refusal(seen, f"{case}-refused")

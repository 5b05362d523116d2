"""``--use-megatron-fsdp`` trains as Megatron's own data parallelism does, and resumes."""

import pickle
import shutil

import pytest

from megatron_came.tools import inspect
from tests.training.damaged_files import distributed
from tests.training.harness import SMALL, Case, losses, run, worst_difference
from tests.training.layouts import CP, DO, SP, TP

TOLERANCE = 2e-6  # relative, of the loss; see test_training
# Of bf16 weights: one that is rounded otherwise, as the last bits of sums differ between cuts, is
# off by 2^-9. With and without Megatron's distributed optimizer losses differ by 4.4e-5 on 4 ranks.
BF16_TOLERANCE = 1e-4
FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy "
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
ZERO3 = FSDP + "optim_grads_params "
MODEL = SMALL + "--log-num-zeros-in-grad --make-vocab-size-divisible-by 32 "
RULE = "--came-rule *.linear_fc2.weight beta1=0.7 beta2=0.9 "
SWIGLU = "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights " + RULE
OVERLAP = "--overlap-grad-reduce --overlap-param-gather "
BF16 = "--bf16 --megatron-fsdp-main-grads-dtype fp32 "
# By number of ranks: what is compared with the first of its row, which has no FSDP.
LAYOUTS = {
    2: (
        (DO, *(f"{FSDP}{strategy} " for strategy in STRATEGIES), ZERO3 + OVERLAP),
        (DO + BF16, ZERO3 + BF16),
        (DO + SWIGLU, ZERO3 + SWIGLU),
    ),
    4: (
        (TP + DO, *(f"{FSDP}{strategy} {TP}" for strategy in STRATEGIES)),
        (TP + SP + DO, ZERO3 + TP + SP),
        (TP + DO + BF16, ZERO3 + TP + BF16, TP + BF16),
        (DO, ZERO3),
        (CP + DO, ZERO3 + CP),
    ),
}
# What goes on from the checkpoint at 3 of 6 iterations of another case: its number of ranks and
# flags, this one's flags; by number of ranks.
SAME = {
    2: [*(f"{FSDP}{strategy} " for strategy in STRATEGIES), ZERO3 + BF16, ZERO3 + SWIGLU],
    4: [*(f"{FSDP}{strategy} {TP}" for strategy in STRATEGIES), ZERO3 + TP + BF16, ZERO3 + CP],
}
OTHER = {
    2: {
        "to-no_shard": (2, ZERO3, FSDP + "no_shard "),
        "to-tp2": (2, ZERO3 + SWIGLU, ZERO3 + SWIGLU + TP),
    },
    4: {
        "to-dp4": (2, ZERO3 + SWIGLU, ZERO3 + SWIGLU),
        "to-tp2-dp2": (2, ZERO3, FSDP + "optim " + TP),
        "from-no_shard": (2, FSDP + "no_shard ", ZERO3 + TP),
    },
}
# From the checkpoint at 4 iterations of to-dp4, which began at two ranks; and of that to two.
THEN = {"then-tp2-dp2": ("to-dp4", 4, TP), "then-dp2": ("then-tp2-dp2", 2, "")}
FACTOR = "optimizer.state.exp_avg_res_row.decoder.layers.1.mlp.linear_fc2.weight"


def named(ranks, flags):
    return f"{ranks}-" + "".join(flags.split())


def compared(ranks):
    return [(ranks, first, flags) for first, *rest in LAYOUTS[ranks] for flags in rest]


def train(ranks, folder, more=()):
    cases = [
        Case(name, flags + (saving(folder / name) if FSDP in flags else ""), model=MODEL)
        for row in LAYOUTS[ranks]
        for flags in row
        for name in [named(ranks, flags)]
    ]
    return run(ranks, [*cases, *more], folder)


def saving(folder, interval=3):
    return f"--save {folder} --save-interval {interval} "


def loading(folder, iteration=3):
    return f"--load {folder} --ckpt-step {iteration} "


def check(seen, ranks, first, flags):
    theirs, ours = (losses(seen[named(ranks, each)]) for each in (first, flags))
    assert theirs[-1] < theirs[0] - 0.2  # it trains, or nothing is compared
    tolerance = BF16_TOLERANCE if "--bf16" in flags else TOLERANCE
    assert worst_difference(ours, theirs) <= tolerance
    assert worst_difference(ours[:2], theirs[:2]) <= TOLERANCE  # before one can be seen


@pytest.fixture(scope="session")
def on_two(tmp_path_factory):
    """What two ranks saw."""
    faults = [
        Case("no-sums", ZERO3, "no_dp_sum", model=MODEL),
        Case("silent", ZERO3 + TP, "came+silent", fails=True, model=MODEL),
    ]
    folder = tmp_path_factory.mktemp("ranks2", numbered=False)
    # With optim_grads_params a save of Adam's does not end: see docs/support.md.
    adam = FSDP + "no_shard --optimizer adam "
    more = [Case("adam", adam + saving(folder / "adam"), model=MODEL)]
    more.append(Case("torch_dist", DO + saving(folder / "torch_dist"), model=MODEL))
    return train(2, folder, [*faults, *more])


@pytest.fixture(scope="session")
def on_four(tmp_path_factory):
    """What four ranks saw."""
    return train(4, tmp_path_factory.mktemp("ranks4", numbered=False))


def resumptions(ranks, base):
    return [
        Case(again(ranks, flags), flags + loading(base / f"ranks{ranks}" / named(ranks, flags)))
        for flags in SAME[ranks]
    ] + [
        Case(name, flags + loading(base / f"ranks{of}" / named(of, source)))
        for name, (of, source, flags) in OTHER[ranks].items()
    ]


def again(ranks, flags):
    return "again-" + named(ranks, flags)


@pytest.fixture(scope="session")
def resumed_on_two(on_two, tmp_path_factory):
    """What two ranks saw that resumed, and what was printed, under "log"."""
    base = tmp_path_factory.getbasetemp()
    saved, folder = base / "ranks2", base / "resumed2"
    zero3 = saved / named(2, ZERO3)
    for name in ("missing", "damaged"):
        shutil.copytree(zero3, saved / name)
    metadata = saved / "missing" / "iter_0000003" / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    del content.state_dict_metadata[FACTOR]
    metadata.write_bytes(pickle.dumps(content))
    distributed(saved / "damaged" / "iter_0000003", FACTOR.__eq__)
    refused = {
        "adam": (ZERO3, "adam"),
        "missing": (ZERO3, "missing"),
        "damaged": (ZERO3, "damaged"),
        "not-verified": (ZERO3 + "--came-no-verify ", "missing"),
        "from-torch_dist": (ZERO3, "torch_dist"),
        "to-torch_dist": (DO, named(2, ZERO3)),
        "narrower": (ZERO3 + "--ffn-hidden-size 96 ", named(2, ZERO3)),
    }
    cases = [
        *resumptions(2, base),
        *(
            Case(f"to-{name}", ZERO3 + flags + loading(zero3))
            for name, flags in (
                ("beta3", "--came-beta3 0.99 "),
                ("no-load-optim", "--no-load-optim "),
                ("finetune", "--finetune "),
                ("bf16", BF16),
            )
        ),
        Case("to-weights-of-adam", ZERO3 + "--no-load-optim " + loading(saved / "adam")),
        *(
            Case(f"refused-{name}", flags + loading(saved / source), fails=True)
            for name, (flags, source) in refused.items()
        ),
    ]
    for case in cases:
        case.model = MODEL
    seen = run(2, cases, folder)
    return {**seen, "log": (folder / "log").read_text()}


@pytest.fixture(scope="session")
def resumed_on_four(on_two, on_four, tmp_path_factory):
    """What four ranks saw that resumed, and then two."""
    base = tmp_path_factory.getbasetemp()
    cases = {2: [], 4: resumptions(4, base)}
    for case in cases[4]:
        if case.name == "to-dp4":
            case.flags += saving(base / "to-dp4", 1)
    for number, (name, (source, ranks, flags)) in enumerate(THEN.items(), 4):
        more = loading(base / source, number) + saving(base / name, 1)
        cases[ranks].append(Case(name, ZERO3 + SWIGLU + flags + more))
    seen = {}
    for ranks in (4, 2):
        for case in cases[ranks]:
            case.model = MODEL
        seen |= run(ranks, cases[ranks], base / f"resumed-on-four-{ranks}")
    return seen


@pytest.mark.parametrize(("ranks", "first", "flags"), compared(2))
def test_losses_equal_those_without_fsdp(on_two, ranks, first, flags):
    check(on_two, ranks, first, flags)


@pytest.mark.matrix
@pytest.mark.parametrize(("ranks", "first", "flags"), compared(4))
def test_losses_equal_those_without_fsdp_in_larger_layouts(on_four, ranks, first, flags):
    check(on_four, ranks, first, flags)


def test_norms_and_zeros_are_those_without_fsdp(on_two):
    """Before the first update they depend on the model alone."""
    ours, theirs = (on_two[named(2, flags)][0] for flags in (ZERO3, DO))
    for key in ("grad_norms", "zeros"):
        assert ours[key][0] == pytest.approx(theirs[key][0], rel=1e-6)


def test_a_missing_reduction_is_seen(on_two):
    theirs = losses(on_two[named(2, DO)])
    assert worst_difference(losses(on_two["no-sums"]), theirs) > 50 * TOLERANCE


def test_a_weight_that_is_cut_without_saying_so_is_refused_before_training(on_two):
    for rank in on_two["silent"]:
        assert "which the weight does not say (tensor_model_parallel" in rank["error"]
        assert not rank["losses"]


def check_same(straight, resumed):
    assert losses(resumed) == losses(straight)[3:]
    for before, after in zip(straight, resumed, strict=True):
        assert after["state"] == before["state"]  # main weights are in it
        assert after["steps"] == before["steps"] == [6] * len(before["steps"])


def check_other(straight, resumed):
    theirs = losses(straight)[-len(losses(resumed)) :]
    assert len(theirs) > 0
    assert worst_difference(losses(resumed), theirs) <= TOLERANCE


@pytest.mark.parametrize("flags", SAME[2])
def test_resuming_is_bit_identical(on_two, resumed_on_two, flags):
    check_same(on_two[named(2, flags)], resumed_on_two[again(2, flags)])


@pytest.mark.matrix
@pytest.mark.parametrize("flags", SAME[4])
def test_resuming_is_bit_identical_in_larger_layouts(on_four, resumed_on_four, flags):
    check_same(on_four[named(4, flags)], resumed_on_four[again(4, flags)])


@pytest.mark.parametrize("name", OTHER[2])
def test_resuming_at_another_layout_differs_by_rounding(on_two, resumed_on_two, name):
    check_other(on_two[named(2, OTHER[2][name][1])], resumed_on_two[name])


@pytest.mark.matrix
@pytest.mark.parametrize("name", OTHER[4])
def test_resuming_on_more_ranks_differs_by_rounding(on_two, resumed_on_four, name):
    check_other(on_two[named(2, OTHER[4][name][1])], resumed_on_four[name])


@pytest.mark.matrix
@pytest.mark.parametrize("name", THEN)
def test_a_run_goes_through_layouts(on_two, resumed_on_four, name):
    check_other(on_two[named(2, ZERO3 + SWIGLU)], resumed_on_four[name])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("beta3", "training goes on with --came-beta3 0.99 (the checkpoint's run had 0.9999)."),
        ("no-load-optim", "training goes on after iteration 3 with an optimizer without momentum"),
        ("bf16", "training goes on with --bf16 on (the checkpoint's run had it off)"),
        ("tp2", "random states are not the checkpoint's, but those of a new run: it was saved at"),
    ],
)
def test_what_a_resumed_run_does_otherwise_is_said(on_two, resumed_on_two, name, sentence):
    assert sentence in resumed_on_two["log"]
    assert losses(resumed_on_two[f"to-{name}"])


def test_weights_alone_can_be_taken(on_two, resumed_on_two):
    straight = losses(on_two[named(2, ZERO3)])
    for name in ("to-no-load-optim", "to-finetune"):
        assert losses(resumed_on_two[name])[0] < straight[0] - 0.1
    assert len(losses(resumed_on_two["to-finetune"])) == 6
    for seen in resumed_on_two["to-no-load-optim"]:
        assert seen["steps"] == [3, 3]
    of_adam = losses(on_two["adam"])[3], losses(resumed_on_two["to-weights-of-adam"])[0]
    assert of_adam[0] == pytest.approx(of_adam[1], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("adam", "the checkpoint holds the state of --optimizer adam, this run has --optimizer c"),
        ("missing", "exp_avg_res_row of decoder.layers.1.mlp.linear_fc2.weight is in no file"),
        ("not-verified", f"the checkpoint lacks {FACTOR} of the optimizer's state: give the flags"),
        ("damaged", "exp_avg_res_row of decoder.layers.1.mlp.linear_fc2.weight in __"),
        ("from-torch_dist", "is of --ckpt-format torch_dist, and --use-megatron-fsdp loads"),
        (
            "to-torch_dist",
            "is of --ckpt-format fsdp_dtensor, which --use-megatron-fsdp alone loads",
        ),
        ("narrower", "(differing: --ffn-hidden-size 96 (the checkpoint's run had 128))"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(resumed_on_two, name, sentence):
    for rank in resumed_on_two[f"refused-{name}"]:
        assert sentence in rank["error"]
        assert not rank["losses"]


def test_inspect_proves_a_checkpoint(on_two, resumed_on_two, tmp_path_factory, capsys):
    saved = tmp_path_factory.getbasetemp() / "ranks2"
    for flags in SAME[2]:
        assert inspect.main(["--verify", str(saved / named(2, flags))]) == 0
        assert "It is sound." in capsys.readouterr().out
    assert inspect.main(["--verify", str(saved / "damaged" / "iter_0000003")]) == 1
    assert f"damaged: {FACTOR.split('.')[2]} of decoder" in capsys.readouterr().out
    assert inspect.main(["--summary", str(saved / named(2, ZERO3))]) == 0
    assert "weights          28 tensors" in capsys.readouterr().out

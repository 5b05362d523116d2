"""--use-torch-fsdp2 beside plain data parallelism: training, and checkpoints between layouts."""

import pytest
import torch

from tests.training.harness import Case, losses, run, worst_difference

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="its fully_shard does not run on a CPU"
)

TOLERANCE = 2e-6  # see test_training
RULE = "--came-rule *.linear_fc2.weight beta1=0.7 beta2=0.9 "
UNTIED = (
    "--optimizer came --ckpt-format torch_dist --train-iters 8 --lr-decay-iters 20 "
    "--untie-embeddings-and-output-weights --log-params-norm "
) + RULE
FSDP2 = UNTIED + "--use-torch-fsdp2 "
BF16 = "--bf16 --micro-batch-size 4 "  # one micro-batch: FSDP2 adds several up in bf16
LLAMA = (
    "--swiglu --group-query-attention --num-query-groups 2 --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope "
)
INT8 = "--bf16 --came-momentum-dtype int8 --came-bias-correction "
TP = "--tensor-model-parallel-size 2 "
HALF, AT_HALF = "--save-interval 4 ", "--ckpt-step 4 "

# What is trained on two ranks, and what goes on from the checkpoint of which.
TRAINED = {
    "ddp": UNTIED,
    "fsdp2": FSDP2,
    "ddp-bf16": UNTIED + BF16 + "--grad-reduce-in-bf16 ",
    "fsdp2-bf16": FSDP2 + BF16,
}
RESUMED = {"again": ("fsdp2", FSDP2), "at-ddp": ("fsdp2", UNTIED), "from-ddp": ("ddp", FSDP2)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    cases = [
        Case(name, flags + (f"--save {folder / name} {HALF}" if "bf16" not in name else ""))
        for name, flags in TRAINED.items()
    ] + [
        Case(name, flags + f"--load {folder / source} {AT_HALF}")
        for name, (source, flags) in RESUMED.items()
    ]
    return run(2, cases, folder / "seen")


def test_losses_equal_those_of_data_parallelism(seen):
    ours, theirs = losses(seen["fsdp2"]), losses(seen["ddp"])
    assert theirs[-1] < theirs[0] - 0.5
    assert worst_difference(ours, theirs) <= TOLERANCE


def test_norms_of_the_weights_are_of_all_ranks(seen):
    (ours, again), (theirs, _) = ([r["params_norms"] for r in seen[n]] for n in ("fsdp2", "ddp"))
    assert ours == again == pytest.approx(theirs, rel=1e-6)
    assert len(ours) == 8


def test_losses_in_bf16_equal_them_until_a_weight_is_rounded_otherwise(seen):
    ours, theirs = losses(seen["fsdp2-bf16"]), losses(seen["ddp-bf16"])
    assert worst_difference(ours[:4], theirs[:4]) <= TOLERANCE
    assert worst_difference(ours, theirs) <= 2e-4


def test_resuming_is_bit_identical(seen):
    assert losses(seen["again"]) == losses(seen["fsdp2"])[4:]
    for straight, second in zip(seen["fsdp2"], seen["again"], strict=True):
        assert second["state"] == straight["state"]
        assert second["weights"] == straight["weights"]
        assert second["steps"] == straight["steps"] == [8] * len(straight["steps"])


@pytest.mark.parametrize("name", ["at-ddp", "from-ddp"])
def test_checkpoints_go_from_one_to_the_other(seen, name):
    straight = losses(seen[RESUMED[name][0]])[4:]
    assert worst_difference(losses(seen[name]), straight) <= TOLERANCE


# (ranks, flags), saved at 4 of 8 iterations; and what resumes from it.
SAVED = {
    "llama": (2, FSDP2 + LLAMA),
    "int8": (2, FSDP2 + INT8),
    "tp2-dp2": (4, FSDP2 + LLAMA + TP),
    "dp4": (4, FSDP2 + LLAMA),
}
MORE = {
    **{f"{name}-again": (name, *how) for name, how in SAVED.items()},
    "llama-at-ddp": ("llama", 2, UNTIED + LLAMA),
    "llama-at-dp4": ("llama", 4, FSDP2 + LLAMA),
    "llama-at-tp2": ("llama", 2, FSDP2 + LLAMA + TP),
    "llama-at-tp2-dp2": ("llama", 4, FSDP2 + LLAMA + TP),
    "tp2-dp2-at-dp2": ("tp2-dp2", 2, FSDP2 + LLAMA),
    "tp2-dp2-at-ddp": ("tp2-dp2", 2, UNTIED + LLAMA + TP),
    "dp4-at-dp2": ("dp4", 2, FSDP2 + LLAMA),
    "int8-at-ddp": ("int8", 2, UNTIED + INT8),
}
UNLIKE = "--global-batch-size 12 --micro-batch-size 2 "
BESIDE = {  # compared with plain data parallelism, by number of ranks
    2: {"cp2": "--context-parallel-size 2 ", "frozen": "", "nothing": ""},
    3: {"unlike-rows": UNLIKE},
    4: {
        "tp2-dp2-bias": TP,
        "moe-tp2-sp": LLAMA + TP + "--sequence-parallel --num-experts 4 "
        "--moe-router-topk 2 --moe-router-load-balancing-type none ",
    },
}
FROZEN = {"frozen": "came+frozen-layer", "nothing": "came+frozen-but-one"}


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2-more")
    cases = {2: [], 3: [], 4: []}
    for name, (ranks, flags) in SAVED.items():
        cases[ranks].append(Case(name, flags + f"--save {folder / name} {HALF}"))
    for ranks, beside in BESIDE.items():
        cases[ranks] += [
            # A rule for what is not trained is refused.
            Case(
                f"{kind}-{name}",
                (base.replace(RULE, "") if name == "nothing" else base) + flags,
                FROZEN.get(name, "came"),
            )
            for name, flags in beside.items()
            for kind, base in (("ddp", UNTIED), ("fsdp2", FSDP2))
        ]
    cases[2].append(Case("nan", FSDP2, "nan-loss", fails=True))
    cases[3].append(
        Case("refused", FSDP2 + UNLIKE + f"--save {folder / 'refused'} {HALF}", fails=True)
    )
    results = {}
    for ranks, here in cases.items():
        results |= run(ranks, here, folder / f"first{ranks}")
    for ranks in (2, 4):
        results |= run(
            ranks,
            [
                Case(name, flags + f"--load {folder / source} {AT_HALF}")
                for name, (source, where, flags) in MORE.items()
                if where == ranks
            ],
            folder / f"second{ranks}",
        )
    return results


@pytest.mark.matrix
@pytest.mark.parametrize("name", [name for beside in BESIDE.values() for name in beside])
def test_other_layouts_equal_plain_data_parallelism(more, name):
    ours, theirs = losses(more[f"fsdp2-{name}"]), losses(more[f"ddp-{name}"])
    assert worst_difference(ours, theirs) <= TOLERANCE


@pytest.mark.matrix
@pytest.mark.parametrize("name", SAVED)
def test_resuming_at_the_same_layout_is_bit_identical(more, name):
    assert losses(more[f"{name}-again"]) == losses(more[name])[4:]


@pytest.mark.matrix
@pytest.mark.parametrize("name", [n for n in MORE if not n.endswith("again") and "int8" not in n])
def test_resuming_at_another_layout_differs_by_rounding(more, name):
    straight = losses(more[MORE[name][0]])[4:]
    assert worst_difference(losses(more[name]), straight) <= TOLERANCE


@pytest.mark.matrix
def test_int8_momentum_goes_to_plain_data_parallelism(more):
    difference = worst_difference(losses(more["int8-at-ddp"]), losses(more["int8"])[4:])
    assert difference < 1e-3  # bf16 gradients are added up otherwise


@pytest.mark.matrix
def test_weights_that_checkpoints_have_no_place_for_are_refused(more):
    for rank in more["refused"]:
        assert "into unlike numbers of rows" in rank["error"]
        assert not rank["losses"]


@pytest.mark.matrix
def test_a_bad_loss_of_one_rank_ends_all(more):
    for rank in more["nan"]:
        assert "rank 1: the loss is NaN, though all weights of this rank are" in rank["error"]
        assert len(rank["losses"]) == 2
